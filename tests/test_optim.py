"""Schedules at named points, decay masks, AdamW's arithmetic."""

import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bigjax import UsageError, optim
from bigjax.ops import optimizers

pytestmark = pytest.mark.usefixtures("optax_alone")
PEAK = 0.2
COS = 0.5 * (1 + math.cos(math.pi / 4))  # a quarter of the way down


@pytest.mark.parametrize(
    ("name", "options", "points"),
    [
        ("constant", {}, {0: 1, 500: 1, 999: 1}),
        ("step", {}, {0: 1, 499: 1, 500: 0.1, 749: 0.1, 750: 0.01, 899: 0.01, 900: 0.001, 999: 0.001}),
        ("cosine", {}, {0: 1, 250: COS, 500: 0.5, 1000: 0}),
        ("cosine", {"end": 0.1}, {0: 1, 250: 0.1 + 0.9 * COS, 500: 0.55, 1000: 0.1, 2000: 0.1}),
        ("warmup-cosine", {"warmup": 200}, {0: 0, 50: 0.25, 100: 0.5, 200: 1, 400: COS, 600: 0.5, 1000: 0}),
        ("warmup-cosine", {"end": 0.1}, {0: 0, 25: 0.5, 50: 1, 525: 0.55, 1000: 0.1}),  # warm-up over 5 %
        ("warmup-cosine", {"warmup": 0.2}, {0: 0, 100: 0.5, 200: 1, 400: COS, 600: 0.5, 1000: 0}),  # a share
        ("rsqrt", {"warmup": 100}, {0: 0.01, 49: 0.5, 99: 1, 399: 0.5, 899: 1 / 3}),
        ("rsqrt", {}, {24: 0.5, 49: 1, 199: 0.5}),
    ],
)
def test_schedule_at_named_points(name: str, options: dict, points: dict[int, float]) -> None:
    rate = optim.schedule(name, PEAK, steps=1000, **options)
    traced = jax.jit(rate)
    for n, share in points.items():
        np.testing.assert_allclose(rate(n), PEAK * share, rtol=1e-5, atol=1e-8, err_msg=f"{name} at {n}")
        np.testing.assert_allclose(traced(jnp.int32(n)), PEAK * share, rtol=1e-5, atol=1e-7, err_msg=f"{name} at {n}")


@pytest.mark.parametrize("name", ["constant", "step", "cosine", "warmup-cosine", "rsqrt"])
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_schedule_of_a_short_run_is_finite_and_never_above_the_peak(name: str, steps: int) -> None:
    rate = optim.schedule(name, PEAK, steps=steps)
    values = np.array([float(rate(n)) for n in range(steps + 1)])
    assert np.isfinite(values).all() and values.min() >= 0 and values.max() <= PEAK * 1.0001


def test_unknown_schedule_names_those_there_are() -> None:
    with pytest.raises(UsageError, match="unknown schedule 'linear'.*constant, step, cosine, warmup-cosine, rsqrt"):
        optim.schedule("linear", PEAK, steps=10)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["constant", "step", "cosine"])
def test_a_warm_up_that_would_be_ignored_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match=f"schedule '{name}' has no warm-up: use warmup-cosine or rsqrt"):
        optim.schedule(name, PEAK, steps=10, warmup=2)  # type: ignore[arg-type]


PARAMS = {
    "dense_0": {"kernel": jnp.array([[1.0, -2.0], [3.0, 0.5]]), "bias": jnp.array([4.0, -1.0])},
    "norm_0": {"scale": jnp.array([1.5, 2.0]), "bias": jnp.array([0.25, 0.75])},
    "biased": {"kernel": jnp.array([[-7.0]])},
}
DECAYED = {
    "dense_0": {"kernel": True, "bias": False},
    "norm_0": {"scale": False, "bias": False},
    "biased": {"kernel": True},
}


def test_mask_by_path() -> None:
    assert optim.mask(optim.NO_DECAY, matching=False)(PARAMS) == DECAYED
    assert optim.mask(r"^dense_0/kernel$")(PARAMS) == {
        "dense_0": {"kernel": True, "bias": False},
        "norm_0": {"scale": False, "bias": False},
        "biased": {"kernel": False},
    }
    shapes = jax.eval_shape(lambda: PARAMS)
    assert optim.mask("kernel")(shapes) == optim.mask("kernel")(PARAMS)


def test_adamw_with_zero_gradient_shrinks_the_decayed_by_rate_times_decay() -> None:
    rate, decay = 0.1, 0.02
    tx = optim.adamw(rate, weight_decay=decay)
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, PARAMS), tx.init(PARAMS), PARAMS)
    new = optax.apply_updates(PARAMS, updates)
    expected = jax.tree.map(lambda w, d: w - rate * decay * w if d else w, PARAMS, DECAYED)
    chex.assert_trees_all_close(new, expected, rtol=1e-6)
    still = jax.tree.map(lambda u, d: d or bool((u == 0).all()), updates, DECAYED)
    assert all(jax.tree.leaves(still))  # not by rounding: exactly


def test_adamw_first_update_by_hand() -> None:
    """Of Adam's first update the bias-corrected moments are the gradient and its square: rate × sign, decay aside."""
    rate, decay = 0.1, 0.02
    tx = optim.adamw(rate, weight_decay=decay, no_decay="^dense_0/bias$")
    grads = jax.tree.map(lambda w: jnp.sign(w) * 3, PARAMS)
    updates, _ = tx.update(grads, tx.init(PARAMS), PARAMS)
    expected = jax.tree.map(lambda w: -rate * (jnp.sign(w) + decay * w), PARAMS)
    expected["dense_0"]["bias"] = -rate * jnp.sign(PARAMS["dense_0"]["bias"])
    chex.assert_trees_all_close(updates, expected, rtol=1e-5)


@pytest.mark.parametrize(("size", "factor"), [(10.0, 0.2), (1.0, 1.0)])
def test_clip_is_of_the_global_norm_before_adam(size: float, factor: float) -> None:
    """The second moment remembers what Adam was given: the gradient scaled down to norm 2, or left as it was."""
    grads = {"a": jnp.array([0.6, 0.0]) * size, "b": jnp.array([[0.8]]) * size}
    tx = optim.adamw(1.0, clip=2.0, b2=0.0)
    _, state = tx.update(grads, tx.init(grads), grads)
    (nu,) = (s.nu for s in jax.tree.leaves(state, is_leaf=lambda s: hasattr(s, "nu")) if hasattr(s, "nu"))
    chex.assert_trees_all_close(nu, jax.tree.map(lambda g: jnp.square(factor * g), grads), rtol=1e-5)


def test_adamw_as_flags_is_adamw_under_its_schedule() -> None:
    flags = optim.AdamW(learning_rate=0.3, schedule="rsqrt", warmup=2, weight_decay=0.1, clip=0.5, b1=0.7, b2=0.8)
    rate = optim.schedule("rsqrt", 0.3, steps=5, warmup=2)
    assert_alike(flags(5), optim.adamw(rate, weight_decay=0.1, clip=0.5, b1=0.7, b2=0.8))


def assert_alike(ours: optax.GradientTransformation, expected: optax.GradientTransformation, **tolerance) -> None:
    """On three updates; without a tolerance bit for bit."""
    check = chex.assert_trees_all_close if tolerance else chex.assert_trees_all_equal
    states = [tx.init(PARAMS) for tx in (ours, expected)]
    for n in range(3):
        grads = jax.tree.map(lambda w: jnp.cos(w + n), PARAMS)  # noqa: B023
        (a, states[0]), (b, states[1]) = (tx.update(grads, s, PARAMS) for tx, s in zip((ours, expected), states))
        check(a, b, **tolerance)


DECAY = optim.mask(optim.NO_DECAY, matching=False)


@pytest.mark.parametrize("nesterov", [False, True])
def test_sgd_as_flags_adds_the_decay_to_the_gradient_before_the_momentum(nesterov: bool) -> None:
    flags = optimizers.SGD(learning_rate=0.3, warmup=2, momentum=0.8, nesterov=nesterov, weight_decay=0.1)
    ours, w, trace = flags(5), 2.0, 0.0
    params = {"kernel": jnp.array(w), "bias": jnp.array(w)}
    state = ours.init(params)
    for n in range(4):
        updates, state = ours.update(jax.tree.map(jnp.ones_like, params), state, params)
        rate = float(optim.schedule("warmup-cosine", 0.3, steps=5, warmup=2)(n))
        trace = 0.8 * trace + 1 + 0.1 * w
        expected = -rate * (0.8 * trace + 1 + 0.1 * w if nesterov else trace)
        np.testing.assert_allclose(updates["kernel"], expected, rtol=1e-5)
        assert n == 0 or abs(float(updates["bias"]) - expected) > 0.01  # no decay of a bias
        params = optax.apply_updates(params, updates)
        w = float(params["kernel"])


@pytest.mark.parametrize("nesterov", [False, True])
def test_lars_as_flags_is_optaxs(nesterov: bool) -> None:
    flags = optimizers.LARS(
        learning_rate=3.0, warmup=0.4, momentum=0.8, nesterov=nesterov, weight_decay=0.1, trust=0.02
    )
    rate = optim.schedule("warmup-cosine", 3.0, steps=5, warmup=2)
    how = {"weight_decay_mask": DECAY, "trust_ratio_mask": DECAY, "momentum": 0.8, "nesterov": nesterov}
    assert_alike(flags(5), optax.lars(rate, 0.1, trust_coefficient=0.02, **how), rtol=1e-5)
    assert dict(vars(optimizers.LARS(**vars(optimizers.SGD())))) == vars(optimizers.SGD()) | {"trust": 0.001}
