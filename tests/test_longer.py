"""--extend: a run that goes on to a greater length, and what else may change from one session to the next."""

import json
import shutil
from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp
import optax
import pytest
from conftest import tiny_experiment
from test_train import fit, log, numbers, saved

from bigjax import UsageError
from bigjax.models import MLP
from bigjax.optim import adamw, schedule


def experiment(**changes: Any) -> Any:
    return tiny_experiment(model=MLP(features=(8,), outputs=3, dropout=0.1, batch_norm=True), **changes)


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("short") / "run"
    fit(folder, experiment(), ema=0.9)
    return folder


@pytest.fixture
def own(short: Path, tmp_path: Path) -> Path:
    """A copy of the finished run of 6 updates."""
    shutil.copytree(short, tmp_path / "run")
    return tmp_path / "run"


def test_a_longer_run_equals_one_of_that_length_from_the_start(own: Path, tmp_path: Path) -> None:
    """With a constant schedule, bit for bit: state and log."""
    run = fit(own, experiment(), ema=0.9, steps=12, extend=True)
    assert run.result["step"] == 12 and int(run.state.step) == 12
    fit(tmp_path / "straight", experiment(), ema=0.9, steps=12)
    chex.assert_trees_all_equal(saved(own, 12), saved(tmp_path / "straight", 12))
    assert numbers(own) == numbers(tmp_path / "straight")
    record = json.loads((own / "config.json").read_text())
    assert (record["steps"], record["extended"]) == (12, [{"from": 6, "to": 12}])
    again = fit(own, experiment(), ema=0.9, steps=12, extend=True)  # the same command shows the result
    assert again.result == run.result
    assert fit(own, experiment(), ema=0.9, steps=12).result == run.result


def test_the_schedule_is_that_of_the_new_length(own: Path, tmp_path: Path) -> None:
    """From where it goes on; the moments are kept."""
    cosine = lambda steps: optax.sgd(schedule("cosine", 0.1, steps=steps))  # noqa: E731
    fit(tmp_path / "run6", experiment(tx=cosine))
    before = saved(tmp_path / "run6", 6)["state"]["params"]
    fit(tmp_path / "run6", experiment(tx=cosine), steps=9, extend=True)
    told = [line["update_norm"] for line in log(tmp_path / "run6") if line["split"] == "train"]
    assert told[-1] > 0  # at the old end the rate was 0
    with pytest.raises(AssertionError):
        chex.assert_trees_all_equal(before, saved(tmp_path / "run6", 9)["state"]["params"])


def test_another_length_without_extend_is_refused_in_a_line_that_names_it(own: Path) -> None:
    with pytest.raises(UsageError) as e:
        fit(own, experiment(), ema=0.9, steps=12)
    assert "of another length (it has --steps 6, not --steps 12): add --extend to go on" in str(e.value)
    assert "\n" not in str(e.value)
    with pytest.raises(UsageError, match=r"\(it has --steps 6, not --steps 6 --minutes 5.0\): add"):
        fit(own, experiment(), ema=0.9, minutes=5.0)


@pytest.mark.parametrize("changes, said", [
    ({"steps": 4}, "has 6 updates, and 4 are not more: give more"),
    ({"steps": 12, "seed": 1}, "belongs to a run with other settings"),
    ({"steps": 12, "experiment": {"tx": optax.sgd(1.0)}}, "belongs to a run with other code or data"),
])  # fmt: skip
def test_what_cannot_be_extended_keeps_its_result(changes: dict[str, Any], said: str, own: Path) -> None:
    kept = {name: (own / name).read_bytes() for name in ("result.json", "metrics.jsonl", "config.json")}
    with pytest.raises(UsageError, match=said) as e:
        fit(own, experiment(**changes.pop("experiment", {})), ema=0.9, extend=True, **changes)
    assert "steps" not in str(e.value)
    assert kept == {name: (own / name).read_bytes() for name in kept}


def test_killed_while_it_goes_on(own: Path, tmp_path: Path) -> None:
    """After the new length was recorded and before anything was saved: the same command, or the plain one, goes on."""

    class Killed(BaseException):
        pass

    def hook(step: int, split: str, values: Any) -> None:
        raise Killed

    with pytest.raises(Killed):
        fit(own, experiment(on_log=hook), ema=0.9, steps=12, extend=True)
    assert not (own / "result.json").exists()
    run = fit(own, experiment(), ema=0.9, steps=12)
    assert run.result["step"] == 12 and [line["step"] for line in log(own) if line["split"] == "train"][-1] == 12
    assert json.loads((own / "config.json").read_text())["extended"] == [{"from": 6, "to": 12}]


def test_epochs_may_grow_too_and_a_new_run_may_say_extend(tmp_path: Path) -> None:
    run = fit(tmp_path / "run", steps=None, epochs=1.0, extend=True)
    assert run.result["step"] == 8  # 60 examples by 8
    more = fit(tmp_path / "run", steps=None, epochs=2.0, extend=True)
    assert more.result["step"] == 15


def test_how_often_something_is_told_may_change(short: Path, tmp_path: Path) -> None:
    """In a run that goes on; what is trained stays the same."""
    folder = tmp_path / "run"
    shutil.copytree(short, folder)
    (folder / "result.json").unlink()
    shutil.rmtree(folder / "checkpoints" / "6")
    fit(folder, experiment(), ema=0.9, log_every=1, eval_every=2, save_every=5, keep=1)
    chex.assert_trees_all_equal(saved(folder, 6)["state"], saved(short, 6)["state"])
    assert [line["step"] for line in log(folder) if line["split"] == "train"] == [
        2,
        4,
        5,
        6,
    ]  # the window that was open


def test_adam_goes_on_with_its_moments(tmp_path: Path) -> None:
    fit(tmp_path / "run", tiny_experiment(tx=adamw(1e-2)))
    count = jax.tree.leaves(saved(tmp_path / "run", 6)["state"]["opt_state"])
    fit(tmp_path / "run", tiny_experiment(tx=adamw(1e-2)), steps=8, extend=True)
    after = jax.tree.leaves(saved(tmp_path / "run", 8)["state"]["opt_state"])
    assert any(jnp.issubdtype(x.dtype, jnp.integer) and int(x) == 8 for x in after) and len(after) == len(count)
