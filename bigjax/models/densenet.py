"""DenseNet: every layer sees what all layers before it in its block have made.

B batch, H height, W width, C channels, K outputs. Source: Huang et al. 2017 (DenseNet-BC: bottlenecks, and transitions
that halve the channels).
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from bigjax import UsageError
from bigjax.models.layers import REMAT, BatchNorm, conv, normalize
from bigjax.sharding import constrain

DEPTHS = {
    121: {"blocks": (6, 12, 24, 16), "growth": 32, "width": 64},
    161: {"blocks": (6, 12, 36, 24), "growth": 48, "width": 96},
    169: {"blocks": (6, 12, 32, 32), "growth": 32, "width": 64},
    201: {"blocks": (6, 12, 48, 32), "growth": 32, "width": 64},
}


def convolved(x: Array, features: int, size: int, stride: int, *, dtype: str, name: str) -> Array:
    """A convolution that keeps the size but for its stride."""
    fields = {"strides": stride, "padding": size // 2, "use_bias": False, "kernel_init": nn.initializers.he_normal()}
    return conv(features, size, **fields, dtype=dtype, name=name)(x)


class Layer(nn.Module):
    """What `growth` channels are made of all that came before, through 1×1 and 3×3 convolutions."""

    growth: int
    bottleneck: int
    dropout: float
    train: bool
    dtype: str

    @nn.compact
    def __call__(self, *before: Array) -> Array:
        x = jnp.concatenate(before, -1)  # here, so that the backward pass may make it again: there is one a layer
        for n, (features, size) in enumerate(((self.bottleneck * self.growth, 1), (self.growth, 3))):
            x = nn.relu(BatchNorm(self.train, dtype=self.dtype, name=f"norm_{n}")(x))
            x = convolved(x, features, size, 1, dtype=self.dtype, name=f"conv_{n}")
        return nn.Dropout(self.dropout)(x, deterministic=not self.train)


class DenseNet(nn.Module):
    """image_BHWC -> logits_BK float32 (Huang et al. 2017), DenseNet-121 by its defaults; `DEPTHS` has the others.

    blocks: how many layers each has; behind all but the last, channels and sides of the image are halved.
    growth: channels that a layer adds. bottleneck: so many times that between its convolutions. width: of the stem.
    stem: "imagenet", a 7×7 convolution and a pooling that quarter the image; "cifar", a 3×3 one, for 32 pixels.
    dropout: of what a layer adds. mean, std: normalise the pixels: one number, or one a channel.
    remat: "none", "full" (every layer, and what it saw: memory that grows as the depth, not as its square) or "dots".
    Sown: intermediates/stage_0, …, and features, (B, C), what the head sees. Mistakes raise `UsageError`.

        model = DenseNet()
        variables = model.init(jax.random.key(0), jnp.zeros((1, 224, 224, 3)))
        logits_BK, state = model.apply(variables, image_BHWC, train=True, mutable="batch_stats")
    """

    blocks: tuple[int, ...] = (6, 12, 24, 16)
    growth: int = 32
    width: int = 64
    bottleneck: int = 4
    outputs: int = 1000
    stem: str = "imagenet"
    dropout: float = 0.0
    mean: float | tuple[float, ...] = 0.0
    std: float | tuple[float, ...] = 1.0
    remat: str = "none"
    dtype: str = "float32"

    @nn.compact
    def __call__(self, image_BHWC: Array, *, train: bool = False) -> Array:
        self._check(image_BHWC)

        def normed(x: Array, name: str) -> Array:
            return nn.relu(BatchNorm(train, dtype=self.dtype, name=name)(x))

        x = constrain(normalize(image_BHWC, self.mean, self.std, dtype=self.dtype), "batch")
        size, stride = (7, 2) if self.stem == "imagenet" else (3, 1)
        x = normed(convolved(x, self.width, size, stride, dtype=self.dtype, name="conv_stem"), "norm_stem")
        if self.stem == "imagenet":
            x = nn.max_pool(x, (3, 3), (2, 2), padding=((1, 1), (1, 1)))
        layer = Layer if self.remat == "none" else nn.remat(Layer, policy=REMAT[self.remat])
        fields = (self.growth, self.bottleneck, self.dropout, train, self.dtype)
        for i, count in enumerate(self.blocks):
            if i:
                x = convolved(normed(x, f"norm_{i}"), x.shape[-1] // 2, 1, 1, dtype=self.dtype, name=f"conv_{i}")
                x = halved(x)
            made = [x]
            for j in range(count):
                made.append(layer(*fields, name=f"block_{i}_{j}")(*made))
            x = jnp.concatenate(made, -1)
            self.sow("intermediates", f"stage_{i}", x)
        x_BC = normed(x, "norm").mean((1, 2))
        self.sow("intermediates", "features", x_BC)
        return nn.Dense(self.outputs, dtype=self.dtype, name="logits")(x_BC).astype(jnp.float32)

    def _check(self, image_BHWC: Array) -> None:
        least = 2 ** (len(self.blocks) - 1)
        least = 4 * least - 3 if self.stem == "imagenet" else least
        if image_BHWC.ndim != 4 or min(image_BHWC.shape[1:3]) < least:
            raise UsageError(
                f"this DenseNet takes images (batch, height, width, channels) of at least {least} pixels a side, not "
                f"an array of shape {image_BHWC.shape}: resize them, or use fewer blocks"
            )
        if self.stem not in ("imagenet", "cifar"):
            raise UsageError(f"stem {self.stem!r} is unknown: use imagenet or cifar")
        if self.remat not in REMAT:
            raise UsageError(f"remat {self.remat!r} is unknown: use one of {', '.join(REMAT)}")


def halved(x: Array) -> Array:
    """The mean of 2×2 pixels; an odd last row or column is dropped."""
    b, h, w, c = x.shape
    return x[:, : h // 2 * 2, : w // 2 * 2].reshape(b, h // 2, 2, w // 2, 2, c).mean((2, 4))


TINY = DenseNet(blocks=(1, 2), growth=3, width=4, bottleneck=2, outputs=3, stem="cifar", dropout=0.1)
TINY_INPUTS = (jax.ShapeDtypeStruct((2, 8, 8, 3), "float32"),)
