"""What a configuration may hold; what a published number is held against."""

import dataclasses
from dataclasses import dataclass
from typing import Annotated, Any

import jax
import numpy as np
import optax
import pytest
from conftest import tiny_experiment

from bigjax import UsageError, cli
from bigjax.experiment import Fraction, Positive, Published, RunConfig, Within, check, key_of, size_of
from bigjax.task import Task


@dataclass(frozen=True)
class Group:
    rate: Annotated[float, Positive] = 0.1
    sizes: Annotated[tuple[int, ...], Within(2, 9)] = (3,)


@dataclass(frozen=True)
class Config(RunConfig):
    batch_size: int = 64  # a script's default: what RunConfig says of the number still holds
    learning_rate: Annotated[float, Positive] = 1e-3
    dropout: Annotated[float, Fraction] = 0.0
    features: Annotated[tuple[int, ...], Positive] = (8, 8)
    betas: tuple[float, float] = (0.9, 0.999)
    reward_min: float = 0.0
    group: Group = Group()
    flat: cli.Flat[Group] = Group()


def test_defaults_pass():
    assert check(Config()) is None  # it raises where something is wrong
    assert None is check(
        Config(steps=1, epochs=0.5, minutes=0.1, validation=0.1, best="min:loss", ema=0.999, features=())
    )
    assert check(Config(betas=(0.0, 0.9), reward_min=-1.0)) is None  # by their annotation, not by their names


@pytest.mark.parametrize(
    "change, flag",
    [
        *(
            ({name: value}, "--" + name.replace("_", "-"))
            for name in (
                "steps",
                "epochs",
                "minutes",
                "batch_size",
                "accumulate",
                "log_every",
                "eval_every",
                "save_every",
                "keep",
                "learning_rate",
            )
            for value in (0, -1)
        ),
        ({"seed": -1}, "--seed -1: give a whole number from 0 up to, but below, 18446744073709551616"),
        ({"seed": 2**64}, "--seed 18446744073709551616: give a whole number"),
        ({"split_seed": 10**400}, "--split-seed 10+: give a whole number"),
        ({"split_seed": 1.5}, "--split-seed 1.5: give a whole number"),
        ({"steps": 2**31}, "--steps 2147483648: give a whole number from 1 up to, but below, 2147483648"),
        ({"log_every": 2**40}, "--log-every"),
        ({"features": (8, 0)}, "--features"),
        ({"learning_rate": float("nan")}, "--learning-rate nan"),
        ({"minutes": float("inf")}, "--minutes inf"),
        ({"validation": 1.0}, "--validation"),
        ({"ema": 1.0}, "--ema"),
        ({"dropout": -0.1}, "--dropout"),
        ({"dropout": 1.0}, "--dropout"),
        ({"betas": (0.9, float("nan"))}, "--betas nan: give a finite number"),
        ({"group": Group(rate=0.0)}, "--group.rate 0.0: give a number above 0"),
        ({"group": Group(sizes=(4, 9))}, "--group.sizes 9: give a number from 2 up to, but below, 9"),
        ({"flat": Group(rate=-1.0)}, "--rate -1.0"),
        ({"batch_size": 10, "accumulate": 4}, "--accumulate 4 does not divide --batch-size 10"),
        ({"best": "accuracy", "validation": 0.1}, "--best accuracy: say max:METRIC or min:METRIC"),
        ({"best": "max:accuracy"}, "--best .*--validation 0.1"),
    ],
)
def test_a_value_without_sense_is_refused_by_its_flag(change, flag):
    with pytest.raises(UsageError, match=f"^{flag}") as error:
        check(Config(**change))
    assert "\n" not in str(error.value)


def test_each_seed_has_a_key_of_its_own_and_small_ones_have_jaxs():
    seeds = [0, 7, 2**31, 2**32 - 1, 2**32, 2**32 + 7, 2**63 - 1, 2**63, 2**64 - 1]
    check(Config(seed=seeds[-1], split_seed=seeds[-1]))
    bits = [jax.random.key_data(key_of(seed)).tolist() for seed in seeds]
    assert len(set(map(tuple, bits))) == len(seeds)
    assert bits[:4] == [jax.random.key_data(jax.random.key(seed)).tolist() for seed in seeds[:4]]


def test_published_numbers():
    accuracy, loss = Published("eval/accuracy", 0.9, "us"), Published("eval/loss", 0.5, "them", better="lower")
    reached = lambda p, **m: p.compare({"eval/" + k: v for k, v in m.items()})["reached"]  # noqa: E731
    assert reached(accuracy, accuracy=0.9) is True and reached(accuracy, accuracy=0.89) is False
    assert reached(loss, loss=0.5) is True and reached(loss, loss=0.51) is False
    assert reached(accuracy, loss=1.0) is None
    assert reached(accuracy, accuracy=float("nan")) is False
    assert accuracy.compare({}) == {"metric": "eval/accuracy", "value": 0.9, "source": "us", "reached": None}


def players(*names: str) -> Task:
    return Task({}, lambda *_: ({}, {}), dict.fromkeys(names, lambda *_: None), lambda *_: {})


def test_tx_may_be_plain_by_player_or_a_function_of_the_steps():
    sgd, adam = optax.sgd(0.1), optax.adam(0.1)
    both = {"actor": sgd, "critic": adam}

    def given(tx: Any, *names: str) -> Any:
        return dataclasses.replace(tiny_experiment(), tx=tx, task=players(*names)).transformations(9)

    assert given(sgd, "model") == {"model": sgd} == given(lambda steps: sgd, "model")
    assert given(sgd, "actor", "critic") == {"actor": sgd, "critic": sgd}
    assert given(both, "actor", "critic") == both == given(lambda steps: both, "actor", "critic")
    asked = []
    given(lambda steps: asked.append(steps) or sgd, "model")
    assert asked == [9]
    with pytest.raises(UsageError, match="player 'critic' has a loss but no tx: add it to tx .actor."):
        given({"actor": sgd}, "actor", "critic")
    with pytest.raises(UsageError, match="tx names the player 'critic', which has no loss .there are actor."):
        given(both, "actor")
    with pytest.raises(UsageError, match="tx gives a float: give an optax transformation"):
        given(lambda steps: 0.1, "actor")
    for wrong in (optax.sgd, None, 1e-3):
        with pytest.raises(UsageError, match="give an optax transformation, as optax.sgd"):
            given(wrong, "actor")


@pytest.mark.parametrize(
    ("split", "said"),
    [
        ({"x": np.ones((4, 2)), "mask": np.ones(4)}, "a field is called 'mask', which bigjax gives to every batch"),
        ({"x": np.ones((4, 2)), "index": np.ones(4)}, "a field is called 'index'"),
        ({"x": [[1.0], [2.0]]}, "field 'x' is no array with one row an example, but a list"),
        ({"x": np.ones((4, 2)), "scale": 2.0}, "field 'scale' is no array"),
    ],
)
def test_fields_that_are_none(split: Any, said: str):
    with pytest.raises(UsageError, match=said):
        size_of(split)
