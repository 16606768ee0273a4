"""metrics.jsonl is JSON whatever was measured."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from etils import epath

from bigjax import UsageError
from bigjax.run.log import Log, json_text, read_log


def strict(text: str) -> Any:
    """As any other language reads it."""

    def refuse(word: str) -> None:
        raise ValueError(f"{word} is not JSON")

    return json.loads(text, parse_constant=refuse)


def test_what_is_not_finite_is_null_at_any_depth() -> None:
    value = {"a": [1.5, math.nan, (math.inf, np.float64(-math.inf))], "b": {"c": math.nan}, "n": None, "s": "NaN"}
    assert strict(json_text(value, indent=1)) == {
        "a": [1.5, None, [None, None]],
        "b": {"c": None},
        "n": None,
        "s": "NaN",
    }


@pytest.mark.parametrize("resumed", [False, True])
def test_every_line_is_json_and_comes_back_as_nan(resumed: bool, tmp_path: Path) -> None:
    """Also one of release 0.1, which wrote NaN, once the run goes on."""
    folder = epath.Path(tmp_path)
    if resumed:
        (folder / "metrics.jsonl").write_text('{"step": 1, "split": "train", "loss": NaN, "accuracy": Infinity}\n')
    log = Log(folder, step=1)
    if not resumed:
        log.write(1, "train", {"loss": math.nan, "accuracy": math.inf})
    log.close()
    (line,) = (folder / "metrics.jsonl").read_text().splitlines()
    assert strict(line) == {"step": 1, "split": "train", "loss": None, "accuracy": None}
    (record,) = read_log(folder / "metrics.jsonl")
    assert record.pop("step") == 1 and record.pop("split") == "train"
    assert all(math.isnan(v) for v in record.values()) and len(record) == 2


@pytest.fixture
def home(tmp_path: Path) -> epath.Path:
    return epath.Path(tmp_path)


def test_a_damaged_line_is_named(home: epath.Path) -> None:
    (home / "metrics.jsonl").write_text('{"step": 2}\n{"st\n{"step": 6}\n')
    with pytest.raises(UsageError, match="metrics.jsonl, line 2 is damaged: repair or remove that line"):
        list(read_log(home / "metrics.jsonl"))


@pytest.mark.parametrize("torn", ["", "{", '{"step": 6, "split": "tr', '{"step": 6, "split": "train", "loss": 0.2}'])
def test_a_torn_last_line_is_left_out_and_repaired(home: epath.Path, torn: str) -> None:
    """A whole record that lacks only its line end counts as written."""
    path = home / "metrics.jsonl"
    path.write_text('{"step": 2, "split": "train", "loss": 0.5}\n{"step": 4, "split": "train", "loss": 0.25}\n' + torn)
    steps = [2, 4, 6] if torn.endswith("}") else [2, 4]
    assert [r["step"] for r in read_log(path)] == steps
    log = Log(home, step=6)
    log.write(8, "train", {"loss": 0.1})
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [*steps, 8]
    assert path.read_text().endswith("\n")


def test_no_log_has_no_records(home: epath.Path) -> None:
    assert list(read_log(home / "metrics.jsonl")) == []


def test_log_resumed_has_no_gap_and_no_repeat(home: epath.Path) -> None:
    path = home / "metrics.jsonl"
    first = Log(home, step=0)
    for step in (2, 4, 6, 8):
        first.write(step, "train", {"loss": 1 / step, "odd": float("nan")})
        assert len(path.read_text().splitlines()) == step // 2  # on disk at once
    first.write(6, "eval", {"loss": 0.7})
    second = Log(home, step=6)  # a checkpoint of step 6 was resumed: its own lines stay
    kept = [(r["step"], r["split"]) for r in read_log(path)]
    assert kept == [(2, "train"), (4, "train"), (6, "train"), (6, "eval")]
    second.write(8, "train", {"loss": 1 / 8})
    records = list(read_log(path))
    assert [(r["step"], r["split"]) for r in records] == [*kept, (8, "train")]
    assert records[1]["loss"] == 1 / 4 and records[2]["loss"] == 1 / 6  # to the last bit
    assert [p.name for p in home.iterdir()] == ["metrics.jsonl"]


def test_a_log_that_starts_over_is_empty_and_an_inactive_one_touches_nothing(home: epath.Path) -> None:
    Log(home, step=0).write(2, "train", {"loss": 1.0})
    before = (home / "metrics.jsonl").read_text()
    idle = Log(home, step=0, active=False)
    idle.write(2, "train", {"loss": 1.0})
    idle.close()
    assert (home / "metrics.jsonl").read_text() == before
    Log(home, step=0)
    assert (home / "metrics.jsonl").read_text() == ""


def test_event_files_hold_the_values(home: epath.Path) -> None:
    log = Log(home, step=0, tensorboard=True)
    log.write(2, "eval", {"accuracy": 0.5})
    log.close()
    (events,) = (home / "tensorboard").iterdir()
    assert b"eval/accuracy" in events.read_bytes()
