"""A signal that comes while the host waits for data, or evaluates: obeyed there, and nothing of the run is lost."""

import math
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import chex
import numpy as np
import pytest
from conftest import blobs, tiny_experiment
from test_train import fit, log, numbers

from bigjax import Interrupted, train
from bigjax.experiment import Experiment
from bigjax.run import processes, words
from bigjax.run.attempt import Attempts, Broken

FLAGS = {"log_every": 2, "eval_every": 2, "save_every": 4}
LONG = 60.0  # seconds that nothing here may wait


def interrupting(times: int) -> Callable[..., dict[str, float]]:
    """An evaluator: the first `times` times it is interrupted, and would take long to go on."""
    left = [times]

    def evaluate(params: Any, model_state: Any, key: Any) -> dict[str, float]:
        left[0] -= 1
        if left[0] >= 0:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(LONG)
        return {"spread": 1.0}

    return evaluate


def slow(times: int) -> Experiment:
    return tiny_experiment(evaluators={"slow": interrupting(times)})


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, train.Run]:
    """In peace."""
    folder = tmp_path_factory.mktemp("interrupt") / "run"
    return folder, fit(folder, slow(0), **FLAGS)


def test_an_evaluator_is_broken_off_and_run_again_by_the_next_session(
    straight: tuple[Path, train.Run], tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    """Three times over: at step 2; again there, where the run is resumed; and at step 4. The log has no gap."""
    experiment, run = slow(2), tmp_path / "run"
    for _ in range(2):
        with pytest.raises(Interrupted, match="stopped by SIGINT at step 2, which is saved: the same command goes on"):
            fit(run, experiment, **FLAGS)
        assert "\nSIGINT: stopping now\n" in capfd.readouterr().err
        assert [line["split"] for line in log(run)] == ["train"]
    ended = fit(run, experiment, **FLAGS)
    assert numbers(run) == numbers(straight[0])
    chex.assert_trees_all_equal(ended.state, straight[1].state)


def test_the_last_evaluation_is_owed_too(straight: tuple[Path, train.Run], tmp_path: Path) -> None:
    run = tmp_path / "run"
    fit(run, tiny_experiment(evaluators={"slow": lambda *_: {"spread": 1.0}}), **FLAGS | {"steps": 4, "eval_every": 4})
    (run / "result.json").unlink()
    kept = (run / "metrics.jsonl").read_text().splitlines(keepends=True)[:-1]
    (run / "metrics.jsonl").write_text("".join(kept))
    with pytest.raises(Interrupted, match="at step 4, which is saved"):
        fit(run, slow(1), **FLAGS | {"steps": 4, "eval_every": 4})
    assert "eval" not in {line["split"] for line in log(run)} and not (run / "result.json").exists()
    ended = fit(run, slow(0), **FLAGS | {"steps": 4, "eval_every": 4})
    assert [(line["step"], line["split"]) for line in log(run)] == [(2, "train"), (4, "train"), (4, "eval")]
    assert ended.result["metrics"]["eval/spread"] == 1.0


def test_where_the_evaluation_decides_what_is_saved_the_step_is_done_again(tmp_path: Path) -> None:
    """The best checkpoint has its number with it; a hook that ends the run is asked again."""
    best = FLAGS | {"validation": 0.2, "best": "max:accuracy", "save_every": 1, "eval_every": 3}
    with pytest.raises(Interrupted, match="at step 3; the checkpoint of step 2 is kept: the same command"):
        fit(tmp_path / "best", slow(1), **best)
    fit(tmp_path / "best", slow(0), **best)
    fit(tmp_path / "peace", slow(0), **best)
    assert numbers(tmp_path / "best") == numbers(tmp_path / "peace")

    def ends(step: int, split: str, values: Any) -> bool:
        return step == 2

    experiment = tiny_experiment(evaluators={"slow": interrupting(1)}, on_log=ends)
    with pytest.raises(Interrupted, match="; no checkpoint was saved before it: the same"):
        fit(tmp_path / "ends", experiment, **FLAGS | {"eval_every": 100, "save_every": 100})
    assert fit(tmp_path / "ends", experiment, **FLAGS).result["metrics"]["eval/spread"] == 1.0


class Slow:
    """A reader: once so many rows are left, the next is interrupted, and would take long."""

    def __init__(self, left: float) -> None:
        self.data, self.left, self.end = blobs(60, seed=0), left, threading.Event()
        self.label = self.data["label"]

    def __len__(self) -> int:
        return 60

    def __getitem__(self, row: int) -> dict[str, np.ndarray]:
        self.left -= 1
        if self.left < 0 and not self.end.is_set():
            os.kill(os.getpid(), signal.SIGINT)
            self.end.wait(LONG)
        return {k: v[row] for k, v in self.data.items()}


@pytest.mark.parametrize("left, armed, said", [
    (math.inf, 0, "at step [0-9]+, which is saved"),  # by a hook, while it trains
    (20, None, "by SIGINT as it began: the same command goes on"),
    (0, None, "by SIGINT as it began: the same command goes on"),
])  # fmt: skip
def test_data_that_are_slow_are_not_waited_for(
    left: float, armed: Any, said: str, tmp_path: Path, monkeypatch: Any
) -> None:
    reader, ended = Slow(left), []
    flags = {"steps": 40, "eval_every": 40, "save_every": 40}  # more than Grain reads ahead

    def arm(step: int, split: str, values: Any) -> None:
        reader.left = armed

    with pytest.raises(Interrupted, match=said) as e:
        fit(tmp_path / "run", tiny_experiment(train=reader, on_log=arm), **flags)
    with pytest.raises(SystemExit) as left, monkeypatch.context() as patch:
        patch.setattr(processes, "end", lambda status: ended.append(status))
        words.leave(e.value)
    assert ended == [130] == [left.value.code]  # and so does the program, which Python would let wait for the reader
    reader.end.set()
    fit(tmp_path / "run", tiny_experiment(train=reader), **flags)
    fit(tmp_path / "peace", tiny_experiment(train=reader), **flags)
    assert numbers(tmp_path / "run") == numbers(tmp_path / "peace")


def test_an_attempt_is_broken_off_once_and_only_while_it_goes_on() -> None:
    attempts = Attempts()
    assert attempts.attempt(lambda x: x + 1, 1) == 2 and attempts.when() == "after this update"

    def ended() -> None:
        try:
            attempts.end(signal.SIGINT)
        finally:
            attempts.end(signal.SIGINT)  # again, while something is closed because of it
        raise AssertionError("it went on")

    assert attempts.attempt(ended) is None and attempts.when() == "now"
    attempts.end(signal.SIGINT)  # nothing goes on
    assert attempts.attempt(lambda: pytest.fail("it began")) is None
    with pytest.raises(ValueError):
        Attempts().attempt(int, "x")
    with pytest.raises(Interrupted, match="by SIGINT as it began"):
        attempts.attempt(int, "1", where="as it began")
    assert issubclass(Broken, KeyboardInterrupt)


def test_a_hook_is_broken_off(tmp_path: Path) -> None:
    """Its line is in the log by then; the update that the run stands at is saved."""
    left = [1]

    def hook(step: int, split: str, values: Any) -> None:
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(LONG)

    with pytest.raises(Interrupted, match="at step [0-9]+, which is saved"):
        fit(tmp_path / "run", tiny_experiment(on_log=hook), **FLAGS)
    fit(tmp_path / "run", tiny_experiment(on_log=hook), **FLAGS)
    fit(tmp_path / "peace", tiny_experiment(), **FLAGS)
    assert left[0] < 0 and numbers(tmp_path / "run") == numbers(tmp_path / "peace")
