"""EfficientNet: one small network, made wider, deeper and for larger images at once.

B batch, H height, W width, C channels, K outputs. Sources: Tan & Le 2019; its blocks are those of MobileNetV2
(Sandler et al. 2018) with squeeze and excitation (Hu et al. 2018).
"""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from bigjax import UsageError
from bigjax.models.layers import REMAT, BatchNorm, conv, normalize
from bigjax.sharding import constrain

SIZES = {  # for images of 224, 240, 260, 300, 380, 456, 528 and 600 pixels
    "b0": {"width": 1.0, "depth": 1.0, "dropout": 0.2},
    "b1": {"width": 1.0, "depth": 1.1, "dropout": 0.2},
    "b2": {"width": 1.1, "depth": 1.2, "dropout": 0.3},
    "b3": {"width": 1.2, "depth": 1.4, "dropout": 0.3},
    "b4": {"width": 1.4, "depth": 1.8, "dropout": 0.4},
    "b5": {"width": 1.6, "depth": 2.2, "dropout": 0.4},
    "b6": {"width": 1.8, "depth": 2.6, "dropout": 0.5},
    "b7": {"width": 2.0, "depth": 3.1, "dropout": 0.5},
}
Stage = tuple[int, int, int, int, int]  # blocks, kernel, stride of the first, expansion, features
B0: tuple[Stage, ...] = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
Padding = str | tuple[tuple[int, int], ...]


class Unit(nn.Module):
    """A convolution and its normalisation; depthwise: each channel by itself."""

    features: int
    kernel: int
    stride: int
    padding: Padding
    depthwise: bool
    batch_norm: tuple[bool, float, float]  # train, momentum, epsilon
    dtype: str

    @nn.compact
    def __call__(self, x: Array) -> Array:
        init = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
        fields = {"strides": self.stride, "padding": self.padding, "use_bias": False, "kernel_init": init}
        if self.depthwise:  # whose fan-out is that of one channel
            init = nn.initializers.normal(math.sqrt(2.0) / self.kernel)
            fields |= {"feature_group_count": self.features, "kernel_init": init}
        x = conv(self.features, self.kernel, **fields, dtype=self.dtype, name="conv")(x)
        return BatchNorm(*self.batch_norm, dtype=self.dtype, name="norm")(x)


class Block(nn.Module):
    """Wider by `expansion`, each channel by itself, weighed by what is seen of all, and back; added where it fits."""

    stage: Stage
    stride: int
    padding: Padding
    reduction: float
    drop: float
    batch_norm: tuple[bool, float, float]
    dtype: str

    @nn.compact
    def __call__(self, x: Array) -> Array:
        _, kernel, _, expansion, features = self.stage
        C, rest = x.shape[-1], {"batch_norm": self.batch_norm, "dtype": self.dtype}
        wide, y = C * expansion, x
        if expansion != 1:
            y = nn.silu(Unit(wide, 1, 1, "VALID", False, **rest, name="expand")(y))
        y = nn.silu(Unit(wide, kernel, self.stride, self.padding, True, **rest, name="depthwise")(y))
        seen = y.mean((1, 2), keepdims=True)
        seen = nn.silu(nn.Conv(max(1, int(C * self.reduction)), (1, 1), dtype=self.dtype, name="squeeze")(seen))
        y = y * nn.sigmoid(nn.Conv(wide, (1, 1), dtype=self.dtype, name="excite")(seen))
        y = Unit(features, 1, 1, "VALID", False, **rest, name="project")(y)
        if y.shape != x.shape:
            return y
        return x + nn.Dropout(self.drop, broadcast_dims=(1, 2, 3))(y, deterministic=not self.batch_norm[0])


class EfficientNet(nn.Module):
    """image_BHWC -> logits_BK float32 (Tan & Le 2019), EfficientNet-B0 by its defaults; `SIZES` has the others.

    width, depth: what channels and blocks are multiplied by. stages: of the network that is multiplied: blocks, kernel,
        stride, expansion, features. stem, top: channels before and after them. divisor: of all channels.
    squeeze: hidden units of the excitation, as a part of a block's channels.
    padding: where a convolution halves the image: "same", as many zeros as its size needs, fewer before than behind
        (TensorFlow's); "symmetric" (torchvision's and timm's); or the numbers of those blocks, from 0, whose image has
        odd sides (transformers'), and all others are padded as for even ones.
    dropout: before the logits. stochastic_depth: how often an example passes by a block in training, for the last;
        those before it less often, in proportion (Huang et al. 2016).
    momentum, epsilon: of BatchNorm. mean, std: normalise the pixels: one number, or one a channel.
    remat: "none", "full" (every block) or "dots".
    Sown: intermediates/stage_0, …, and features, (B, C), what the head sees. Mistakes raise `UsageError`.

        model = EfficientNet()
        variables = model.init(jax.random.key(0), jnp.zeros((1, 224, 224, 3)))
        logits_BK, state = model.apply(variables, image_BHWC, train=True, mutable="batch_stats",
                                       rngs={"dropout": jax.random.key(1)})
    """

    width: float = 1.0
    depth: float = 1.0
    stages: tuple[Stage, ...] = B0
    stem: int = 32
    top: int = 1280
    divisor: int = 8
    squeeze: float = 0.25
    outputs: int = 1000
    padding: str | tuple[int, ...] = ()
    dropout: float = 0.2
    stochastic_depth: float = 0.2
    momentum: float = 0.99
    epsilon: float = 1e-3
    mean: float | tuple[float, ...] = 0.0
    std: float | tuple[float, ...] = 1.0
    remat: str = "none"
    dtype: str = "float32"

    def rounded(self, features: int) -> int:
        """So many features, `width` times: a multiple of `divisor`, and at least 0.9 of it."""
        exact = features * self.width
        near = max(self.divisor, int(exact + self.divisor / 2) // self.divisor * self.divisor)
        return near + self.divisor if near < 0.9 * exact else near

    def blocks(self) -> list[tuple[int, int, Stage]]:
        """(its stage's number, its own in that stage, the stage with its real features) of each block."""
        real = [(math.ceil(self.depth * count), *rest, self.rounded(f)) for count, *rest, f in self.stages]
        return [(i, j, stage) for i, stage in enumerate(real) for j in range(stage[0])]

    def _padding(self, kernel: int, stride: int, block: int | None = None) -> Padding:
        if self.padding == "same":
            return "SAME"
        less = int(stride > 1 and self.padding != "symmetric" and block not in self.padding)
        return ((kernel // 2 - less, kernel // 2),) * 2

    @nn.compact
    def __call__(self, image_BHWC: Array, *, train: bool = False) -> Array:
        self._check(image_BHWC)
        rest = {"batch_norm": (train, self.momentum, self.epsilon), "dtype": self.dtype}
        x = constrain(normalize(image_BHWC, self.mean, self.std, dtype=self.dtype), "batch")
        x = nn.silu(Unit(self.rounded(self.stem), 3, 2, self._padding(3, 2), False, **rest, name="unit_stem")(x))
        block = Block if self.remat == "none" else nn.remat(Block, policy=REMAT[self.remat])
        blocks = self.blocks()
        for n, (i, j, stage) in enumerate(blocks):
            stride, drop = 1 if j else stage[2], self.stochastic_depth * n / len(blocks)
            padding = self._padding(stage[1], stride, n)
            x = block(stage, stride, padding, self.squeeze, drop, **rest, name=f"stage_{i}_{j}")(x)
            if j == stage[0] - 1:
                self.sow("intermediates", f"stage_{i}", x)
        x = nn.silu(Unit(self.rounded(self.top), 1, 1, "VALID", False, **rest, name="unit_top")(x))
        x_BC = x.mean((1, 2))
        self.sow("intermediates", "features", x_BC)
        x_BC = nn.Dropout(self.dropout)(x_BC, deterministic=not train)
        return nn.Dense(self.outputs, dtype=self.dtype, name="logits")(x_BC).astype(jnp.float32)

    def _check(self, image_BHWC: Array) -> None:
        if image_BHWC.ndim != 4 or not min(image_BHWC.shape[1:3]):
            got = image_BHWC.shape
            raise UsageError(f"EfficientNet takes images (batch, height, width, channels), not an array of shape {got}")
        if isinstance(self.padding, str) and self.padding not in ("same", "symmetric"):
            raise UsageError(f"padding {self.padding!r} is unknown: use same, symmetric, or numbers of blocks")
        if not 0 <= self.stochastic_depth < 1:
            raise UsageError(f"stochastic_depth {self.stochastic_depth} is no probability: use one below 1, 0 for none")
        if self.remat not in REMAT:
            raise UsageError(f"remat {self.remat!r} is unknown: use one of {', '.join(REMAT)}")


TINY = EfficientNet(
    stages=((1, 3, 1, 1, 4), (2, 3, 2, 2, 6)), stem=4, top=8, divisor=2, outputs=3, dropout=0.1, padding="same"
)
TINY_INPUTS = (jax.ShapeDtypeStruct((2, 12, 12, 3), "float32"),)
