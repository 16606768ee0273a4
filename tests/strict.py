"""The settings of every test, and of the scripts that tests start: it imports no more than these need."""

import atexit
import contextlib
import functools
import gc
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

gc.set_threshold(100_000, 20, 50)  # JAX makes a great many objects to trace, and collections took an eighth of a test
os.environ["JAX_PLATFORMS"] = "cpu"
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:  # one for all tests and the processes that they start
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="bigjax-test-cache-")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")  # many train the same tiny models
FEW_OPTIMIZATIONS = os.environ.get("BIGJAX_OPTIMIZED") != "1"  # compiles in half
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = str(int(FEW_OPTIMIZATIONS))  # in the processes that tests start too
os.environ["XLA_FLAGS"] = (  # and again in a third
    "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1" if FEW_OPTIMIZATIONS else ""
)
os.environ.pop("TFDS_DATA_DIR", None)

import jax  # noqa: E402
import numpy as np  # noqa: E402

from bigjax import evaluation, train  # noqa: E402
from bigjax.look import charts  # noqa: E402
from bigjax.run import restore, words  # noqa: E402
from bigjax.use import generate  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_disable_most_optimizations", FEW_OPTIMIZATIONS)  # also where JAX was imported before


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
PANEL = charts._panel  # a curve of a report: all are a third of a tiny run, and drawn where a test asks for `drawn`
charts._panel = lambda title, lines: f"<figure>{title}</figure>"
# scripts of other processes are under it as a whole, those that import this file as the tests of this one
os.environ |= {"JAX_NUMPY_DTYPE_PROMOTION": "strict", "JAX_TRANSFER_GUARD": "disallow"}
jax.config.update("jax_transfer_guard", "allow")


def blobs(size: int, *, seed: int) -> dict[str, np.ndarray]:
    """Images (size, 4, 4, 1) of three classes that a small network can tell apart:
    a bright row at 0, 1 or 2, and noise.
    """
    random = np.random.default_rng(seed)
    label = random.integers(0, 3, size).astype(np.int32)
    image = random.integers(0, 120, (size, 4, 4, 1)).astype(np.uint8)
    image[np.arange(size), label] += 100
    return {"image": image, "label": label}
