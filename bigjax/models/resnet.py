"""ResNet: convolutions that learn what to add to their input.

B batch, H height, W width, C channels, K outputs. Sources: He et al. 2016; version 1.5, where the 3×3 convolution of a
bottleneck has the stride (Goyal et al. 2017).
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from bigjax import UsageError
from bigjax.models.layers import REMAT, BatchNorm, conv, normalize
from bigjax.sharding import constrain

DEPTHS = {
    18: {"stages": (2, 2, 2, 2), "block": "basic"},
    34: {"stages": (3, 4, 6, 3), "block": "basic"},
    50: {"stages": (3, 4, 6, 3), "block": "bottleneck"},
    101: {"stages": (3, 4, 23, 3), "block": "bottleneck"},
    152: {"stages": (3, 8, 36, 3), "block": "bottleneck"},
}


class Block(nn.Module):
    """relu(x + f(x)): f is two 3×3 convolutions ("basic"), or 1×1, 3×3 and 1×1 through a quarter ("bottleneck")."""

    kind: str
    features: int
    stride: int
    train: bool
    zero: bool
    dtype: str

    @nn.compact
    def __call__(self, x: Array) -> Array:
        F = self.features
        forms = [(3, F, self.stride), (3, F, 1)]
        if self.kind == "bottleneck":
            forms = [(1, F // 4, 1), (3, F // 4, self.stride), (1, F, 1)]
        y = x
        for n, (size, features, stride) in enumerate(forms):
            last = n == len(forms) - 1
            y = normed(y, features, size, stride, f"{n}", train=self.train, zero=self.zero and last, dtype=self.dtype)
            y = y if last else nn.relu(y)
        if self.stride > 1 or x.shape[-1] != F:
            x = normed(x, F, 1, self.stride, "shortcut", train=self.train, dtype=self.dtype)
        return nn.relu(x + y)


def normed(
    x: Array, features: int, size: int, stride: int, name: str, *, train: bool, zero: bool = False, dtype: str
) -> Array:
    """A convolution that keeps the size but for its stride, and its normalisation."""
    init = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
    fields = {"strides": stride, "padding": size // 2, "use_bias": False, "kernel_init": init, "dtype": dtype}
    x = conv(features, size, **fields, name=f"conv_{name}")(x)
    scale = nn.initializers.zeros if zero else nn.initializers.ones
    return BatchNorm(train, scale_init=scale, dtype=dtype, name=f"norm_{name}")(x)


class ResNet(nn.Module):
    """image_BHWC -> logits_BK float32 (He et al. 2016), ResNet-50 by its defaults; `DEPTHS` has the fields of others.

    stages: how many blocks each has; all but the first halve the image. block: "bottleneck" or "basic".
    width: of the stem. widths: of the stages; None for width × 1, 2, 4, 8, and 4 times that of bottlenecks.
    stem: "imagenet", a 7×7 convolution and a pooling that quarter the image; "cifar", a 3×3 one, for 32 pixels.
    zero: begins with blocks that add nothing (Goyal et al. 2017): the last scale of each is 0.
    mean, std: normalise the pixels: one number, or one a channel.
    remat: "none", "full" (every block) or "dots".
    Sown: intermediates/stage_0, …, and features, (B, C), what the head sees. Mistakes raise `UsageError`.

        model = ResNet()
        variables = model.init(jax.random.key(0), jnp.zeros((1, 224, 224, 3)))
        logits_BK, state = model.apply(variables, image_BHWC, train=True, mutable="batch_stats")
    """

    stages: tuple[int, ...] = (3, 4, 6, 3)
    block: str = "bottleneck"
    width: int = 64
    widths: tuple[int, ...] | None = None
    outputs: int = 1000
    stem: str = "imagenet"
    zero: bool = False
    mean: float | tuple[float, ...] = 0.0
    std: float | tuple[float, ...] = 1.0
    remat: str = "none"
    dtype: str = "float32"

    def widths_of_stages(self) -> tuple[int, ...]:
        first = self.width * (4 if self.block == "bottleneck" else 1)
        return self.widths or tuple(first * 2**i for i in range(len(self.stages)))

    @nn.compact
    def __call__(self, image_BHWC: Array, *, train: bool = False) -> Array:
        self._check(image_BHWC)
        x = constrain(normalize(image_BHWC, self.mean, self.std, dtype=self.dtype), "batch")
        size, stride = (7, 2) if self.stem == "imagenet" else (3, 1)
        x = nn.relu(normed(x, self.width, size, stride, "stem", train=train, dtype=self.dtype))
        if self.stem == "imagenet":
            x = nn.max_pool(x, (3, 3), (2, 2), padding=((1, 1), (1, 1)))
        block = Block if self.remat == "none" else nn.remat(Block, policy=REMAT[self.remat])
        for i, (count, width) in enumerate(zip(self.stages, self.widths_of_stages())):
            for j in range(count):
                stride = 2 if i and not j else 1
                x = block(self.block, width, stride, train, self.zero, self.dtype, name=f"stage_{i}_{j}")(x)
            self.sow("intermediates", f"stage_{i}", x)
        x_BC = x.mean((1, 2))
        self.sow("intermediates", "features", x_BC)
        head = nn.Dense(self.outputs, kernel_init=nn.initializers.normal(0.01), dtype=self.dtype, name="logits")
        return head(x_BC).astype(jnp.float32)

    def _check(self, image_BHWC: Array) -> None:
        if image_BHWC.ndim != 4 or not min(image_BHWC.shape[1:3]):
            got = image_BHWC.shape
            raise UsageError(f"a ResNet takes images (batch, height, width, channels), not an array of shape {got}")
        if self.block not in ("bottleneck", "basic") or self.stem not in ("imagenet", "cifar"):
            raise UsageError(
                f"block {self.block!r} and stem {self.stem!r}: use bottleneck or basic, and imagenet or cifar"
            )
        if len(self.widths_of_stages()) != len(self.stages):
            raise UsageError(f"widths {self.widths} and stages {self.stages} differ in number: give one width a stage")
        if self.remat not in REMAT:
            raise UsageError(f"remat {self.remat!r} is unknown: use one of {', '.join(REMAT)}")


TINY = ResNet(stages=(1, 1), width=4, outputs=3)
TINY_INPUTS = (jax.ShapeDtypeStruct((2, 16, 16, 3), "float32"),)
