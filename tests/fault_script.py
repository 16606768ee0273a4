"""An experiment script for tests that kill it: any of families.py, its data read slowly from the outside, or IN_MEMORY.

python tests/fault_script.py --family gan --workdir FOLDER
"""

import ctypes
import os
import sys
import threading
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
from families import BATCH, FAMILIES, TEST  # its settings are every test's

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
    """A split read by index, each example after a while. Those whose row is the value of a variable are not well:
    HANG never comes in training, HANG_FIRST never when the data are looked at before, RAISE raises, EXIT ends the
    thread that reads it, NAN is not finite.
    """

    def __init__(self, split: dict[str, np.ndarray]):
        self.split = split

    def __len__(self) -> int:
        return len(next(iter(self.split.values())))

    def __getitem__(self, row: int) -> dict[str, np.ndarray]:
        ill = {k for k in ("HANG", "HANG_FIRST", "RAISE", "EXIT", "NAN") if os.environ.get(k) == str(row)}
        looked_at = threading.current_thread().name.startswith("bigjax-identity")
        if ("HANG_FIRST" if looked_at else "HANG") in ill:
            time.sleep(600)
        if "RAISE" in ill:
            raise OSError("it cannot be decoded")
        if "EXIT" in ill:
            sys.exit()
        time.sleep(float(os.environ.get("SLEEP", 0)))
        example = {k: v[row] for k, v in self.split.items()}
        if "NAN" in os.environ:
            example["image"] = np.where("NAN" in ill, np.nan, example["image"] / 255).astype(np.float32)
        return example


def build(config: Config) -> Experiment:
    family = FAMILIES[config.family]
    train, test = family.data(24, seed=0), family.data(TEST, seed=1)
    task: Any = family.task(family.models)
    return Experiment(task, family.tx, train if "IN_MEMORY" in os.environ else Slow(train), test)


def end_thread(name: str, seconds: float) -> None:
    """Ends the thread called so, after so many seconds and once it is there, by an exception from outside it."""
    time.sleep(seconds)
    while not (found := [t for t in threading.enumerate() if t.name == name]):
        time.sleep(0.1)
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(found[0].ident), ctypes.py_object(SystemExit))


if __name__ == "__main__":
    if "END_PREFETCH" in os.environ:
        seconds = float(os.environ["END_PREFETCH"])
        threading.Thread(target=end_thread, args=("bigjax-prefetch", seconds), daemon=True).start()
    cli.main(Config, build)
