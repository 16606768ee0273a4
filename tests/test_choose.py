"""Settings are chosen on validation splits, and the scripts' defaults are those that were chosen."""

import importlib.util
import json
import sys
from types import ModuleType

import pytest
from conftest import REPOSITORY

from bigjax.run.workdir import difference

EXPERIMENTS = REPOSITORY / "experiments"


def bench(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"bench_{name}", REPOSITORY / "bench" / f"{name}.py")
    sys.modules[spec.name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


choose = bench("choose")
KEPT = json.loads(choose.KEPT.read_text())


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


@pytest.mark.parametrize("script", list(KEPT))
def test_defaults_are_what_was_chosen(script: str) -> None:
    """A script's defaults were tried on two splits at least, and what was tried in the same way was not better by more
    than two standard errors. Comparisons may be shorter than the real run, and hold out more.
    """
    now = choose.settings(EXPERIMENTS / f"{script}.py", "")
    way = lambda record: record["settings"]["validation"]  # noqa: E731
    same = lambda a: not difference(a | {k: now[k] for k in ("validation", "steps")}, now, now)  # noqa: E731
    ours = [record for record in KEPT[script] if same(record["settings"])]
    assert ours and all(len(record["numbers"]) >= 2 for record in ours)
    for mine in ours:
        for other in (r for r in KEPT[script] if way(r) == way(mine)):
            _, _, more, unsure = choose.compared(mine, other, "accuracy")
            assert not more > 2 * unsure, other["flags"]
