"""A working directory in a bucket: what the faults of test_faults and test_manifest must not do holds there too."""

import contextlib
import dataclasses
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import fsspec
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from fault_script import Config, build
from gcs_server import serving
from test_faults import SLOW, lines, same, started, state, until
from test_manifest import newest

import bigjax
from bigjax import Interrupted, UsageError, train
from bigjax.optim import path_string
from bigjax.run import log, manifest
from bigjax.run.checkpoint import Checkpoints, committed, listing, unchecked
from bigjax.run.workdir import clear

STARTING = 2.0  # seconds in which a process imports and compiles, and polling the bucket would only slow it down
FAMILIES = ["cnn", pytest.param("gan", marks=pytest.mark.slow)]


@pytest.fixture(scope="module")
def bucket() -> Iterator[epath.Path]:
    """One for all tests here."""
    with serving() as address:
        yield epath.Path(address)


def resume(run: epath.Path, family: str) -> train.Run:
    """The script in this process: trains to the end."""
    config = Config(family=family, workdir=str(run))
    return train.fit(dataclasses.replace(build(config), name="fault_script"), config)


@pytest.fixture(scope="module")
def peaceful(bucket: epath.Path) -> Callable[[str], epath.Path]:
    """The working directory of a run that nothing happened to, made once a family."""

    def run(family: str) -> epath.Path:
        folder = bucket / "peaceful" / family
        if not folder.exists():
            resume(folder, family)
        return folder

    return run


def below(folder: epath.Path) -> list[epath.Path]:
    """All files, in order."""
    parts = [below(p) if p.is_dir() else [p] for p in sorted(folder.iterdir(), key=str)]
    return [p for part in parts for p in part]


def copy(one: epath.Path, two: epath.Path) -> epath.Path:
    fsspec.core.url_to_fs(str(one))[0].copy(str(one), str(two), recursive=True)
    return two


def unfinished(run: epath.Path) -> list[int]:
    """The steps that are being saved, or whose save was killed."""
    folder = run / "checkpoints"
    return sorted({*unchecked(folder)} - {*committed(folder)})


@pytest.mark.parametrize("family", FAMILIES)
def test_stopped_at_20_and_resumed_is_straight(
    family: str, bucket: epath.Path, peaceful: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bucket tears no line of the log, but somebody may have copied a torn one there."""
    run, save = bucket / "stopped" / family, Checkpoints.save

    def stop_at_20(self: Checkpoints, step: int, *args: Any, **options: Any) -> None:
        save(self, step, *args, **options)
        if step == 20:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch, pytest.raises(Interrupted, match="SIGTERM at step 20"):
        patch.setattr(Checkpoints, "save", stop_at_20)
        resume(run, family)
    assert committed(run / "checkpoints") == [10, 20] and not (run / "result.json").exists()
    log = run / "metrics.jsonl"
    log.write_text(log.read_text() + '{"step": 21, "spl')
    resume(run, family)
    same(peaceful(family), run)
    assert [r["step"] for r in lines(run) if r["split"] == "train"] == [*range(7, 60, 7), 60]


@pytest.mark.parametrize(
    ("family", "kills"),
    [("cnn", 1), pytest.param("cnn", 4, marks=pytest.mark.slow), pytest.param("gan", 4, marks=pytest.mark.slow)],
)
def test_killed_at_random_moments_it_gives_the_same_bits(
    family: str, kills: int, bucket: epath.Path, peaceful: Callable
) -> None:
    """SIGKILL, the moments drawn from a printed seed: so many while it saves, and some anywhere."""
    seed, run = random.randrange(2**32), bucket / "killed" / f"{family}{kills}"
    print("seed of the moments:", seed)
    draw, hit = random.Random(seed), 0
    for n in range(kills):
        with started(run, "--family", family, SLEEP=SLOW) as process:
            time.sleep(STARTING)
            until(lambda: not unfinished(run) or process.poll() is not None)  # noqa: B023
            until(lambda: unfinished(run) or process.poll() is not None)  # noqa: B023
            time.sleep(draw.uniform(0, 0.3) if n else 0)
            process.send_signal(signal.SIGKILL)
        hit += bool(unfinished(run))
    assert hit, "no kill came in a save"
    for _ in range(kills - 1):
        with started(run, "--family", family, SLEEP=SLOW) as process, contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=draw.uniform(2, 8))
    resume(run, family)
    same(peaceful(family), run)
    assert not unfinished(run)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_damaged_checkpoint_is_named_and_the_one_before_serves(
    family: str,
    bucket: epath.Path,
    peaceful: Callable,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And the step is saved again, after its lines of the log."""
    run, logged, save = copy(peaceful(family), bucket / "damaged" / family), [], Checkpoints.save
    monkeypatch.setattr(log, "BUCKET_SECONDS", 1e9)
    monkeypatch.setattr(Checkpoints, "save", lambda *args, **kw: logged.append(lines(run)) or save(*args, **kw))
    flip(max(below(run / "checkpoints" / "60" / "state" / "ocdbt.process_0"), key=lambda p: p.stat().length))
    (run / "result.json").unlink()
    resume(run, family)
    said = capsys.readouterr().out.splitlines()
    assert len([line for line in said if "step 60" in line and "is damaged: its file state/ocdbt" in line]) == 1
    assert "resuming at step 50" in said
    same(peaceful(family), run)
    assert logged == [lines(run)]
    assert len(below(run / "checkpoints" / "damaged_60")) > 8


def flip(path: epath.Path) -> None:
    """One bit, in the middle."""
    whole = bytearray(path.read_bytes())
    whole[len(whole) // 2] ^= 4
    path.write_bytes(bytes(whole))


@pytest.fixture(scope="module")
def three(bucket: epath.Path) -> epath.Path:
    """Checkpoints of the steps 1, 2 and 3."""
    checkpoints = Checkpoints(bucket / "three", keep=3)
    for step in (1, 2, 3):
        checkpoints.save(step, {"x": jnp.arange(100.0) * step, "n": jnp.int32(step)})
    checkpoints.wait()
    checkpoints.close()
    return bucket / "three"


@pytest.fixture
def saved(three: epath.Path, request: pytest.FixtureRequest) -> epath.Path:
    return copy(three, three.parent / re.sub(r"\W", "_", request.node.name) / "checkpoints")


def test_one_flipped_bit_in_any_file_is_found(saved: epath.Path) -> None:
    assert newest(saved) == (3, []) and len(below(saved / "3")) > 8
    for path in below(saved / "3"):
        whole = path.read_bytes()
        flip(path)
        assert manifest.damage(saved, 3) == f"its file {path.relative_to(saved / '3')} is not what was saved (crc32)"
        path.write_bytes(whole)
    assert newest(saved) == (3, [])


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (lambda folder: folder.rmtree(), "is missing"),
        (lambda folder: (folder / "commit_success.txt").unlink(), "its file commit_success.txt is missing"),
        (lambda folder: (folder / "state" / "_METADATA").unlink(), "its file state/_METADATA is missing"),
        (lambda folder: (folder / "state" / "manifest.ocdbt").write_bytes(b"x"), "manifest.ocdbt has 1 bytes, not "),
    ],
    ids=["all files gone", "orbax's mark missing", "file missing", "truncated file"],
)
def test_other_damage_is_found(saved: epath.Path, harm: Callable[[epath.Path], None], words: str) -> None:
    """A folder without the mark is to orbax a save that was killed: what the manifest says tells them apart."""
    harm(saved / "3")
    step, (line,) = newest(saved)
    assert step == 2 and "the checkpoint of step 3" in line and words in line


def test_where_none_is_whole_nothing_starts_over(saved: epath.Path) -> None:
    (saved / "3").rmtree()
    assert newest(saved)[0] == 2 and "step 3" in newest(saved)[1][0]
    (saved / "2" / "commit_success.txt").unlink()
    flip(saved / "1" / "state" / "manifest.ocdbt")
    with pytest.raises(UsageError, match="step 3 .* is damaged.*no other is whole.*--no-resume"):
        newest(saved)


def test_without_a_manifest_a_checkpoint_is_unverified_not_lost(saved: epath.Path) -> None:
    (saved / "manifests" / "3.json").unlink()
    assert newest(saved) == (3, [])


def test_setting_aside_goes_on_after_a_kill(saved: epath.Path) -> None:
    """A bucket renames file by file."""
    (saved / "damaged_3" / "commit_success.txt").write_text("moved")
    (saved / "3" / "commit_success.txt").unlink()
    writer = Checkpoints(saved)
    said: list[str] = []
    assert writer.newest(tell=said.append) == 2 and "step 3" in said[0]
    writer.set_aside(2)
    writer.close()
    assert not (saved / "3").exists() and len(below(saved / "damaged_3")) > 8
    assert newest(saved) == (2, [])


def test_what_another_process_writes_is_seen(saved: epath.Path) -> None:
    """Unlike gcsfs does by itself, which lists a folder once and for all."""
    assert newest(saved) == (3, [])
    fsspec.filesystem("gs", skip_instance_cache=True).rm(str(saved / "3" / "state" / "manifest.ocdbt"))
    assert newest(saved)[0] == 2


def test_what_a_killed_save_left_is_no_checkpoint(saved: epath.Path) -> None:
    """A reader leaves it alone, since it may be a save under way; a writer cleans it up and leaves all else."""
    (saved / "4" / "state" / "manifest.ocdbt").write_bytes((saved / "3" / "state" / "manifest.ocdbt").read_bytes())
    manifest.write(saved, 4, where=saved / "4")
    before = [p for p in below(saved) if p.parts[-3] != "4"]
    assert newest(saved) == (3, []) and (saved / "4").exists()
    assert [line.split()[1] for line in listing(saved.parent)[0]] == ["1", "2", "3"]
    writer = Checkpoints(saved)
    assert not (saved / "4").exists() and below(saved) == before
    assert writer.newest(tell=print) == 3
    writer.save(4, {"x": jnp.arange(100.0) * 4, "n": jnp.int32(4)})
    writer.wait()
    writer.close()
    assert newest(saved) == (4, []) and listing(saved.parent, verify=True)[1]


def test_what_users_call(peaceful: Callable) -> None:
    """The list of checkpoints as it is run; a loaded model; a finished run given back; all of it deleted."""
    run = peaceful("cnn")
    done = subprocess.run([sys.executable, "-m", "bigjax", "checkpoints", str(run)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert [line.split()[1] for line in done.stdout.splitlines()] == ["40", "50", "60"]
    assert done.stdout.splitlines()[2].endswith("has checksums; the next run resumes here")
    _, variables = bigjax.load(run)
    kept = state(run)
    for path, leaf in jax.tree_util.tree_leaves_with_path(variables):
        np.testing.assert_array_equal(leaf, kept[f"state/ema/model/{path_string(path)}"])
    again = resume(run, "cnn")
    assert int(again.state.step) == 60 == again.result["step"] and (run / "report.html").exists()
    old = copy(run, run.parent / "old")
    clear(old)
    assert not old.exists()
