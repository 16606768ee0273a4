"""Faults from outside: killed, told to stop, started twice, hanging. What comes after equals a run in peace."""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np
import pytest
from conftest import REPOSITORY
from etils import epath
from test_families import FAMILIES

from bigjax.checkpoint import Checkpoints
from bigjax.metrics import read_log

SCRIPT = REPOSITORY / "tests" / "fault_script.py"
Folder = Path | epath.Path
SLOW = "0.004"  # seconds an example: 30 ms an update, so that most moments are in training


@contextlib.contextmanager
def started(folder: Folder, *flags: str, **environment: str) -> Iterator[subprocess.Popen]:
    """The script, which does not outlive the test."""
    paths = os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "tests")])
    process = subprocess.Popen(
        [sys.executable, str(SCRIPT), "--workdir", str(folder), *flags],
        env=os.environ | {"PYTHONPATH": paths} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def finish(folder: Path, *flags: str, **environment: str) -> tuple[int, str, str]:
    """(exit status, stdout, stderr) at its end."""
    with started(folder, *flags, **environment) as process:
        out, err = process.communicate(timeout=240)
        return process.returncode, out, err


def until(condition: Callable[[], bool], *, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "nothing came"
        time.sleep(0.01)


def lines(folder: Folder) -> list[dict]:
    """The log without what depends on the clock."""
    return [{k: v for k, v in r.items() if k != "examples_per_second"} for r in read_log(folder / "metrics.jsonl")]


def state(folder: Folder) -> dict[str, np.ndarray]:
    """All that the newest checkpoint holds, as bytes are compared."""
    checkpoints = Checkpoints(folder / "checkpoints", read_only=True)
    step = checkpoints.latest()
    tree = checkpoints.restore(step, checkpoints.shapes(step))
    checkpoints.close()
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): np.asarray(x) for path, x in leaves} | {"step": np.array(step)}


def same(one: Folder, two: Folder) -> None:
    """The same bits in parameters, optimizer, model state, averages and open window; the same log."""
    a, b = state(one), state(two)
    assert a.keys() == b.keys() and len(a) > 8
    for k in a:
        np.testing.assert_array_equal(a[k], b[k], err_msg=k)
    assert lines(one) == lines(two)


@pytest.fixture(scope="module")
def peaceful(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The working directory of a run that nothing happened to, made once a family."""
    made: dict[str, Path] = {}

    def run(family: str) -> Path:
        if family not in made:
            made[family] = tmp_path_factory.mktemp("peaceful") / family
            status, _, err = finish(made[family], "--family", family)
            assert status == 0, err
        return made[family]

    return run


FEW = [f if f == "cnn" else pytest.param(f, marks=pytest.mark.slow) for f in FAMILIES]


@pytest.mark.parametrize("family", FEW)
@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_told_to_stop_it_saves_and_goes_on(
    family: str, number: signal.Signals, status: int, tmp_path: Path, peaceful: Callable[[str], Path]
) -> None:
    """In the middle of a window, twice over; the same command then gives the bits of a run in peace."""
    run = tmp_path / "run"
    with started(run, "--family", family, SLEEP="0.6") as process:  # some 0.3 s an update
        until(lambda: len(list(read_log(run / "metrics.jsonl"))) >= 2 if (run / "metrics.jsonl").exists() else False)
        time.sleep(0.5)  # that line came with the save of step 20: away from it
        process.send_signal(number)
        process.send_signal(number)
        _, err = process.communicate(timeout=60)
    assert process.returncode == status, err
    assert f"stopped by {number.name} at step" in err and "Traceback" not in err
    stopped = int(err.split("at step ")[1].split(",")[0])
    assert 20 < stopped < 60 and stopped % 10 and (run / "checkpoints" / str(stopped)).is_dir()
    assert finish(run, "--family", family)[0] == 0
    same(peaceful(family), run)


def killed(run: Path, family: str, moments: Iterator[float]) -> int:
    """Starts it again and again, killed after so many seconds of its life, until it is finished; how often."""
    for count, seconds in enumerate(moments):
        with started(run, "--family", family, SLEEP=SLOW) as process:
            try:
                process.wait(timeout=seconds)
            except subprocess.TimeoutExpired:
                continue
            assert process.returncode == 0, process.stderr.read()
            return count
    raise AssertionError("it never came to its end")


@pytest.mark.parametrize("family", FEW)
def test_killed_at_random_moments_it_gives_the_same_bits(
    family: str, tmp_path: Path, peaceful: Callable[[str], Path]
) -> None:
    """SIGKILL, the moments drawn from a printed seed; three of them while a checkpoint is being written."""
    seed, run = random.randrange(2**32), tmp_path / "run"
    print("seed of the moments:", seed)
    draw = random.Random(seed)
    saves = 3
    for _ in range(saves):  # as soon as a save is under way
        with started(run, "--family", family, SLEEP=SLOW) as process:
            before = set(run.glob("checkpoints/*.orbax-checkpoint-tmp*"))
            until(lambda: process.poll() is not None or set(run.glob("checkpoints/*-tmp*")) - before)  # noqa: B023
            process.send_signal(signal.SIGKILL)
    fast = family == "cnn"
    kills = killed(run, family, (draw.uniform(2, 9) if n < (2 if fast else 7) else 200.0 for n in range(20)))
    same(peaceful(family), run)
    assert kills + saves >= 3
    left = [p.name for p in (run / "checkpoints").iterdir() if "tmp" in p.name]
    assert not left


def test_two_at_once_are_refused_and_a_kill_leaves_no_lock(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with started(run, SLEEP="0.05") as process:
        until(lambda: (run / "config.json").exists())
        status, _, err = finish(run)
        assert status == 2 and f"is in use by pid {process.pid} on " in err and len(err.strip().splitlines()) == 1
        process.kill()
        process.wait()
    assert finish(run)[0] == 0


def test_an_update_that_hangs_ends_with_stacks_and_the_batch(tmp_path: Path) -> None:
    """The example that hangs is read after the first batches: what waits for it is named."""
    status, _, err = finish(tmp_path / "run", "--hang-seconds", "20", "--steps", "200", HANG="5")
    assert status == 4, err
    assert "Thread 0x" in err and "bigjax-prefetch" in err or "prefetch.py" in err
    last = err.strip().splitlines()[-1]
    assert last.startswith("error: update ") and "examples" in last and "longer than --hang-seconds 20" in last


def test_the_log_has_every_line_once_and_a_torn_one_is_mended(tmp_path: Path, peaceful: Callable[[str], Path]) -> None:
    run = tmp_path / "run"
    with started(run, SLEEP=SLOW) as process:
        until(lambda: (run / "checkpoints" / "20").exists())
        process.kill()
    with (run / "metrics.jsonl").open("a") as log:
        log.write('{"step": 28, "spl')
    assert finish(run)[0] == 0
    assert lines(run) == lines(peaceful("cnn"))
    steps = [r["step"] for r in lines(run) if r["split"] == "train"]
    assert steps == [*range(7, 60, 7), 60] and json.loads((run / "result.json").read_text())["step"] == 60
