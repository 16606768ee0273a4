"""Small pieces that the models of this folder share."""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from bigjax import UsageError

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "relu": nn.relu, "sigmoid": nn.sigmoid, "tanh": jnp.tanh, "gelu": nn.gelu,
}  # fmt: skip
MONOTONE = ("relu", "sigmoid", "tanh")  # max(f(a), f(b)) = f(max(a, b)): pooling may come first (not gelu)
INITS = (
    "lecun_normal", "lecun_uniform", "he_normal", "he_uniform", "glorot_normal", "glorot_uniform", "orthogonal",
)  # fmt: skip


def activation(name: str) -> Callable[[Array], Array]:
    """The element-wise function called `name`; UsageError lists the names there are."""
    if name not in ACTIVATIONS:
        raise UsageError(f"no activation is called {name!r}: use one of {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


def initializer(name: str) -> Callable[..., Array]:
    """The initialiser of kernels called `name` (`jax.nn.initializers`); UsageError lists the names there are."""
    if name not in INITS:
        raise UsageError(f"no initialisation is called {name!r}: use one of {', '.join(INITS)}")
    return getattr(jax.nn.initializers, name)()


def normalize(x: Array, mean: float | tuple[float, ...], std: float | tuple[float, ...], *, dtype: str) -> Array:
    """(x - mean) / std in float32, then `dtype`; a tuple has one number for each entry of x's last axis."""

    def along(value: float | tuple[float, ...]) -> Array:
        v = jnp.asarray(value, jnp.float32)
        if v.ndim and v.shape[0] != x.shape[-1]:
            raise UsageError(f"mean and std have {v.shape[0]} entries, the input's last axis has {x.shape[-1]}")
        return v.reshape((1,) * (x.ndim - v.ndim) + v.shape) if v.ndim else v

    if mean == 0.0 and std == 1.0:
        return x.astype(dtype)
    return ((x.astype(jnp.float32) - along(mean)) / along(std)).astype(dtype)
