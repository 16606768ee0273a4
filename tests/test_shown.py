"""What is only shown: where it fails, the run goes on; and what is shown first."""

import dataclasses
import json
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import optax
import pytest
from conftest import tiny_experiment

from bigjax import UsageError, cli, train
from bigjax.experiment import Pictures, Published, RunConfig
from bigjax.look.display import Display
from bigjax.look.pictures import load_gallery
from bigjax.run.lines import Clock, Lines
from bigjax.run.log import Log
from bigjax.run.shown import own_metric, usual
from bigjax.sharding import MeshConfig, make_mesh

FLAGS = {"steps": 6, "batch_size": 8, "log_every": 2, "eval_every": 3, "save_every": 3}


def fails(*_: Any, **__: Any) -> Any:
    raise RuntimeError("no\nwonder")


@pytest.fixture
def said(monkeypatch):
    lines = []
    monkeypatch.setattr("bigjax.look.display.Display.line", lambda self, line: lines.append(line))
    return lines


def test_everything_shown_may_fail_and_the_run_goes_on(tmp_path, monkeypatch, said):
    for name in (
        "bigjax.look.diagnose.layer_rows",
        "bigjax.look.report.write_report",
        "tensorboardX.SummaryWriter.add_scalar",
        "jax.profiler.start_trace",
    ):
        monkeypatch.setattr(name, fails)
    gallery = {
        "broken": fails,
        "flat": lambda *_: Pictures(np.zeros((3, 4))),
        "bands": lambda *_: Pictures(np.full((2, 4, 4, 5), 0.5)),
        "words": lambda *_: "fine",
    }
    config = RunConfig(workdir=str(tmp_path / "run"), tensorboard=True, profile=True, **FLAGS)
    run = train.fit(tiny_experiment(gallery=gallery), config, quiet=True)
    assert json.loads((tmp_path / "run/result.json").read_text()) == run.result and run.result["step"] == 6
    warning = "warning: {} failed (RuntimeError: no); the run goes on"
    told = [line for line in said if line.startswith("warning")]
    wanted = {"the table of layers": 1, "tensorboard": 1, "the profile": 2, "gallery 'broken'": 2, "report.html": 1}
    assert {what: told.count(warning.format(what)) for what in wanted} == wanted | {"the profile": 1}
    assert sum("gallery 'flat' failed (UsageError: gallery 'flat' has images (3, 4)" in line for line in told) == 2
    shown = load_gallery(tmp_path / "run")
    assert list(shown) == ["bands", "words"] and shown["words"] == {3: "fine", 6: "fine"}


def test_numbers_are_not_only_shown(tmp_path):
    config = RunConfig(workdir=str(tmp_path / "run"), **FLAGS)
    with pytest.raises(RuntimeError, match="wonder"):
        train.fit(tiny_experiment(evaluators={"broken": fails}), config, quiet=True)


def test_a_number_of_an_evaluator_with_a_name_of_the_logs_own_is_refused(tmp_path):
    config = RunConfig(workdir=str(tmp_path / "run"), **FLAGS)
    with pytest.raises(UsageError, match="^a number of eval is called 'split', as the log's own: give it another"):
        train.fit(tiny_experiment(evaluators={"mine": lambda *_: {"split": 1.0}}), config, quiet=True)


def test_a_hook_that_fails_is_named_and_the_checkpoint_kept(tmp_path):
    def hook(step: int, split: str, values: Any) -> None:
        if step == 6:
            values["nothing"]

    config = RunConfig(workdir=str(tmp_path / "run"), **FLAGS)
    with pytest.raises(UsageError) as told:
        train.fit(tiny_experiment(), config, quiet=True, on_log=hook)
    assert str(told.value).startswith(f"on_log failed at step 6 (KeyError: 'nothing'; {__file__}, line ")
    assert str(told.value).endswith("): correct it; the same command goes on from the last checkpoint")
    assert "\n" not in str(told.value)
    assert train.fit(tiny_experiment(), config, quiet=True).result["step"] == 6


def test_the_verb_report_is_refused_in_one_line(tmp_path, capsys, monkeypatch):
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setattr(sys.modules[__name__], "__file__", "tiny.py")
    (tmp_path / "gallery").mkdir()
    (tmp_path / "gallery/00000001-x.npz").write_text("no pictures")
    with pytest.raises(SystemExit) as ended:
        cli.main(RunConfig, build, ["report", "--workdir", str(tmp_path)])
    (line,) = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2 and line.startswith("error: ") and "00000001-x.npz can't be read" in line


def build(config: RunConfig) -> Any:
    return tiny_experiment()


def test_the_log_has_the_learning_rate_of_the_last_update_that_was_applied(tmp_path, said):
    config = RunConfig(nonfinite="skip", **FLAGS)
    experiment = tiny_experiment(tx=build_schedule, published=(Published("eval/recall", 0.5, "a test"),))
    program, log = SimpleNamespace(config=config, steps=10, experiment=experiment), Log(tmp_path, step=0)
    shown = []
    display = SimpleNamespace(
        line=said.append, begin=lambda *_: None, update=lambda *a, metrics, **_: shown.append(metrics)
    )
    # of three updates dropped before, one is in the open window, whose sums say so
    lines = Lines(log, display, Clock(), [], program, forgiven=1, dropped=3)
    lines.begin(5, 0.0)
    for step, skipped in ((6, 1.0), (8, 0.0), (10, 1.0)):
        window = {"a": (1.0, 2.0), "loss": (1.0, 2.0), "recall": (1.0, 2.0), "skipped": (skipped, 2.0)}
        lines.set_aside(step, window, 0.0)
        lines.read()
    written = [json.loads(line)["learning_rate"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert written == pytest.approx([0.5 * 2, 0.5 * 4, 0.5 * 5])  # updates 3, 5, 6
    assert list(shown[0])[:3] == ["recall", "loss", "learning_rate"]


def test_a_schedule_that_only_the_update_can_ask_is_told_once(tmp_path, said):
    experiment = tiny_experiment(tx=optax.sgd(fails))
    config, mesh = RunConfig(**FLAGS), make_mesh(MeshConfig(), batch_size=8)
    program = SimpleNamespace(config=config, steps=10, experiment=experiment, mesh=mesh)
    log = Log(tmp_path, step=0)
    lines = Lines(log, Display(enabled=False), Clock(), [], program)
    lines.begin(1, 0.0)
    for step in (2, 4):
        lines.set_aside(step, {"loss": (1.0, 2.0), "skipped": (0.0, 2.0)}, 0.0)
        lines.read()
    warnings = [line for line in said if line.startswith("warning")]
    assert warnings == ["warning: the learning rate failed (RuntimeError: no); the run goes on"]
    written = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in written] == [2, 4] and "learning_rate" not in written[0]


def build_schedule(steps: int) -> Any:
    return optax.sgd(lambda count: 0.5 * count)


@dataclasses.dataclass(frozen=True)
class Config(RunConfig):
    width: tuple[int, ...] = (1, 2)


def test_a_runs_own_metric_is_that_of_its_rows_or_of_what_is_published(monkeypatch):
    aim = Published("eval/recall", 0.5, "a test")
    assert own_metric(tiny_experiment(), Config()) is None
    assert own_metric(tiny_experiment(published=(aim,)), Config()) == "eval/recall"
    script = ModuleType("script")
    script.ROWS = {"one": {"metric": "eval/f1"}}
    monkeypatch.setitem(sys.modules, "script", script)
    monkeypatch.setattr(Config, "__module__", "script")
    assert own_metric(tiny_experiment(published=(aim,)), Config()) == "eval/f1"
    script.METRIC = "eval/bits_per_byte"
    assert own_metric(tiny_experiment(published=(aim,)), Config()) == "eval/bits_per_byte"


def test_what_is_given_otherwise_is_recorded_with_its_default():
    given = {"a": 1, "same": 2, "group": {"b": 3, "c": 4}, "other": {"d": 5}, "width": [1], "new": 6}
    default = {"a": 0, "same": 2, "group": {"b": 3, "c": 0}, "other": {"d": 5}, "width": [2], "gone": 7}
    assert usual(given, default) == {"a": 0, "group": {"c": 0}, "width": [2]}
