"""What a configuration may hold; what a published number is held against."""

import dataclasses
from dataclasses import dataclass

import pytest
from conftest import tiny_experiment

from bigjax import UsageError
from bigjax.experiment import Published, RunConfig, check
from bigjax.models import MLP


@dataclass(frozen=True)
class Config(RunConfig):
    learning_rate: float = 1e-3
    dropout: float = 0.0
    features: tuple[int, ...] = (8, 8)


def test_defaults_pass():
    assert check(Config()) is None  # it raises where something is wrong
    assert None is check(
        Config(steps=1, epochs=0.5, minutes=0.1, validation=0.1, best="min:loss", ema=0.999, features=())
    )


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
        ({"seed": -1}, "--seed"),
        ({"features": (8, 0)}, "--features"),
        ({"learning_rate": float("nan")}, "--learning-rate nan"),
        ({"minutes": float("inf")}, "--minutes inf"),
        ({"validation": 1.0}, "--validation"),
        ({"ema": 1.0}, "--ema"),
        ({"dropout": -0.1}, "--dropout"),
        ({"dropout": 1.0}, "--dropout"),
        ({"batch_size": 10, "accumulate": 4}, "--accumulate 4 does not divide --batch-size 10"),
        ({"best": "accuracy", "validation": 0.1}, "--best accuracy: say max:METRIC or min:METRIC"),
        ({"best": "max:accuracy"}, "--best .*--validation 0.1"),
    ],
)
def test_a_value_without_sense_is_refused_by_its_flag(change, flag):
    with pytest.raises(UsageError, match=f"^{flag}") as error:
        check(Config(**change))
    assert "\n" not in str(error.value)


def test_published_numbers():
    accuracy, loss = Published("eval/accuracy", 0.9, "us"), Published("eval/loss", 0.5, "them", better="lower")
    reached = lambda p, **m: p.compare({"eval/" + k: v for k, v in m.items()})["reached"]  # noqa: E731
    assert reached(accuracy, accuracy=0.9) is True and reached(accuracy, accuracy=0.89) is False
    assert reached(loss, loss=0.5) is True and reached(loss, loss=0.51) is False
    assert reached(accuracy, loss=1.0) is None
    assert reached(accuracy, accuracy=float("nan")) is False
    assert accuracy.compare({}) == {"metric": "eval/accuracy", "value": 0.9, "source": "us", "reached": None}


def test_models_by_player():
    a, b = MLP(), MLP(features=(2,))
    assert tiny_experiment(model=a).models() == {"model": a}
    assert dataclasses.replace(tiny_experiment(), model={"generator": a, "critic": b}).models() == {
        "generator": a,
        "critic": b,
    }
