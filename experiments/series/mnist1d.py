"""MNIST-1D: four models on the same small benchmark, whose data everybody has (Greydanus & Kobak 2024).

Measured: accuracy 31.6 ± 1.2 % (10 seeds) in 8 s on 2 CPU cores, commit 821568b.

    python experiments/series/mnist1d.py --model linear     # or mlp, cnn, gru
"""

from dataclasses import dataclass
from typing import Annotated, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from bigjax import UsageError, cli, optim
from bigjax.data import reading, sources
from bigjax.experiment import Experiment, Positive, Published, RunConfig
from bigjax.models import LSTM, MLP
from bigjax.task import fields
from bigjax.tasks import classify

TAKES = ("x", "label")
ROWS = {
    "mnist1d_linear": {"arguments": "--model linear", "data": "mnist1d", "metric": "eval/accuracy", "seeds": 10},
    "mnist1d_mlp": {"arguments": "--model mlp", "data": "mnist1d", "metric": "eval/accuracy", "seeds": 10},
    "mnist1d_cnn": {"arguments": "--model cnn", "data": "mnist1d", "metric": "eval/accuracy", "seeds": 10},
    "mnist1d_gru": {"arguments": "--model gru", "data": "mnist1d", "metric": "eval/accuracy", "seeds": 10},
}

PUBLISHED = {"linear": 0.32, "mlp": 0.68, "cnn": 0.94, "gru": 0.91}
SOURCE = "Greydanus & Kobak, Scaling Down Deep Learning with MNIST-1D, ICML 2024, arXiv:2011.14439"


class CNN1D(nn.Module):
    """Signals (B, 40) to logits (B, 10): three convolutions of width 5 and stride 2, as in the paper's code."""

    channels: int = 25
    outputs: int = 10

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        x = x[..., None]
        for width in (5, 3, 3):
            x = nn.relu(nn.Conv(self.channels, (width,), strides=2, padding=1)(x))
        return nn.Dense(self.outputs)(jax.lax.collapse(x, 1)).astype(jnp.float32)


@dataclass(frozen=True)
class Config(RunConfig):
    data: str = "mnist1d"  # or a path to your own .npz or .csv with numbers and `label`
    columns: cli.Flat[reading.Label] = reading.Label()
    model: Literal["linear", "mlp", "cnn", "gru"] = "cnn"  # which of the paper's four
    steps: int | None = 6000
    batch_size: int = 100
    learning_rate: Annotated[float, Positive] = 1e-2  # at the schedule's highest
    schedule: optim.Schedule | None = None  # cosine for the GRU, constant for the others
    log_every: int = 200
    eval_every: int = 1500
    save_every: int = 3000


def build(c: Config) -> Experiment:
    data = sources.load(c.data, eval_data=c.eval_data, split_seed=c.split_seed, takes=TAKES, **vars(c.columns))
    if c.model == "cnn" and data.shape("x")[0] < 3:
        raise UsageError(f"the cnn takes at least 3 columns of numbers, and {c.data} has fewer: use --model linear")
    model = {
        "linear": MLP(features=(), outputs=data.classes),
        "mlp": MLP(features=(100, 100), outputs=data.classes),
        "cnn": CNN1D(outputs=data.classes),
        "gru": LSTM(cell="gru", hidden=(6,), bidirectional=True, pool="flatten", outputs=data.classes),
    }[c.model]
    schedule = c.schedule or ("cosine" if c.model == "gru" else "constant")
    return Experiment(
        task=classify(model, classes=data.classes, inputs=fields("x")),
        tx=lambda steps: optax.adam(optim.schedule(schedule, c.learning_rate, steps=steps)),
        train=data.train,
        test=data.test,
        class_names=data.class_names,
        published=[Published("eval/accuracy", PUBLISHED[c.model], SOURCE)] if c.data == "mnist1d" else [],
    )


if __name__ == "__main__":
    cli.main(Config, build)
