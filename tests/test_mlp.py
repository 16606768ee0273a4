import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from bigjax import UsageError
from bigjax.models import MLP
from bigjax.models.layers import ACTIVATIONS, INITS, initializer


def count(variables: dict) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))


def test_parameter_count_of_the_classic_listing():
    variables = MLP().init(jax.random.key(0), jnp.zeros((1, 28, 28, 1)))
    assert count(variables) == 109_386


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_equals_the_formula(name):
    model = MLP(features=(5,), outputs=3, activation=name, mean=(0.1, 0.2), std=(0.5, 2.0))
    x = jax.random.uniform(jax.random.key(1), (4, 2))
    variables = model.init(jax.random.key(0), x)
    p = variables["params"]
    h = (x - jnp.array([[0.1, 0.2]])) / jnp.array([[0.5, 2.0]]) @ p["dense_0"]["kernel"] + p["dense_0"]["bias"][None]
    formula = {
        "relu": lambda h: jnp.maximum(h, 0),
        "sigmoid": lambda h: 1 / (1 + jnp.exp(-h)),
        "tanh": jnp.tanh,
        "gelu": lambda h: 0.5 * h * (1 + jnp.tanh(np.sqrt(2 / np.pi) * (h + 0.044715 * h**3))),
    }[name]
    expected = formula(h) @ p["logits"]["kernel"] + p["logits"]["bias"][None]
    np.testing.assert_allclose(model.apply(variables, x), expected, rtol=1e-5, atol=1e-6)


def test_without_hidden_layers_is_linear_and_sows_its_input():
    model = MLP(features=(), outputs=2)
    variables = model.init(jax.random.key(0), jnp.zeros((1, 3)))
    assert set(variables["params"]) == {"logits"}
    _, state = model.apply(variables, jnp.ones((4, 3)), mutable="intermediates")
    chex.assert_trees_all_equal(state["intermediates"]["features"][0], jnp.ones((4, 3)))


def test_dropout_only_in_training():
    model = MLP(features=(16,), dropout=0.5)
    x = jnp.ones((2, 3))
    variables = model.init(jax.random.key(0), x)
    plain = model.apply(variables, x)
    dropped = model.apply(variables, x, train=True, rngs={"dropout": jax.random.key(1)})
    assert not np.allclose(plain, dropped)
    chex.assert_trees_all_equal(plain, model.apply(variables, x, rngs={"dropout": jax.random.key(1)}))


@pytest.mark.parametrize("name", INITS)
def test_initialisations_have_their_variance(name):
    fan_in, fan_out = 200, 100
    expected = {
        "lecun": 1 / fan_in, "he": 2 / fan_in, "glorot": 2 / (fan_in + fan_out), "orthogonal": 1 / fan_in,
    }[name.split("_")[0]]  # fmt: skip
    kernel = initializer(name)(jax.random.key(0), (fan_in, fan_out))
    assert float(kernel.var()) == pytest.approx(expected, rel=0.05)


def test_functions_are_used_as_they_are():
    x = jax.random.normal(jax.random.key(1), (4, 3))
    named = MLP(features=(5,), activation="gelu", kernel_init="he_normal")
    given = MLP(features=(5,), activation=nn.gelu, kernel_init=nn.initializers.he_normal())
    variables = named.init(jax.random.key(0), x)
    chex.assert_trees_all_equal(given.init(jax.random.key(0), x), variables)
    chex.assert_trees_all_equal(given.apply(variables, x), named.apply(variables, x))
    squared = MLP(features=(5,), activation=jnp.square, kernel_init=lambda key, shape, dtype: jnp.ones(shape, dtype))
    variables = squared.init(jax.random.key(0), x)
    expected = 5 * jnp.square(x.sum(1, keepdims=True)).repeat(10, 1)
    np.testing.assert_allclose(squared.apply(variables, x), expected, rtol=1e-5)


def test_unknown_names_are_told_what_there_is():
    x = jnp.zeros((1, 4))
    with pytest.raises(UsageError, match="'swish'.*relu, sigmoid, tanh, gelu"):
        MLP(activation="swish").init(jax.random.key(0), x)
    with pytest.raises(UsageError, match="'kaiming'.*he_normal"):
        MLP(kernel_init="kaiming").init(jax.random.key(0), x)
    with pytest.raises(UsageError, match="2 entries.*4"):
        MLP(mean=(0.0, 1.0)).init(jax.random.key(0), x)
