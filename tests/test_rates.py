import jax
import numpy as np
import optax
import pytest

from bigjax import optim
from bigjax.ops import optimizers
from bigjax.run.rates import learning_rates

COSINE = optim.schedule("warmup-cosine", 0.5, steps=100)
with jax.numpy_dtype_promotion("standard"):
    HALF = {"learning_rate": float(COSINE(50))}


@pytest.mark.parametrize(("tx", "expected"), [
    (optax.sgd(0.1, momentum=0.9), {"learning_rate": 0.1}),
    (optax.sgd(COSINE), HALF),
    (optax.adam(COSINE), HALF),
    (optim.AdamW(0.5, weight_decay=0.1, clip=1.0)(100), HALF),
    (optim.adamw(0.25, weight_decay=0.1), {"learning_rate": 0.25}),
    (optimizers.lamb(COSINE, weight_decay=0.1), HALF),
    (optimizers.SGD(0.5, weight_decay=0.1)(100), HALF),
    (optimizers.LARS(0.5, weight_decay=0.1)(100), HALF),
    (optimizers.muon(0.1, adam_rate=COSINE), {"learning_rate/muon": 0.1, "learning_rate/adam": HALF["learning_rate"]}),
    (optax.chain(optax.scale_by_adam(), optax.scale_by_schedule(COSINE), optax.scale(-1.0)), HALF),
    (optax.chain(optax.clip(1.0), optax.scale(0.5), optax.sgd(0.5)), {"learning_rate": 0.25}),
    (optax.scale(0.5), {}),  # no rate: it doesn't turn the gradient round
    (optax.set_to_zero(), {}),
    (optax.GradientTransformation(lambda p: (), lambda u, s, p=None: (u, s)), {}),  # somebody's own
    (optax.MultiSteps(optax.sgd(COSINE), 4).gradient_transformation(), {}),  # it counts otherwise
    (optax.chain(optax.masked(optax.scale(0.1), {"a": True}), optax.sgd(0.1)), {}),  # two rates, of whom it isn't said
])  # fmt: skip
def test_the_rate_is_found_in_what_a_transformation_is_made_of(tx, expected):
    assert learning_rates({"model": tx})(50) == pytest.approx(expected)


def test_players_with_rates_of_their_own_are_named_and_equal_rates_are_one():
    two = {"discriminator": optax.sgd(0.1), "generator": optax.sgd(COSINE)}
    assert learning_rates(two)(50) == pytest.approx(
        {"learning_rate/discriminator": 0.1, "learning_rate/generator": HALF["learning_rate"]}
    )
    assert learning_rates(two | {"generator": optax.adam(0.1)})(50) == pytest.approx({"learning_rate": 0.1})


def test_it_is_the_rate_that_the_update_has():
    """SGD on a gradient of ones moves by the rate; as do updates that may transfer and promote nothing by the way."""
    tx = optax.sgd(COSINE)
    params = {"w": np.float32(0)}
    state, rates = tx.init(params), learning_rates({"model": tx})
    for count in range(3):
        with jax.numpy_dtype_promotion("standard"):
            updates, state = tx.update({"w": np.float32(1)}, state)
        with jax.transfer_guard("disallow"), jax.numpy_dtype_promotion("strict"):
            assert rates(count)["learning_rate"] == pytest.approx(float(-updates["w"]))
