"""The watchdog and the errors of storage by themselves: `test_faults.py` and `test_disk.py` have them in a run."""

import errno
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator

import pytest
from etils import epath

from bigjax import SaveError
from bigjax.run import guard, watch

ENDED: list[int] = []  # the exit statuses that it would have ended this process with


@pytest.fixture
def watchdog(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[float], watch.Watchdog]]:
    """watchdog(seconds) makes one that would end the process once, and is closed with the test."""
    made: list[watch.Watchdog] = []

    def end(status: int) -> None:
        ENDED.append(status)
        made[0].closed.set()

    def make(seconds: float) -> watch.Watchdog:
        made.append(watch.Watchdog(seconds))
        return made[0]

    ENDED.clear()
    monkeypatch.setattr(os, "_exit", end)
    yield make
    made[0].closed.set()
    for thread in watching():
        thread.join(timeout=10)


def watching() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name == "bigjax-watchdog"]


def test_the_watchdog_ends_what_takes_too_long(
    watchdog: Callable[[float], watch.Watchdog], capfd: pytest.CaptureFixture
) -> None:
    dog = watchdog(0.2)
    with dog.watching(lambda: "update 7"):
        dog.closed.wait(10)
    assert ENDED == [watch.HUNG]
    said = capfd.readouterr().err
    assert "Thread 0x" in said and "error: update 7 took longer than --hang-seconds 0.2" in said


def test_the_watchdog_leaves_alone_what_goes_on_and_what_it_does_not_watch(
    watchdog: Callable[[float], watch.Watchdog],
) -> None:
    dog = watchdog(1.0)
    time.sleep(1.5)  # nothing is watched
    with dog.watching(lambda: "update 7"):
        for _ in range(15):
            time.sleep(0.1)
            dog.beat()
    time.sleep(1.5)
    assert len(watching()) == 1 and ENDED == []


def test_a_watchdog_of_0_seconds_does_not_watch(watchdog: Callable[[float], watch.Watchdog]) -> None:
    with watchdog(0).watching(lambda: "update 7"):
        assert not watching()


def test_a_full_disk_is_one_line() -> None:
    """And what has nothing to do with the working directory stays as it is."""
    for error, words in [
        (OSError(errno.ENOSPC, "No space left on device"), r"^the run in runs/x cannot go on.*make room there"),
        (PermissionError(errno.EACCES, "Permission denied", "runs/x/metrics.jsonl"), "Permission denied.*writable"),
    ]:
        with pytest.raises(SaveError, match=words), guard.storage(epath.Path("runs/x")):
            raise error
    for other in (FileNotFoundError(errno.ENOENT, "no", "runs/x/a"), PermissionError(errno.EACCES, "no", "elsewhere")):
        with pytest.raises(type(other)), guard.storage(epath.Path("runs/x")):
            raise other


IMPORTS = """
import importlib, logging, pkgutil, sys
import absl.logging, jax, orbax.checkpoint  # these may
hook, filters = sys.unraisablehook, {name: list(logging.getLogger(name).filters) for name in ("", "absl")}
import bigjax
for module in pkgutil.walk_packages(bigjax.__path__, "bigjax."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
assert sys.unraisablehook is hook
assert all(logging.getLogger(name).filters == before for name, before in filters.items())
from bigjax.run import guard, watch
guard.quiet()
mine = sys.unraisablehook
guard.quiet()
from orbax.checkpoint._src.metadata import checkpoint  # which logs a warning of a folder without metadata
assert checkpoint.metadata_store(enable_write=False, blocking_write=True).read("nowhere") is None
assert hook is not mine is sys.unraisablehook and len(logging.getLogger("absl").filters) == len(filters["absl"]) + 1
"""


def test_only_a_program_that_starts_quiets_what_others_print() -> None:
    """Imports leave the interpreter as it is; asked twice it is quiet once; half a checkpoint is no news."""
    done = subprocess.run([sys.executable, "-c", IMPORTS], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
