"""BERT: a Transformer that sees both sides of each token, and the heads that are trained on it.

B batch, L positions, D width, V vocabulary, K outputs. Source: Devlin et al. 2019.
"""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from bigjax import UsageError
from bigjax.models.layers import fields_of, stack, tell_factors
from bigjax.models.transformer import Attention, FeedForward, norm, unit
from bigjax.ops.vocabulary import Factors
from bigjax.sharding import constrain

HEADS = ("none", "masked", "sequence", "token", "question")


class Spec(nn.Module):
    """The fields of a `BERT`, which says what they mean, and of its blocks."""

    vocabulary: int = 30522
    layers: int = 12
    width: int = 768
    heads: int = 12
    mlp: int | None = None
    context: int = 512
    segments: int = 2
    head: str = "none"
    outputs: int = 2
    pooler: bool = True
    activation: str | Callable[[Array], Array] = "gelu_erf"
    epsilon: float = 1e-12
    dropout: float = 0.1
    scan: bool = False
    remat: str = "none"
    dtype: str = "float32"


class Block(Spec):
    """Post-norm: norm(x + attention(x)), then norm(x + mlp(x)); returns (x_BLD, None) as `nn.scan` wants it."""

    deterministic: bool = True

    @nn.compact
    def __call__(self, x_BLD: Array, mask: Array | None) -> tuple[Array, None]:
        def add(x_BLD: Array, y_BLD: Array, name: str) -> Array:
            y_BLD = nn.Dropout(self.dropout)(y_BLD, deterministic=self.deterministic)
            return norm("layer", bias=True, dtype=self.dtype, epsilon=self.epsilon, name=name)(x_BLD + y_BLD)

        attend = Attention(self.heads, self.heads, causal=False, dtype=self.dtype, name="attention")
        x_BLD = add(x_BLD, attend(x_BLD, mask=mask)[0], "attention_norm")
        feed = FeedForward(self.mlp or 4 * self.width, self.activation, dtype=self.dtype, name="mlp")
        return add(x_BLD, feed(x_BLD), "mlp_norm"), None


class BERT(Spec):
    """tokens_BL int32 -> hidden_BLD float32, or the logits of its head (Devlin et al. 2019).

    mask_BL is true where a token is real: no other is looked at, on whichever side it is. segments_BL says which of two
    texts a token is of; None for the first.

    head: "none" -> (B, L, width); "masked" -> (B, L, vocabulary), tied to the embedding; "sequence" -> (B, outputs), of
        the first token; "token" -> (B, L, outputs); "question" -> (B, L, 2), where an answer begins and ends.
    pooler: of head "none": has parameters for the first token's summary, which is sown as `pooled`.
    mlp: hidden units; None for 4 × width. activation: "gelu_erf", "gelu" (tanh form), "relu", or a function.
    dropout: on the embedding, before each addition and before the head.
    scan, remat: as of `GPT`: layers by `nn.scan`, and what the backward pass recomputes.
    Sown: intermediates/features, (B, L, D), what the head sees. Mistakes raise `UsageError`.

        model = BERT()
        variables = model.init(jax.random.key(0), jnp.zeros((1, 512), "int32"))
        hidden_BLD = model.apply(variables, tokens_BL, mask_BL)
    """

    @nn.compact
    def __call__(
        self, tokens_BL: Array, mask_BL: Array | None = None, segments_BL: Array | None = None, *, train: bool = False
    ) -> Array:
        self._check(tokens_BL)
        init = nn.initializers.normal(0.02)

        def embedding(count: int, name: str) -> nn.Embed:
            return nn.Embed(count, self.width, embedding_init=init, dtype=self.dtype, name=name)

        def dense(width: int, name: str, **fields: object) -> nn.Dense:
            return nn.Dense(width, kernel_init=init, dtype=self.dtype, name=name, **fields)

        def layer_norm(name: str) -> Callable[[Array], Array]:
            return norm("layer", bias=True, dtype=self.dtype, epsilon=self.epsilon, name=name)

        drop = nn.Dropout(self.dropout, deterministic=not train)
        segments_BL = jnp.zeros_like(tokens_BL) if segments_BL is None else segments_BL
        embed = embedding(self.vocabulary, "embedding")
        x_BLD = constrain(embed(tokens_BL), "batch") + embedding(self.segments, "segments")(segments_BL)
        x_BLD = x_BLD + embedding(self.context, "positions")(jnp.arange(tokens_BL.shape[1]))[None]
        x_BLD = drop(layer_norm("embedding_norm")(x_BLD))
        mask = None if mask_BL is None else mask_BL.astype(bool)[:, None, None]
        blocks = stack(Block, deterministic=not train, **fields_of(self, Spec))
        x_BLD = blocks(x_BLD, mask)
        self.sow("intermediates", "features", x_BLD)
        if self.head == "none":
            if self.pooler:
                self.sow("intermediates", "pooled", jnp.tanh(dense(self.width, "pooler")(x_BLD[:, 0])))
            return x_BLD.astype(jnp.float32)
        if self.head == "masked":
            gelu = unit(self.activation)
            x_BLD = layer_norm("head_norm")(gelu(dense(self.width, "head")(x_BLD)))
            bias_V = self.param("head_bias", nn.initializers.zeros, (self.vocabulary,))
            factors = Factors(x_BLD, embed.embedding.astype(self.dtype), bias_V)
            tell_factors(self, factors)
            return factors.logits()
        if self.head == "sequence":
            x_BLD = jnp.tanh(dense(self.width, "pooler")(x_BLD[:, 0]))
        outputs = 2 if self.head == "question" else self.outputs
        x_BLD = x_BLD if self.head == "question" else drop(x_BLD)
        return dense(outputs, "logits")(x_BLD).astype(jnp.float32)

    def _check(self, tokens_BL: Array) -> None:
        if tokens_BL.ndim != 2 or not jnp.issubdtype(tokens_BL.dtype, jnp.integer):
            got = f"{tokens_BL.dtype}{list(tokens_BL.shape)}"
            raise UsageError(f"a BERT takes integer tokens (batch, length), not {got}")
        if self.width % self.heads:
            raise UsageError(f"width {self.width} is no multiple of heads ({self.heads}): change one of the two")
        if self.head not in HEADS:
            raise UsageError(f"head {self.head!r} is unknown: use one of {', '.join(HEADS)}")
        if (got := tokens_BL.shape[1]) > self.context:
            raise UsageError(f"{got} tokens are more than the context ({self.context}): cut them or raise context")


TINY = BERT(vocabulary=11, layers=2, width=8, heads=2, mlp=12, context=6, head="masked")
TINY_INPUTS = (jax.ShapeDtypeStruct((2, 4), "int32"),)
