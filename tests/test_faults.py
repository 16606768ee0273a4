"""Faults from outside: killed, told to stop, started twice, hanging. What comes after equals a run in peace."""

import contextlib
import functools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import jax
import numpy as np
import pytest
from conftest import REPOSITORY
from etils import epath
from families import FAMILIES

import bigjax
from bigjax.optim import path_string
from bigjax.run.checkpoint import Checkpoints, listing
from bigjax.run.log import read_log

SCRIPT = REPOSITORY / "tests" / "fault_script.py"
Folder = Path | epath.Path
# Others stand for them: a kill breaks nothing new there.
NO_MORE = {"bert", "t5", "mixtral", "vit", "resnet", "inception", "convnext", "efficientnet"}
SLOW = "0.004"  # seconds an example: 30 ms an update, so that most moments are in training


@contextlib.contextmanager
def started(folder: Folder, *flags: str, within: Sequence[str] = (), **environment: str) -> Iterator[subprocess.Popen]:
    """The script, which does not outlive the test; `within`: a command that runs it."""
    paths = os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "tests")])
    if "gpt" in flags:  # as users run it, with all of XLA's optimizations
        environment = {"BIGJAX_OPTIMIZED": "1"} | environment
    process = subprocess.Popen(
        [*within, sys.executable, str(SCRIPT), "--workdir", str(folder), *flags],
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
    return {path_string(path): np.asarray(x) for path, x in leaves} | {"step": np.array(step)}


def same(one: Folder, two: Folder) -> None:
    """The same bits in parameters, optimizer, model state, averages and open window; the same log."""
    a, b = state(one), state(two)
    assert a.keys() == b.keys() and len(a) > 8
    for k in a:
        np.testing.assert_array_equal(a[k], b[k], err_msg=k)
    assert lines(one) == lines(two)


@pytest.fixture(scope="module")
def peaceful(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """The working directory of a run that nothing happened to, made once."""

    @functools.cache
    def run(family: str, *flags: str, **environment: str) -> Path:
        folder = tmp_path_factory.mktemp("peaceful") / family
        status, _, err = finish(folder, "--family", family, *flags, **environment)
        assert status == 0, err
        return folder

    return run


@pytest.mark.slow
@pytest.mark.parametrize(
    "family, number", [("autoencoder", signal.SIGKILL), ("gan", signal.SIGKILL), ("gpt", signal.SIGTERM)]
)
def test_fused_and_resident_it_goes_on_with_the_same_bits(
    family: str, number: signal.Signals, tmp_path: Path, peaceful: Callable[..., Path]
) -> None:
    flags = ["--family", family, *"--fuse 4 --resident --steps 3000 --save-every 50 --log-every 70".split()]
    flags += ["--eval-every", "1000"]
    with started(tmp_path / "run", *flags, IN_MEMORY="1") as process:
        until(lambda: newest(tmp_path / "run") >= 100)
        process.send_signal(number)
        process.communicate(timeout=60)
    assert process.returncode == (143 if number == signal.SIGTERM else -9) and newest(tmp_path / "run") < 3000
    assert finish(tmp_path / "run", *flags, IN_MEMORY="1")[0] == 0
    same(peaceful(family, *flags[2:], IN_MEMORY="1"), tmp_path / "run")


TWO = pytest.mark.parametrize("family", ["cnn", pytest.param("gan", marks=pytest.mark.slow)])


@pytest.mark.parametrize(
    "family, number, status",
    [
        ("cnn", signal.SIGTERM, 143),
        pytest.param("cnn", signal.SIGINT, 130, marks=pytest.mark.slow),
        pytest.param("gan", signal.SIGTERM, 143, marks=pytest.mark.slow),
        pytest.param("gan", signal.SIGINT, 130, marks=pytest.mark.slow),
    ],
)
def test_told_to_stop_it_saves_and_goes_on(
    family: str, number: signal.Signals, status: int, tmp_path: Path, peaceful: Callable[..., Path]
) -> None:
    """In the middle of a window, twice over; the same command then gives the bits of a run in peace."""
    run = tmp_path / "run"
    with started(run, "--family", family, SLEEP="0.6") as process:  # some 0.3 s an update
        until(lambda: len(list(read_log(run / "metrics.jsonl"))) >= 2 if (run / "metrics.jsonl").exists() else False)
        until(lambda: newest(run) >= 20)  # that line came with the save of step 20: away from it
        time.sleep(0.5)
        process.send_signal(number)
        process.send_signal(number)
        _, err = process.communicate(timeout=60)
    assert process.returncode == status, err
    assert f"stopped by {number.name} at step" in err and "Traceback" not in err
    stopped = int(err.split("at step ")[1].split(",")[0])
    assert 20 < stopped < 60 and stopped % 10 and (run / "checkpoints" / str(stopped)).is_dir()
    assert finish(run, "--family", family)[0] == 0
    same(peaceful(family), run)


KILLS = {"saving": 3, "between": 4, "anywhere": 3}
LONG = ("--steps", "1000", "--eval-every", "500", "--save-every", "20")


def kill(run: Path, family: str, moment: str, draw: random.Random) -> str | None:
    """Starts it and kills it at such a moment; when that was, by what it left; None if it came to its end before."""
    committed = newest(run)
    before = len(lines(run))
    with started(run, "--family", family, *LONG, SLEEP=SLOW) as process:

        def over() -> bool:
            return process.poll() is not None

        def saving() -> bool:
            return any(int(p.name.split(".")[0]) > newest(run) for p in run.glob("checkpoints/*-tmp*"))

        def resumed() -> bool:
            return len(lines(run)) > before or newest(run) > committed

        if moment == "saving":
            until(lambda: over() or saving())
        elif moment == "between":
            until(lambda: over() or resumed())
            time.sleep(draw.uniform(0, 0.6))
            until(lambda: over() or not saving())
        else:
            time.sleep(draw.uniform(0, 6))
        process.send_signal(signal.SIGKILL)
        out, err = process.communicate()
        if process.returncode == 0:
            return None
        assert process.returncode == -signal.SIGKILL, err
        assert not committed or "resuming" not in out or f"resuming at step {committed}" in out, out
        return "saving" if saving() else "between" if resumed() else "anywhere"


def newest(run: Path) -> int:
    """The step of the newest committed checkpoint; 0: none."""
    return max((int(p.name) for p in run.glob("checkpoints/*") if p.name.isdigit()), default=0)


@pytest.mark.parametrize(
    "family, kills",
    [("cnn", {"saving": 1, "between": 1})]
    + [pytest.param(f, KILLS, marks=pytest.mark.slow) for f in FAMILIES if f not in NO_MORE],
)
def test_killed_at_random_moments_it_gives_the_same_bits(
    family: str, kills: dict[str, int], tmp_path: Path, peaceful: Callable[..., Path]
) -> None:
    """SIGKILL, the moments drawn from a printed seed: while a checkpoint is being written, between, and anywhere."""
    seed, run = random.randrange(2**32), tmp_path / "run"
    print("seed of the moments:", seed)
    draw, hit = random.Random(seed), Counter()
    moments = [m for m, count in kills.items() for _ in range(count)]
    draw.shuffle(moments)
    while moments:
        moment = moments.pop()
        if (was := kill(run, family, moment, draw)) is None:
            raise AssertionError(f"it came to its end after {hit}")
        hit[was] += 1
        if moment != "anywhere" and was != moment:
            moments.append(moment)  # that one was missed
    print("killed", hit)
    assert all(hit[moment] >= count for moment, count in kills.items() if moment != "anywhere")
    assert hit.total() >= sum(kills.values())
    status, _, err = finish(run, "--family", family, *LONG)
    assert status == 0, err
    same(peaceful(family, *LONG), run)
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


@TWO
def test_an_update_that_hangs_ends_with_stacks_and_the_batch(family: str, tmp_path: Path) -> None:
    """The example that hangs is read after the first batches: what waits for it is named."""
    status, _, err = finish(tmp_path / "run", "--family", family, "--hang-seconds", "10", "--steps", "200", HANG="5")
    assert status == 4, err
    assert "Thread 0x" in err and "bigjax-prefetch" in err or "prefetch.py" in err
    last = err.strip().splitlines()[-1]
    assert last.startswith("error: update ") and "examples" in last and "longer than --hang-seconds 10" in last


def test_data_that_hang_before_training_end_it_too(tmp_path: Path) -> None:
    status, _, err = finish(tmp_path / "run", "--hang-seconds", "10", HANG_FIRST="5")
    assert status == 4, err
    assert "Thread 0x" in err and "identity.py" in err
    assert err.strip().splitlines()[-1].startswith("error: reading the data's first examples took longer than --hang-")


def test_the_log_has_every_line_once_and_a_torn_one_is_mended(tmp_path: Path, peaceful: Callable[..., Path]) -> None:
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


@pytest.mark.parametrize(
    "family, damage",
    [("cnn", "flipped")]
    + [
        pytest.param(f, d, marks=pytest.mark.slow)
        for f in ("cnn", "gan")
        for d in ("empty", "missing", "truncated", "flipped")
        if (f, d) != ("cnn", "flipped")
    ],
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_serves(
    family: str, damage: str, tmp_path: Path, stopped: Callable[[str], Path], peaceful: Callable[..., Path]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(stopped(family), run)
    last = newest(run)
    files = sorted(p for p in (run / "checkpoints" / str(last)).rglob("*") if p.is_file())
    largest = max(files, key=lambda p: p.stat().st_size)
    if damage == "empty":
        shutil.rmtree(run / "checkpoints" / str(last))
        (run / "checkpoints" / str(last)).mkdir()
    elif damage == "missing":
        random.choice(files).unlink()
    else:
        content = largest.read_bytes()
        middle = len(content) // 2
        largest.write_bytes(
            content[:middle] + (bytes([content[middle] ^ 1]) + content[middle + 1 :]) * (damage == "flipped")
        )
    status, out, err = finish(run, "--family", family)
    assert status == 0, err
    (named,) = [line for line in out.splitlines() if "is damaged" in line]
    assert f"the checkpoint of step {last} in" in named and "its file" in named
    before = max(n for n in range(0, last, 10))
    assert f"resuming at step {before}" in out
    same(peaceful(family), run)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A run that was killed after the checkpoint of step 30 or later, made once a family."""

    @functools.cache
    def run(family: str) -> Path:
        folder = tmp_path_factory.mktemp("stopped") / family
        with started(folder, "--family", family, SLEEP="0.02") as process:
            until(lambda: newest(folder) >= 30)
            process.kill()
            process.wait()
        assert newest(folder) < 60
        return folder

    return run


@pytest.mark.parametrize(
    "family, damaged", [("cnn", "RAISE"), *(pytest.param(f, "EXIT", marks=pytest.mark.slow) for f in ("cnn", "gan"))]
)
def test_an_example_that_cannot_be_read_is_named(family: str, damaged: str, tmp_path: Path) -> None:
    """Its worker raises, or ends; nothing hangs or stays behind, and what was saved serves."""
    shared, run = set(Path("/dev/shm").iterdir()), tmp_path / "run"
    begin = time.monotonic()
    with started(run, "--family", family, **{damaged: "5"}) as process:
        _, err = process.communicate(timeout=60)
        assert children(process.pid) == set()
    assert process.returncode == 2 and time.monotonic() - begin < 60
    (line,) = err.strip().splitlines()
    assert line.startswith("error: example 5 of the data cannot be read or transformed (")
    assert ("OSError: it cannot be decoded, fault_script.py line" if damaged == "RAISE" else "SystemExit") in line
    assert set(Path("/dev/shm").iterdir()) <= shared
    assert finish(run, "--family", family)[0] == 0


def children(pid: int) -> set[str]:
    """Processes of the same session that live on."""
    found = subprocess.run(["ps", "--ppid", str(pid), "-o", "pid="], capture_output=True, text=True)
    return set(found.stdout.split())


@TWO
def test_a_prefetch_thread_that_dies_is_named_with_its_batch(family: str, tmp_path: Path) -> None:
    """Ended by an exception from outside, at some moment of the training."""
    run = tmp_path / "run"
    begin = time.monotonic()
    status, _, err = finish(run, "--family", family, "--steps", "100000", SLEEP="0.02", END_PREFETCH="6")
    assert status == 2 and time.monotonic() - begin < 6 + 30, err
    (line,) = err.strip().splitlines()
    assert re.match(
        r"error: update (\d+) \(batch \d+: examples \d+, .*\): the data thread failed \(SystemExit", line
    ), line
    assert line.endswith("; the same command goes on from the last checkpoint")


@TWO
def test_a_batch_that_is_not_finite_stops_the_run_or_is_skipped_and_counted(
    family: str, tmp_path: Path, peaceful: Callable[..., Path]
) -> None:
    """Also across a kill; example 7 comes in every epoch of three batches."""
    status, _, err = finish(tmp_path / "stops", "--family", family, NAN="7")
    assert status == 2
    assert re.match(r"error: update [123] \(batch [012]\) is not finite: the data's 'image' is not; ", err), err
    skip = ("--family", family, "--nonfinite", "skip")
    run = tmp_path / "run"
    with started(run, *skip, SLEEP="0.02", NAN="7") as process:
        until(lambda: newest(run) >= 30)
        process.kill()
    assert finish(run, *skip, NAN="7")[0] == 0
    there = peaceful(*skip[1:], NAN="7")
    same(there, run)
    assert json.loads((run / "result.json").read_text())["skipped"] == 20 and state(run)["step"] == 60


def test_what_the_first_release_saved_can_still_be_used(tmp_path: Path) -> None:
    """golden/run_0.1.tar.gz: step 20 of 60 of this script's cnn as release 0.1 left it, and its numbers beside it."""
    with tarfile.open(REPOSITORY / "tests" / "golden" / "run_0.1.tar.gz") as archive:
        archive.extractall(tmp_path, filter="data")
    run = tmp_path / "run"
    listed, whole = listing(run, verify=True)
    assert whole and listed == [listed[0]] and "verified; the next run resumes here" in listed[0]
    with np.load(run / "expected.npz") as expected:
        there = state(run)
        assert there.keys() - {"step"} == set(expected.files) and len(there) > 60
        for k in expected.files:
            np.testing.assert_array_equal(there[k], expected[k], err_msg=k)
    model, variables = bigjax.load(run)
    assert model.apply(variables, np.zeros((2, 4, 4, 1), np.float32)).shape == (2, 3)
    status, out, err = finish(run)
    assert status == 0 and "resuming at step 20" in out, err
    assert json.loads((run / "result.json").read_text())["step"] == 60
    assert [r["step"] for r in lines(run) if r["split"] == "train"] == [*range(7, 60, 7), 60]
