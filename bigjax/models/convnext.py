"""ConvNeXt: a convolutional network with what Transformers have taught.

B batch, H height, W width, C channels, K outputs. Source: Liu et al. 2022 (its first version, which has no response
normalisation).
"""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from bigjax import UsageError
from bigjax.models.layers import REMAT, conv, normalize
from bigjax.models.transformer import FeedForward, norm
from bigjax.sharding import constrain

SIZES = {
    "atto": {"stages": (2, 2, 6, 2), "widths": (40, 80, 160, 320)},
    "femto": {"stages": (2, 2, 6, 2), "widths": (48, 96, 192, 384)},
    "pico": {"stages": (2, 2, 6, 2), "widths": (64, 128, 256, 512)},
    "nano": {"stages": (2, 2, 8, 2), "widths": (80, 160, 320, 640)},
    "tiny": {"stages": (3, 3, 9, 3), "widths": (96, 192, 384, 768)},
    "small": {"stages": (3, 3, 27, 3), "widths": (96, 192, 384, 768)},
    "base": {"stages": (3, 3, 27, 3), "widths": (128, 256, 512, 1024)},
    "large": {"stages": (3, 3, 27, 3), "widths": (192, 384, 768, 1536)},
    "xlarge": {"stages": (3, 3, 27, 3), "widths": (256, 512, 1024, 2048)},
}
INIT = nn.initializers.truncated_normal(0.02)


class Block(nn.Module):
    """x + scale × mlp(norm(f(x))): f sees 7×7 pixels of each channel by itself, the MLP all channels of a pixel."""

    activation: str | Callable[[Array], Array]
    scale: float
    drop: float
    train: bool
    dtype: str

    @nn.compact
    def __call__(self, x: Array) -> Array:
        C = x.shape[-1]
        fields = {"padding": 3, "feature_group_count": C, "kernel_init": INIT, "dtype": self.dtype}
        y = conv(C, 7, **fields, name="depthwise")(x)
        y = norm("layer", bias=True, dtype=self.dtype, epsilon=1e-6, name="norm")(y)
        inits = {"kernel_init": INIT, "out_init": INIT}
        y = FeedForward(4 * C, self.activation, **inits, dtype=self.dtype, name="mlp")(y)
        if self.scale:
            scale_C = self.param("layer_scale", nn.initializers.constant(self.scale), (C,))
            y = y * scale_C.astype(self.dtype).reshape(1, 1, 1, C)
        return x + nn.Dropout(self.drop, broadcast_dims=(1, 2, 3))(y, deterministic=not self.train)


class ConvNeXt(nn.Module):
    """image_BHWC -> logits_BK float32 (Liu et al. 2022), ConvNeXt-T by its defaults; `SIZES` has the others.

    stages: how many blocks each has; all but the first begin by halving the image. widths: their channels.
    patch: the side of the first convolution, and its stride.
    layer_scale: what the branches are multiplied by at first, each channel by its own; 0 for no such parameter.
    stochastic_depth: how often an example passes by the last block in training, those before it less often, in
        proportion to how many there are (Huang et al. 2016); of the paper 0.1, 0.4, 0.5 and 0.5 for T, S, B and L.
    epsilon: of the norm before the head. mean, std: normalise the pixels: one number, or one a channel.
    remat: "none", "full" (every block) or "dots".
    Sown: intermediates/stage_0, …, and features, (B, C), what the head sees. Mistakes raise `UsageError`.

        model = ConvNeXt()
        variables = model.init(jax.random.key(0), jnp.zeros((1, 224, 224, 3)))
        logits_BK = model.apply(variables, image_BHWC)
    """

    stages: tuple[int, ...] = (3, 3, 9, 3)
    widths: tuple[int, ...] = (96, 192, 384, 768)
    patch: int = 4
    outputs: int = 1000
    activation: str | Callable[[Array], Array] = "gelu_erf"
    layer_scale: float = 1e-6
    stochastic_depth: float = 0.0
    epsilon: float = 1e-6
    mean: float | tuple[float, ...] = 0.0
    std: float | tuple[float, ...] = 1.0
    remat: str = "none"
    dtype: str = "float32"

    @nn.compact
    def __call__(self, image_BHWC: Array, *, train: bool = False) -> Array:
        self._check(image_BHWC)
        x = constrain(normalize(image_BHWC, self.mean, self.std, dtype=self.dtype), "batch")

        def cut(x: Array, width: int, side: int, name: str) -> Array:
            fields = {"strides": side, "padding": "VALID", "kernel_init": INIT, "dtype": self.dtype}
            return nn.Conv(width, (side, side), **fields, name=f"conv_{name}")(x)

        def normed(x: Array, name: str, epsilon: float = 1e-6) -> Array:
            return norm("layer", bias=True, dtype=self.dtype, epsilon=epsilon, name=name)(x)

        x = normed(cut(x, self.widths[0], self.patch, "stem"), "norm_stem")
        block = Block if self.remat == "none" else nn.remat(Block, policy=REMAT[self.remat])
        fields = {"activation": self.activation, "scale": self.layer_scale, "train": train, "dtype": self.dtype}
        last, n = max(sum(self.stages) - 1, 1), 0
        for i, (count, width) in enumerate(zip(self.stages, self.widths)):
            if i:
                x = cut(normed(x, f"norm_{i}"), width, 2, f"{i}")
            for j in range(count):
                x = block(drop=self.stochastic_depth * n / last, **fields, name=f"stage_{i}_{j}")(x)
                n += 1
            self.sow("intermediates", f"stage_{i}", x)
        x_BC = normed(x.mean((1, 2)), "norm", self.epsilon)
        self.sow("intermediates", "features", x_BC)
        head = nn.Dense(self.outputs, kernel_init=INIT, dtype=self.dtype, name="logits")
        return head(x_BC).astype(jnp.float32)

    def _check(self, image_BHWC: Array) -> None:
        least = self.patch * 2 ** (len(self.stages) - 1)
        if image_BHWC.ndim != 4 or min(image_BHWC.shape[1:3]) < least:
            raise UsageError(
                f"this ConvNeXt takes images (batch, height, width, channels) of at least {least} pixels a side, not "
                f"an array of shape {image_BHWC.shape}: resize them, or use fewer stages or a smaller patch"
            )
        if len(self.widths) != len(self.stages):
            raise UsageError(f"widths {self.widths} and stages {self.stages} differ in number: give one width a stage")
        if not 0 <= self.stochastic_depth < 1:
            raise UsageError(f"stochastic_depth {self.stochastic_depth} is no probability: use one below 1, 0 for none")
        if self.remat not in REMAT:
            raise UsageError(f"remat {self.remat!r} is unknown: use one of {', '.join(REMAT)}")


TINY = ConvNeXt(stages=(1, 1), widths=(4, 6), patch=2, outputs=3, layer_scale=0.5, stochastic_depth=0.5)
TINY_INPUTS = (jax.ShapeDtypeStruct((2, 8, 8, 3), "float32"),)
