"""Two processes of 4 virtual CPU devices each, over gloo on loopback, through the command line of a tiny script."""

import contextlib
import functools
import itertools
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import jax
import numpy as np
import pytest
from conftest import REPOSITORY

from bigjax import UsageError
from bigjax.experiment import DistributedConfig
from bigjax.look.pictures import load_gallery
from bigjax.run import manifest, processes
from bigjax.run.checkpoint import Checkpoints, listing
from bigjax.run.log import read_log

SCRIPT = REPOSITORY / "tests" / "process_script.py"
LAUNCHER = ("SLURM_", "OMPI_", "TPU_", "MEGASCALE_", "KUBERNETES_SERVICE_HOST", "JAX_COORDINATOR", "XLA_FLAGS")


@contextlib.contextmanager
def started(
    *commands: list[str],
    devices: int,
    script: str = SCRIPT.name,
    each: Sequence[Mapping[str, str]] = (),
    **variables: str,
) -> Iterator[list[subprocess.Popen]]:
    """The script once with each command's flags; none of them outlives the test.

    each: variables of each alone, with SCRIPT its own script.
    """
    paths = os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "tests")])
    clean = {k: v for k, v in os.environ.items() if not k.startswith(LAUNCHER)}
    env = clean | variables | {"PYTHONPATH": paths, "JAX_NUM_CPU_DEVICES": str(devices)}
    running: list[subprocess.Popen] = []
    try:
        for flags, own in itertools.zip_longest(commands, each, fillvalue={}):
            command = [sys.executable, str(own.get("SCRIPT", SCRIPT.with_name(script))), *flags]
            running.append(
                subprocess.Popen(command, env=env | own, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            )
        yield running
    finally:
        for process in running:
            process.kill()
            process.communicate()


def said(process: subprocess.Popen, *, timeout: float = 240) -> tuple[int, str, str]:
    """(exit status, stdout, stderr) at its end."""
    out, err = process.communicate(timeout=timeout)
    return process.returncode, out, err


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def place(index: int, port: int, *, count: int = 2) -> list[str]:
    where = {"coordinator": f"127.0.0.1:{port}", "processes": count, "index": index}
    return [word for k, v in where.items() for word in (f"--distributed.{k}", str(v))]


def train(folder: Path, *flags: str, count: int = 2) -> list[tuple[int, str, str]]:
    """Trains to the end in `folder` with 8 devices in one process, or 4 in each of two."""
    port, flags = free_port(), ("--workdir", str(folder), *flags)
    commands = [[*flags, *(place(i, port) if count > 1 else ())] for i in range(count)]
    with started(*commands, devices=8 // count) as running:
        done = [said(p) for p in running]
    assert [status for status, _, _ in done] == [0] * count, done
    return done


def parameters(folder: Path) -> dict[str, np.ndarray]:
    """All that the newest checkpoint holds, by path."""
    checkpoints = Checkpoints(folder / "checkpoints", read_only=True)
    step = checkpoints.latest()
    state = checkpoints.restore(step, {"state": checkpoints.shapes(step)["state"]})["state"]
    checkpoints.close()
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(x) for path, x in leaves}


def same(one: Path, two: Path) -> None:
    """The same parameters and lines of metrics, up to the order of additions."""
    a, b = parameters(one), parameters(two)
    assert a.keys() == b.keys() and len(a) > 4
    for k in a:
        np.testing.assert_allclose(b[k], a[k], rtol=1e-4, atol=1e-6, err_msg=k)
    logs = [list(read_log(folder / "metrics.jsonl")) for folder in (one, two)]
    for x, y in zip(*logs, strict=True):
        for k in ("examples_per_second", "crc"):  # the latter tells every bit
            x.pop(k, None), y.pop(k, None)
        assert x.keys() == y.keys() and (x.pop("split"), x["step"]) == (y.pop("split"), y["step"])
        np.testing.assert_allclose(list(y.values()), list(x.values()), rtol=1e-4, atol=1e-6)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The working directory of a run by one process with 8 devices, made once."""

    @functools.cache
    def run(model: str) -> Path:
        folder = tmp_path_factory.mktemp("alone") / model
        train(folder, "--model", model, count=1)
        return folder

    return run


CASES = {
    "cnn_data": ("cnn", ""),
    "cnn_fsdp": ("cnn", "--mesh.data 1 --mesh.fsdp 8"),
    "gpt_data": ("gpt", ""),
    "gpt_fsdp": ("gpt", "--mesh.data 1 --mesh.fsdp 8"),
    "gpt_tensor": ("gpt", "--mesh.data 1 --mesh.fsdp 4 --mesh.tensor 2"),
}


@pytest.mark.parametrize("case", [c if c == "cnn_data" else pytest.param(c, marks=pytest.mark.slow) for c in CASES])
def test_two_processes_give_the_numbers_of_one(case: str, tmp_path: Path, alone: Callable[[str], Path]) -> None:
    model, mesh = CASES[case]
    (_, told, _), (_, silent, _) = train(tmp_path / "run", "--model", model, *mesh.split())
    same(alone(model), tmp_path / "run")
    assert "step 4/4" in told and "Gloo" not in told and silent == ""  # only process 0 reports
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [(r["step"], r["split"]) for r in map(json.loads, lines)] == [(2, "train"), (4, "train"), (4, "eval")]
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["devices"] | {"kind": ""} == {"platform": "cpu", "kind": "", "count": 8, "processes": 2}
    if model == "cnn":
        assert np.sum(result["confusion"]) == 13  # each of the test split's examples once
    pictures = [load_gallery(folder) for folder in (alone(model), tmp_path / "run")]
    assert [*pictures[1]] == ["mistakes"] * (model == "cnn") + ["zeros"]
    for one, two in zip(*(p["mistakes"][4] for p in pictures if model == "cnn"), strict=True):
        np.testing.assert_array_equal(two, one)


def test_each_process_takes_the_checksums_of_its_own_files(tmp_path: Path) -> None:
    """As Python's audit of opened files tells."""
    flags = ["--workdir", str(tmp_path / "run"), "--mesh.data", "1", "--mesh.fsdp", "8"]
    port = free_port()
    with started(*([*flags, *place(i, port)] for i in (0, 1)), devices=4, OPENED=str(tmp_path)) as running:
        assert [said(p)[0] for p in running] == [0, 0]
    opened = [set(re.findall(r"ocdbt.process_\d", (tmp_path / f"{i}.opened").read_text())) for i in (0, 1)]
    assert opened == [{"ocdbt.process_0"}, {"ocdbt.process_1"}]
    checkpoints = tmp_path / "run" / "checkpoints"
    assert sorted(p.name for p in (checkpoints / "manifests").iterdir()) == ["2.json", "4.json"]
    assert listing(tmp_path / "run", verify=True)[1]
    file = next((checkpoints / "4" / "state" / "ocdbt.process_1" / "d").iterdir())
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    assert f"its file {file.relative_to(checkpoints / '4')}" in manifest.damage(checkpoints, 4)


@pytest.mark.slow
@pytest.mark.parametrize("before, after", [(2, 1), (1, 2)])
def test_a_run_goes_on_with_another_number_of_processes(
    before: int, after: int, tmp_path: Path, alone: Callable[[str], Path]
) -> None:
    folder = tmp_path / "run"
    flags = ["--model", "gpt", "--workdir", str(folder)]
    port = free_port()
    commands = [[*flags, *(place(i, port) if before > 1 else ())] for i in range(before)]
    with started(*commands, devices=8 // before, HOLD="all") as running:  # in the evaluation of step 4, before its save
        wait_for(lambda: (folder / "checkpoints" / "2").exists(), running)
    done = train(folder, *flags[:2], count=after)
    assert "resuming at step 2" in done[0][1]
    same(alone("gpt"), folder)


@pytest.mark.slow
def test_two_processes_start_from_another_run_and_agree_on_the_steps(
    tmp_path: Path, alone: Callable[[str], Path]
) -> None:
    flags = ["--init-from", str(alone("cnn")), "--steps", "3", "--minutes", "1", "--mesh.data", "1", "--mesh.fsdp", "8"]
    (_, told, _), _ = train(tmp_path / "run", *flags)
    assert "took 4 of 4 parameters" in told and "step 3/3" in told
    assert json.loads((tmp_path / "run" / "config.json").read_text())["steps"] == 3


def wait_for(true: Callable[[], bool], running: list[subprocess.Popen], *, timeout: float = 240) -> None:
    end = time.monotonic() + timeout
    while not true():
        assert time.monotonic() < end
        assert all(p.poll() is None for p in running), [said(p) for p in running if p.poll() is not None]
        time.sleep(0.2)


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_one_that_is_killed_ends_the_other_which_says_so(victim: int, tmp_path: Path) -> None:
    port, log = free_port(), tmp_path / "metrics.jsonl"
    flags = ["--workdir", str(tmp_path), "--steps", "1000000"]
    with started(*([*flags, *place(i, port)] for i in (0, 1)), devices=4) as running:
        wait_for(lambda: log.exists() and log.read_text().count("\n") > 3, running)
        running[victim].send_signal(signal.SIGKILL)
        begin = time.monotonic()
        status, _, err = said(running[1 - victim], timeout=60)
        assert time.monotonic() - begin < 20
    assert status == 3
    name = f"process {victim} ({socket.gethostname()}, pid {running[victim].pid})"
    assert f"error: {name} is gone: this process ends too; start all again" in err
    assert "Traceback" not in err


def bits(one: Path, two: Path) -> None:
    """The same bits in all that is saved, and in the log but for its speeds."""
    a, b = parameters(one), parameters(two)
    assert a.keys() == b.keys() and len(a) > 4
    for k in a:
        np.testing.assert_array_equal(b[k], a[k], err_msg=k)
    logs = [
        [{k: v for k, v in r.items() if k != "examples_per_second"} for r in read_log(folder / "metrics.jsonl")]
        for folder in (one, two)
    ]
    assert logs[0] == logs[1]


@pytest.mark.slow
@pytest.mark.parametrize("family", ["cnn", "gan"])
def test_one_is_killed_and_both_restarted_resume_exactly(family: str, tmp_path: Path) -> None:
    """The script of test_faults: batch statistics over both, averaged parameters, data read by index."""
    run, straight = tmp_path / "run", tmp_path / "straight"

    def commands(folder: Path) -> list[list[str]]:
        port = free_port()
        return [["--workdir", str(folder), "--family", family, *place(i, port)] for i in (0, 1)]

    with started(*commands(straight), devices=4, script="fault_script.py") as running:
        assert [said(p)[0] for p in running] == [0, 0]
    with started(*commands(run), devices=4, script="fault_script.py", SLEEP="0.1") as running:
        wait_for(lambda: (run / "checkpoints" / "20").exists(), running)
        time.sleep(0.3)
        running[1].send_signal(signal.SIGKILL)
        begin = time.monotonic()
        status, _, err = said(running[0], timeout=60)
        assert time.monotonic() - begin < 20
        assert status == 3 and f"pid {running[1].pid}) is gone" in err, (status, err)
    assert not (run / "result.json").exists()
    with started(*commands(run), devices=4, script="fault_script.py") as running:
        (status, told, err), (other, _, _) = [said(p) for p in running]
    assert (status, other) == (0, 0) and "resuming at step " in told, err
    bits(straight, run)


def test_a_thread_that_aborts_leaves_time_to_say_why() -> None:
    """As Gloo's does, in C++, where another process is gone."""
    code = (
        "import ctypes, os, threading; from bigjax.run.processes import slow_aborts; slow_aborts();"
        "threading.Timer(0.5, os._exit, (3,)).start(); ctypes.CDLL(None).abort()"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 3


@pytest.mark.slow
@pytest.mark.parametrize("number, who, statuses", [("TERM", [1], [143, 143]), ("INT", [0, 1], [130, 130])])
def test_told_to_stop_all_save_the_same_step_and_go_on(
    number: str, who: list[int], statuses: list[int], tmp_path: Path
) -> None:
    """A notice of pre-emption to one of them; Ctrl-C to both."""
    steps = ["--steps", "600", "--eval-every", "600", "--save-every", "600", "--log-every", "10"]
    run, port = tmp_path / "run", free_port()
    log = run / "metrics.jsonl"
    commands = [["--workdir", str(run), *steps, *place(i, port)] for i in (0, 1)]
    with started(*commands, devices=4) as running:
        wait_for(lambda: log.exists() and log.read_text().count("\n") > 1, running)
        for i in who:
            running[i].send_signal(getattr(signal, f"SIG{number}"))
        done = [said(p, timeout=60) for p in running]
    assert [status for status, _, _ in done] == statuses, done
    lines = [re.search(rf"stopped by SIG{number} at step (\d+), which is saved", err) for _, _, err in done]
    (step,) = {int(line[1]) for line in lines}
    assert 10 < step < 600 and (run / "checkpoints" / str(step)).is_dir()
    assert not any("Traceback" in err for _, _, err in done)
    (_, told, _), _ = train(run, *steps)
    assert f"resuming at step {step}" in told
    train(tmp_path / "straight", *steps)
    bits(tmp_path / "straight", run)


@pytest.mark.slow
@pytest.mark.parametrize("before, after", [(2, 1), (1, 2)])
def test_what_another_number_of_processes_restores_is_exact(before: int, after: int, tmp_path: Path) -> None:
    """A checksum of all parameters, as trained and saved by some and read by others."""
    flags = ["--model", "gpt", "--mesh.data", "1", "--mesh.fsdp", "8"]
    train(tmp_path, *flags, count=before)
    trained = json.loads((tmp_path / "result.json").read_text())["metrics"]
    port = free_port()
    commands = [
        ["evaluate", "--workdir", str(tmp_path), *flags, *(place(i, port) if after > 1 else ())] for i in range(after)
    ]
    with started(*commands, devices=8 // after) as running:
        (status, out, err), *_ = [said(p) for p in running]
    assert status == 0, err
    assert json.loads(out[out.index("{") :])["eval/crc"] == trained["eval/crc"] > 0


def refused(*commands: list[str], timeout: float = 240, each: Sequence[Mapping[str, str]] = ()) -> list[str]:
    """The one line that each of the commands ends with."""
    with started(*commands, devices=4, each=each) as running:
        done = [said(p, timeout=timeout) for p in running]
    for status, _, err in done:
        assert status == 2 and err.startswith("error: ") and err.count("\n") == 1, err
    return [err.removeprefix("error: ").strip() for _, _, err in done]


def test_processes_with_different_flags_do_not_start(tmp_path: Path) -> None:
    port = free_port()
    one, two = refused(
        ["--workdir", str(tmp_path / "run"), *place(0, port)],
        ["--workdir", str(tmp_path / "run"), "--batch-size", "16", *place(1, port)],
    )
    assert one == two
    host = re.escape(socket.gethostname())
    assert re.fullmatch(
        rf"process 1 \({host}, pid \d+\) differs from process 0 \({host}, pid \d+\): --batch-size 16, not 8: give all "
        "the same flags, code and versions",
        one,
    )
    assert not (tmp_path / "run").exists()


def test_one_that_never_comes_is_named() -> None:
    port = free_port()
    (line,) = refused([*place(0, port, count=3), "--distributed.timeout", "1"])
    assert line == (f"processes 1, 2 have not come to 127.0.0.1:{port} within 1 s: start all 3, see their output")


def test_a_coordinator_that_is_not_there_is_named() -> None:
    port = free_port()
    (line,) = refused([*place(1, port), "--distributed.timeout", "1"])
    assert line == (
        f"the coordinator 127.0.0.1:{port} could not be reached within 1 s (Connection refused): start process 0 "
        "there, or correct --distributed.coordinator"
    )


def test_a_coordinator_that_is_something_else_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with started(place(1, port), devices=4) as (process,):
            peer, _ = server.accept()
            peer.recv(2**16)
            peer.close()
            status, _, err = said(process)
    assert status == 2
    assert f"the coordinator 127.0.0.1:{port} does not answer process 1" in err


@pytest.mark.parametrize(
    "flags, text",
    [
        (
            {"coordinator": "a:1", "processes": 2, "index": 2},
            "--distributed.index 2: there are 2 processes, use 0 to 1",
        ),
        ({"coordinator": "a:1", "processes": 2, "index": -1}, "--distributed.index -1: there are 2 processes"),
        ({"coordinator": "a:1", "processes": 0, "index": 0}, "--distributed.processes 0: give a number above 0"),
        ({"coordinator": "a", "processes": 2, "index": 0}, "--distributed.coordinator a: give HOST:PORT of process 0"),
        ({"processes": 2, "index": 0}, "--distributed.coordinator missing: give all three"),
        ({"coordinator": "a:1"}, "--distributed.processes and --distributed.index missing: give all three"),
    ],
)
def test_flags_that_make_no_sense_are_refused(flags: dict, text: str) -> None:
    with pytest.raises(UsageError, match="^" + re.escape(text)):
        processes.launched(DistributedConfig(**flags))


def test_launchers_are_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith(LAUNCHER):
            monkeypatch.delenv(name)
    assert processes.launched(DistributedConfig()) is None
    slurm = {"JOB_ID": "7", "STEP_NODELIST": "node[03-04]", "NTASKS": "2", "PROCID": "1", "LOCALID": "0"}
    for k, v in slurm.items():
        monkeypatch.setenv(f"SLURM_{k}", v)
    coordinator, count, index = processes.launched(DistributedConfig())
    assert coordinator.startswith("node03:") and (count, index) == (2, 1)
    assert processes.launched(DistributedConfig(processes=1)) is None
    monkeypatch.setenv("SLURM_NTASKS", "1")
    monkeypatch.setenv("SLURM_PROCID", "0")
    assert processes.launched(DistributedConfig()) is None
    monkeypatch.setenv("SLURM_NTASKS", "many")
    with pytest.raises(UsageError, match="^what the launcher says of this process cannot be read"):
        processes.launched(DistributedConfig())
