"""A damaged checkpoint is found before it is used, and the one before serves."""

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from bigjax import UsageError, train
from bigjax.run import manifest
from bigjax.run.checkpoint import Checkpoints


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """Checkpoints of the steps 1, 2 and 3."""
    checkpoints = Checkpoints(tmp_path / "c", keep=3)
    for step in (1, 2, 3):
        checkpoints.save(step, {"x": jnp.arange(100.0) * step, "n": jnp.int32(step)})
    checkpoints.wait()
    checkpoints.close()
    return tmp_path / "c"


def newest(folder: Path) -> tuple[int | None, list[str]]:
    said: list[str] = []
    checkpoints = Checkpoints(folder, read_only=True)
    try:
        return checkpoints.newest(tell=said.append), said
    finally:
        checkpoints.close()


def below(folder: Path) -> list[Path]:
    return [p for p in sorted(folder.rglob("*")) if p.is_file()]


def test_what_is_whole_is_taken_without_a_word(saved: Path) -> None:
    assert newest(saved) == (3, [])
    assert sorted(p.name for p in (saved / "manifests").iterdir()) == ["1.json", "2.json", "3.json"]


def test_one_flipped_bit_in_any_file_is_found(saved: Path) -> None:
    """Also in the files whose damage orbax restores silently wrong."""
    assert len(below(saved / "3")) > 8
    for path in below(saved / "3"):
        whole = path.read_bytes()
        for place in {0, len(whole) // 2, len(whole) - 1} if whole else ():
            broken = bytearray(whole)
            broken[place] ^= 4
            path.write_bytes(broken)
            step, (line,) = newest(saved)
            assert step == 2 and "the checkpoint of step 3" in line and str(path.relative_to(saved / "3")) in line
        path.write_bytes(whole)
    assert newest(saved) == (3, [])


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (lambda folder: shutil.rmtree(folder) or folder.mkdir(), "is missing"),
        (lambda folder: below(folder)[-1].unlink(), "is missing"),
        (lambda folder: max(below(folder), key=lambda p: p.stat().st_size).write_bytes(b"x"), "has 1 bytes, not "),
    ],
    ids=["empty folder", "missing file", "truncated file"],
)
def test_other_damage_is_found(saved: Path, harm: Callable[[Path], None], words: str) -> None:
    harm(saved / "3")
    step, (line,) = newest(saved)
    assert step == 2 and words in line


def test_where_none_is_whole_nothing_starts_over(saved: Path) -> None:
    for step in "123":
        below(saved / step)[-1].unlink()
    with pytest.raises(UsageError, match="step 3 .* is damaged.*no other is whole.*--no-resume"):
        newest(saved)


def test_without_a_manifest_a_checkpoint_is_unverified_not_lost(saved: Path) -> None:
    (saved / "manifests" / "3.json").unlink()
    assert newest(saved) == (3, [])
    (saved / "manifests" / "2.json").write_text("{")
    shutil.rmtree(saved / "3")
    assert newest(saved) == (2, [])
    shutil.rmtree(saved / "2" / "state")
    step, (line,) = newest(saved)
    assert step == 1 and "step 2" in line and "cannot be read" in line


def test_the_list_of_checkpoints(saved: Path) -> None:
    """`python -m bigjax checkpoints`, as it is run."""

    def listed(*flags: str, code: int = 0) -> list[str]:
        command = [sys.executable, "-m", "bigjax", "checkpoints", str(run), *flags]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert done.returncode == code and "Traceback" not in done.stderr, done.stderr
        return (done.stdout or done.stderr).splitlines()

    run = saved.parent / "run"
    run.mkdir()
    assert "holds no checkpoint" in listed(code=2)[0]
    saved.rename(run / "checkpoints")
    (run / "checkpoints" / "manifests" / "1.json").unlink()
    lines = listed("--verify")
    assert [line.split()[1] for line in lines] == ["1", "2", "3"]
    assert lines[0].endswith("unverified") and lines[1].endswith("verified")
    assert lines[2].endswith("verified; the next run resumes here") and " MB " in lines[2]
    below(run / "checkpoints" / "3")[-1].unlink()
    assert listed()[2].endswith("has checksums; the next run resumes here")  # unread
    lines = listed("--verify", code=1)
    assert "damaged: its file" in lines[2] and lines[1].endswith("the next run resumes here")


def test_manifests_go_with_their_checkpoints(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "c", keep=1)
    for step in range(4):
        checkpoints.save(step, {"x": jnp.zeros(3)})
    checkpoints.wait()
    checkpoints.close()
    kept = {p.stem for p in (tmp_path / "c" / "manifests").iterdir()}
    assert "3" in kept and "0" not in kept and "1" not in kept


def test_of_what_other_processes_wrote_their_checksums_count(tmp_path: Path) -> None:
    """And not what process 0 would read; of more processes in a killed save before, nothing is left."""
    theirs = tmp_path / "7.tmp" / "state" / "ocdbt.process_1" / "d"
    theirs.parent.mkdir(parents=True)
    theirs.write_bytes(b"theirs")
    (tmp_path / "7.tmp" / "state" / "_METADATA").write_bytes(b"ours")
    where = tmp_path / "7.tmp"
    for index in (1, 2):
        manifest.write_part(tmp_path, 7, index, state=where / "state")
    theirs.write_bytes(b"turned")
    manifest.write(tmp_path, 7, where=where, processes=2)
    where.rename(tmp_path / "7")
    assert manifest.damage(tmp_path, 7) == "its file state/ocdbt.process_1/d is not what was saved (crc32)"
    (tmp_path / "7" / "state" / "ocdbt.process_1" / "d").write_bytes(b"theirs")
    assert manifest.damage(tmp_path, 7) == "" and len(manifest.read(tmp_path, 7)) == 2
    assert sorted(p.name for p in (tmp_path / "manifests").iterdir()) == ["7.2.part", "7.json"]
    manifest.forget(tmp_path, [8])
    assert not any((tmp_path / "manifests").iterdir())


def test_a_run_resumes_from_the_checkpoint_before_and_saves_that_step_again(fit_tiny, tmp_path: Path, capsys) -> None:
    straight = fit_tiny(folder="straight", steps=9)
    run = fit_tiny(steps=9, save_every=3)
    (run.workdir / "result.json").unlink()
    for path in below(Path(run.workdir) / "checkpoints" / "9"):
        path.write_bytes(path.read_bytes()[:-1] + b"?")
    again = fit_tiny(steps=9, save_every=3)
    assert isinstance(again, train.Run)
    for a, b in zip(*(map(np.asarray, jax_leaves(r.state.params)) for r in (straight, again)), strict=True):
        np.testing.assert_array_equal(a, b)
    folder = Path(run.workdir) / "checkpoints"
    assert (folder / "damaged_9").is_dir() and newest(folder) == (9, [])


def jax_leaves(tree) -> list:
    import jax

    return jax.tree.leaves(tree)
