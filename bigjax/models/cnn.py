"""Convolutional network for small images.

B batch, H height, W width, C channels.
"""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from bigjax import UsageError
from bigjax.models.layers import MONOTONE, activation, conv, initializer, normalize, promoting
from bigjax.ops.convolution import max_pool
from bigjax.sharding import constrain


class CNN(nn.Module):
    """The classic MNIST network (LeCun et al. 1998): 3×3 convolutions 32, 64, 64, Dense 64, 10 logits.

    Image (B, H, W, C) float in [0, 1] to logits (B, outputs) float32. On 28×28×1 it has the 93,322 parameters of the
    TensorFlow CNN tutorial; features (32, 64) with dense (128,): 225,034. 2×2 max pooling follows each of the first
    `pools` convolutions; dropout precedes every dense layer (Krizhevsky et al. 2012). `mean`, `std` normalise the
    pixels: one number, or one a channel. UsageError: an image smaller than `least_side`.
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
    activation: str | Callable[[Array], Array] = "relu"
    kernel_init: str | Callable[..., Array] = "lecun_normal"
    dropout: float = 0.0
    batch_norm: bool = False
    mean: float | tuple[float, ...] = 0.0
    std: float | tuple[float, ...] = 1.0
    dtype: str = "float32"

    def least_side(self) -> int:
        """The pixels a side that the stages need."""
        side, lost = 1, self.kernel - 1 if self.padding == "VALID" else 0
        for i in reversed(range(len(self.features))):
            side = side * (2 if i < self.pools else 1) + lost
        return side

    @nn.compact
    def __call__(self, x_BHWC: Array, *, train: bool = False) -> Array:
        if x_BHWC.ndim != 4:
            raise UsageError(f"CNN takes images (batch, height, width, channels), not an array of shape {x_BHWC.shape}")
        if min(x_BHWC.shape[1:3]) < (least := self.least_side()):
            size, also = "×".join(map(str, x_BHWC.shape[1:3])), "padding='SAME', " if self.padding == "VALID" else ""
            raise UsageError(
                f"images of {size} are too small for {len(self.features)} convolutions, {self.pools} of them pooled: "
                f"use at least {least}×{least} (of a script --resize {least}), {also}fewer features or pools"
            )
        act, init, dtype = activation(self.activation), initializer(self.kernel_init), jnp.dtype(self.dtype)
        x = normalize(x_BHWC, self.mean, self.std, dtype=self.dtype)

        def norm(x: Array, i: int) -> Array:
            if not self.batch_norm:
                return x
            return promoting(nn.BatchNorm(not train, momentum=0.9, dtype=dtype, name=f"norm_{i}"))(x)

        for i, width in enumerate(self.features):
            fields = {"padding": self.padding, "kernel_init": init, "dtype": dtype}
            x = conv(width, self.kernel, **fields, name=f"conv_{i}")(x)
            x = norm(constrain(x, "batch"), i)
            if i >= self.pools:
                x = act(x)
            elif act in MONOTONE:  # equal, and a quarter of the work
                x = act(max_pool(x))
            else:
                x = max_pool(act(x))
            self.sow("intermediates", f"stage_{i}", x)
        x = jax.lax.collapse(x, 1)
        for i, width in enumerate(self.dense):
            x = nn.Dropout(self.dropout)(x, deterministic=not train)
            x = nn.Dense(width, dtype=dtype, kernel_init=init, name=f"dense_{i}")(x)
            x = act(norm(x, len(self.features) + i))
            self.sow("intermediates", f"stage_{len(self.features) + i}", x)
        self.sow("intermediates", "features", x)
        x = nn.Dropout(self.dropout)(x, deterministic=not train)
        x = nn.Dense(self.outputs, dtype=dtype, kernel_init=init, name="logits")(x)
        return x.astype(jnp.float32)


TINY = CNN(features=(4, 5), dense=(6,), padding="SAME", dropout=0.1, batch_norm=True)
TINY_INPUTS = (jax.ShapeDtypeStruct((2, 8, 8, 1), "float32"),)
