"""Settings are compared on validation splits."""

import importlib.util
import sys
from types import ModuleType

import pytest
from conftest import REPOSITORY

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
