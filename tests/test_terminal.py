"""A terminal that is lost or full, and signals: what they do to a run, and what is said at once."""

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import REPOSITORY, tiny_experiment
from test_train import fit

from bigjax import Interrupted
from bigjax.run import guard, machine
from bigjax.run.checkpoint import Checkpoints

LOST = """
import sys
from bigjax.run.machine import forgive_terminal
forgive_terminal()
print("a" * 100_000, flush=True)
print("b" * 100_000)
import os
os.write(1, b"c")  # as C++ does
print("to the end", file=sys.stderr)
"""


def python(code: str, **streams: Any) -> subprocess.CompletedProcess:
    env = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    return subprocess.run([sys.executable, "-c", code], env=env, text=True, timeout=120, **streams)


@pytest.fixture
def closed_pipe() -> Any:
    """What `| head -1` leaves to write to."""
    read, write = os.pipe()
    os.close(read)
    yield write
    os.close(write)


def test_a_pipe_that_nobody_reads_is_told_once_and_forgiven(closed_pipe: int) -> None:
    done = python(LOST, stdout=closed_pipe, stderr=subprocess.PIPE)
    first, last = done.stderr.splitlines()
    assert first == "standard output takes nothing any more (Broken pipe): the run goes on without it"
    assert (done.returncode, last) == (0, "to the end")


def test_a_full_disk_under_standard_output() -> None:
    with open("/dev/full", "w") as full:
        done = python(LOST, stdout=full, stderr=subprocess.PIPE)
    assert done.returncode == 0 and "(No space left on device)" in done.stderr.splitlines()[0]


def test_standard_error_that_is_lost(closed_pipe: int) -> None:
    done = python(LOST.replace('"a"', '"é"'), stdout=subprocess.PIPE, stderr=closed_pipe)
    assert done.returncode == 0 and "é" * 100_000 in done.stdout


def test_characters_that_a_terminal_does_not_have() -> None:
    code = "from bigjax.run.machine import forgive_terminal\nforgive_terminal()\nprint('2 \\u00d7 3')"
    env = os.environ | {"PYTHONPATH": str(REPOSITORY), "PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "2 \\xd7 3\n")


TRAIN = """
import os, sys
sys.path.insert(0, {tests!r})
from conftest import tiny_experiment
from bigjax import cli
from bigjax.experiment import RunConfig
def build(c):
    return tiny_experiment()
sys.modules["__main__"].__file__ = "tiny.py"
cli.main(RunConfig, build, ["--workdir", {folder!r}, "--steps", "4", "--batch-size", "8", "--log-every", "1"])
"""


def test_a_run_whose_reader_is_gone_trains_to_its_end(closed_pipe: int, tmp_path: Path) -> None:
    code = TRAIN.format(tests=str(REPOSITORY / "tests"), folder=str(tmp_path / "run"))
    done = python(code, stdout=closed_pipe, stderr=subprocess.PIPE)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "run" / "result.json").read_text())["step"] == 4


# ---- signals, sent to this process by a hook at step 2


def signalling(number: int) -> Callable[..., None]:
    return lambda step, split, values: os.kill(os.getpid(), number) if step == 2 and split == "train" else None


def steps(folder: Path) -> list[int]:
    checkpoints = Checkpoints(folder / "checkpoints", read_only=True)
    try:
        return checkpoints.steps()
    finally:
        checkpoints.close()


@pytest.fixture
def heard() -> Iterator[Callable[..., None]]:
    """The handler that all signals have that end a run: also where these tests run under nohup, which ignores one."""

    def handler(number: int, frame: Any) -> None:
        raise AssertionError("it came through")

    before = {n: signal.signal(n, handler) for n in guard.ENDING}
    yield handler
    for number, was in before.items():
        signal.signal(number, was)


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGTERM, signal.SIGINT])
def test_a_signal_that_ends_the_run_saves_it(
    number: int, tmp_path: Path, capfd: pytest.CaptureFixture, heard: Callable[..., None]
) -> None:
    with pytest.raises(Interrupted) as e:
        fit(tmp_path / "run", tiny_experiment(on_log=signalling(number)), log_every=1, eval_every=100, save_every=100)
    assert e.value.number == number and "is saved: the same command goes on" in str(e.value)
    assert len(steps(tmp_path / "run")) == 1 and steps(tmp_path / "run")[0] < 6
    assert f"{signal.Signals(number).name}: stopping now" in capfd.readouterr().err  # a hook is not waited for
    assert all(signal.getsignal(n) == heard for n in guard.ENDING)


def test_sigusr1_saves_and_goes_on(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    experiment = tiny_experiment(on_log=signalling(signal.SIGUSR1))
    run = fit(tmp_path / "run", experiment, log_every=1, eval_every=100, save_every=100, keep=3)
    assert run.result["step"] == 6
    saved = steps(tmp_path / "run")
    assert len(saved) == 2 and saved[0] < 6 == saved[1]
    assert "SIGUSR1: saving after this update" in capfd.readouterr().err


def test_a_signal_is_answered_while_the_main_thread_is_busy() -> None:
    """As in a compilation, where Python's own handlers wait for its end."""
    read, write = os.pipe()
    error, heard = os.dup(2), []
    os.dup2(write, 2)

    def other() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        heard.append((os.read(read, 100), busy[0]))

    busy = [True]
    try:
        with guard.signals() as asked:
            thread = threading.Thread(target=other)
            thread.start()
            np.linalg.svd(np.random.default_rng(0).normal(size=(1200, 1200)))  # a second or more without a bytecode
            busy[0] = False
            thread.join(timeout=20)
            assert asked(0) == signal.SIGINT
    finally:
        os.dup2(error, 2)
        for number in (error, read, write):
            os.close(number)
    assert heard == [(b"\nSIGINT: stopping after this update\n", True)]


def test_what_nohup_ignores_is_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with guard.signals() as asked:
            os.kill(os.getpid(), signal.SIGHUP)
            assert asked(0) is None
    finally:
        signal.signal(signal.SIGHUP, before)


def test_the_peak_of_memory_is_that_of_the_process_itself() -> None:
    """Not that of a large one which started it."""
    held = np.ones(2**27)  # 1 GiB
    done = python("from bigjax.run.machine import peak_bytes\nprint(peak_bytes())", capture_output=True)
    assert 2**24 < int(done.stdout) < held.nbytes / 2 < machine.peak_bytes()
