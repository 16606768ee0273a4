"""The one step, against arithmetic written out. B batch, D inputs, H hidden, C classes."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import blobs, tiny_experiment
from jax import Array

from bigjax import UsageError
from bigjax.evaluation import evaluate, evaluator
from bigjax.experiment import RunConfig
from bigjax.look.diagnose import first_nonfinite, layer_rows
from bigjax.models import MLP
from bigjax.sharding import MeshConfig, make_mesh
from bigjax.step import TrainState, averages_of, gradients, init_state, norms, to_float, train_step
from bigjax.task import Task, fields
from bigjax.tasks import classify, regress

KEY = jax.random.key(0)


def rows(mask: list[float] | None = None, **data: Any) -> dict[str, Array]:
    size = len(next(iter(data.values())))
    batch = {"index": np.arange(size, dtype=np.int32), "mask": np.ones(size, np.float32) if mask is None else mask}
    return {k: jnp.asarray(v, jnp.float32 if k == "mask" else None) for k, v in (batch | data).items()}


def start(task: Task, batch: dict[str, Array], tx: Mapping[str, Any], *, ema: float = 0.0) -> TrainState:
    return jax.jit(partial(init_state, task=task, tx=tx, ema=ema))(KEY, batch)


def stepper(task: Task, tx: Mapping[str, Any], **options: Any) -> Callable[..., Any]:
    return jax.jit(partial(train_step, task=task, tx=tx, **options))


# --- gradients against the chain rule


def small_regression() -> tuple[Task, dict[str, Array]]:
    random = np.random.default_rng(0)
    task = regress(MLP(features=(3,), outputs=1, activation="tanh"))
    mask = [1, 1, 0, 1, 1]
    return task, rows(
        mask, x=random.normal(size=(5, 2)).astype(np.float32), target=random.normal(size=5).astype(np.float32)
    )


def chain_rule(params: Any, batch: dict[str, Array]) -> tuple[float, dict[str, Any]]:
    """Loss and gradient of the 2-3-1 network with tanh under the mean squared error of the real rows, by hand."""
    x_BD, target_B, mask_B = (np.asarray(batch[k], np.float64) for k in ("x", "target", "mask"))
    hidden, top = (jax.tree.map(lambda w: np.asarray(w, np.float64), params[k]) for k in ("dense_0", "logits"))
    h_BH = np.tanh(x_BD @ hidden["kernel"] + hidden["bias"])
    y_B = (h_BH @ top["kernel"] + top["bias"])[:, 0]
    loss = (mask_B * (y_B - target_B) ** 2).sum() / mask_B.sum()
    dy_B1 = (2 * mask_B * (y_B - target_B) / mask_B.sum())[:, None]
    da_BH = dy_B1 * top["kernel"].T * (1 - h_BH**2)  # d tanh(a) = 1 - tanh(a)²
    return loss, {
        "logits": {"kernel": h_BH.T @ dy_B1, "bias": dy_B1.sum(0)},
        "dense_0": {"kernel": x_BD.T @ da_BH, "bias": da_BH.sum(0)},
    }


def test_gradient_and_sgd_step_are_the_chain_rules() -> None:
    task, batch = small_regression()
    rate = 0.3
    tx = {"model": optax.sgd(rate)}
    state = start(task, batch, tx)
    loss, expected = chain_rule(state.params["model"], batch)
    grads, own, out, value = gradients(
        task.losses["model"], "model", state.params, state.model_state, batch, KEY, accumulate=1
    )
    chex.assert_shape(grads["dense_0"]["kernel"], (2, 3))
    chex.assert_trees_all_close(grads, expected, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose([value, out["loss"][0] / out["loss"][1]], loss, rtol=1e-5)

    step, params = stepper(task, tx), state.params["model"]
    for n in (1, 2):
        _, grads = chain_rule(params, batch)
        state, out = step(state, batch, KEY)
        params = jax.tree.map(lambda w, g: w - rate * g, params, grads)
        chex.assert_trees_all_close(state.params["model"], params, rtol=1e-4, atol=1e-6)
        assert int(state.step) == n and int(state.skipped) == 0
        flat = np.concatenate([np.ravel(g) for g in jax.tree.leaves(grads)])
        np.testing.assert_allclose(out["grad_norm"][0], np.linalg.norm(flat), rtol=1e-4)
        np.testing.assert_allclose(out["update_norm"][0], rate * np.linalg.norm(flat), rtol=1e-4)
        after = np.concatenate([np.ravel(w) for w in jax.tree.leaves(params)])
        np.testing.assert_allclose(out["param_norm"][0], np.linalg.norm(after), rtol=1e-4)
        top = np.linalg.norm([*np.ravel(grads["logits"]["kernel"]), *grads["logits"]["bias"]])
        np.testing.assert_allclose(out["grad_norm/model/logits"][0], top, rtol=1e-4)


def test_norms_are_numpys_in_all_and_per_layer() -> None:
    random = np.random.default_rng(0)
    a, b, c = (random.normal(size=s).astype(np.float32) for s in ((3, 2), (2,), (4,)))
    trees = {"one": {"first": {"kernel": a, "bias": b}, "empty": {}}, "two": {"first": {"scale": c}}}
    out = {k: float(s / n) for k, (s, n) in norms({"grad_norm": jax.tree.map(jnp.asarray, trees)}, True).items()}
    expected = {
        "grad_norm": np.sqrt(sum(np.square(v).sum() for v in (a, b, c))),
        "grad_norm/one/first": np.sqrt(np.square(a).sum() + np.square(b).sum()),
        "grad_norm/two/first": np.linalg.norm(c),
    }
    assert out.keys() == expected.keys()
    for k, v in expected.items():
        np.testing.assert_allclose(out[k], v, rtol=1e-6)


# --- accumulation


def test_accumulated_parts_give_the_update_of_the_whole() -> None:
    """With dropout, a penalty, and parts whose real rows are unequal in number."""
    model = MLP(features=(6,), outputs=3, dropout=0.5)
    task = classify(model, classes=3, inputs=fields("x"), l2=0.01)
    tx = {"model": optax.sgd(0.2, momentum=0.9)}
    random = np.random.default_rng(0)
    batch = rows(
        [1, 1, 1, 0, 1, 0, 1, 0],  # every second: 4 and 1; every fourth: 2, 1, 2, 0
        x=random.normal(size=(8, 4)).astype(np.float32),
        label=random.integers(0, 3, 8).astype(np.int32),
    )
    ends = {}
    for parts in (1, 2, 4):
        state, step = start(task, batch, tx), stepper(task, tx, accumulate=parts)
        for _ in range(4):
            state, out = step(state, batch, KEY)
        ends[parts] = (state, out)
    for parts in (2, 4):
        chex.assert_trees_all_close(ends[parts], ends[1], rtol=1e-5, atol=1e-6)
    moved = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), ends[1][0].params, start(task, batch, tx).params)
    assert min(jax.tree.leaves(moved)) > 1e-3


# --- players: a and b pull against each other, and both read `ground`, which no loss names


def pull(player: str, other: str, sign: float) -> Any:
    """The loss (B,): sign·(own·x)(other·x) + own², times ground; its own state counts calls and reads the other's."""

    def loss(params: Any, model_state: Any, batch: dict[str, Array], key: Array) -> Any:
        own, them, ground = params[player]["w"], params[other]["w"], params["ground"]["w"]
        loss_B = ground * (sign * (batch["x"] @ own) * (batch["x"] @ them) + jnp.square(own).sum())
        total, count = (loss_B * batch["mask"]).sum(), batch["mask"].sum()
        state = {"calls": model_state[player]["calls"] + 1, "seen": model_state[other]["calls"]}
        return (total, count), (state, {f"{player}_loss": (total, count)})

    return loss


def two_players(*names: str) -> Task:
    both = {"a": pull("a", "b", 1.0), "b": pull("b", "a", -1.0)}

    def init(key: Array, batch: dict[str, Array]) -> Any:
        params = {"a": jnp.array([1.0, -0.5]), "b": jnp.array([0.25, 2.0]), "ground": jnp.array([0.7])}
        state = {p: {"calls": jnp.array(10.0 * i), "seen": jnp.zeros(())} for i, p in enumerate("ab", 1)}
        return {k: {"w": w} for k, w in params.items()}, state

    return Task({}, init=init, losses={n: both[n] for n in names}, evaluate=lambda *_: {})


PAIR = rows([1, 0, 1], x=np.array([[1, 2], [9, 9], [-1, 0.5]], np.float32))


def pull_gradient(own: np.ndarray, them: np.ndarray, sign: float) -> np.ndarray:
    x_BD = np.asarray(PAIR["x"], np.float64)[[0, 2]]
    return 0.7 * (sign * x_BD * (x_BD @ them)[:, None] + 2 * own).mean(0)


def test_players_move_in_order_each_by_its_own_gradient() -> None:
    task, rate = two_players("a", "b"), {"a": 0.1, "b": 0.03}
    tx = {p: optax.sgd(r, momentum=0.9) for p, r in rate.items()}
    old = start(task, PAIR, tx)
    new, out = stepper(task, tx)(old, PAIR, KEY)
    a, b = (np.asarray(old.params[p]["w"], np.float64) for p in "ab")
    step_a = pull_gradient(a, b, 1.0)
    step_b = pull_gradient(b, a - rate["a"] * step_a, -1.0)  # b meets the new a
    np.testing.assert_allclose(new.params["a"]["w"], a - rate["a"] * step_a, rtol=1e-5)
    np.testing.assert_allclose(new.params["b"]["w"], b - rate["b"] * step_b, rtol=1e-5)
    assert new.opt_state.keys() == {"a", "b"}
    traces = {p: jax.tree.leaves(new.opt_state[p])[0] for p in "ab"}
    chex.assert_trees_all_close(traces, {"a": step_a, "b": step_b}, rtol=1e-5)
    assert {p: float(s["calls"]) for p, s in new.model_state.items()} == {"a": 11, "b": 21}
    assert [float(new.model_state[p]["seen"]) for p in "ab"] == [20, 11]
    assert {"a_loss", "b_loss", "grad_norm/a/w", "grad_norm/b/w"} <= out.keys() and "grad_norm/ground/w" not in out


def test_each_accumulated_part_goes_on_from_the_state_of_the_part_before() -> None:
    task, tx = two_players("a", "b"), {p: optax.sgd(0.1) for p in "ab"}
    four = jax.tree.map(lambda x: jnp.concatenate([x[:2], x[1:]]), PAIR)
    new, _ = stepper(task, tx, accumulate=4)(start(task, four, tx), four, KEY)
    assert {p: float(s["calls"]) for p, s in new.model_state.items()} == {"a": 14, "b": 24}


@pytest.mark.parametrize("player", ["a", "b"])
def test_a_players_loss_leaves_every_bit_of_the_others_alone(player: str) -> None:
    task = two_players(player)
    tx = {p: optax.adam(0.1) for p in "ab"}
    old = start(two_players("a", "b"), PAIR, tx, ema=0.5)
    new, _ = stepper(task, tx, ema=0.5)(old, PAIR, KEY)
    for name in {"a", "b", "ground"} - {player}:
        for part in ("params", "opt_state", "model_state"):
            before, after = (getattr(s, part).get(name, {}) for s in (old, new))
            chex.assert_trees_all_equal(before, after)
    for part in ("params", "opt_state", "model_state"):
        changed = jax.tree.map(
            lambda x, y: bool((x != y).any()), getattr(old, part)[player], getattr(new, part)[player]
        )
        assert all(jax.tree.leaves(changed)), part


# --- averages, keys, pixels


def test_averages_begin_as_running_means_and_then_decay() -> None:
    """Of the parameters and of BatchNorm's statistics alike; the initial values are not in them."""
    model = MLP(features=(3,), outputs=1, batch_norm=True)
    task, (_, batch) = regress(model), small_regression()
    tx, decay = {"model": optax.sgd(0.3)}, 0.6
    state, step = start(task, batch, tx, ema=decay), stepper(task, tx, ema=decay)
    chex.assert_trees_all_equal(state.ema, averages_of(state.params, state.model_state))
    assert state.ema["model"].keys() == {"params", "batch_stats"}
    expected, seen = None, []
    for n in range(5):
        state, _ = step(state, batch, KEY)
        seen.append(averages_of(state.params, state.model_state))
        d = min(decay, n / (n + 1))
        expected = jax.tree.map(lambda e, p, d=d: d * e + (1 - d) * p, expected or seen[0], seen[-1])
        if n == 1:  # the mean of the two
            chex.assert_trees_all_close(state.ema, jax.tree.map(lambda a, b: (a + b) / 2, *seen), rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_close(state.ema, expected, rtol=1e-5, atol=1e-6)
    params, model_state = state.evaluated()
    average = {"params": params["model"], "batch_stats": model_state["model"]["batch_stats"]}
    chex.assert_trees_all_equal(average, state.ema["model"])
    assert start(task, batch, tx).ema == {}
    plain = start(task, batch, tx)
    chex.assert_trees_all_equal(plain.evaluated(), (plain.params, plain.model_state))


def test_only_statistics_are_averaged_with_the_parameters() -> None:
    """Other model state, a replay memory say, is not kept twice."""
    task, tx = two_players("a", "b"), {p: optax.sgd(0.1) for p in "ab"}
    state, _ = stepper(task, tx, ema=0.5)(start(task, PAIR, tx, ema=0.5), PAIR, KEY)
    assert all(own.keys() == {"params"} for own in state.ema.values())
    chex.assert_trees_all_equal(state.evaluated()[1], state.model_state)


def dropped_run() -> tuple[Task, dict[str, Array], dict[str, Any]]:
    task = classify(MLP(features=(8,), outputs=3, dropout=0.5), classes=3)
    return task, rows(**blobs(8, seed=0)), {"model": optax.adam(0.01)}


def test_large_seeds_train_and_are_none_of_the_small_ones(fit_tiny: Callable[..., Any]) -> None:
    """Two that agree in their low 32 bits, and the largest."""
    flags = {"steps": 1, "log_every": 1, "eval_every": 1, "save_every": 1, "validation": 0.2}
    runs = [fit_tiny(folder=str(s), seed=s, split_seed=s, **flags) for s in (7, 7 + 2**32, 2**64 - 1)]
    assert len({np.asarray(run.state.params["model"]["dense_0"]["kernel"]).tobytes() for run in runs}) == 3
    assert [run.result["seed"] for run in runs] == [7, 7 + 2**32, 2**64 - 1]
    config = RunConfig(workdir=str(runs[-1].workdir), batch_size=8, seed=2**64 - 1, split_seed=2**64 - 1, **flags)
    assert evaluate(tiny_experiment(), config)["step"] == 1


def test_seeds_share_one_compilation_and_decide_the_bits() -> None:
    task, batch, tx = dropped_run()

    @jax.jit
    @chex.assert_max_traces(n=1)
    def step(state: TrainState, batch: dict[str, Array], key: Array) -> Any:
        return train_step(state, batch, key, task=task, tx=tx)

    first = start(task, batch, tx)

    def run(seed: int) -> tuple[TrainState, Any]:
        state = first
        for _ in range(2):
            state, out = step(state, batch, jax.random.key(seed))
        return state, out

    ends = [run(seed) for seed in range(5)]
    assert step._cache_size() == 1
    chex.assert_trees_all_equal(ends[3], run(3))
    kernels = {np.asarray(s.params["model"]["dense_0"]["kernel"]).tobytes() for s, _ in ends}
    assert len(kernels) == 5
    assert not any(jnp.issubdtype(x.dtype, jax.dtypes.prng_key) for x in jax.tree.leaves(first))
    again, _ = step(first.replace(step=first.step + 1), batch, jax.random.key(3))
    once, _ = step(first, batch, jax.random.key(3))  # the same state, key and batch at another step: another mask
    assert (again.params["model"]["dense_0"]["kernel"] != once.params["model"]["dense_0"]["kernel"]).any()


def test_uint8_pixels_are_scaled_once_before_augmentation() -> None:
    task, batch, tx = *dropped_run()[:2], {"model": optax.sgd(0.1)}
    assert batch["image"].dtype == jnp.uint8
    real = batch | {"image": jnp.asarray(np.asarray(batch["image"], np.float32) / 255)}
    chex.assert_trees_all_close(to_float(batch), real, rtol=1e-6)  # XLA multiplies by 1/255
    real = to_float(batch)
    chex.assert_trees_all_equal(to_float(real), real)
    seen = []

    def augment(batch: dict[str, Array], key: Array) -> dict[str, Array]:
        seen.append(batch["image"].dtype)
        return batch | {"image": batch["image"] / 2}

    first = start(task, batch, tx)
    step = stepper(task, tx, augment=augment)
    chex.assert_trees_all_close(step(first, batch, KEY), step(first, real, KEY), rtol=1e-5)
    assert set(seen) == {jnp.dtype("float32")}
    halved, _ = stepper(task, tx)(first, real | {"image": real["image"] / 2}, KEY)  # augmentation was applied, and once
    chex.assert_trees_all_close(halved.params, step(first, batch, KEY)[0].params, rtol=1e-5)


def test_augmentation_gets_another_key_each_step_but_the_same_for_every_player() -> None:
    keys: list[Any] = []

    def augment(batch: dict[str, Array], key: Array) -> dict[str, Array]:
        jax.debug.callback(lambda k: keys.append(k.tobytes()), jax.random.key_data(key), ordered=True)
        return batch

    task = two_players("a", "b")
    tx = {p: optax.sgd(0.1) for p in "ab"}
    state, step = start(task, PAIR, tx), stepper(task, tx, augment=augment)
    for _ in range(3):
        state, _ = step(state, PAIR, KEY)
    jax.effects_barrier()
    assert len(keys) == len(set(keys)) == 3


# --- what is not finite


@pytest.mark.parametrize("policy", ["stop", "skip"])
def test_a_nonfinite_update_is_dropped_whole_and_counted(policy: str) -> None:
    model = MLP(features=(4,), outputs=3, batch_norm=True)
    task, tx = classify(model, classes=3, inputs=fields("x")), {"model": optax.adam(0.01)}
    x_BD = np.random.default_rng(0).normal(size=(6, 2)).astype(np.float32)
    good = rows(x=x_BD, label=np.array([0, 1, 2, 0, 1, 2], np.int32))
    bad = good | {"x": good["x"].at[2, 1].set(jnp.nan)}
    state, step = (
        start(task, good, tx, ema=0.5),
        stepper(task, tx, ema=0.5, dropped=2**31 - 1 if policy == "skip" else 0),
    )
    one, out = step(state, good, KEY)
    assert out["skipped"] == (0, 1)
    two, out = step(one, bad, KEY)
    chex.assert_trees_all_equal(two.replace(step=one.step, skipped=one.skipped), one)
    assert (int(two.step), int(two.skipped)) == (2, 1)
    assert out["skipped"] == (1, 1)
    chex.assert_trees_all_equal(
        {k: v for k, v in out.items() if k != "skipped"}, {k: (0, 0) for k in out if k != "skipped"}
    )
    three, out = step(two, good, KEY)
    stands = jax.tree.map(lambda a, b: bool((a == b).all()), three, two)
    if policy == "stop":
        assert (int(three.step), int(three.skipped)) == (3, 2)
        assert all(jax.tree.leaves(stands.replace(step=True, skipped=True)))
        assert int(three.step) - int(three.skipped) == 1  # the number of the batch to blame
    else:
        assert (int(three.step), int(three.skipped)) == (3, 1)
        assert not any(jax.tree.leaves((stands.params, stands.ema, stands.model_state)))
        chex.assert_tree_all_finite(three)


@pytest.mark.parametrize("kind", ["loss", "gradient"])
def test_a_loss_or_gradient_alone_that_is_not_finite_is_dropped(kind: str) -> None:
    """A finite gradient of a loss that is NaN; an infinite gradient of a finite loss, whose updates are finite."""

    def loss(params: Any, state: Any, batch: Any, key: Array) -> Any:
        w = params["model"]["w"]
        value = (jnp.square(w - 1) + jnp.nan if kind == "loss" else jnp.sqrt(jnp.abs(w))).sum()
        return (value, jnp.ones(())), (state["model"], {})

    init = lambda *_: ({"model": {"w": jnp.zeros(2)}}, {"model": {}})  # noqa: E731
    task = Task({}, init=init, losses={"model": loss}, evaluate=lambda *_: {})
    signs = optax.stateless(lambda grads, _: jax.tree.map(lambda g: jnp.sign(g) + 1, grads))
    tx = {"model": optax.sgd(1.0) if kind == "loss" else signs}
    state, out = stepper(task, tx)(start(task, PAIR, tx), PAIR, KEY)
    assert int(state.skipped) == 1
    np.testing.assert_array_equal(state.params["model"]["w"], 0)


def test_a_nonfinite_update_of_a_finite_gradient_is_dropped() -> None:
    """As of an optimizer that divides by the norm of a gradient that is 0: the parameters must not be lost to it."""
    tx = {"a": optax.scale(float("nan")), "b": optax.sgd(0.1)}
    task = two_players("a")
    old = start(two_players("a", "b"), PAIR, tx)
    new, _ = stepper(task, tx)(old, PAIR, KEY)
    assert int(new.skipped) == 1
    chex.assert_trees_all_equal(new.params, old.params)


def test_a_later_players_nan_drops_the_earlier_players_update_too() -> None:
    task, tx = two_players("a", "b"), {"a": optax.sgd(0.1), "b": optax.sgd(0.1)}
    calm = dict(task.losses)

    def broken(*args: Any) -> Any:
        (total, count), rest = calm["b"](*args)
        return (total * jnp.nan, count), rest

    task = Task({}, init=task.init, losses=calm | {"b": broken}, evaluate=task.evaluate)
    old = start(task, PAIR, tx)
    new, _ = stepper(task, tx)(old, PAIR, KEY)
    chex.assert_trees_all_equal(new.replace(step=old.step, skipped=old.skipped), old)
    assert int(new.skipped) == 1


def test_drops_before_are_accepted_and_one_more_stops() -> None:
    """A run that skipped and is resumed to stop: dropped=1 goes on from one, and stands still after another."""
    task, tx = two_players("a", "b"), {p: optax.sgd(0.1) for p in "ab"}
    bad, step = PAIR | {"x": PAIR["x"] * jnp.nan}, stepper(task, tx)
    state = start(task, PAIR, tx).replace(skipped=jnp.int32(1), step=jnp.int32(5))
    good, _ = step(state, PAIR, KEY, dropped=1)
    assert int(good.skipped) == 1 and (good.params["a"]["w"] != state.params["a"]["w"]).all()
    stopped, _ = step(good, bad, KEY, dropped=1)
    after, _ = step(stopped, PAIR, KEY, dropped=1)
    chex.assert_trees_all_equal(after.params, good.params)
    assert int(after.step) - (int(after.skipped) - 1) == 6  # the number of the bad batch


def test_norms_by_layer_are_measured_only_when_asked() -> None:
    task, tx = two_players("a", "b"), {p: optax.sgd(0.1) for p in "ab"}
    first, step = start(task, PAIR, tx), stepper(task, tx)
    (_, with_), (_, without) = (step(first, PAIR, KEY, by_layer=jnp.array(b)) for b in (True, False))
    assert with_.keys() == without.keys()
    for name, (total, count) in without.items():
        layers = "/" in name or name == "param_norm"
        assert (float(total), float(count)) == (0, 0) if layers else (total, count) == with_[name]
        assert with_[name][1] == 1 or not layers


# --- what a task gives that is not what it should be


def task_with(loss: Any, **changes: Any) -> Task:
    init = lambda *_: ({"model": {"w": jnp.ones(2)}}, {"model": {}})  # noqa: E731
    return Task(**({"models": {}, "init": init, "losses": {"model": loss}, "evaluate": lambda *_: {}} | changes))


ONE = jnp.ones(())


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (lambda w: w.sum(), r"the loss of 'model' must give \(\(sum, count\)"),
        (lambda w: (w.sum(), ({}, {})), r"first part is no \(sum, count\) of two numbers, but \(\)"),
        (lambda w: ((w, ONE), ({}, {})), r"first part is no \(sum, count\)"),
        (lambda w: ((w.sum(), ONE), {}), "second part is no pair of a model state and a dict"),
        (
            lambda w: ((w.sum(), ONE), ({}, {"error": w.sum()})),
            r"gives the metric 'error' as something else than arrays \(sum, count\)",
        ),
    ],
)
def test_a_loss_of_another_form_is_named(given: Any, said: str) -> None:
    task = task_with(lambda params, state, batch, key: given(params["model"]["w"]))
    tx = {"model": optax.sgd(0.1)}
    with pytest.raises(UsageError, match=said) as error:
        train_step(start(task, PAIR, tx), PAIR, KEY, task=task, tx=tx)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["step", "split", "skipped", "grad_norm", "learning_rate", "learning_rate/a"])
def test_a_metric_with_a_name_of_the_logs_own_is_refused(name: str) -> None:
    task = task_with(lambda params, s, b, k: ((params["model"]["w"].sum(), ONE), ({}, {name: (ONE, ONE)})))
    with pytest.raises(UsageError, match=f"a metric called {name!r}"):
        train_step(start(task, PAIR, {"model": optax.sgd(0.1)}), PAIR, KEY, task=task, tx={"model": optax.sgd(0.1)})


def test_two_players_with_one_metric_are_named() -> None:
    task = two_players("a", "b")

    def same(loss: Any) -> Any:
        def renamed(*args: Any) -> Any:
            total, (state, out) = loss(*args)
            return total, (state, {"loss": next(iter(out.values()))})

        return renamed

    task = task_with(None, init=task.init, losses={k: same(v) for k, v in task.losses.items()})
    tx = {p: optax.sgd(0.1) for p in "ab"}
    with pytest.raises(UsageError, match="two players give a metric called 'loss'"):
        train_step(start(task, PAIR, tx), PAIR, KEY, task=task, tx=tx)


def test_a_field_that_the_data_have_not_is_named_with_those_there_are() -> None:
    task, tx = classify(MLP(features=(3,), outputs=3), classes=3), {"model": optax.sgd(0.1)}
    with pytest.raises(UsageError, match="no field 'image', which the task reads: there are x"):
        start(task, PAIR, tx)
    with pytest.raises(UsageError, match="a loss for 'critic', but task.init gives it no parameters: it has 'model'"):
        start(task_with(None, losses={"critic": None}), PAIR, tx)


def test_an_optimizer_may_ask_for_the_loss() -> None:
    """As optax.contrib.reduce_on_plateau does."""
    task, batch = small_regression()
    tx = {"model": optax.chain(optax.sgd(0.1), optax.contrib.reduce_on_plateau(patience=1, factor=0.5))}
    state, step = start(task, batch, tx), stepper(task, tx)
    for _ in range(3):
        state, _ = step(state, batch, KEY)
    chex.assert_tree_all_finite(state.params)


# --- evaluation


@pytest.mark.parametrize("metric", [jnp.ones(()), (jnp.ones(()),), 1.0])
def test_a_metric_of_the_evaluation_that_is_no_pair_is_named(metric: Any) -> None:
    task = task_with(None, evaluate=lambda *_: {"score": metric})
    judge = evaluator(task, batch_size=4, seed=0, mesh=make_mesh(MeshConfig(), batch_size=4))
    with pytest.raises(UsageError, match="task.evaluate gives the metric 'score' as something else"):
        judge({}, {}, blobs(4, seed=0))


def test_counts_beyond_float32_are_exact() -> None:
    """2²⁴ + 1 is no float32: whole numbers are counted as such, and merged on the host."""
    big = 2**24
    task = task_with(None, evaluate=lambda p, s, batch, key: {"n": (jnp.int32(big) + 1, batch["mask"].sum() * big)})
    judge = evaluator(task, batch_size=1, seed=0, mesh=make_mesh(MeshConfig(), batch_size=1))
    total, count = judge({}, {}, blobs(3, seed=0))["n"]
    assert total == 3 * big + 3 and count == 3 * big


@pytest.mark.parametrize("batch_size", [1, 7, 20, 33])
def test_evaluation_counts_each_example_exactly_once(batch_size: int) -> None:
    size = 20

    def count(params: Any, state: Any, batch: dict[str, Array], key: Array) -> Any:
        return {"each": (jnp.zeros(size).at[batch["index"]].add(batch["mask"]), batch["mask"].sum())}

    task = Task({}, init=None, losses={}, evaluate=count)  # type: ignore[arg-type]
    mesh = make_mesh(MeshConfig(), batch_size=batch_size)
    each, total = evaluator(task, batch_size=batch_size, seed=0, mesh=mesh)({}, {}, blobs(size, seed=0))["each"]
    np.testing.assert_array_equal(each, np.ones(size))
    assert total == size


@pytest.mark.parametrize("batch_size", [7, 20])
def test_evaluation_is_numpys_whatever_the_batch_size(batch_size: int) -> None:
    """Of uint8 images, under a linear model."""
    task, split = classify(MLP(features=(), outputs=3), classes=3, top_k=2), blobs(20, seed=1)
    params, state = task.init(KEY, to_float(rows(**split)))
    evaluate = evaluator(task, batch_size=batch_size, seed=0, mesh=make_mesh(MeshConfig(), batch_size=batch_size))
    out = task.summarize(evaluate(params, state, split))
    layer = params["model"]["logits"]
    z_BC = np.float64(split["image"]).reshape(20, -1) / 255 @ np.float64(layer["kernel"]) + np.float64(layer["bias"])
    log_BC = z_BC - np.log(np.exp(z_BC).sum(-1, keepdims=True))
    np.testing.assert_allclose(out["loss"], -log_BC[np.arange(20), split["label"]].mean(), rtol=1e-4)
    np.testing.assert_allclose(out["accuracy"], (z_BC.argmax(-1) == split["label"]).mean(), rtol=1e-6)
    np.testing.assert_allclose(out["top2_accuracy"], (z_BC.argmin(-1) != split["label"]).mean(), rtol=1e-6)


# --- looking inside


def three_layers() -> tuple[Task, TrainState, dict[str, Array]]:
    task = classify(MLP(features=(4, 5), outputs=3), classes=3)
    batch = to_float(rows(**blobs(4, seed=0)))
    return task, start(task, batch, {"model": optax.sgd(0.1)}), batch


def test_first_nonfinite_names_the_data_and_the_augmentation() -> None:
    task, state, batch = three_layers()
    pixel = batch | {"image": batch["image"].at[1, 2, 3, 0].set(jnp.nan)}
    assert first_nonfinite(task, None, state, pixel, KEY) == "the data's 'image' is not"
    spoil = lambda batch, key: pixel  # noqa: E731
    assert first_nonfinite(task, spoil, state, batch, KEY) == "the augmented batch is not"


@pytest.mark.parametrize("layer", ["dense_0", "dense_1", "logits"])
def test_first_nonfinite_names_the_first_layer_that_overflows(layer: str) -> None:
    """Kernels that are finite but whose outputs are not: the layers after it are not finite either."""
    task, state, batch = three_layers()
    params = jax.tree.map(lambda w: jnp.abs(w) + 0.1, state.params)
    params["model"][layer]["kernel"] = jnp.full_like(params["model"][layer]["kernel"], 3e38)
    said = first_nonfinite(task, None, state.replace(params=params), batch | {"image": batch["image"] + 9}, KEY)
    assert said == f"the output of module {layer!r} of 'model' is the first that is not"


def test_first_nonfinite_names_parameters_losses_and_gradients() -> None:
    task, state, batch = three_layers()
    assert first_nonfinite(task, None, state, batch, KEY) == "a gradient or an update is not, though the losses are"
    params = jax.tree.map(jnp.copy, state.params)
    params["model"]["dense_1"]["kernel"] = params["model"]["dense_1"]["kernel"].at[0, 0].set(jnp.nan)
    said = first_nonfinite(task, None, state.replace(params=params), batch, KEY)
    assert said.startswith("the parameters of 'model'") and said.endswith("not")
    infinite = classify(MLP(features=(4, 5), outputs=3), classes=3, l2=float("inf"))
    said = first_nonfinite(infinite, None, state, batch, KEY)
    assert said == "the loss of 'model' is not, though every module's output is"


class Bare(nn.Module):
    """A module without others inside: its own output is all that there is to blame."""

    @nn.compact
    def __call__(self, x: Array, *, train: bool = False) -> Array:
        return x * self.param("scale", nn.initializers.constant(3e38), (3,))[None]


def test_first_nonfinite_of_a_bare_module() -> None:
    task = classify(Bare(), classes=3, inputs=fields("x"))
    batch = rows(x=np.full((2, 3), 9, np.float32), label=np.zeros(2, np.int32))
    said = first_nonfinite(task, None, start(task, batch, {"model": optax.sgd(0.1)}), batch, KEY)
    assert said == "the output of the outermost module of 'model' is the first that is not"


def test_layer_rows_of_one_player_and_of_two() -> None:
    model = MLP(features=(4,), outputs=3, batch_norm=True)
    x = jnp.zeros((2, 4, 4, 1))
    params = jax.eval_shape(lambda: model.init(KEY, x))["params"]
    rows = [("dense_0", "4", 16 * 4 + 4), ("logits", "3", 4 * 3 + 3), ("norm_0", "4", 8)]
    assert sorted(layer_rows(lambda: model.init(KEY, x), {"model": params})) == rows
    both = layer_rows(lambda: model.init(KEY, x), {"g": params, "d": params})
    assert sorted(both) == [(f"{p}/{name}", *rest) for p in "dg" for name, *rest in rows]
