"""What must hold of every model. A new one joins by a line in TINY, and one in GOLDEN.

The golden files show in a diff what a change does to parameter trees: BIGJAX_UPDATE_GOLDEN=1 writes them anew.
"""

import inspect
import os
import subprocess
import sys
from pathlib import Path

import chex
import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bigjax import models
from bigjax.models import CNN, GPT, LSTM, MLP, VAE, Autoencoder, ConvAutoencoder, Discriminator, Generator

X = jax.random.uniform(jax.random.key(0), (2, 8, 8, 1))
Z = jax.random.normal(jax.random.key(0), (2, 5))
TOKENS = jnp.array([[3, 1, 4, 1], [2, 7, 1, 8]], jnp.int32)
LABEL = jnp.array([0, 2], jnp.int32)
AUTO = {"image": (8, 8, 1), "code": 3, "dropout": 0.1}
TINY = {  # name: (model, its inputs with the batch axis first)
    "mlp": (MLP(features=(8, 6), dropout=0.1, batch_norm=True), (X,)),
    "cnn": (CNN(features=(4, 5), dense=(6,), padding="SAME", dropout=0.1, batch_norm=True), (X,)),
    "generator": (Generator((8, 8, 1), latent=5, features=(6, 4, 4), batch_norm=True), (Z,)),
    "discriminator": (Discriminator(features=(4, 6), spectral_norm=True, classes=3, dropout=0.1), (X, LABEL)),
    "autoencoder": (Autoencoder(**AUTO), (X,)),
    "conv_autoencoder": (ConvAutoencoder(**AUTO, encoder_features=(4, 5), decoder_features=(5, 4)), (X,)),
    "vae": (VAE(**AUTO, encoder_features=(8,), decoder_features=(8,)), (X,)),
    "lstm": (LSTM(hidden=(6,), dropout=0.1), (X[..., 0],)),
    "gpt": (GPT(vocabulary=11, layers=2, width=8, heads=2, context=6, dropout=0.1), (TOKENS,)),
}
GOLDEN = {  # the classic listings'; LSTM and GPT have theirs in their own tests
    "mlp": (MLP(), (28, 28, 1)),
    "cnn": (CNN(), (28, 28, 1)),
    "generator": (Generator((32, 32, 3)), (100,)),
    "discriminator": (Discriminator(), (28, 28, 1)),
    "autoencoder": (Autoencoder(), (28, 28, 1)),
    "conv_autoencoder": (ConvAutoencoder(), (28, 28, 1)),
    "vae": (VAE(), (28, 28, 1)),
}
everyone = pytest.mark.parametrize("name", TINY)


def made(name: str, **fields):
    model, inputs = TINY[name]
    model = model.clone(**fields)
    return model, model.init(jax.random.key(1), *inputs), inputs


def train(model, variables, inputs, key=None):
    """The output in training, without what it does to its state."""
    rngs = {"dropout": jax.random.key(2) if key is None else key, "sample": jax.random.key(3)}
    return model.apply(variables, *inputs, train=True, rngs=rngs, mutable="batch_stats")[0]


@everyone
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gives_float32_from_float32_parameters(name, dtype):
    model, variables, inputs = made(name, dtype=dtype)
    outputs = jax.eval_shape(lambda v: (model.apply(v, *inputs), train(model, v, inputs)), variables)
    assert {leaf.dtype for leaf in jax.tree.leaves((variables, outputs))} == {jnp.dtype("float32")}
    assert all(leaf.shape[0] == 2 for leaf in jax.tree.leaves(outputs))


@everyone
def test_bfloat16_is_used_and_near(name):
    model, variables, inputs = made(name)
    exact, near = (jax.jit(model.clone(dtype=d).apply)(variables, *inputs) for d in ("float32", "bfloat16"))
    for a, b in zip(jax.tree.leaves(exact), jax.tree.leaves(near), strict=True):
        chex.assert_tree_all_finite(b)
        assert 0 < np.abs(a - b).max() < 0.1 * max(1.0, np.abs(a).max())


@everyone
def test_jit_and_vmap_give_what_a_plain_call_gives(name):
    model, variables, inputs = made(name)
    plain = model.apply(variables, *inputs)
    chex.assert_trees_all_close(jax.jit(model.apply)(variables, *inputs), plain, rtol=1e-5, atol=1e-6)

    def one(*example):  # the batch axis of vmap outside, one of length 1 inside
        return jax.tree.map(lambda y: y[0], model.apply(variables, *(x[None] for x in example)))

    chex.assert_trees_all_close(jax.vmap(one)(*inputs), plain, rtol=1e-4, atol=1e-5)


@everyone
def test_gradients_reach_every_parameter(name):
    model, variables, inputs = made(name, dropout=0.0) if name != "generator" else made(name)
    state = {k: v for k, v in variables.items() if k != "params"}

    def loss(params):
        outputs = train(model, {"params": params, **state}, inputs)
        return sum(jnp.sin(y + jnp.arange(y.size).reshape(y.shape)).sum() for y in jax.tree.leaves(outputs))

    gradients = jax.jit(jax.grad(loss))(variables["params"])
    for path, g in flax.traverse_util.flatten_dict(gradients, sep="/").items():
        chex.assert_tree_all_finite(g)
        assert np.abs(g).max() > 0, path


@everyone
def test_is_pure_and_random_only_in_training(name):
    model, variables, inputs = made(name)
    chex.assert_trees_all_equal(model.apply(variables, *inputs), model.apply(variables, *inputs, train=False))
    chex.assert_trees_all_equal(*(train(model, variables, inputs) for _ in range(2)))
    if hasattr(model, "dropout"):
        a, b = (jax.tree.leaves(train(model, variables, inputs, jax.random.key(k))) for k in (5, 6))
        assert any(not np.array_equal(x, y) for x, y in zip(a, b, strict=True))


@everyone
def test_train_is_keyword_only_and_off(name):
    parameter = inspect.signature(type(TINY[name][0]).__call__).parameters["train"]
    assert parameter.kind is parameter.KEYWORD_ONLY and parameter.default is False


@everyone
def test_features_are_sown_when_asked_for(name):
    model, variables, inputs = made(name)
    _, state = model.apply(variables, *inputs, mutable="intermediates")
    assert name == "generator" or state["intermediates"]["features"][0].shape[0] == 2
    _, state = model.apply(variables, *inputs, capture_intermediates=True, mutable="intermediates")
    assert "__call__" in state["intermediates"]
    assert "intermediates" not in variables


@pytest.mark.parametrize("name", GOLDEN)
def test_parameter_tree_is_the_golden_one(name):
    model, shape = GOLDEN[name]
    params = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, *shape)))["params"]
    leaves = flax.traverse_util.flatten_dict(params, sep="/")
    text = "".join(f"{path} {leaf.shape} {leaf.dtype}\n" for path, leaf in sorted(leaves.items()))
    file = Path(__file__).parent / "golden" / f"{name}.txt"
    if os.environ.get("BIGJAX_UPDATE_GOLDEN"):
        file.write_text(text)
    assert file.read_text() == text


def test_importing_models_stays_light():
    heavy = ("tensorflow_datasets", "grain", "orbax.checkpoint", "matplotlib")
    names = ", ".join(models.__all__)
    code = f"from bigjax.models import {names}; import sys; print([m for m in {heavy} if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout == "[]\n", result.stderr
