"""An experiment script for tests that kill it: any family of test_families, its data read slowly from the outside.

python tests/fault_script.py --family gan --workdir FOLDER
"""

import os
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
from test_families import BATCH, FAMILIES, TEST  # conftest's settings are every test's

from bigjax import cli
from bigjax.experiment import Experiment, RunConfig


@dataclass(frozen=True)
class Config(RunConfig):
    family: str = "cnn"
    batch_size: int = BATCH
    steps: int | None = 60
    log_every: int = 7
    eval_every: int = 30
    save_every: int = 10
    keep: int = 3
    ema: float = 0.8


class Slow:
    """A split read by index, each example after a while; the one called HANG never comes."""

    def __init__(self, split: dict[str, np.ndarray]):
        self.split = split

    def __len__(self) -> int:
        return len(next(iter(self.split.values())))

    def __getitem__(self, row: int) -> dict[str, np.ndarray]:
        if os.environ.get("HANG") == str(row):
            time.sleep(600)
        time.sleep(float(os.environ.get("SLEEP", 0)))
        return {k: v[row] for k, v in self.split.items()}


def build(config: Config) -> Experiment:
    family = FAMILIES[config.family]
    train, test = family.data(24, seed=0), family.data(TEST, seed=1)
    task: Any = family.task(family.models)
    return Experiment(family.models, task, family.tx, Slow(train), test)


if __name__ == "__main__":
    cli.main(Config, build)
