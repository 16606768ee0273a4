"""ViT: an image as a row of patches, through a Transformer; DeiT, which has one more token for a teacher's answer.

B batch, H height, W width, C channels, L positions, D features, K outputs. Sources: Dosovitskiy et al. 2021 (ViT);
Touvron et al. 2021 (DeiT); Oquab et al. 2023 (DINOv2: layer scale, gated units, what the head sees).
"""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from bigjax import UsageError
from bigjax.models.layers import fields_of, normalize, stack
from bigjax.models.transformer import Attention, FeedForward, norm
from bigjax.sharding import constrain

POOLS, TEACHERS = ("token", "mean", "both"), ("none", "token", "head")


class Spec(nn.Module):
    """The fields of a `ViT`, which says what they mean, and of its blocks."""

    image: int = 224
    patch: int = 16
    layers: int = 12
    width: int = 768
    heads: int = 12
    mlp: int | None = None
    outputs: int = 1000
    pool: str = "token"
    teacher: str = "none"
    activation: str | Callable[[Array], Array] = "gelu_erf"
    bias: bool = True
    layer_scale: float | None = None
    epsilon: float = 1e-6
    mean: float | tuple[float, ...] = 0.0
    std: float | tuple[float, ...] = 1.0
    dropout: float = 0.0
    scan: bool = False
    remat: str = "none"
    dtype: str = "float32"


class Block(Spec):
    """Pre-norm: x + attention(norm(x)), then x + mlp(norm(x)); returns (x_BLD, None) as `nn.scan` wants it."""

    deterministic: bool = True

    @nn.compact
    def __call__(self, x_BLD: Array) -> tuple[Array, None]:
        def normed(name: str) -> Array:
            return norm("layer", bias=True, dtype=self.dtype, epsilon=self.epsilon, name=name)(x_BLD)

        def scaled(y_BLD: Array, name: str) -> Array:
            if self.layer_scale is None:
                return y_BLD
            scale_D = self.param(name, nn.initializers.constant(self.layer_scale), y_BLD.shape[-1:])
            return y_BLD * scale_D.astype(self.dtype)[None, None]

        drop = nn.Dropout(self.dropout, deterministic=self.deterministic)
        fields = {"causal": False, "qkv_bias": self.bias, "dtype": self.dtype}
        attend = Attention(self.heads, self.heads, **fields, name="attention")
        x_BLD = x_BLD + drop(scaled(attend(normed("attention_norm"))[0], "attention_scale"))
        feed = FeedForward(self.mlp or 4 * self.width, self.activation, dtype=self.dtype, name="mlp")
        return x_BLD + drop(scaled(feed(normed("mlp_norm")), "mlp_scale")), None


class ViT(Spec):
    """image_BHWC -> logits_BK float32 (Dosovitskiy et al. 2021); DINOv2 (Oquab et al. 2023) by its fields.

    image: the side that the positions were learned at; at other sizes, of whole patches, they are interpolated.
    patch: the side of one. mlp: hidden units; None for 4 × width. bias: in q, k and v.
    activation: a function, or its name; "swiglu" is gated (of DINOv2's giant). layer_scale: where what each part adds
        begins, times a learned scale a channel (Touvron et al. 2021, CaiT; DINOv2); None for no scale.
    outputs: of the head; 0 for none: what comes out is what the last norm gives, (B, tokens, D) float32.
    pool: what the head sees: "token", the class token; "mean" of the patches, and then there is no such token; or
        "both", side by side (DINOv2).
    teacher: of DeiT (Touvron et al. 2021): "none"; "token", a second token that the head does not see; "head", which
        has a head for it too, and the logits are the mean of both.
    mean, std: normalise the pixels: one number, or one a channel.
    dropout: on the embedding and before each addition to the stream. scan, remat: as of `GPT`.
    Sown: intermediates/features, (B, D), what the head sees. Mistakes raise `UsageError`.

        model = ViT()
        variables = model.init(jax.random.key(0), jnp.zeros((1, 224, 224, 3)))
        logits_BK = model.apply(variables, image_BHWC)
    """

    @nn.compact
    def __call__(self, image_BHWC: Array, *, train: bool = False) -> Array:
        self._check(image_BHWC)
        init, D, P = nn.initializers.truncated_normal(0.02), self.width, self.patch
        x = normalize(image_BHWC, self.mean, self.std, dtype=self.dtype)
        cut = {"strides": (P, P), "padding": "VALID", "kernel_init": init, "dtype": self.dtype}
        x_BHWD = nn.Conv(D, (P, P), **cut, name="patches")(constrain(x, "batch"))
        B, height, width, _ = x_BHWD.shape
        extra = (self.pool != "mean") + (self.teacher != "none")
        side = self.image // P
        positions_1LD = self.param("positions", init, (1, extra + side * side, D)).astype(self.dtype)
        if (height, width) != (side, side):
            grid = positions_1LD[:, extra:].reshape(side, side, D)
            grid = jnp.einsum("hi,wj,ijd->hwd", *(bicubic(n, side).astype(self.dtype) for n in (height, width)), grid)
            positions_1LD = jnp.concatenate([positions_1LD[:, :extra], grid.reshape(1, height * width, D)], axis=1)
        names = ["class_token"] * (self.pool != "mean") + ["teacher_token"] * (self.teacher != "none")
        tokens = [self.param(name, init, (1, 1, D)).astype(self.dtype) for name in names]
        rows = [jnp.broadcast_to(token, (B, 1, D)) for token in tokens] + [x_BHWD.reshape(B, height * width, D)]
        x_BLD = nn.Dropout(self.dropout)(jnp.concatenate(rows, axis=1) + positions_1LD, deterministic=not train)
        x_BLD = stack(Block, deterministic=not train, **fields_of(self, Spec))(x_BLD)
        x_BLD = norm("layer", bias=True, dtype=self.dtype, epsilon=self.epsilon, name="norm")(x_BLD)
        seen = [x_BLD[:, 0]] * (self.pool != "mean") + [x_BLD[:, extra:].mean(1)] * (self.pool != "token")
        x_BD = jnp.concatenate(seen, axis=-1)
        self.sow("intermediates", "features", x_BD)
        if not self.outputs:
            return x_BLD.astype(jnp.float32)
        logits_BK = nn.Dense(self.outputs, kernel_init=init, dtype=self.dtype, name="logits")(x_BD)
        if self.teacher == "head":
            taught = nn.Dense(self.outputs, kernel_init=init, dtype=self.dtype, name="teacher_logits")(x_BLD[:, 1])
            logits_BK = (logits_BK + taught) / 2
        return logits_BK.astype(jnp.float32)

    def _check(self, image_BHWC: Array) -> None:
        if image_BHWC.ndim != 4:
            got = image_BHWC.shape
            raise UsageError(f"a ViT takes images (batch, height, width, channels), not an array of shape {got}")
        if any(n % self.patch or not n for n in (*image_BHWC.shape[1:3], self.image)):
            size = "×".join(map(str, image_BHWC.shape[1:3]))
            raise UsageError(
                f"images of {size} and positions for {self.image} are not whole patches of {self.patch}: resize the "
                "images to a multiple of it, or choose another patch"
            )
        if self.width % self.heads:
            raise UsageError(f"width {self.width} is no multiple of heads ({self.heads}): change one of the two")
        if self.pool not in POOLS or self.teacher not in TEACHERS:
            raise UsageError(
                f"pool {self.pool!r} and teacher {self.teacher!r}: use one of {', '.join(POOLS)}, and one of "
                f"{', '.join(TEACHERS)}"
            )
        if self.pool == "mean" and self.teacher != "none":
            raise UsageError("a DeiT has a class token: use pool='token' with a teacher")


def bicubic(out: int, size: int) -> Array:
    """(out, size): the weights that interpolate a row of `size` numbers at `out` places (Keys 1981, with a = −0.75).

    As image libraries do it: pixels have an extent, and beyond the edge there is what is at the edge.
    """
    place = (np.arange(out) + 0.5) * size / out - 0.5
    weights, first = np.zeros((out, size), np.float32), np.floor(place).astype(int)
    for tap in range(-1, 3):
        d = np.abs(place - first - tap)
        near, far = 1.25 * d**3 - 2.25 * d**2 + 1, -0.75 * (d**3 - 5 * d**2 + 8 * d - 4)
        np.add.at(weights, (np.arange(out), np.clip(first + tap, 0, size - 1)), np.where(d <= 1, near, far))
    return jnp.asarray(weights)


TINY = ViT(image=4, patch=4, layers=2, width=8, heads=2, mlp=12, outputs=3, teacher="head", dropout=0.1)
TINY_INPUTS = (jax.ShapeDtypeStruct((2, 8, 8, 3), "float32"),)
