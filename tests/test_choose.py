"""Settings are compared on validation splits."""

import importlib.util
import itertools
import json
import sys
from types import ModuleType
from typing import Any

import pytest
from conftest import REPOSITORY

from bigjax.tools import results

EXPERIMENTS = REPOSITORY / "experiments"


def bench(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"bench_{name}", REPOSITORY / "bench" / f"{name}.py")
    sys.modules[spec.name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


choose = bench("choose")


def test_differences_are_paired() -> None:
    """On the splits that both have; the means are of each one's own."""
    first = {"numbers": {"0": {"loss": 1.0}, "1": {"loss": 3.0}, "2": {"loss": 8.0}}, "flags": "--a"}
    other = {"numbers": {"0": {"loss": 1.5}, "1": {"loss": 4.5}, "7": {"loss": 0.0}}, "flags": "--b"}
    assert choose.compared(first, other, "loss") == pytest.approx((2.0, 1.3229, 1.0, 0.5), abs=1e-4)
    assert choose.table([first, other], ["loss"]).splitlines() == [
        "loss 4.00000 ± 2.08167, to the first +0.00000 ± 0.00000 (3 splits): --a",
        "loss 2.00000 ± 1.32288, to the first +1.00000 ± 0.50000 (3 splits): --b",
    ]


def test_one_candidate_however_it_is_spelt() -> None:
    path = EXPERIMENTS / "vision" / "mnist_mlp.py"
    spelt = choose.settings(path, "--batch-size 128 --features 128 64 --seed 3 --log-every 7")
    assert spelt == choose.settings(path, "") != choose.settings(path, "--ema 0.9")


def test_a_flag_that_a_script_gains_leaves_what_was_compared() -> None:
    usual = {"steps": 5, "images": {"resize": None, "split": None}}
    assert choose.alike({"steps": 5, "images": {"resize": None}}, usual, usual)
    assert not choose.alike({"steps": 5, "images": {"resize": None}}, {**usual, "images": {"split": "a"}}, usual)
    assert not choose.alike({"steps": 4}, usual, usual)


def test_no_default_is_beaten() -> None:
    """By more than two standard errors of the difference, in the metric of the script's first row, where the data held
    out and the number of updates are the same. Scripts whose recipe is a paper's compare nothing; what was compared on
    other data than a script's own says nothing of its defaults.
    """
    rows = {row["script"]: row for row in reversed(results.rows(EXPERIMENTS).values())}
    kept = json.loads(choose.KEPT.read_text())
    assert "vision/mnist_cnn" in kept

    def recipe(settings: dict[str, Any]) -> dict[str, Any]:
        return {k: v for k, v in settings.items() if k not in ("steps", "validation")}

    for script, records in kept.items():
        metric = rows[f"{script}.py"]["metric"].removeprefix("eval/")
        sign = 1 if metric.endswith(results.PERCENT) else -1
        usual = recipe(choose.settings(EXPERIMENTS / f"{script}.py", ""))
        records = [r for r in records if r["settings"]["data"] == usual["data"]]
        ours = [r for r in records if choose.alike(recipe(r["settings"]), usual, usual)]
        assert ours or not records, f"{script}: its defaults were not compared with anything"
        for mine, other in itertools.product(ours, records):
            if all(mine["settings"][k] == other["settings"][k] for k in ("steps", "validation")) and mine != other:
                *_, better, unsure = choose.compared(mine, other, metric)
                assert not sign * better > 2 * unsure, f"{script}: {other['flags']} is better by {better:.4f}"
