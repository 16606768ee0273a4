"""MLP on MNIST.

Measured: accuracy 97.9 ± 0.4 % (10 seeds) in 11 s on 2 CPU cores, commit 821568b.

    python experiments/vision/mnist_mlp.py                                          # 4,000 embedded images
    python experiments/vision/mnist_mlp.py --optimizer sgd --schedule constant --learning-rate 0.01 --batch-size 32 \\
        --epochs 10 --no-augment --dropout 0 --weight-decay 0                # the classic recipe
"""

from dataclasses import dataclass
from typing import Annotated, Literal

import optax

from bigjax import cli, optim
from bigjax.data import reading, sources
from bigjax.data.augment import Augmentation
from bigjax.experiment import Experiment, Fraction, Positive, Published, RunConfig
from bigjax.look.gallery import worst_mistakes
from bigjax.models import MLP
from bigjax.tasks import classify

TAKES = ("image", "label")
ROWS = {
    "mnist_mlp": {"data": "mnist5k", "metric": "eval/accuracy", "seeds": 10},
    "mnist_mlp_classic": {
        "arguments": "--optimizer sgd --schedule constant --learning-rate 0.01 --batch-size 32 --epochs 10 "
        "--no-augment --weight-decay 0",
        "data": "mnist5k",
        "metric": "eval/accuracy",
        "seeds": 10,
    },
    "mnist_mlp_full": {"arguments": "--data mnist --steps 20000", "data": "mnist", "metric": "eval/accuracy"},
}

LECUN = "LeCun et al., Gradient-based learning applied to document recognition, 1998: 784-300-100-10"


@dataclass(frozen=True)
class Config(RunConfig):
    data: str = "mnist5k"  # or mnist (TFDS), or a path to your own images
    images: cli.Flat[reading.Images] = reading.Images()
    steps: int | None = 4000
    batch_size: int = 128
    optimizer: Literal["adamw", "sgd"] = "adamw"  # sgd takes of the flags of adamw the learning rate and the schedule
    adamw: cli.Flat[optim.AdamW] = optim.AdamW(learning_rate=2e-3, weight_decay=1e-2)
    features: Annotated[tuple[int, ...], Positive] = (128, 64)  # units of each hidden layer
    dropout: Annotated[float, Fraction] = 0.0  # share dropped of each hidden layer
    augmentation: cli.Flat[Augmentation] = Augmentation(rotate=12.0, shift=2.0, scale=0.12)


def build(c: Config) -> Experiment:
    data = sources.load(c.data, eval_data=c.eval_data, split_seed=c.split_seed, takes=TAKES, **vars(c.images))
    mean, std = sources.image_statistics(data.train)
    model = MLP(features=c.features, outputs=data.classes, dropout=c.dropout, mean=mean, std=std, dtype=c.dtype)

    return Experiment(
        task=classify(model, classes=data.classes),
        tx=c.adamw if c.optimizer == "adamw" else lambda steps: optax.sgd(c.adamw.rate(steps)),
        train=data.train,
        test=data.test,
        class_names=data.class_names,
        augment=c.augmentation.function(),
        published=[Published("eval/accuracy", 0.9695, LECUN)] if c.data == "mnist" else [],
        gallery={"worst mistakes": worst_mistakes(model, data.test, class_names=data.class_names)},
    )


if __name__ == "__main__":
    cli.main(Config, build)
