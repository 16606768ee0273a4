import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bigjax import UsageError
from bigjax.models import CNN
from bigjax.models.layers import upsample
from bigjax.ops.convolution import conv_general_dilated, max_pool


@pytest.mark.parametrize("fields, count", [({}, 93_322), ({"features": (32, 64), "dense": (128,)}, 225_034)])
def test_parameter_counts_of_the_classic_listings(fields, count):
    shapes = jax.eval_shape(CNN(**fields).init, jax.random.key(0), jnp.zeros((1, 28, 28, 1)))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes["params"])) == count


def assert_same(ours, theirs, x):
    """Trees, values and gradients of two modules."""
    variables = theirs.init(jax.random.key(1), x)
    chex.assert_trees_all_equal(variables, ours.init(jax.random.key(1), x))

    def everything(module):
        gradients = jax.grad(lambda v, x: jnp.sin(module.apply(v, x)).sum(), (0, 1))(variables, x)
        return module.apply(variables, x), gradients

    chex.assert_trees_all_close(everything(ours), everything(theirs), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("channels", [1, 4])
@pytest.mark.parametrize(
    "fields",
    [
        {"padding": "VALID"},
        {},
        {"padding": 1, "kernel_size": (4, 5)},
        {"padding": [(2, 0), (0, 1)]},
        {"padding": "CIRCULAR"},
        {"strides": 2},
        {"strides": (1, 2)},
        {"kernel_dilation": 2},
        {"feature_group_count": 2},
        {"input_dilation": 2, "padding": 1},
        {"input_dilation": 2, "padding": 2, "kernel_size": (4, 4)},
        {"kernel_size": (4, 5), "use_bias": False},
        {"features": 3},
    ],
    ids=str,
)
def test_conv_equals_linens(channels, fields):
    fields = {"features": 8, "kernel_size": (3, 3)} | fields
    if fields.get("feature_group_count", 1) > channels:
        pytest.skip("one channel makes no groups")
    x = jax.random.normal(jax.random.key(0), (2, 9, 8, channels))
    assert_same(nn.Conv(**fields, conv_general_dilated=conv_general_dilated), nn.Conv(**fields), x)


@pytest.mark.parametrize("shape, size", [((2, 9, 3), (3,)), ((2, 4, 5, 6, 3), (3, 3, 3))])
def test_conv_of_other_ranks_equals_linens(shape, size):
    x = jax.random.normal(jax.random.key(0), shape)
    assert_same(nn.Conv(8, size, conv_general_dilated=conv_general_dilated), nn.Conv(8, size), x)


def test_upsample_equals_linens_transposed_convolution():
    x = jax.random.normal(jax.random.key(0), (2, 5, 4, 3))
    assert_same(upsample(6), nn.ConvTranspose(6, (4, 4), (2, 2)), x)


@pytest.mark.parametrize("forms", [{"features": 8}, {"features": 3, "input_dilation": 2, "padding": 2}], ids=str)
def test_the_platform_compiled_for_decides_the_form(forms):
    size = (4, 4) if "padding" in forms else (3, 3)
    module, x = nn.Conv(**forms, kernel_size=size, conv_general_dilated=conv_general_dilated), jnp.zeros((1, 8, 8, 2))
    variables = module.init(jax.random.key(0), x)
    traced = jax.jit(jax.grad(lambda v, x: module.apply(v, x).sum())).trace(variables, x)
    texts = {name: traced.lower(lowering_platforms=(name,)).as_text() for name in ("cpu", "tpu", "cuda")}
    assert texts["tpu"] == texts["cuda"] != texts["cpu"]
    native = jax.jit(jax.grad(lambda v, x: nn.Conv(**forms, kernel_size=size).apply(v, x).sum())).lower(variables, x)
    dilated = "lhs_dilate = [2, 2]"
    assert (dilated in texts["tpu"]) == (dilated in native.as_text()) == ("padding" in forms)
    assert dilated not in texts["cpu"] and "stablehlo.convolution" in texts["tpu"]
    assert ("stablehlo.convolution" in texts["cpu"]) == ("padding" in forms)  # four small ones; else products only


@settings(max_examples=10, deadline=None)
@given(st.integers(2, 7), st.integers(2, 7), st.integers(0, 1000))
def test_pooling_equals_linens(height, width, seed):
    x = jax.random.normal(jax.random.key(seed), (2, height, width, 3))

    def pooled(x):
        return nn.max_pool(x, (2, 2), (2, 2))

    def both(x):
        return [(f(x), jax.grad(lambda x, f=f: (f(x) ** 3).sum())(x)) for f in (max_pool, pooled)]

    values, gradients = zip(*jax.jit(both)(x))
    chex.assert_trees_all_equal(*values)
    chex.assert_trees_all_close(*gradients, rtol=1e-6)


@pytest.mark.parametrize("place", range(4))
def test_pooling_keeps_nan(place):
    x = jnp.zeros((4,)).at[place].set(jnp.nan).reshape(1, 2, 2, 1)
    assert bool(jnp.isnan(max_pool(x)).all())


@pytest.mark.parametrize("activation", ["relu", "sigmoid", "tanh", "gelu", nn.relu, nn.silu])
def test_equals_the_network_written_out(activation):
    model = CNN(features=(8, 9), dense=(6,), activation=activation, mean=0.1, std=0.3)
    x = jax.random.uniform(jax.random.key(0), (2, 12, 12, 1))
    variables = model.init(jax.random.key(1), x)
    p = variables["params"]
    for layer in ("conv_0", "conv_1"):  # below zero gelu falls before it rises: there pooling first would be wrong
        p[layer]["bias"] = p[layer]["bias"] - 0.7
    act = {"relu": nn.relu, "sigmoid": nn.sigmoid, "tanh": jnp.tanh, "gelu": nn.gelu}.get(activation, activation)
    y = (x - 0.1) / 0.3
    for i in range(2):
        y = nn.Conv((8, 9)[i], (3, 3), padding="VALID").apply({"params": p[f"conv_{i}"]}, y)
        y = nn.max_pool(act(y), (2, 2), (2, 2))
    y = act(nn.Dense(6).apply({"params": p["dense_0"]}, y.reshape(2, -1)))
    y = nn.Dense(10).apply({"params": p["logits"]}, y)
    chex.assert_trees_all_close(model.apply(variables, x), y, rtol=1e-5, atol=1e-5)


def test_stages_are_sown():
    model = CNN()
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 28, 28, 1)))
    _, state = jax.eval_shape(
        lambda v, x: model.apply(v, x, mutable="intermediates"), shapes, jnp.zeros((2, 28, 28, 1))
    )
    assert {name: value[0].shape for name, value in state["intermediates"].items()} == {
        "stage_0": (2, 13, 13, 32), "stage_1": (2, 5, 5, 64), "stage_2": (2, 3, 3, 64), "stage_3": (2, 64),
        "features": (2, 64),
    }  # fmt: skip


def test_images_that_are_too_small_are_refused():
    def shapes(model, height, width):
        return jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, height, width, 1)))

    for model, least in ((CNN(), 18), (CNN(padding="SAME"), 4), (CNN(features=(4,), pools=1), 4), (CNN(kernel=5), 32)):
        assert model.least_side() == least
        assert shapes(model, least, least + 1)["params"]["dense_0"]["kernel"].shape[0] == model.features[-1]
        for height, width in ((least - 1, least), (least, least - 1)):
            with pytest.raises(UsageError, match=f"{height}×{width} are too small.*at least {least}×{least}"):
                shapes(model, height, width)
    with pytest.raises(UsageError, match="batch, height, width"):
        CNN().init(jax.random.key(0), jnp.zeros((1, 784)))


def test_batch_norm_moves_its_statistics_in_training_only():
    model = CNN(features=(3,), dense=(4,), batch_norm=True)
    x = jax.random.uniform(jax.random.key(0), (4, 6, 6, 1))
    variables = model.init(jax.random.key(1), x)
    _, trained = model.apply(variables, x, train=True, mutable="batch_stats")
    _, evaluated = model.apply(variables, x, mutable="batch_stats")
    chex.assert_trees_all_equal(evaluated["batch_stats"], variables["batch_stats"])
    assert not np.allclose(trained["batch_stats"]["norm_0"]["mean"], variables["batch_stats"]["norm_0"]["mean"])
