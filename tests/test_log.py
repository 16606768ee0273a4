"""metrics.jsonl is JSON whatever was measured."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from etils import epath

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
