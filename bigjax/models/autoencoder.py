"""Autoencoders, dense and convolutional, and the variational autoencoder.

B batch, H height, W width, C channels, Z numbers of the code, S steps.
All decode to logits, one for each pixel and channel: the sigmoid gives the pixel in [0, 1], binary cross-entropy takes
the logits as they are.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from bigjax import UsageError
from bigjax.models.layers import activation, conv, grid, initializer, normalize, upsample
from bigjax.sharding import constrain


class Stack(nn.Module):
    """(B, ...) to (B, outputs): hidden layers `dense_0`, `dense_1`, ..., dropout after the first, then `out`."""

    features: tuple[int, ...]
    outputs: int | tuple[int, int, int]
    activation: str | Callable[[Array], Array]
    kernel_init: str | Callable[..., Array]
    dropout: float
    dtype: str

    @nn.compact
    def __call__(self, x: Array, *, train: bool = False) -> Array:
        act, init, dtype = activation(self.activation), initializer(self.kernel_init), jnp.dtype(self.dtype)
        x = jax.lax.collapse(x, 1)
        for i, width in enumerate(self.features):
            x = act(nn.Dense(width, dtype=dtype, kernel_init=init, name=f"dense_{i}")(x))
            self.sow("intermediates", f"stage_{i}", x)
            if i == 0:  # as in the classic listing: once on the way down, once on the way up
                x = nn.Dropout(self.dropout)(x, deterministic=not train)
        return nn.Dense(self.outputs, dtype=dtype, kernel_init=init, name="out")(x)


class ConvEncoder(Stack):
    """(B, H, W, C) to (B, outputs): 3×3 convolutions of stride 2, then `out`."""

    @nn.compact
    def __call__(self, x: Array, *, train: bool = False) -> Array:
        act, init, dtype = activation(self.activation), initializer(self.kernel_init), jnp.dtype(self.dtype)
        for i, width in enumerate(self.features):
            x = act(conv(width, 3, strides=2, kernel_init=init, dtype=dtype, name=f"conv_{i}")(x))
            self.sow("intermediates", f"stage_{i}", x)
        x = nn.Dropout(self.dropout)(jax.lax.collapse(x, 1), deterministic=not train)
        return nn.Dense(self.outputs, dtype=dtype, kernel_init=init, name="out")(x)


class ConvDecoder(Stack):
    """(B, Z) to (B, *outputs), images: Dense to the smallest grid, 4×4 transposed convolutions that double it, cut."""

    @nn.compact
    def __call__(self, x: Array, *, train: bool = False) -> Array:
        act, init, dtype = activation(self.activation), initializer(self.kernel_init), jnp.dtype(self.dtype)
        shape = (*grid(self.outputs, len(self.features)), self.features[0])
        x = act(nn.Dense(math.prod(shape), dtype=dtype, kernel_init=init, name="dense_0")(x))
        x = nn.Dropout(self.dropout)(x, deterministic=not train).reshape(-1, *shape)
        for i, features in enumerate((*self.features[1:], self.outputs[2])):
            x = upsample(features, kernel_init=init, dtype=dtype, name=f"upsample_{i}")(x)
            x = act(x) if i < len(self.features) - 1 else x
            self.sow("intermediates", f"stage_{i}", x)
        return x[:, : self.outputs[0], : self.outputs[1]]


class Autoencoder(nn.Module):
    """Dense autoencoder (Hinton & Salakhutdinov 2006): 784-64-32-64-64-784, 109,552 parameters on 28×28×1.

    Images (B, H, W, C) float in [0, 1], of the shape `image`, to logits (B, H, W, C) float32. `encode` gives the code
    (B, Z) float32, linear; `decode` takes it back to logits. Dropout follows the first hidden layer of each half.
    With `mutable="intermediates"` a call also returns `features` (the code) and each hidden layer as `stage_i`.

        model = Autoencoder(dropout=0.5)
        variables = model.init(jax.random.key(0), jnp.zeros((1, 28, 28, 1)))
        code_BZ = model.apply(variables, image_BHWC, method="encode")
        image = jax.nn.sigmoid(model.apply(variables, code_BZ, method="decode"))
    """

    image: tuple[int, int, int] = (28, 28, 1)
    code: int = 32
    encoder_features: tuple[int, ...] = (64,)
    decoder_features: tuple[int, ...] = (64, 64)
    activation: str | Callable[[Array], Array] = "relu"
    kernel_init: str | Callable[..., Array] = "glorot_uniform"
    dropout: float = 0.0
    mean: float | tuple[float, ...] = 0.0
    std: float | tuple[float, ...] = 1.0
    dtype: str = "float32"

    def setup(self) -> None:
        self.encoder = self._half(Stack, self.encoder_features, self.code)
        self.decoder = self._half(Stack, self.decoder_features, math.prod(self.image))

    def _half(self, kind: type[Stack], features: tuple[int, ...], outputs: int | tuple[int, int, int]) -> Stack:
        return kind(features, outputs, self.activation, self.kernel_init, self.dropout, self.dtype)

    def encode(self, x_BHWC: Array, *, train: bool = False) -> Array:
        """Images (B, H, W, C) to codes (B, Z) float32."""
        if x_BHWC.shape[1:] != tuple(self.image):
            raise UsageError(f"this autoencoder is for images {tuple(self.image)}, not {x_BHWC.shape[1:]}: set image")
        x = constrain(normalize(x_BHWC, self.mean, self.std, dtype=self.dtype), "batch")
        return self.encoder(x, train=train).astype(jnp.float32)

    def decode(self, code_BZ: Array, *, train: bool = False) -> Array:
        """Codes (B, Z) to logits (B, H, W, C) float32."""
        return self.decoder(code_BZ.astype(self.dtype), train=train).astype(jnp.float32).reshape(-1, *self.image)

    def __call__(self, x_BHWC: Array, *, train: bool = False) -> Array:
        code_BZ = self.encode(x_BHWC, train=train)
        self.sow("intermediates", "features", code_BZ)
        return self.decode(code_BZ, train=train)


class ConvAutoencoder(Autoencoder):
    """As `Autoencoder`, with convolutions of stride 2 down and transposed ones up (Masci et al. 2011).

    `encoder_features` are channels, each halving the sides; `decoder_features` those of the way back, each doubling
    them (the last doubling goes to the image's own channels).
    """

    encoder_features: tuple[int, ...] = (16, 32)
    decoder_features: tuple[int, ...] = (32, 16)

    def setup(self) -> None:
        self.encoder = self._half(ConvEncoder, self.encoder_features, self.code)
        self.decoder = self._half(ConvDecoder, self.decoder_features, self.image)


class Variational(NamedTuple):
    """What a VAE gives: logits (B, H, W, C) of one sample of the code, and the code's mean and log variance (B, Z)."""

    logits: Array
    mean: Array
    log_variance: Array


class VAE(Autoencoder):
    """Variational autoencoder (Kingma & Welling 2014), dense: q(z|x) = N(mean, exp(log_variance)), p(z) = N(0, 1).

    `encode` gives (mean, log_variance), each (B, Z) float32; `decode` takes any z (B, Z) to logits. A call samples
    z = mean + exp(log_variance / 2) · noise if there is a random stream "sample", and takes z = mean if there is none.

        model = VAE()
        variables = model.init(jax.random.key(0), jnp.zeros((1, 28, 28, 1)))
        logits, mean, log_variance = model.apply(variables, image_BHWC, train=True, rngs={"sample": key})
        image = sample(model, variables, key, 16)
    """

    code: int = 20
    encoder_features: tuple[int, ...] = (400,)
    decoder_features: tuple[int, ...] = (400,)

    def setup(self) -> None:
        self.encoder = self._half(Stack, self.encoder_features, 2 * self.code)
        self.decoder = self._half(Stack, self.decoder_features, math.prod(self.image))

    def encode(self, x_BHWC: Array, *, train: bool = False) -> tuple[Array, Array]:
        """Images (B, H, W, C) to the mean and the log variance of their codes, each (B, Z) float32."""
        mean_BZ, log_variance_BZ = jnp.split(super().encode(x_BHWC, train=train), 2, -1)
        return mean_BZ, log_variance_BZ

    def __call__(self, x_BHWC: Array, *, train: bool = False) -> Variational:
        mean_BZ, log_variance_BZ = self.encode(x_BHWC, train=train)
        self.sow("intermediates", "features", mean_BZ)
        z_BZ = mean_BZ
        if self.has_rng("sample"):
            z_BZ += jnp.exp(log_variance_BZ / 2) * jax.random.normal(self.make_rng("sample"), mean_BZ.shape)
        return Variational(self.decode(z_BZ, train=train), mean_BZ, log_variance_BZ)


def interpolate(model: Autoencoder, variables: Mapping[str, Any], a: Array, b: Array, steps: int = 8) -> Array:
    """Images (S, B, H, W, C) in [0, 1] on the line between the codes of a and b (B, H, W, C), both ends included."""
    codes = [model.apply(variables, x, method="encode") for x in (a, b)]
    a_BZ, b_BZ = (code[0] for code in codes) if isinstance(model, VAE) else codes  # a VAE's means
    code_SBZ = jnp.linspace(a_BZ, b_BZ, steps)
    logits = model.apply(variables, code_SBZ.reshape(-1, model.code), method="decode")
    return jax.nn.sigmoid(logits).reshape(steps, *a.shape)


def sample(model: VAE, variables: Mapping[str, Any], key: Array, n: int) -> Array:
    """n images (n, H, W, C) in [0, 1], decoded from z ~ N(0, 1); UsageError if `model` has no prior to draw from."""
    if not isinstance(model, VAE):
        raise UsageError(f"a {type(model).__name__} has no distribution of codes to sample from: use a VAE")
    z_BZ = jax.random.normal(key, (n, model.code))
    return jax.nn.sigmoid(model.apply(variables, z_BZ, method="decode"))


TINY = {
    "autoencoder": Autoencoder((8, 8, 1), 3, (6,), (6, 5), dropout=0.1),
    "conv_autoencoder": ConvAutoencoder((8, 8, 1), 3, (4, 5), (5, 4), dropout=0.1),
    "vae": VAE((8, 8, 1), 3, (8,), (8,), dropout=0.1),
}
TINY_INPUTS = (jax.ShapeDtypeStruct((2, 8, 8, 1), "float32"),)
