"""Processes that are no one run say so before they can hang; and one that hangs is ended by a signal."""

import json
import os
import re
import signal
import socket
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
from conftest import tiny_experiment
from test_processes import SCRIPT, free_port, place, refused, said, started, wait_for

from bigjax import UsageError
from bigjax.experiment import RunConfig
from bigjax.program import Program
from bigjax.run import alike, barrier, identity, manifest, meeting, processes, stopping, watch

HOST = re.escape(socket.gethostname())
DIFFERS = rf"process 1 \({HOST}, pid \d+\) differs from process 0 \({HOST}, pid \d+\): "
CODE, DATA = ": give all the same flags, code and versions", ": give all the same code and data"
REFUSED = {
    "rows": rf"{DIFFERS}train data 80 rows \(checksum \d+\), not 48 rows \(checksum \d+\){DATA}",
    "content": rf"{DIFFERS}train data 48 rows \(checksum \d+\), not 48 rows \(checksum \d+\){DATA}",
    "width": rf"{DIFFERS}parameters 243, not 163; the program \(model, .*\) \w+, not \w+; the initial .*{DATA}",
    "rate": rf"{DIFFERS}the program \(model, loss, optimizer, or a number in them\) \w+, not \w+{DATA}",
    "init": rf"{DIFFERS}the initial parameters \w+, not \w+{DATA}",
    "tests": rf"{DIFFERS}eval data 100 rows \(checksum \d+\), not 13 rows \(checksum \d+\){DATA}",
    "evaluators": rf"{DIFFERS}evaluators none, not norm{DATA}",
    "minutes": rf"{DIFFERS}train data 48 rows .*, not 48 rows .*{DATA}",
    "x64": rf"{DIFFERS}jax_enable_x64 True, not False{CODE}",
    "flags": rf"{DIFFERS}--batch-size 24, not 12{CODE}",
    "folders": r"--workdir \S+/own_0 is not one folder that all processes see, where process 0 writes: process 1 "
    rf"\({HOST}, pid \d+\), to which it is \S+/own_1, sees nothing of it: give one on a shared file system, or gs://.*",
}
REFUSED["buckets"] = REFUSED["folders"]


def told(folder: Path, *cases: str, count: int = 2) -> list[dict[str, Any]]:
    """What each of the processes of together_script.py says of each case."""
    port = str(free_port())
    commands = [[port, str(count), str(i), str(folder), *cases] for i in range(count)]
    with started(*commands, devices=12 // count // 2, script="together_script.py") as running:
        done = [said(p, timeout=600) for p in running]
    lines = [
        [line.removeprefix("CASE ") for line in out.splitlines() if line.startswith("CASE ")] for _, out, _ in done
    ]
    return [{"status": status, "err": err} | {k: v for line in mine for k, v in json.loads(line).items()}
            for (status, _, err), mine in zip(done, lines, strict=True)]  # fmt: skip


@pytest.mark.slow
def test_what_differs_is_refused_in_all_and_they_go_on(tmp_path: Path, bucket: str) -> None:
    """Joined as in a notebook. Every call is refused in both by the same line; then both train, are judged, stop."""
    good = ("spelled", "bucket", "judged", "interrupted")
    last = ("judged_otherwise", "drawn", "drawn_alone", "fails_alone")
    zero, one = told(tmp_path, "few", *REFUSED, *good, *last)
    assert re.fullmatch(rf"process 1 \({HOST}, pid \d+\): {re.escape(one['few']['refused'])}", zero["few"]["refused"])
    for case, line in REFUSED.items():
        assert zero[case] == one[case] and re.fullmatch(line, zero[case]["refused"]), zero[case]
    assert not (tmp_path / "refused" / "config.json").exists()
    assert [p.name for p in (tmp_path / "own_0").iterdir()] == [".lock"] and not (tmp_path / "own_1").exists()
    assert all(zero[case] == one[case] and "refused" not in zero[case] for case in good)
    assert zero["spelled"]["step"] == zero["judged"]["step"] == 8
    stops = [f"stopped by SIGINT at step {n}, which is saved: the same command goes on" for n in (4, 8)]
    assert zero["interrupted"] == {"step": 60, "norm": 0.0, "stopped": stops}
    assert re.fullmatch(REFUSED["tests"], zero["judged_otherwise"]["refused"])
    assert zero["drawn"] == one["drawn"] and zero["drawn"]["step"] == 8  # a gallery that fails in all ends nothing
    alone = rf"gallery 'bad' failed in process 1 \({HOST}, pid \d+\): no picture, and not in all processes alike"
    assert zero["drawn_alone"] == one["drawn_alone"] and re.fullmatch(alone, zero["drawn_alone"]["refused"])
    assert one["fails_alone"] == {"raised": "no number"} and zero["status"] == 3
    last = zero["err"].strip().splitlines()[-1]
    assert re.fullmatch(rf"error: process 1 \({HOST}, pid \d+\) stopped \(no number\): this process ends too; .*", last)


@pytest.mark.slow
def test_three_processes(tmp_path: Path) -> None:
    """A run that two began among what they do."""
    begun = told(tmp_path, "begun")
    assert "stopped by SIGINT at step 4, which is saved" in begun[0]["begun"]["stopped"]
    zero, one, two = told(tmp_path, "folders", "spelled", "interrupted", "gone_on", count=3)
    assert zero["gone_on"]["step"] == 8 and zero["gone_on"]["norm"] == pytest.approx(zero["spelled"]["norm"], rel=1e-5)
    assert re.search(r"process 1 .*sees nothing of it; process 2 .*sees nothing of it: ", two["folders"]["refused"])
    assert zero["spelled"] == one["spelled"] == two["spelled"] and zero["spelled"]["step"] == 8
    assert zero["interrupted"] == one["interrupted"] == two["interrupted"]
    assert zero["interrupted"]["step"] == 60 and len(zero["interrupted"]["stopped"]) == 2


def pair(folder: Path, *flags: str) -> list[list[str]]:
    port = free_port()
    return [["--workdir", str(folder / "run"), *flags, *place(i, port)] for i in (0, 1)]


@pytest.mark.slow
def test_other_code_switches_or_devices_are_refused_at_the_meeting(tmp_path: Path) -> None:
    copy = tmp_path / SCRIPT.name
    copy.write_text(SCRIPT.read_text().replace("optax.sgd(0.1)", "optax.sgd(0.01)"))
    counts = rf"process 0 \({HOST}, pid \d+\) 4, process 1 \({HOST}, pid \d+\) 3"
    for own, line in (
        ({"SCRIPT": str(copy)}, rf"{DIFFERS}the code of process_script\.py \w+, not \w+{CODE}"),
        (
            {"JAX_ENABLE_X64": "1", "LIBTPU_INIT_ARGS": "--a=1"},
            rf"{DIFFERS}LIBTPU_INIT_ARGS --a=1, not ; jax_enable_x64 True, not False{CODE}",
        ),
        (
            {"JAX_NUM_CPU_DEVICES": "3"},
            rf"the processes have unequal numbers of devices: {counts}: give each as many .*",
        ),
    ):
        both = refused(*pair(tmp_path), each=[{}, own])
        assert both[0] == both[1] and re.fullmatch(line, both[0]), both
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_run_that_hangs_ends_by_sigterm(tmp_path: Path) -> None:
    """One stands in its evaluator, the other waits for it in a save; the checkpoint of step 2 is whole."""
    with started(*pair(tmp_path), devices=1, HOLD="1") as running:
        wait_for((tmp_path / "run" / "held").exists, running)
        running[0].send_signal(signal.SIGTERM)
        done = [said(p, timeout=60) for p in running]
    assert {status for status, _, _ in done} <= {143, 3} and 143 in {status for status, _, _ in done}
    ended = [line for _, _, err in done for line in err.splitlines() if "hangs, for" in line]
    assert ended and all(line.endswith("the same command goes on from the last checkpoint") for line in ended)
    assert not manifest.damage(tmp_path / "run" / "checkpoints", 2)
    assert not any("Traceback" in err for _, _, err in done)


@pytest.mark.slow
def test_ctrl_c_ends_no_process_that_hangs_but_says_what_does(tmp_path: Path) -> None:
    with started(["--workdir", str(tmp_path / "run")], devices=1, HOLD="all") as running:
        wait_for((tmp_path / "run" / "held").exists, running)
        running[0].send_signal(signal.SIGINT)
        lines = [running[0].stderr.readline() for _ in range(3)]
        assert lines[1:] == [
            "SIGINT: stopping now\n",
            f"SIGINT: still at the evaluator 'norm'; kill {running[0].pid} ends the process without a save\n",
        ]
        running[0].send_signal(signal.SIGTERM)
        status, _, err = said(running[0], timeout=60)
    assert status == 143 and "SIGTERM: the evaluator 'norm' hangs, for " in err


@pytest.mark.slow
def test_runs_side_by_side(tmp_path: Path) -> None:
    """While one stands still another of two processes trains beside it; in the same folder it is refused."""
    with started(*pair(tmp_path), devices=4, HOLD="all") as running:
        wait_for((tmp_path / "run" / "held").exists, running)
        both = refused(*pair(tmp_path))
        own = re.escape(f"pid {running[0].pid} on {socket.gethostname()}")
        assert both[0] == both[1]
        assert re.fullmatch(rf"--workdir \S+/run is in use by {own}: wait for its end, or use another", both[0])
        with started(*pair(tmp_path / "beside"), devices=4) as beside:
            assert [said(p)[0] for p in beside] == [0, 0]
        assert all(p.poll() is None for p in running)
    assert (tmp_path / "beside" / "run" / "result.json").exists()


@pytest.mark.slow
def test_a_disk_that_takes_nothing_more_from_one_of_them(tmp_path: Path) -> None:
    """Which says so; the other names it; the checkpoint before is whole, and with room they go on."""
    flags = ("--mesh.data", "1", "--mesh.fsdp", "8")
    with started(*pair(tmp_path, *flags), devices=4, FULL="1") as running:
        (zero, _, other), (one, _, err) = [said(p) for p in running]
    mine, theirs = (text.strip().splitlines()[-1] for text in (err, other))  # XLA has something to say of this mesh
    begin = r"error: a checkpoint could not be saved in \S+; step 2 is intact \("
    assert zero == one == 2 and re.match(rf"{begin}.*: make it writable, or choose another", mine), (mine, theirs)
    assert re.match(rf"{begin}process 1 \({HOST}, pid \d+\): .*: make it writable", theirs), theirs
    assert not manifest.damage(tmp_path / "run" / "checkpoints", 2) and not (tmp_path / "run" / "result.json").exists()
    with started(*pair(tmp_path, *flags), devices=4) as running:
        assert [said(p)[0] for p in running] == [0, 0]
    assert (tmp_path / "run" / "result.json").exists()


def test_switches_that_change_no_number_are_not_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XLA_FLAGS")
    before = alike.switches()
    monkeypatch.setenv("XLA_FLAGS", "--xla_dump_to=/tmp/x --xla_force_host_platform_device_count=8")
    with jax.log_compiles():
        assert alike.switches() == before
    monkeypatch.setenv("XLA_FLAGS", "--xla_b=2 --xla_dump_to=/tmp/x --xla_a=1")
    assert alike.switches() == before | {"XLA_FLAGS": "--xla_a=1 --xla_b=2"}


class Clock:
    """Seconds that pass, and seconds of a processor that are used, when a test says so."""

    def __init__(self) -> None:
        self.now = self.used = 100.0

    def monotonic(self) -> float:
        return self.now

    def process_time(self) -> float:
        return self.used


def test_what_stands_still_is_ended_and_what_works_is_not(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    """The first of its kind by the processor it uses; others by how long their kind has taken; a save never."""
    clock, statuses = Clock(), []
    monkeypatch.setattr(stopping, "time", clock)
    monkeypatch.setattr(watch, "time", clock)
    monkeypatch.setattr(stopping.Hung, "watch", lambda hung: None)  # the thread: here a test looks
    monkeypatch.setattr(processes, "end", statuses.append)

    def ends(number: int, *, seconds: float = 9.0, used: float = 0.0, again: bool = False) -> list[int]:
        """The exit statuses of a run that hears the signal, and then stands still so long."""
        statuses.clear()
        hung = stopping.Hung(number)
        clock.now, clock.used = clock.now + seconds, clock.used + used
        if again:
            hung.again(number)
        hung.look()
        return list(statuses)

    with watch.watched(0, "the run") as dog:
        with watch.watching("the first evaluation"):
            assert ends(signal.SIGTERM) == [143] and ends(signal.SIGTERM, seconds=6.0) == []
            assert ends(signal.SIGTERM, used=1.0) == []
            assert ends(signal.SIGINT) == []
        dog.longest |= {"slow": 100.0, "quick": 2.0}
        with watch.watching("an update", "slow"):
            assert ends(signal.SIGTERM) == []
        with watch.watching("an update", "quick"):
            assert ends(signal.SIGHUP, used=9.0) == [129]
        with watch.watching("a save", watch.SAVE):
            assert ends(signal.SIGTERM) == []
            assert ends(signal.SIGTERM, again=True) == [143]
            assert ends(signal.SIGTERM, seconds=6.0, again=True) == []
        dog.longest[watch.UPDATE] = 5.0
        with watch.watching("the numbers of an update"):
            assert ends(signal.SIGTERM) == [] and ends(signal.SIGTERM, seconds=16.0) == [143]
    assert ends(signal.SIGTERM) == []  # nothing runs
    lines = capfd.readouterr().err.splitlines()
    assert "SIGTERM: still at a save; the same signal again ends the process without a save" in lines
    assert f"SIGINT: still at the first evaluation; kill {os.getpid()} ends the process without a save" in lines
    assert (
        "SIGHUP: an update hangs, for 9 s so far: this process ends without a save; the same command goes on from the "
        "last checkpoint"
    ) in lines


def test_all_of_a_run_is_watched_and_by_name(fit_tiny: Callable[..., Any]) -> None:
    """What hangs is named."""
    heard = {}

    def listen(where: str, gives: Any) -> Callable[..., Any]:
        return lambda *_: (heard.update({where: watch.dog().doing()}), gives)[1]

    task = tiny_experiment().task

    def judge(*arguments: Any) -> Any:
        heard["evaluation"] = watch.dog().doing()  # when it is traced, there last
        return task.evaluate(*arguments)

    fit_tiny(
        tiny_experiment(
            task=replace(task, evaluate=judge),
            evaluators={"norm": listen("evaluator", {"norm": 1.0})},
            gallery={"poem": listen("gallery", "...")},
            on_log=listen("hook", None),
        )
    )
    assert heard == {
        "evaluator": "the evaluator 'norm'",
        "gallery": "the gallery 'poem'",
        "hook": "the hook on_log",
        "evaluation": "the evaluation of the split 'eval'",
    }


def test_processes_at_two_places_hear_nothing_of_one_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """What process 0 says at another place is no answer."""
    monkeypatch.setattr(processes, "several", lambda: True)
    monkeypatch.setattr(processes, "first", lambda: False)
    monkeypatch.setattr(processes, "wait_for", lambda *_, **__: {"value": 1, "by": "len"})
    assert processes.from_first(len) == 1
    with pytest.raises(UsageError, match="is at sum, process 0 at len: call the same in all processes"):
        processes.from_first(sum)


def test_who_waits_long_says_for_whom_and_hears_of_its_end(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    clock = Clock()
    monkeypatch.setattr(processes, "time", clock)
    monkeypatch.setattr(processes.Session, "failed", "")

    def get(key: str) -> None:
        clock.now += 20
        processes.Session.failed = "process 3 stopped (no memory)" * (clock.now > 1000)

    monkeypatch.setattr(processes, "get", get)
    with pytest.raises(UsageError, match="process 3 has not come to the same place within 100 s: call the same in all"):
        processes.wait_for("a", 3, timeout=100)
    clock.now = 985.0
    with pytest.raises(UsageError, match=re.escape("process 3 stopped (no memory)")):
        processes.wait_for("a", 3)
    line = rf"process 0 \({HOST}, pid {os.getpid()}\) waits for process 3, for 40 s so far\n"
    assert re.fullmatch(line, capfd.readouterr().err)


def test_what_fails_in_a_save_is_told_in_few_words() -> None:
    found = barrier.Barrier()
    found.failing(OSError("a long story " * 30 + "No space left on device (28)"))
    assert found.why == "No space left on device"
    found.failing(ValueError("one\ntwo"))
    assert found.why == "one"
    found(key="alone", timeout_ms=1)  # a process that is alone waits for nobody


def test_the_longest_of_a_kind_is_known_but_for_the_first_which_compiles() -> None:
    with watch.watched(0, "the run") as dog:
        for _ in range(2):
            with watch.watching("a batch", "batch"):
                assert dog.slow() is None and dog.doing() == "a batch"
        assert 0 < dog.longest["batch"] < 60 and dog.doing() == "the run"
    assert watch.dog() is watch.NOBODY


def test_what_is_told_of_many_differences_is_short() -> None:
    """A module that one process alone has imported so far is none."""
    assert meeting.changes({"a": 1, "b": None}, {"a": 2, "b": 0}) == "a 1, not 2; b None, not 0"
    assert meeting.changes({"the code of plots": "1f", "the code of x": "2a"}, {"the code of x": "2a"}) == ""
    assert meeting.changes(dict.fromkeys("abcdefgh", 1), {}).endswith("f 1, not None; and 2 more")


def test_rows_that_one_process_cannot_read_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    class Torn(list):
        def __getitem__(self, row: int) -> dict[str, Any]:
            if row == 3:
                raise OSError("torn")
            return {"label": super().__getitem__(row)}

    told: list[Any] = []
    monkeypatch.setattr(processes, "agree", lambda about, advice: told.append(about))
    program: Any = SimpleNamespace(state_shapes=SimpleNamespace(params={}), experiment=tiny_experiment())
    for split in (Torn(range(200)), Torn(range(3)), {"label": np.arange(3)}):
        identity.agree(program, "1f" * 32, {"train": identity.fingerprint_of(split)})
    assert [re.sub(r"\d{3,}\b(?! rows)", "N", about["train data"]) for about in told] == [
        "200 rows (checksum N, 1 of those tried unreadable)",
        "3 rows (checksum N)",
        "3 rows (checksum N)",
    ]


def test_what_is_begun_with_is_that_of_a_checkpoint(fit_tiny: Any, tmp_path: Path, monkeypatch: Any) -> None:
    """By its content: each process may see another folder by the same name."""
    monkeypatch.setattr(identity.processes, "several", lambda: False)
    for seed in (0, 1):
        fit_tiny(folder=f"from{seed}", seed=seed, steps=2)
    monkeypatch.setattr(identity.processes, "several", lambda: True)

    def told(source: str | None) -> dict[str, str]:
        experiment = tiny_experiment()
        config = RunConfig(steps=1, batch_size=8, init_from=source and str(tmp_path / source))
        return identity.beginnings(Program(experiment, config, experiment.train, steps=1))

    none, one, other = told(None), told("from0"), told("from1")
    assert one.keys() - none.keys() == {"--init-from's parameters"} and one == told("from0") != other
    assert other["--init-from's parameters"].startswith("of step 2 (checksum ")
    (tmp_path / "empty").mkdir()
    assert told("empty")["--init-from's parameters"] == "no checkpoint"
