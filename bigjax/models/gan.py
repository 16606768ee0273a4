"""Generator and discriminator of a DCGAN (Radford, Metz & Chintala 2016), for images of any size.

B batch, H height, W width, C channels, Z latent numbers.

The classic listings' counts hold: `Generator(image=(32, 32, 3))` has the 2,444,931 parameters of the one for CIFAR
(latent 100, Dense to 8×8×256, two 4×4 transposed convolutions of 128, a 3×3 convolution), `Discriminator()` on 28×28×1
the 74,433 of the one for MNIST (two 3×3 convolutions 64, 128 without biases, stride 2, global maximum, Dense 1). Those
two don't fit each other; here both take their shapes from the image, so a pair made for the same `image` always does.
"""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from bigjax import UsageError
from bigjax.models.layers import conv, grid, initializer, normalize, promoting, upsample
from bigjax.sharding import constrain


def one_hot(label_B: Array | None, classes: int, dtype: jnp.dtype) -> Array:
    """(B, classes); UsageError if there are classes but no labels."""
    if label_B is None:
        raise UsageError(f"this model is conditioned on {classes} classes: call it with labels, or set classes=0")
    return jax.nn.one_hot(label_B, classes, dtype=dtype)


class Generator(nn.Module):
    """Latent (B, Z) float, usually standard normal, to images (B, H, W, C) float32 in [0, 1].

    Dense to features[0] channels on the smallest grid, a 4×4 transposed convolution of stride 2 for each further entry
    of `features`, what goes beyond the image cut off, a 3×3 convolution to C channels, sigmoid. With `classes`, one-hot
    labels (B,) join the latent (Mirza & Osindero 2014). `batch_norm` as in the DCGAN paper; the listing has none.
    28×28×1 gives 2,054,785 parameters.

        model = Generator(latent=64, features=(64, 32, 16))
        variables = model.init(jax.random.key(0), jnp.zeros((1, 64)))
        image_BHWC = model.apply(variables, jax.random.normal(key, (16, 64)), train=False)
    """

    image: tuple[int, int, int] = (28, 28, 1)
    latent: int = 100
    features: tuple[int, ...] = (256, 128, 128)
    slope: float = 0.2  # of the leaky ReLU below zero
    batch_norm: bool = False
    classes: int = 0
    kernel_init: str | Callable[..., Array] = "glorot_uniform"
    dtype: str = "float32"

    @nn.compact
    def __call__(self, z_BZ: Array, label_B: Array | None = None, *, train: bool = False) -> Array:
        if z_BZ.shape[-1] != self.latent:
            raise UsageError(f"the generator's latent is {self.latent} numbers, not {z_BZ.shape[-1]}")
        init, dtype = initializer(self.kernel_init), jnp.dtype(self.dtype)
        x = z_BZ.astype(dtype)
        if self.classes:
            x = jnp.concatenate([x, one_hot(label_B, self.classes, dtype)], -1)
        height, width = grid(self.image, len(self.features) - 1)
        size = height * width * self.features[0]
        x = nn.Dense(size, dtype=dtype, kernel_init=init, name="dense_0")(x)
        x = constrain(x, "batch").reshape(-1, height, width, self.features[0])
        for i, features in enumerate(self.features):
            if i:
                x = upsample(features, kernel_init=init, dtype=dtype, name=f"upsample_{i - 1}")(x)
            if self.batch_norm:
                x = promoting(nn.BatchNorm(not train, momentum=0.9, dtype=dtype, name=f"norm_{i}"))(x)
            x = nn.leaky_relu(x, self.slope)
            self.sow("intermediates", f"stage_{i}", x)
        x = x[:, : self.image[0], : self.image[1]]
        x = conv(self.image[2], 3, kernel_init=init, dtype=dtype, name="image")(x)
        return nn.sigmoid(x.astype(jnp.float32))


class Discriminator(nn.Module):
    """Images (B, H, W, C) float in [0, 1] to logits (B,) float32, positive where an image seems real.

    A 3×3 convolution of stride 2 for each entry of `features`, then `pool`: "max" over the grid, as the listing, or
    "flatten", and Dense 1. `spectral_norm` divides each kernel by its largest singular value (Miyato et al. 2018); the
    power iteration's state is in `batch_stats`, and moves on with `train=True`. With `classes`, labels (B,) enter by
    projection (Miyato & Koyama 2018). `mean`, `std` normalise the pixels: 0.5 and 0.5 give [-1, 1].

        model = Discriminator(spectral_norm=True)
        variables = model.init(jax.random.key(0), jnp.zeros((1, 28, 28, 1)))
        logit_B, state = model.apply(variables, image_BHWC, train=True, mutable="batch_stats")
    """

    features: tuple[int, ...] = (64, 128)
    slope: float = 0.2
    pool: str = "max"
    dropout: float = 0.0
    spectral_norm: bool = False
    classes: int = 0
    use_bias: bool = False  # of the convolutions
    mean: float | tuple[float, ...] = 0.5
    std: float | tuple[float, ...] = 0.5
    kernel_init: str | Callable[..., Array] = "glorot_uniform"
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x_BHWC: Array, label_B: Array | None = None, *, train: bool = False) -> Array:
        if self.pool not in ("max", "flatten"):
            raise UsageError(f"no pooling of the discriminator is called {self.pool!r}: use max or flatten")
        dtype, init = jnp.dtype(self.dtype), initializer(self.kernel_init)

        def layer(module: nn.Module, x: Array) -> Array:
            y = module(x)
            if not self.spectral_norm:
                return y
            kernel, bias = (module.variables["params"].get(k) for k in ("kernel", "bias"))
            scale = (1 / self._norm(module.name, kernel, train)).astype(dtype)
            y = y * scale  # the layer is linear, so this is the layer of kernel · scale
            return y if bias is None else y + (bias.astype(dtype) * (1 - scale)).reshape((1,) * (y.ndim - 1) + (-1,))

        x = normalize(x_BHWC, self.mean, self.std, dtype=self.dtype)
        for i, width in enumerate(self.features):
            fields = {"strides": 2, "use_bias": self.use_bias, "kernel_init": init, "dtype": dtype}
            x = layer(conv(width, 3, **fields, name=f"conv_{i}"), x)
            x = nn.leaky_relu(constrain(x, "batch"), self.slope)
            self.sow("intermediates", f"stage_{i}", x)
            x = nn.Dropout(self.dropout)(x, deterministic=not train)
        x = x.max((1, 2)) if self.pool == "max" else jax.lax.collapse(x, 1)
        self.sow("intermediates", "features", x)
        logit = layer(nn.Dense(1, dtype=dtype, kernel_init=init, name="logit"), x)[:, 0]
        if self.classes:
            project = nn.Dense(x.shape[-1], use_bias=False, dtype=dtype, kernel_init=init, name="projection")
            logit = logit + (layer(project, one_hot(label_B, self.classes, dtype)) * x).sum(-1)
        return logit.astype(jnp.float32)

    def _norm(self, name: str, kernel: Array, train: bool) -> Array:
        """The largest singular value of a kernel (..., D), by one more step of the power iteration."""
        matrix = kernel.reshape(-1, kernel.shape[-1])
        right = self.variable(
            "batch_stats", f"{name}_right", lambda: jax.random.normal(self.make_rng("params"), matrix.shape[1:])
        )

        def unit(x: Array) -> Array:
            return x / (jnp.linalg.norm(x) + 1e-12)

        fixed = jax.lax.stop_gradient(matrix)
        left = unit(fixed @ right.value)
        vector = unit(left @ fixed)
        if train and not self.is_initializing():
            right.value = vector
        return left @ matrix @ vector


TINY = {
    "generator": Generator((8, 8, 1), latent=5, features=(6, 4, 4), batch_norm=True),
    "discriminator": Discriminator(features=(4, 6), spectral_norm=True, classes=3, dropout=0.1),
}
TINY_INPUTS = {
    "generator": (jax.ShapeDtypeStruct((2, 5), "float32"),),
    "discriminator": (jax.ShapeDtypeStruct((2, 8, 8, 1), "float32"), jax.ShapeDtypeStruct((2,), "int32")),
}
