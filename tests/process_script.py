"""An experiment script for tests with several processes: a tiny CNN or GPT, SGD, everything in float32.

python tests/process_script.py --model gpt --workdir FOLDER
"""

import os
import resource
import signal
import sys
import time
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
import optax
from strict import blobs  # its settings are every test's

from bigjax import cli, sharding
from bigjax.experiment import Experiment, Pictures, RunConfig
from bigjax.look.gallery import worst_mistakes
from bigjax.models import CNN, GPT
from bigjax.tasks import classify, next_token


@dataclass(frozen=True)
class Config(RunConfig):
    model: Literal["cnn", "gpt"] = "cnn"
    batch_size: int = 8
    steps: int | None = 4
    log_every: int = 2
    eval_every: int = 4
    save_every: int = 2


def tokens(size: int, *, seed: int) -> dict[str, np.ndarray]:
    return {"tokens": np.random.default_rng(seed).integers(0, 16, (size, 9)).astype(np.int32)}


def build(config: Config) -> Experiment:
    if config.model == "gpt":
        model: Any = GPT(vocabulary=16, layers=2, width=16, heads=4, mlp=32, context=8, scan=True)
        task, data = next_token(model), tokens
    else:
        model = CNN(features=(8,), dense=(), pools=1, padding="SAME", outputs=3)
        task, data = classify(model, classes=3), blobs

    def norm(params: Any, model_state: Any, key: Any) -> dict[str, float]:
        """Asks for whole arrays on the host."""
        if os.environ.get("HOLD") in ("all", str(config.distributed.index)):  # stands still, to be killed here
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})  # as what never returns to Python
            Path(config.workdir, "held").touch()
            time.sleep(600)
        if os.environ.get("FULL") == str(config.distributed.index):  # no file takes more, as on a disk that is full
            resource.setrlimit(resource.RLIMIT_FSIZE, (64, resource.RLIM_INFINITY))
        bits = b"".join(x.tobytes() for x in jax.tree.leaves(sharding.to_host(params)))
        return {"norm": float(jax.jit(optax.tree.norm)(params)), "crc": float(zlib.crc32(bits))}

    test, gallery = data(13, seed=1), {"zeros": lambda params, model_state, key: Pictures(np.zeros((1, 2, 2)))}
    if config.model == "cnn":
        gallery["mistakes"] = worst_mistakes(model, test)
    return Experiment(task, optax.sgd(0.1), data(48, seed=0), test, evaluators={"norm": norm}, gallery=gallery)


def note_opened(folder: str) -> None:
    """Writes the name of every file of a checkpoint that this process opens into FOLDER/INDEX.opened."""
    log = open(f"{folder}/{sys.argv[sys.argv.index('--distributed.index') + 1]}.opened", "w", buffering=1)

    def note(event: str, arguments: tuple) -> None:
        if event == "open" and "ocdbt.process_" in str(arguments[0]):
            log.write(f"{arguments[0]}\n")

    sys.addaudithook(note)


if __name__ == "__main__":
    if "OPENED" in os.environ:
        note_opened(os.environ["OPENED"])
    cli.main(Config, build)
