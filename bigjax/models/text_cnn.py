"""A convolution over words, and the largest of what each of its filters gives.

B batch, L positions, D embedding, M maps of a width, F features, C outputs. Source: Kim 2014.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from bigjax import UsageError
from bigjax.sharding import constrain


def _uniform(key: Array, shape: tuple[int, ...], dtype: jnp.dtype) -> Array:
    return jax.random.uniform(key, shape, dtype, -0.25, 0.25)


class Windows(nn.Module):
    """x_BLD -> y_BLM: `maps` filters of the `width` words from each place on; zeros are behind the last."""

    width: int
    maps: int
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x_BLD: Array) -> Array:
        L, D = x_BLD.shape[1:]
        kernel = self.param("kernel", nn.initializers.he_normal(in_axis=(0, 1)), (self.width, D, self.maps))
        bias = self.param("bias", nn.initializers.zeros, (self.maps,))
        x_BLD = jnp.pad(x_BLD, ((0, 0), (0, self.width - 1), (0, 0)))
        kernel = kernel.astype(self.dtype)
        parts = (x_BLD[:, i : i + L] @ kernel[i] for i in range(self.width))
        return sum(parts) + bias.astype(self.dtype)[None, None]


class TextCNN(nn.Module):
    """Filters of several widths over words, max over time (Kim, Convolutional Neural Networks for Sentence
    Classification, 2014; its CNN-rand, whose words begin at random).

    Called with tokens_BL int32; `length_B` says how many of a row are real: what comes after them changes nothing. Of
    each filter the largest of its values at the real places is taken, of a row without any 0; a filter wider than what
    is left of the row sees zeros there, so that a row may be shorter than the widest. Returns float32 (B, C), without
    `outputs` the features (B, widths × maps). Mistakes in fields or shapes raise `UsageError`.

    embedding: numbers a word is given. widths: words that filters see; maps: filters of each width.
    dropout: on the features, before the head.
    Sown: intermediates/features, what the head sees.

        model = TextCNN(vocabulary=8000)
        variables = model.init(jax.random.key(0), jnp.zeros((1, 60), "int32"))
        logits_BC = model.apply(variables, tokens_BL, length_B)
    """

    vocabulary: int = 8000
    embedding: int = 300
    widths: tuple[int, ...] = (3, 4, 5)
    maps: int = 100
    outputs: int | None = 2
    dropout: float = 0.5
    dtype: str = "float32"

    @nn.compact
    def __call__(self, tokens_BL: Array, length_B: Array | None = None, *, train: bool = False) -> Array:
        if not self.widths or min(self.widths) < 1 or len(set(self.widths)) < len(self.widths):
            raise UsageError(f"widths {self.widths} of a TextCNN: give one or more different ones, from 1 up")
        if tokens_BL.ndim != 2 or not jnp.issubdtype(tokens_BL.dtype, jnp.integer):
            raise UsageError(
                f"a TextCNN takes integer tokens (batch, length), not {tokens_BL.dtype}{list(tokens_BL.shape)}"
            )
        embed = nn.Embed(self.vocabulary, self.embedding, embedding_init=_uniform, dtype=self.dtype, name="embedding")
        x_BLD = constrain(embed(tokens_BL), "batch")
        if length_B is not None:
            real_BL1 = (jnp.arange(tokens_BL.shape[1])[None] < length_B[:, None])[..., None]
            x_BLD = jnp.where(real_BL1, x_BLD, 0)
        pooled = []
        for width in self.widths:
            y_BLM = Windows(width, self.maps, self.dtype, name=f"width_{width}")(x_BLD)
            if length_B is not None:
                y_BLM = jnp.where(real_BL1, y_BLM, -jnp.inf)
            pooled.append(nn.relu(y_BLM.max(1)))  # as the largest of rectified ones, and 0 of no place at all
        features_BF = jnp.concatenate(pooled, axis=-1)
        features_BF = nn.Dropout(self.dropout)(features_BF, deterministic=not train)
        self.sow("intermediates", "features", features_BF)
        if self.outputs is None:
            return features_BF.astype(jnp.float32)
        return nn.Dense(self.outputs, dtype=self.dtype, name="head")(features_BF).astype(jnp.float32)


TINY = TextCNN(vocabulary=11, embedding=4, widths=(2, 3), maps=3, outputs=3, dropout=0.1)
TINY_INPUTS = (jax.ShapeDtypeStruct((2, 6), "int32"),)
