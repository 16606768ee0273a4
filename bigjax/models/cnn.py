"""Convolutional network for small images.

B batch, H height, W width, C channels, D channels of the output, K kernel size.
"""

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from bigjax import UsageError
from bigjax.models.layers import MONOTONE, activation, initializer, normalize
from bigjax.ops.convolution import convolve, max_pool, upsample
from bigjax.sharding import constrain


class Conv(nn.Module):
    """`nn.Conv` with a square kernel: same parameters (kernel (K, K, C, D), bias (D,)) and values; see `convolve`."""

    features: int
    kernel: int = 3
    stride: int = 1
    padding: str = "VALID"
    kernel_init: str = "lecun_normal"
    use_bias: bool = True
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x_BHWC: Array) -> Array:
        shape = (self.kernel, self.kernel, x_BHWC.shape[-1], self.features)
        kernel = self.param("kernel", initializer(self.kernel_init), shape).astype(self.dtype)
        y = convolve(x_BHWC.astype(self.dtype), kernel, stride=self.stride, padding=self.padding)
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, (self.features,)).astype(self.dtype)
            y = y + bias.reshape(1, 1, 1, -1)
        return y


class Upsample(nn.Module):
    """`nn.ConvTranspose` with a 4×4 kernel and stride 2: same parameters and values; see `upsample`."""

    features: int
    kernel_init: str = "lecun_normal"
    use_bias: bool = True
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x_BHWC: Array) -> Array:
        kernel = self.param("kernel", initializer(self.kernel_init), (4, 4, x_BHWC.shape[-1], self.features))
        y = upsample(x_BHWC.astype(self.dtype), kernel.astype(self.dtype))
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, (self.features,)).astype(self.dtype)
            y = y + bias.reshape(1, 1, 1, -1)
        return y


class CNN(nn.Module):
    """The classic MNIST network (LeCun et al. 1998): 3×3 convolutions 32, 64, 64, Dense 64, 10 logits.

    Image (B, H, W, C) float in [0, 1] to logits (B, outputs) float32. On 28×28×1 it has the 93,322 parameters of the
    TensorFlow CNN tutorial; features (32, 64) with dense (128,): 225,034. 2×2 max pooling follows each of the first
    `pools` convolutions; dropout precedes every dense layer (Krizhevsky et al. 2012). `mean`, `std` normalise the
    pixels: one number, or one a channel. UsageError if the image is too small for the stages.
    With `mutable="intermediates"` a call also returns `stage_0`, `stage_1`, ... (the activation of each convolution
    after pooling, then of each dense layer) and `features`, the last one before the logits;
    `capture_intermediates=True` adds each layer's output.

        model = CNN()
        variables = model.init(jax.random.key(0), jnp.zeros((1, 28, 28, 1)))
        logits, state = model.apply(variables, image_BHWC, train=False, mutable="intermediates")
    """

    features: tuple[int, ...] = (32, 64, 64)
    dense: tuple[int, ...] = (64,)
    outputs: int = 10
    kernel: int = 3
    padding: str = "VALID"
    pools: int = 2
    activation: str = "relu"
    kernel_init: str = "lecun_normal"
    dropout: float = 0.0
    batch_norm: bool = False
    mean: float | tuple[float, ...] = 0.0
    std: float | tuple[float, ...] = 1.0
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x_BHWC: Array, *, train: bool = False) -> Array:
        if x_BHWC.ndim != 4:
            raise UsageError(f"CNN takes images (batch, height, width, channels), not an array of shape {x_BHWC.shape}")
        act, init, dtype = activation(self.activation), initializer(self.kernel_init), jnp.dtype(self.dtype)
        x = normalize(x_BHWC, self.mean, self.std, dtype=self.dtype)

        def norm(x: Array, i: int) -> Array:
            return nn.BatchNorm(not train, momentum=0.9, dtype=dtype, name=f"norm_{i}")(x) if self.batch_norm else x

        for i, width in enumerate(self.features):
            lost, pool = self.kernel - 1 if self.padding == "VALID" else 0, 2 if i < self.pools else 1
            if min(x.shape[1:3]) < lost + pool:
                size, hint = "×".join(map(str, x_BHWC.shape[1:3])), "use padding='SAME' or fewer features or pools"
                raise UsageError(f"images of {size} are too small for convolution {i}: {hint}")
            x = Conv(width, self.kernel, 1, self.padding, self.kernel_init, dtype=self.dtype, name=f"conv_{i}")(x)
            x = norm(constrain(x, "batch"), i)
            if i >= self.pools:
                x = act(x)
            elif self.activation in MONOTONE:  # equal, and a quarter of the work
                x = act(max_pool(x))
            else:
                x = max_pool(act(x))
            self.sow("intermediates", f"stage_{i}", x)
        x = x.reshape(x.shape[0], -1)
        for i, width in enumerate(self.dense):
            x = nn.Dropout(self.dropout)(x, deterministic=not train)
            x = nn.Dense(width, dtype=dtype, kernel_init=init, name=f"dense_{i}")(x)
            x = act(norm(x, len(self.features) + i))
            self.sow("intermediates", f"stage_{len(self.features) + i}", x)
        self.sow("intermediates", "features", x)
        x = nn.Dropout(self.dropout)(x, deterministic=not train)
        x = nn.Dense(self.outputs, dtype=dtype, kernel_init=init, name="logits")(x)
        return x.astype(jnp.float32)
