"""Small pieces that the models of this folder share."""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from bigjax import UsageError
from bigjax.ops.convolution import conv_general_dilated
from bigjax.ops.counted import plainly
from bigjax.ops.vocabulary import Factors, dot_float32

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "relu": nn.relu, "sigmoid": nn.sigmoid, "tanh": jnp.tanh, "gelu": nn.gelu,
}  # fmt: skip
REMAT = {"none": None, "full": None, "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable}
MONOTONE = (nn.relu, nn.sigmoid, jnp.tanh)  # max(f(a), f(b)) = f(max(a, b)): pooling may come first (not gelu)
INITS = (
    "lecun_normal", "lecun_uniform", "he_normal", "he_uniform", "glorot_normal", "glorot_uniform", "orthogonal",
)  # fmt: skip


def activation(f: str | Callable[[Array], Array]) -> Callable[[Array], Array]:
    """The element-wise function called `f`, or `f` itself; UsageError lists the names there are."""
    if callable(f):
        return f
    if f not in ACTIVATIONS:
        raise UsageError(f"no activation is called {f!r}: use one of {', '.join(ACTIVATIONS)}, or a function")
    return ACTIVATIONS[f]


def initializer(f: str | Callable[..., Array]) -> Callable[..., Array]:
    """The initialiser of kernels called `f` in `jax.nn.initializers`, or `f` itself (key, shape, dtype -> array).

    UsageError lists the names there are.
    """
    if callable(f):
        return f
    if f not in INITS:
        raise UsageError(f"no initialisation is called {f!r}: use one of {', '.join(INITS)}, or a function")
    return getattr(jax.nn.initializers, f)()


def normalize(x: Array, mean: float | tuple[float, ...], std: float | tuple[float, ...], *, dtype: str) -> Array:
    """(x - mean) / std in float32, then `dtype`; a tuple has one number for each entry of x's last axis.

    Of a grey image (B, H, W, 1) and three numbers it makes a coloured one.
    """
    grey = x.ndim == 4 and x.shape[-1] == 1

    def along(value: float | tuple[float, ...]) -> Array:
        v = jnp.asarray(value, jnp.float32)
        if v.ndim and v.shape[0] != x.shape[-1] and not (grey and v.shape[0] == 3):
            raise UsageError(f"mean and std have {v.shape[0]} entries, the input's last axis has {x.shape[-1]}")
        return v.reshape((1,) * (x.ndim - v.ndim) + v.shape) if v.ndim else v

    if mean == 0.0 and std == 1.0:
        return x.astype(dtype)
    return ((x.astype(jnp.float32) - along(mean)) / along(std)).astype(dtype)


def promoting(module: nn.Module) -> Callable[[Array], Array]:
    """A module of flax's that computes in more precision than its input has, also where JAX promotes nothing itself."""

    def call(x: Array) -> Array:
        with jax.numpy_dtype_promotion("standard"):
            return module(x)

    return call


class BatchNorm(nn.Module):
    """Batch normalisation (Ioffe & Szegedy 2015), statistics in float32; `train` moves their averages.

    The averaged variance is the population's, n / (n − 1) times the batch's, as those who publish weights keep it;
    `flax.linen.BatchNorm` averages the batch's own.
    """

    train: bool
    momentum: float = 0.9
    epsilon: float = 1e-5
    scale_init: Callable[..., Array] = nn.initializers.ones
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x: Array) -> Array:
        shape, axes = x.shape[-1:], tuple(range(x.ndim - 1))
        scale, bias = self.param("scale", self.scale_init, shape), self.param("bias", nn.initializers.zeros, shape)
        averages = [
            self.variable("batch_stats", k, f, shape, jnp.float32) for k, f in (("mean", jnp.zeros), ("var", jnp.ones))
        ]
        mean, var = (v.value for v in averages)
        x32 = x.astype(jnp.float32)
        if self.train:
            mean, var = x32.mean(axes), x32.var(axes)
            if not self.is_initializing():
                count = x.size // shape[0]
                for average, value in zip(averages, (mean, var * (count / max(count - 1, 1)))):
                    average.value = self.momentum * average.value + (1 - self.momentum) * value
        gain = scale * jax.lax.rsqrt(var + self.epsilon)
        gain, shift = (v.reshape((1,) * len(axes) + shape) for v in (gain, bias - mean * gain))
        return (x32 * gain + shift).astype(self.dtype)


class OffsetRMSNorm(nn.Module):
    """RMSNorm (Zhang & Sennrich 2019) times 1 + scale, in float32: what decays to 0 is what the scale adds to 1."""

    epsilon: float = 1e-6
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x: Array) -> Array:
        scale = self.param("scale", nn.initializers.zeros, x.shape[-1:]).reshape((1,) * (x.ndim - 1) + x.shape[-1:])
        x32 = x.astype(jnp.float32)
        y = x32 * jax.lax.rsqrt(jnp.square(x32).mean(-1, keepdims=True) + self.epsilon)
        return (y * (1 + scale.astype(jnp.float32))).astype(self.dtype)


def tell_factors(model: nn.Module, factors: Factors) -> None:
    """Sows them as factors/logits, for who doesn't want the product (`ops.vocabulary`)."""
    if not model.is_initializing():
        model.sow("factors", "logits", factors)


def unembed(model: nn.Module, x_BLD: Array, embed: nn.Embed | None, *, init: Callable[..., Array]) -> Array:
    """The logits of a model with vocabulary and dtype, by its embedding or by a kernel of their own.

    Their factors are sown, unless an adapter (`models.adapt`) has its part in the product.
    """
    if embed is not None:
        kernel_VD = embed.embedding
    else:
        fields = {"use_bias": False, "kernel_init": init, "dtype": model.dtype, "dot_general": dot_float32}
        dense = nn.Dense(model.vocabulary, **fields, name="unembedding")
        logits_BLV, kernel_VD = dense(x_BLD), dense.variables["params"]["kernel"].T
        if dense.has_variable("params", "lora_a"):
            return logits_BLV
    factors = Factors(x_BLD, kernel_VD.astype(model.dtype))
    tell_factors(model, factors)
    return factors.logits() if embed is not None else logits_BLV


def stack(kind: type[nn.Module], *, layers: int, scan: bool, remat: str, **fields: Any) -> Callable[..., Array]:
    """x -> x through so many blocks, whose call is (x, *others) -> (x, None); each is given the same others.

    With `each`, a tuple with an entry for each block (stacked, where `scan`), a block is called with its own too, last:
    (x, *others, own) -> (x, new), and the result is x and all that is new.

    scan: by `nn.scan`, with parameters stacked on a leading axis under "layers"; else under "layer_0", … remat: of
    REMAT, what the backward pass computes again.
    """
    if remat not in REMAT:
        raise UsageError(f"remat {remat!r} is unknown: use one of {', '.join(REMAT)}")
    fields |= {"layers": layers, "scan": scan, "remat": remat}
    block = kind if remat == "none" or plainly("remat") else nn.remat(kind, policy=REMAT[remat], prevent_cse=not scan)

    def call(x: Array, *others: Any, each: Any = None) -> Any:
        own = () if each is None else (each,)
        if not scan:
            new = []
            for n in range(layers):
                x, one = block(**fields, name=f"layer_{n}")(x, *others, *(e[n] for e in own))
                new.append(one)
            return (x, tuple(new)) if own else x
        axes = {"variable_axes": {"params": 0, "intermediates": 0}, "split_rngs": {"params": True, "dropout": True}}
        scanned = nn.scan(block, in_axes=(nn.broadcast,) * len(others) + (0,) * len(own), length=layers, **axes)
        x, new = scanned(**fields, name="layers")(x, *others, *own)
        return (x, new) if own else x

    return call


def fields_of(model: nn.Module, spec: type[nn.Module]) -> dict[str, Any]:
    """The values that a model has for the fields of a class that it inherits from."""
    return {f.name: getattr(model, f.name) for f in dataclasses.fields(spec) if f.name not in ("parent", "name")}


def conv(features: int, size: int, **fields: Any) -> nn.Conv:
    """`nn.Conv` with a square kernel, in the form that is fastest where it runs; `fields` are `nn.Conv`'s."""
    return nn.Conv(features, (size, size), conv_general_dilated=conv_general_dilated, **fields)


def upsample(features: int, **fields: Any) -> nn.Conv:
    """`nn.ConvTranspose` with a 4×4 kernel, stride 2, "SAME": (B, H, W, C) to (B, 2H, 2W, features)."""
    return conv(features, 4, input_dilation=2, padding=2, **fields)


def grid(image: tuple[int, int, int], halvings: int) -> tuple[int, int]:
    """Height and width of the smallest grid that, doubled `halvings` times, covers `image`; the rest is cut off."""
    height, width, _ = image
    return -(-height // 2**halvings), -(-width // 2**halvings)
