"""Strict settings for every test, and a tiny classifier that trains in a second."""

import atexit
import contextlib
import functools
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:  # one for all tests and the processes that they start
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="bigjax-test-cache-")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
for name in ("TFDS_DATA_DIR", "XLA_FLAGS"):
    os.environ.pop(name, None)

import hypothesis  # noqa: E402
import jax  # noqa: E402
import numpy as np  # noqa: E402
import optax  # noqa: E402
import pytest  # noqa: E402
from gcs_server import serving  # noqa: E402

from bigjax import evaluation, train  # noqa: E402
from bigjax.experiment import Experiment, RunConfig  # noqa: E402
from bigjax.models import MLP  # noqa: E402
from bigjax.program import Program  # noqa: E402
from bigjax.run import restore, words  # noqa: E402
from bigjax.tasks import classify  # noqa: E402
from bigjax.use import generate  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_disable_most_optimizations", os.environ.get("BIGJAX_OPTIMIZED") != "1")  # compiles in half


@contextlib.contextmanager
def no_silent_transfer() -> Iterator[None]:
    """While it is entered, in every thread, JAX refuses what moves to the devices without having been told to."""
    before = jax.config.jax_transfer_guard
    jax.config.update("jax_transfer_guard", "disallow")
    try:
        yield
    finally:
        jax.config.update("jax_transfer_guard", before)


def guarded(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same function under `no_silent_transfer`: of a test itself every number that it writes is a transfer."""

    @functools.wraps(function)
    def call(*arguments: Any, **options: Any) -> Any:
        with no_silent_transfer():
            return function(*arguments, **options)

    return call


words.flags = True  # messages name flags, as a script's do; test_words.py has those of Python
train.fit, restore.load, generate.generate = map(guarded, (train.fit, restore.load, generate.generate))
train.evaluate = evaluation.evaluate = guarded(evaluation.evaluate)
# scripts of other processes are under it as a whole, those that import this file as the tests of this one
os.environ |= {"JAX_NUMPY_DTYPE_PROMOTION": "strict", "JAX_TRANSFER_GUARD": "disallow"}
jax.config.update("jax_transfer_guard", "allow")

hypothesis.settings.register_profile("bigjax", deadline=None)  # the machines are shared: time is no reason to fail
hypothesis.settings.load_profile("bigjax")

REPOSITORY = Path(__file__).parents[1]


def blobs(size: int, *, seed: int) -> dict[str, np.ndarray]:
    """Images (size, 4, 4, 1) of three classes that a small network can tell apart:
    a bright row at 0, 1 or 2, and noise.
    """
    random = np.random.default_rng(seed)
    label = random.integers(0, 3, size).astype(np.int32)
    image = random.integers(0, 120, (size, 4, 4, 1)).astype(np.uint8)
    image[np.arange(size), label] += 100
    return {"image": image, "label": label}


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
    with program.batches(0) as batches:
        for _ in range(count):
            state, window, _ = program.update(state, window, next(batches), program.key, controls)
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
