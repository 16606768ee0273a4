"""Multi-layer perceptron, and the small pieces that the models of this folder share.

B batch, D features of a layer.
"""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from bigjax import UsageError
from bigjax.sharding import constrain

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


class MLP(nn.Module):
    """Fully connected network (Rumelhart, Hinton & Williams 1986): 784-128-64-10, 109,386 parameters on 28×28×1.

    Input (B, ...) float, flattened to (B, D); output (B, outputs) float32: logits, or values for regression.
    `features=()` is the linear model. `mean`, `std` normalise the input: one number, or one for each entry of its
    last axis. Dropout follows each hidden activation. With `mutable="intermediates"` a call also returns `stage_0`,
    `stage_1`, ... (the activation of each hidden layer) and `features` (the last one before the logits);
    `capture_intermediates=True` adds each layer's output.

        model = MLP()
        variables = model.init(jax.random.key(0), jnp.zeros((1, 28, 28, 1)))
        logits = model.apply(variables, image_BHWC, train=False)
    """

    features: tuple[int, ...] = (128, 64)
    outputs: int = 10
    activation: str = "relu"
    kernel_init: str = "lecun_normal"
    dropout: float = 0.0
    batch_norm: bool = False
    mean: float | tuple[float, ...] = 0.0
    std: float | tuple[float, ...] = 1.0
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x: Array, *, train: bool = False) -> Array:
        act, dtype = activation(self.activation), jnp.dtype(self.dtype)
        x = normalize(x, self.mean, self.std, dtype=self.dtype)
        x = x.reshape(x.shape[0], -1)
        for i, width in enumerate(self.features):
            x = nn.Dense(width, dtype=dtype, kernel_init=initializer(self.kernel_init), name=f"dense_{i}")(x)
            if self.batch_norm:
                x = nn.BatchNorm(not train, momentum=0.9, dtype=dtype, name=f"norm_{i}")(x)
            x = act(constrain(x, "batch"))
            self.sow("intermediates", f"stage_{i}", x)
            if i == len(self.features) - 1:
                self.sow("intermediates", "features", x)
            x = nn.Dropout(self.dropout)(x, deterministic=not train)
        if not self.features:
            self.sow("intermediates", "features", x)
        x = nn.Dense(self.outputs, dtype=dtype, kernel_init=initializer(self.kernel_init), name="logits")(x)
        return x.astype(jnp.float32)
