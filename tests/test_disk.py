"""A disk that is full, read-only or out of reach while a checkpoint is saved: a real small one, in memory.

It is mounted in a namespace of its own, so that nobody needs to be root; what is done to it comes from outside.
"""

import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
from test_faults import newest, peaceful, same, started, until  # noqa: F401

from bigjax.run.checkpoint import listing

UNSHARE = ["unshare", "--user", "--map-root-user", "--mount"]


class Disk:
    """A file system of 4 MB that only processes started by `inside` see at `path`; from outside it is `seen`."""

    def __init__(self, path: Path, pid: int):
        self.path, self.pid = path, pid
        self.seen = Path(f"/proc/{pid}/root{path}")

    def inside(self, *command: str) -> list[str]:
        return ["nsenter", f"--target={self.pid}", "--user", "--mount", "--preserve-credentials", *command]

    def do(self, *command: str) -> None:
        subprocess.run(self.inside(*command), check=True, capture_output=True)

    def fill(self, *, leave: int) -> None:
        """To the last `leave` kB."""
        free = os.statvfs(self.seen).f_bavail * os.statvfs(self.seen).f_frsize // 1024
        dd = ["dd", "if=/dev/zero", f"of={self.path}/filler", "bs=1k", f"count={free - leave}"]
        subprocess.run(self.inside(*dd), capture_output=True)  # which may find it full before: the run writes too

    def training(self, *flags: str, **environment: str) -> AbstractContextManager[subprocess.Popen]:
        """The script, without root's right to write whatever a folder's permissions say."""
        within = self.inside("setpriv", "--bounding-set=-dac_override,-dac_read_search")
        return started(self.path / "run", *flags, within=within, **environment)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    mount = f'mount -t tmpfs -o size=4m tmpfs "{tmp_path}" && echo mounted && exec sleep 600'
    holder = subprocess.Popen([*UNSHARE, "sh", "-c", mount], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        if holder.stdout.readline() != "mounted\n":
            pytest.skip(f"this machine lets no user mount a file system: {holder.stderr.read().strip()}")
        yield Disk(tmp_path, holder.pid)
    finally:
        holder.kill()
        holder.communicate()


def forbid(disk: Disk) -> None:
    disk.do("chmod", "-R", "a-w", str(disk.path / "run" / "checkpoints"))


def allow(disk: Disk) -> None:
    disk.do("chmod", "-R", "u+w", str(disk.path / "run" / "checkpoints"))


def freeze(disk: Disk) -> None:
    folder = str(disk.path / "run" / "checkpoints")
    disk.do("mount", "--bind", folder, folder)
    read_only = disk.inside("mount", "-o", "remount,bind,ro", folder)
    until(lambda: subprocess.run(read_only, capture_output=True).returncode == 0)  # refused while a file is written


def thaw(disk: Disk) -> None:
    disk.do("umount", str(disk.path / "run" / "checkpoints"))


FAULTS: dict[str, tuple[Callable[[Disk], None], Callable[[Disk], None], str]] = {
    **{
        f"full_{kb}": (
            lambda disk, kb=kb: disk.fill(leave=kb),
            lambda disk: disk.do("rm", f"{disk.path}/filler"),
            "No space left on device",
        )
        for kb in (0, 4, 12, 24, 40, 60)  # a checkpoint has some 50 kB: full in each of its files
    },
    "read_only": (freeze, thaw, "Read-only file system"),
    "permission": (forbid, allow, "Permission denied"),
}
LONG = ("--steps", "200", "--eval-every", "100")
FAST = {("cnn", "full_24"), ("cnn", "permission")}


@pytest.mark.parametrize(
    "family, fault",
    [
        (f, fault) if (f, fault) in FAST else pytest.param(f, fault, marks=pytest.mark.slow)
        for f in ("cnn", "gan")
        for fault in FAULTS
    ],
)
def test_a_save_that_fails_stops_the_run_and_loses_nothing(
    family: str,
    fault: str,
    disk: Disk,
    peaceful: Callable[..., Path],  # noqa: F811
) -> None:
    """One line, status 2, no result; the checkpoint before is whole, and once it can be written the run goes on."""
    harm, heal, words = FAULTS[fault]
    run = disk.seen / "run"
    with disk.training("--family", family, *LONG, SLEEP="0.03") as process:
        until(lambda: newest(run) >= 20 or process.poll() is not None)
        harm(disk)
        good = newest(run)
        out, err = process.communicate(timeout=120)
    assert process.returncode == 2, err
    assert err.count("\n") == 1, err
    line = err.strip()
    assert line.startswith("error: ") and words in line and ("make room there" in line) == fault.startswith("full")
    assert line.endswith(", or choose another --workdir, and run again")
    assert not (run / "result.json").exists() and "report:" not in out
    heal(disk)
    assert newest(run) >= good >= 20
    lines, whole = listing(run, verify=True)
    assert whole and "the next run resumes here" in lines[-1]
    with disk.training("--family", family, *LONG) as process:
        out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert f"resuming at step {newest(run) and lines[-1].split()[1]}" in out
    same(peaceful(family, *LONG), run)
