"""What is learned: losses against formulas. B batch, C classes, D values a row."""

from collections.abc import Callable
from functools import partial
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import blobs
from families import FAMILIES, Family
from jax import Array
from strict import no_silent_transfer
from test_families import LONG

from bigjax import UsageError
from bigjax.metrics import Bins
from bigjax.models import MLP
from bigjax.step import init_state, to_float, train_step
from bigjax.task import Task, fields, forward, one_player
from bigjax.tasks import classify, regress

KEY = jax.random.key(0)
B, C = 6, 4
EMPTY = {"model": {}}


class Same(nn.Module):
    """Gives back its input: the losses' arithmetic without a network."""

    @nn.compact
    def __call__(self, x: Array, *, train: bool = False) -> Array:
        return x


def rows(**fields: Any) -> dict[str, Array]:
    size = len(next(iter(fields.values())))
    batch = {"index": np.arange(size, dtype=np.int32), "mask": np.ones(size, np.float32)} | fields
    return {k: jnp.asarray(v) for k, v in batch.items()}


def logit_batch(classes: int = C, **fields: Any) -> dict[str, Array]:
    random = np.random.default_rng(0)
    logits_BC = random.normal(size=(B, classes)).astype(np.float32) * 2
    return rows(**{"x": logits_BC, "label": random.integers(0, classes, B).astype(np.int32)} | fields)


def mean_loss(task: Task, batch: dict[str, Array], params: Any = None) -> float:
    (total, count), _ = task.losses["model"](params or EMPTY, EMPTY, batch, KEY)
    return float(total / count)


def log_softmax(x_BC: Array) -> np.ndarray:
    x = np.asarray(x_BC, np.float64)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


features = partial(classify, Same(), inputs=fields("x"))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy_with_label_smoothing(smoothing: float) -> None:
    batch = logit_batch()
    log_BC, label_B = log_softmax(batch["x"]), np.asarray(batch["label"])
    each_B = -(1 - smoothing) * log_BC[np.arange(B), label_B] - smoothing * log_BC.mean(-1)
    task = features(classes=C, label_smoothing=smoothing)
    np.testing.assert_allclose(mean_loss(task, batch), each_B.mean(), rtol=1e-5)
    plain = task.evaluate(EMPTY, EMPTY, batch, KEY)["loss"]  # evaluation does not smooth
    np.testing.assert_allclose(plain[0] / plain[1], -log_BC[np.arange(B), label_B].mean(), rtol=1e-5)


def test_mixup_is_trained_towards_both_labels() -> None:
    mix_B = np.linspace(0, 1, B).astype(np.float32)
    other_B = np.array([3, 0, 1, 2, 3, 0], np.int32)
    batch = logit_batch(mix=mix_B, label_mix=other_B)
    log_BC, label_B = log_softmax(batch["x"]), np.asarray(batch["label"])
    each_B = -mix_B * log_BC[np.arange(B), label_B] - (1 - mix_B) * log_BC[np.arange(B), other_B]
    np.testing.assert_allclose(mean_loss(features(classes=C), batch), each_B.mean(), rtol=1e-5)


def test_one_logit_is_sigmoid_binary_cross_entropy() -> None:
    batch = logit_batch(1, label=np.array([0, 1, 1, 0, 1, 0], np.int32))
    z_B, label_B = np.asarray(batch["x"], np.float64)[:, 0], np.asarray(batch["label"])
    p_B = 1 / (1 + np.exp(-z_B))
    expected = -np.where(label_B == 1, np.log(p_B), np.log(1 - p_B)).mean()
    task = features(classes=2)
    np.testing.assert_allclose(mean_loss(task, batch), expected, rtol=1e-5)
    out = task.summarize(task.evaluate(EMPTY, EMPTY, batch, KEY))
    np.testing.assert_allclose([out["loss"], out["accuracy"]], [expected, ((z_B > 0) == label_B).mean()], rtol=1e-5)


def test_top_k_counts_a_label_among_the_k_largest() -> None:
    logits_BC = np.array([[4, 3, 2, 1]] * 4, np.float32)
    batch = rows(x=logits_BC, label=np.arange(4, dtype=np.int32), mask=np.array([1, 1, 1, 1], np.float32))
    for k, share in ((1, 0.25), (2, 0.5), (3, 0.75)):
        out = features(classes=4, top_k=k).evaluate(EMPTY, EMPTY, batch, KEY)
        total, count = out[f"top{k}_accuracy"]
        assert total / count == share
    assert "top4_accuracy" not in features(classes=4, top_k=4).evaluate(EMPTY, EMPTY, batch, KEY)


@pytest.mark.parametrize("target_shape", [(B,), (B, 1), (B, 3), (B, 2, 2)])
def test_squared_error_is_numpys(target_shape: tuple[int, ...]) -> None:
    random = np.random.default_rng(1)
    target = random.normal(size=target_shape).astype(np.float32)
    out_BD = random.normal(size=(B, target[0].size)).astype(np.float32)
    mask_B = np.array([1, 1, 0, 1, 1, 0], np.float32)
    batch = rows(x=out_BD, target=target, mask=mask_B)
    expected = np.square(out_BD - target.reshape(B, -1))[mask_B > 0].mean()
    task = regress(Same())
    np.testing.assert_allclose(mean_loss(task, batch), expected, rtol=1e-5)
    np.testing.assert_allclose(task.summarize(task.evaluate(EMPTY, EMPTY, batch, KEY))["loss"], expected, rtol=1e-5)


def test_outputs_that_do_not_fit_are_named_not_broadcast() -> None:
    batch = rows(x=np.ones((B, 1), np.float32), target=np.ones((B, 3), np.float32))
    with pytest.raises(UsageError, match="gives 1 values a row, `target` has 3: give it 3 outputs"):
        mean_loss(regress(Same()), batch)
    task = features(classes=3)
    for run in (task.losses["model"], task.evaluate):
        with pytest.raises(UsageError, match="gives 4 logits for 3 classes: give it 3 outputs"):
            run(EMPTY, EMPTY, logit_batch(4), KEY)


def test_l1_and_l2_are_terms_of_the_loss_and_leave_biases_alone() -> None:
    model = MLP(features=(3,), outputs=C)
    batch = rows(x=np.ones((B, 2), np.float32), label=np.zeros(B, np.int32))
    params, _ = classify(model, classes=C, inputs=fields("x")).init(KEY, batch)
    params = jax.tree.map(lambda w: w + 0.5, params)  # biases are not zero
    kernels = [np.asarray(layer["kernel"], np.float64) for layer in params["model"].values()]
    l1, l2 = 0.01, 0.003
    plain = mean_loss(classify(model, classes=C, inputs=fields("x")), batch, params)
    task = classify(model, classes=C, inputs=fields("x"), l1=l1, l2=l2)
    penalty = sum(l1 * np.abs(w).sum() + l2 * np.square(w).sum() for w in kernels)
    for mask_B in (
        np.ones(B, np.float32),
        np.array([1, 0, 0, 1, 0, 0], np.float32),
    ):  # equal rows: the mean is the same
        np.testing.assert_allclose(
            mean_loss(task, batch | {"mask": jnp.asarray(mask_B)}, params), plain + penalty, rtol=1e-5
        )
    _, (_, metrics) = task.losses["model"](params, EMPTY, batch, KEY)
    np.testing.assert_allclose(metrics["loss"][0] / metrics["loss"][1], plain, rtol=1e-5)  # comparable with evaluation


REGRESSION = Family(MLP(features=(3,), outputs=1), partial(regress, inputs=fields("image")))


@pytest.mark.parametrize(
    "name", [pytest.param(f, marks=pytest.mark.slow) if f in LONG else f for f in [*FAMILIES, "regression"]]
)
def test_an_empty_batch_counts_nothing(name: str) -> None:
    family = (FAMILIES | {"regression": REGRESSION})[name]
    task, split = family.task(family.models), family.data(2, seed=0)
    two = to_float(rows(**split | ({"target": np.zeros(2, np.float32)} if name == "regression" else {})))
    none = {k: v[:0] for k, v in two.items()}
    state = jax.jit(task.init)(KEY, two)
    with no_silent_transfer():
        counts = jax.device_get(jax.jit(task.evaluate)(*state, none, KEY))
    for metric, values in counts.items():
        for value in values:
            np.testing.assert_array_equal(value, np.zeros_like(value), err_msg=metric)
    assert set(counts) == set(task.evaluate(*state, two, KEY))


@pytest.mark.parametrize("kind", ["classify", "regress"])
def test_masked_rows_count_for_nothing(kind: str) -> None:
    """A batch padded with junk gives the sums, and the gradient, of its real rows alone."""
    model = MLP(features=(3,), outputs=C, dropout=0.5)
    task = (
        classify(model, classes=C, inputs=fields("x"), top_k=2, l2=0.1)
        if kind == "classify"
        else regress(model, l1=0.1)
    )
    random = np.random.default_rng(2)
    small = rows(
        x=random.normal(size=(4, 2)).astype(np.float32),
        label=np.array([0, 1, 2, 3], np.int32),
        target=random.normal(size=(4, C)).astype(np.float32),
    )
    params, state = task.init(KEY, small)
    junk = {k: jnp.concatenate([v, 7 * v[:2]]) for k, v in small.items()}
    junk |= {
        "mask": jnp.array([1.0, 1, 1, 1, 0, 0]),
        "index": jnp.array([0, 1, 2, 3, -1, -1]),
        "label": junk["label"] % C,
    }

    def value(params: Any, batch: dict[str, Array]) -> Any:
        (total, count), (_, metrics) = task.losses["model"](params, state, batch, KEY)
        return total, (count, metrics)

    both = [jax.value_and_grad(value, has_aux=True)(params, b) for b in (small, junk)]
    chex.assert_trees_all_close(*both, rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_close(*(task.evaluate(params, state, b, KEY) for b in (small, junk)), rtol=1e-5, atol=1e-6)


class Drop(nn.Module):
    """A user's own module; `how` it calls dropout is its own affair."""

    how: str = "keyword"
    rate: float = 0.5

    @nn.compact
    def __call__(self, x: Array, *, train: bool = False) -> Array:
        drop = partial(nn.Dropout, self.rate)
        return {
            "keyword": lambda: drop()(x, deterministic=not train),
            "position": lambda: drop()(x, not train),
            "inputs": lambda: drop()(inputs=x, deterministic=not train),
            "field": lambda: drop(deterministic=not train)(x),
            "key": lambda: drop()(x, not train, jax.random.key(5)),
            "shared": lambda: drop(broadcast_dims=(-1,))(x, deterministic=not train),
            "nested": lambda: nn.Sequential([drop(deterministic=not train), nn.Dense(x.shape[-1], kernel_init=eye)])(x),
        }[self.how]()


def eye(key: Array, shape: tuple[int, ...], dtype: Any) -> Array:
    return jnp.eye(*shape, dtype=dtype)


D = 40


def dropped(
    index: list[int], *, key: Array = KEY, how: str = "keyword", rate: float = 0.5, shape: tuple = (D,)
) -> np.ndarray:
    """What dropout makes of ones, (B, *shape)."""
    index_B = jnp.array(index, jnp.int32)
    model, x = Drop(how, rate), jnp.ones((len(index), *shape))
    params = model.init(key, x).get("params", {})
    out, state = forward(model, {"params": params}, (x,), key=key, index_B=index_B, train=True)
    assert not state
    chex.assert_equal_shape([out, x])
    return np.asarray(out)


@pytest.mark.parametrize("how", ["keyword", "position", "inputs", "field", "key", "shared", "nested"])
def test_dropout_of_a_row_depends_on_its_index_alone(how: str) -> None:
    shape = (5, 4) if how == "shared" else (D,)
    a, b = dropped([3, 11, 7, 200], how=how, shape=shape), dropped([200, 5, 3], how=how, shape=shape)
    np.testing.assert_array_equal(a[0], b[2])
    np.testing.assert_array_equal(a[3], b[0])
    assert set(np.unique(a)) == {0.0, 2.0}
    if how == "shared":
        np.testing.assert_array_equal(a, a[..., :1] * np.ones(4))
    else:
        assert len({row.tobytes() for row in a}) == 4  # rows differ


def test_dropout_differs_between_steps_and_layers() -> None:
    index, other = [0, 1, 2], jax.random.fold_in(KEY, 1)
    assert (dropped(index) != dropped(index, key=other)).any(axis=1).all()

    class Two(nn.Module):
        @nn.compact
        def __call__(self, x: Array, *, train: bool = False) -> Array:
            return jnp.stack([nn.Dropout(0.5)(x, deterministic=not train) for _ in range(2)])

    two, _ = forward(Two(), {}, (jnp.ones((3, D)),), key=KEY, index_B=jnp.arange(3), train=True)
    assert (two[0] != two[1]).any(axis=1).all()


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_dropout_drops_its_rate_and_keeps_the_mean(rate: float) -> None:
    out = dropped(list(range(50)), rate=rate, shape=(200,))
    n, kept = out.size, out != 0
    np.testing.assert_allclose(out[kept], 1 / (1 - rate), rtol=1e-5)
    assert abs(kept.mean() - (1 - rate)) < 4 * np.sqrt(rate * (1 - rate) / n)
    columns, across = kept.mean(0), 4.5 * np.sqrt(rate * (1 - rate) / 50)  # no column is favoured
    assert np.abs(columns - (1 - rate)).max() < across


def test_dropout_at_its_ends_and_when_off() -> None:
    np.testing.assert_array_equal(dropped([0, 1], rate=0.0), 1)
    np.testing.assert_array_equal(dropped([0, 1], rate=1.0), 0)
    model, x = Drop("keyword", 1.0), jnp.ones((2, 3))
    grad = jax.grad(lambda x: forward(model, {}, (x,), key=KEY, index_B=jnp.arange(2), train=True)[0].sum())(x)
    np.testing.assert_array_equal(grad, 0)  # not NaN
    np.testing.assert_array_equal(model.apply({}, x, train=False), 1)


def test_evaluation_has_no_dropout_and_needs_no_key() -> None:
    task = classify(Drop("keyword", 0.9), classes=C, inputs=fields("x"))
    batch = logit_batch()
    out = task.evaluate(EMPTY, EMPTY, batch, KEY)
    np.testing.assert_allclose(out["loss"][0], -log_softmax(batch["x"])[np.arange(B), batch["label"]].sum(), rtol=1e-5)


def regression_blobs(size: int) -> dict[str, np.ndarray]:
    random = np.random.default_rng(3)
    x_BD = random.normal(size=(size, 3)).astype(np.float32)
    return {"x": x_BD, "target": np.sin(2 * x_BD[:, :2]).astype(np.float32)}


@pytest.mark.parametrize(
    ("task", "data"),
    [
        (lambda: classify(MLP(features=(16,), outputs=3), classes=3), lambda: blobs(8, seed=0)),
        (lambda: regress(MLP(features=(16,), outputs=2)), lambda: regression_blobs(8)),
    ],
    ids=["classify", "regress"],
)
def test_one_batch_can_be_learned_by_heart(task: Callable[[], Task], data: Callable[[], dict[str, np.ndarray]]) -> None:
    batch, learned = rows(**data()), task()
    tx = {"model": optax.adam(0.03)}
    state = init_state(KEY, batch, task=learned, tx=tx, ema=0.0)
    step = jax.jit(partial(train_step, task=learned, tx=tx))
    losses = []
    for _ in range(200):
        state, out = step(state, batch, KEY)
        losses.append(float(out["loss"][0] / out["loss"][1]))
    assert losses[0] > 0.3 and losses[-1] < 0.02, losses[::30]


# ---- a user's own task and module


class NoMode(nn.Module):
    """A module without a `train` argument, and one that insists on it."""

    insists: bool = False

    @nn.compact
    def __call__(self, x: Array) -> Array:
        return nn.Dense(2)(x)


class Insists(nn.Module):
    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        return nn.Dropout(0.5)(nn.Dense(2)(x), deterministic=not train)


@pytest.mark.parametrize("module", [NoMode(), Insists()])
def test_a_module_is_told_of_training_if_it_asks(module: nn.Module) -> None:
    task = regress(module)
    batch = rows(x=np.ones((B, 3), np.float32), target=np.ones((B, 2), np.float32))
    params, state = task.init(KEY, batch)
    assert np.isfinite(mean_loss(task, batch, params))
    assert np.isfinite(task.evaluate(params, state, batch, KEY)["loss"][0])


def error_task(metric: Any) -> Task:
    def per_example(out: Array, batch: dict[str, Array]) -> Any:
        loss_B = jnp.square(out - batch["target"]).mean(-1)
        return loss_B, jnp.ones_like(loss_B), {"error": metric(out, batch)}

    return one_player(Same(), per_example, inputs=fields("x"))


def test_a_tasks_own_metrics_do_not_count_padding() -> None:
    """Rows in, masked once, in the core: there is no way to count a row of padding."""
    batch = rows(
        x=np.arange(B * 2, dtype=np.float32).reshape(B, 2),
        target=np.zeros((B, 2), np.float32),
        mask=np.array([1, 1, 0, 1, 0, 0], np.float32),
    )
    task = error_task(lambda out, batch: (jnp.abs(out).sum(-1), jnp.ones(B)))
    out = task.evaluate(EMPTY, EMPTY, batch, KEY)
    total, count = out["error"]
    assert (float(total), float(count)) == (0 + 1 + 2 + 3 + 6 + 7, 3)
    wide = error_task(lambda out, batch: (out, jnp.ones(B)))  # a vector a row
    np.testing.assert_array_equal(wide.evaluate(EMPTY, EMPTY, batch, KEY)["error"][0], [0 + 2 + 6, 1 + 3 + 7])
    count = error_task(lambda out, batch: (Bins((jnp.arange(B) % 2,), (3,)), jnp.ones(B)))
    histogram = count.evaluate(EMPTY, EMPTY, batch, KEY)["error"][0]
    np.testing.assert_array_equal(histogram, [1, 2, 0])
    assert jnp.issubdtype(histogram.dtype, jnp.integer)


@pytest.mark.parametrize(
    "metric",
    [
        lambda out, batch: jnp.abs(out).sum(),
        lambda out, batch: (jnp.abs(out).sum(), jnp.ones(())),
        lambda out, batch: (jnp.abs(out).sum(-1), 1.0),
        lambda out, batch: (jnp.ones(B + 1), jnp.ones(B)),
    ],
)
def test_a_metric_that_is_no_rows_is_named(metric: Any) -> None:
    batch = rows(x=np.ones((B, 2), np.float32), target=np.zeros((B, 2), np.float32))
    for run in (mean_loss, lambda task, batch: task.evaluate(EMPTY, EMPTY, batch, KEY)):
        with pytest.raises(UsageError, match=r"'error' is not \(value of each row, count of each row\), 6 rows both"):
            run(error_task(metric), batch)


def test_a_loss_that_is_no_rows_is_named() -> None:
    batch = rows(x=np.ones((B, 2), np.float32))
    summed = one_player(Same(), lambda out, batch: (out.sum(), jnp.float32(B), {}), inputs=fields("x"))
    with pytest.raises(UsageError, match="'loss' is not"):
        mean_loss(summed, batch)
    with pytest.raises(UsageError, match="return these three"):
        mean_loss(one_player(Same(), lambda out, batch: out.sum(-1), inputs=fields("x")), batch)


@pytest.mark.parametrize(
    ("label", "said"),
    [
        (np.array([0, 1, 4], np.int32), "label 4 is none of the 4 classes"),
        (np.array([0, -1, 2], np.int64), "label -1 is none of the 4 classes"),
        (np.array([0.0, 1.0]), "label is float64.*whole numbers, 0 to 3"),
        (np.zeros((3, 2), np.int32), "label is int32.2."),
    ],
)
def test_labels_outside_the_classes_are_refused(label: np.ndarray, said: str) -> None:
    task = features(classes=C)
    with pytest.raises(UsageError, match=said):
        task.check({"label": label})
    task.check({"label": np.array([0, 3], np.uint8)})


def test_many_classes_are_counted_without_a_matrix() -> None:
    """As scikit-learn counts them from the matrix, in whole numbers."""
    many, random = 1500, np.random.default_rng(0)
    label_B = random.integers(0, 40, 64).astype(np.int32) * 37
    logits_BC = random.normal(size=(64, many)).astype(np.float32)
    logits_BC[np.arange(32), label_B[:32]] += 20
    batch = rows(x=logits_BC, label=label_B, mask=(np.arange(64) % 5 > 0).astype(np.float32))
    task = features(classes=many)
    out = task.evaluate(EMPTY, EMPTY, batch, KEY)
    assert "confusion" not in out and max(x.size for x in jax.tree.leaves(out)) == many
    assert all(jnp.issubdtype(out[k][0].dtype, jnp.integer) for k in ("hits", "labelled", "predicted"))
    import sklearn.metrics

    real, guess = np.asarray(batch["mask"]) > 0, logits_BC.argmax(-1)
    macro = sklearn.metrics.f1_score(label_B[real], guess[real], average="macro", zero_division=0)
    np.testing.assert_allclose(task.summarize(out)["macro_f1"], macro, rtol=1e-6)


def test_a_metric_called_loss_is_refused() -> None:
    """It would be what is minimised."""
    batch = rows(x=np.ones((B, 2), np.float32))
    both = one_player(
        Same(), lambda out, b: (out.sum(-1), jnp.ones(B), {"loss": (out[:, 0], jnp.ones(B))}), inputs=fields("x")
    )
    with pytest.raises(UsageError, match="a metric called 'loss'"):
        mean_loss(both, batch)


def test_a_sequential_is_not_told_of_training() -> None:
    """It takes any keyword, and hands it to its first layer."""
    task = regress(nn.Sequential([nn.Dense(3), nn.relu, nn.Dense(2)]))
    batch = rows(x=np.ones((B, 3), np.float32), target=np.ones((B, 2), np.float32))
    params, _ = task.init(KEY, batch)
    assert np.isfinite(mean_loss(task, batch, params))
