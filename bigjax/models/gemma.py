"""Gemma 3 (text): of every six layers five look at what is near, and one at everything.

B batch, L positions, D width, V vocabulary. Sources: Gemma Team 2025 (Gemma 3: the local layers, norms of queries and
keys); Gemma Team 2024 (Gemma 2: a norm before and a norm after each part).
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import Array

from bigjax import UsageError
from bigjax.models.cache import Cache, Caches
from bigjax.models.decoder import Decoder
from bigjax.models.layers import fields_of
from bigjax.models.transformer import Attention, FeedForward, norm
from bigjax.sharding import constrain


class Spec(nn.Module):
    """The fields of a `Gemma`, which says what they mean, and of its blocks."""

    vocabulary: int = 262_144
    layers: int = 26
    width: int = 1152
    heads: int = 4
    kv_heads: int = 1
    head: int = 256
    mlp: int = 6912
    context: int = 32_768
    window: int = 512
    period: int = 6
    rope_base: float = 1_000_000.0
    rope_factor: float = 1.0
    local_rope_base: float = 10_000.0
    query_scalar: float | None = None
    epsilon: float = 1e-6
    tied: bool = True
    scan: bool = False
    remat: str = "none"
    dtype: str = "float32"


class Block(Spec):
    """x + norm(attention(norm(x))), then x + norm(mlp(norm(x))). near: whether it is a local layer."""

    @nn.compact
    def __call__(self, x_BLD: Array, position: Array, own: tuple[Cache | None, Array]) -> tuple[Array, Cache | None]:
        cache, near = own
        init = nn.initializers.normal(0.02)
        shared = {"bias": False, "kernel_init": init, "out_init": init, "dtype": self.dtype}
        attend = Attention(
            self.heads,
            self.kv_heads,
            self.head,
            rotary=True,
            qk_norm="rms_offset",
            window=jnp.where(near, self.window, self.context),
            rope_base=jnp.where(near, self.local_rope_base, self.rope_base),
            rope_scaling=(jnp.where(near, 1.0, self.rope_factor),),
            scale=(self.query_scalar or self.head) ** -0.5,
            epsilon=self.epsilon,
            **shared,
            name="attention",
        )
        y_BLD, cache = attend(normed(self, "attention_norm")(x_BLD), cache, position=position)
        x_BLD = x_BLD + normed(self, "attention_post_norm")(y_BLD)
        feed = FeedForward(self.mlp, "geglu", **shared, name="mlp")
        return x_BLD + normed(self, "mlp_post_norm")(feed(normed(self, "mlp_norm")(x_BLD))), cache


def normed(spec: Spec, name: str) -> Callable[[Array], Array]:
    """RMSNorm by 1 + scale, as all of a Gemma's."""
    return norm("rms_offset", bias=False, dtype=spec.dtype, epsilon=spec.epsilon, name=name)


class Gemma(Spec, Decoder):
    """tokens_BL int32 -> logits_BLV float32, where position l sees tokens 0…l (Gemma Team 2025).

    `length_B` says how many tokens of a row are real, as of `GPT`. The defaults are Gemma 3 1B. Embeddings enter times
    √width.

    mlp: hidden units, of GELU gated (GEGLU). head: the size of one.
    window, period: all layers but every `period`th look at `window` positions, themselves among them.
    rope_base, rope_factor, local_rope_base: how fast rotary positions turn in the layers that look at everything, by
        how many times slower (for contexts longer than in pretraining), and how fast in the others.
    query_scalar: scores are divided by its root; None for the size of a head.
    epsilon: of the norms. tied: the output kernel is the embedding. scan, remat: as of `GPT`.
    Sown: intermediates/features, (B, L, D), what the output kernel sees. Mistakes raise `UsageError`.

        model = Gemma()
        variables = model.init(jax.random.key(0), jnp.zeros((1, 1024), "int32"))
        logits_BLV = model.apply(variables, tokens_BL)
    """

    @nn.compact
    def _run(
        self, tokens_BL: Array, cache: Caches | None, position: Array, *, train: bool, at_B: Array | None = None
    ) -> tuple:
        self._check(tokens_BL)
        self._check_rotary()
        if self.period < 1:
            raise UsageError(f"period {self.period}: every so-manieth layer looks at everything, so give at least 1")
        embed = self._embedding()
        x_BLD = constrain(embed(tokens_BL), "batch") * self.width**0.5
        near = np.arange(1, self.layers + 1) % self.period != 0
        x_BLD, cache = self._stack(Block, fields_of(self, Spec), x_BLD, cache, position, near)
        x_BLD = normed(self, "norm")(x_BLD)
        self.sow("intermediates", "features", x_BLD)
        return self._logits(x_BLD, embed, at_B), cache


TINY = Gemma(vocabulary=11, layers=3, width=8, heads=2, head=6, mlp=12, context=6, window=2, period=2, rope_factor=2.0)
TINY_INPUTS = (jax.ShapeDtypeStruct((2, 4), "int32"),)
