"""VGG: 3×3 convolutions, one after the other, and three dense layers.

B batch, H height, W width, C channels, K outputs. Sources: Simonyan & Zisserman 2015; with batch normalisation as
torchvision has it.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from bigjax import UsageError
from bigjax.models.layers import REMAT, BatchNorm, conv, normalize
from bigjax.ops.convolution import max_pool
from bigjax.sharding import constrain

DEPTHS = {
    11: {"stages": (1, 1, 2, 2, 2)},
    13: {"stages": (2, 2, 2, 2, 2)},
    16: {"stages": (2, 2, 3, 3, 3)},
    19: {"stages": (2, 2, 4, 4, 4)},
}


class Stage(nn.Module):
    """So many 3×3 convolutions of one width, and a pooling that halves the image."""

    count: int
    features: int
    batch_norm: bool
    train: bool
    dtype: str

    @nn.compact
    def __call__(self, x: Array) -> Array:
        init = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
        for j in range(self.count):
            x = conv(self.features, 3, padding=1, kernel_init=init, dtype=self.dtype, name=f"conv_{j}")(x)
            if self.batch_norm:
                x = BatchNorm(self.train, dtype=self.dtype, name=f"norm_{j}")(x)
            x = nn.relu(x if j < self.count - 1 else max_pool(x))  # the largest first: equal, and a quarter of the work
        return x


class VGG(nn.Module):
    """image_BHWC -> logits_BK float32 (Simonyan & Zisserman 2015), VGG-16 by its defaults; `DEPTHS` has the others.

    stages: how many convolutions each has, after which the image is halved. widths: their channels.
    batch_norm: after each convolution (Ioffe & Szegedy 2015).
    grid: what the dense layers see of an image, so many means a side: all there is at 224 pixels.
    dense: their units. dropout: after each of them.
    mean, std: normalise the pixels: one number, or one a channel.
    remat: "none", "full" (every stage) or "dots".
    Sown: intermediates/stage_0, …, and features, (B, D), what the head sees. Mistakes raise `UsageError`.

        model = VGG()
        variables = model.init(jax.random.key(0), jnp.zeros((1, 224, 224, 3)))
        logits_BK = model.apply(variables, image_BHWC)
    """

    stages: tuple[int, ...] = (2, 2, 3, 3, 3)
    widths: tuple[int, ...] = (64, 128, 256, 512, 512)
    batch_norm: bool = False
    grid: int = 7
    dense: tuple[int, ...] = (4096, 4096)
    outputs: int = 1000
    dropout: float = 0.5
    mean: float | tuple[float, ...] = 0.0
    std: float | tuple[float, ...] = 1.0
    remat: str = "none"
    dtype: str = "float32"

    @nn.compact
    def __call__(self, image_BHWC: Array, *, train: bool = False) -> Array:
        self._check(image_BHWC)
        x = constrain(normalize(image_BHWC, self.mean, self.std, dtype=self.dtype), "batch")
        stage = Stage if self.remat == "none" else nn.remat(Stage, policy=REMAT[self.remat])
        for i, (count, width) in enumerate(zip(self.stages, self.widths)):
            x = stage(count, width, self.batch_norm, train, self.dtype, name=f"block_{i}")(x)
            self.sow("intermediates", f"stage_{i}", x)
        if x.shape[1:3] != (self.grid, self.grid):
            rows, columns = (means(self.grid, n).astype(self.dtype) for n in x.shape[1:3])
            x = jnp.einsum("ih,jw,bhwc->bijc", rows, columns, x)
        x = jax.lax.collapse(x.transpose(0, 3, 1, 2), 1)  # a channel after the other, as everybody's weights have them
        init = nn.initializers.normal(0.01)
        for i, width in enumerate(self.dense):
            x = nn.relu(nn.Dense(width, kernel_init=init, dtype=self.dtype, name=f"dense_{i}")(x))
            if i == len(self.dense) - 1:
                self.sow("intermediates", "features", x)
            x = nn.Dropout(self.dropout)(x, deterministic=not train)
        return nn.Dense(self.outputs, kernel_init=init, dtype=self.dtype, name="logits")(x).astype(jnp.float32)

    def _check(self, image_BHWC: Array) -> None:
        least = 2 ** len(self.stages)
        if image_BHWC.ndim != 4 or min(image_BHWC.shape[1:3]) < least:
            raise UsageError(
                f"this VGG takes images (batch, height, width, channels) of at least {least} pixels a side, not an "
                f"array of shape {image_BHWC.shape}: resize them, or use fewer stages"
            )
        if len(self.widths) != len(self.stages):
            raise UsageError(f"widths {self.widths} and stages {self.stages} differ in number: give one width a stage")
        if self.remat not in REMAT:
            raise UsageError(f"remat {self.remat!r} is unknown: use one of {', '.join(REMAT)}")


def means(out: int, size: int) -> Array:
    """(out, size): the weights that make `out` means of a row of `size` numbers, of equal parts as near as can be."""
    place, here = np.arange(out)[:, None], np.arange(size)[None]
    inside = (here >= place * size // out) & (here < -(-(place + 1) * size // out))
    return jnp.asarray(inside / inside.sum(1, keepdims=True), jnp.float32)


TINY = VGG(stages=(1, 2), widths=(4, 6), batch_norm=True, grid=3, dense=(6, 5), outputs=3, dropout=0.1)
TINY_INPUTS = (jax.ShapeDtypeStruct((2, 8, 8, 3), "float32"),)
