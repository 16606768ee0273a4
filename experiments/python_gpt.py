"""GPT on Python's standard library, byte by byte.

Measured: not yet.

    python experiments/python_gpt.py
    python experiments/python_gpt.py --minutes 20
"""

from dataclasses import dataclass

import numpy as np
import optax

from bigjax import UsageError, cli, optim
from bigjax.data import text
from bigjax.experiment import Experiment, RunConfig
from bigjax.generate import generate
from bigjax.models import GPT
from bigjax.tasks import Key, ModelState, Params, next_token

PROMPT = b"def "
SAMPLE = 400  # bytes


@dataclass(frozen=True)
class Config(RunConfig):
    data: str = "python"
    minutes: float | None = 4.5
    batch_size: int = 16
    learning_rate: float = 0.02  # of Muon, for matrices
    adam_rate: float = 3e-3  # for embeddings, norms and biases
    schedule: optim.Schedule = "warmup-cosine"
    weight_decay: float = 0.01
    context: int = 256
    layers: int = 4
    width: int = 192
    heads: int = 4
    eval_every: int = 10**6
    save_every: int = 500


def build(c: Config) -> Experiment:
    if c.data != "python":
        raise UsageError(f"python_gpt.py trains on --data python, the standard library, not {c.data!r}")
    corpus = text.python_corpus()
    model = GPT(
        vocabulary=256,
        layers=c.layers,
        width=c.width,
        heads=c.heads,
        context=max(c.context, SAMPLE + len(PROMPT)),
        position="rotary",
        norm="rms",
        activation="gelu",
        bias=False,
        dtype=c.dtype,
    )

    def sample(params: Params, model_state: ModelState, key: Key) -> str:
        prompt_BL = np.frombuffer(PROMPT, np.uint8)[None].astype(np.int32)
        tokens_BL = generate(model, {"params": params["model"]}, prompt_BL, length=SAMPLE, key=key, temperature=0.8)
        return bytes(np.asarray(tokens_BL[0]).astype(np.uint8)).decode("utf-8", "replace")

    def tx(steps: int) -> dict[str, optax.GradientTransformation]:
        rates = [optim.schedule(c.schedule, peak, steps=steps) for peak in (c.learning_rate, c.adam_rate)]
        return {"model": optim.muon(rates[0], adam_rate=rates[1], weight_decay=c.weight_decay)}

    return Experiment(
        model=model,
        task=next_token(model, bytes_a_token=1),
        tx=tx,
        train=text.byte_windows(corpus.train, length=c.context, stride=c.context // 2, once=False),
        test=text.byte_windows(corpus.test, length=c.context, stride=c.context // 2),
        gallery={"sample": sample},
        facts={
            "corpus_sha256": corpus.sha256,
            "xz_bits_per_byte": text.xz_bits_per_byte(corpus.test),
        },
    )


if __name__ == "__main__":
    cli.main(Config, build)
