"""Strict settings for every test, and a tiny classifier that trains in a second."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from strict import PANEL, blobs  # isort: skip  # first: it sets what JAX reads when it is imported

import hypothesis
import jax
import optax
import pytest
from gcs_server import serving

from bigjax import train
from bigjax.data.feeds import Feeding
from bigjax.experiment import Experiment, RunConfig
from bigjax.look import charts
from bigjax.models import MLP
from bigjax.program import Program
from bigjax.tasks import classify

hypothesis.settings.register_profile("bigjax", deadline=None)  # the machines are shared: time is no reason to fail
hypothesis.settings.load_profile("bigjax")

REPOSITORY = Path(__file__).parents[1]


def tiny_experiment(**changes: Any) -> Experiment:
    """An MLP on `blobs`: 60 images to train on, 20 to test."""
    model = changes.pop("model", MLP(features=(8,), outputs=3, dropout=0.1))
    parts = {
        "name": "tiny",
        "task": classify(model, classes=3, top_k=2),
        "tx": lambda steps: {"model": optax.adam(1e-2)},
        "train": blobs(60, seed=0),
        "test": blobs(20, seed=1),
    }
    return Experiment(**(parts | changes))


@pytest.fixture
def fit_tiny(tmp_path: Path) -> Callable[..., train.Run]:
    """fit_tiny(experiment=..., folder="run", steps=...,
    ...) trains the tiny experiment quietly in a temporary folder.
    """

    def fit(experiment: Experiment | None = None, *, folder: str = "run", **flags: Any) -> train.Run:
        flags = {"steps": 6, "batch_size": 8, "log_every": 2, "eval_every": 6, "save_every": 3} | flags
        return train.fit(
            experiment or tiny_experiment(), RunConfig(workdir=str(tmp_path / folder), **flags), quiet=True
        )

    return fit


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reports have their curves."""
    monkeypatch.setattr(charts, "_panel", PANEL)


@pytest.fixture
def optax_alone() -> Iterator[None]:
    """optax raises its decays to whole numbers: `train_step` lets it, and here it is called without that."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture
def bucket() -> Iterator[str]:
    """gs://bucket, kept by an emulator on loopback, for this process and those that a test starts."""
    with serving() as address:
        yield address


def updated(program: Program, count: int) -> tuple[Any, Any]:
    """(state, window) after so many updates from the beginning; under the program's mesh."""
    state, window, controls = program.initialize(program.key), program.fresh_window(), program.controls()
    feeding, step = Feeding(program, start=0), 0
    with feeding.batches() as batches:
        while step < count:
            state, window, _ = feeding.update(state, window, next(batches), program.key, controls)
            step = feeding.stop(step)
    assert step == count
    return state, window


def run_with_devices(call: str, *, folder: Path) -> None:
    """Runs Python code in a process with 8 virtual devices."""
    start = "import jax; jax.config.update('jax_num_cpu_devices', 8); "  # conftest takes XLA_FLAGS away
    paths = os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "tests")])
    done = subprocess.run(
        [sys.executable, "-c", start + call],
        env=os.environ | {"PYTHONPATH": paths},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-3000:]
