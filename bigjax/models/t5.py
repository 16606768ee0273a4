"""T5: an encoder reads a text, a decoder writes another; positions enter as biases of attention.

B batch, L positions of the text read, M of the text written, D width, H heads, K head size, V vocabulary. Sources:
Raffel et al. 2020 (1.0, the defaults); Shazeer 2020 (1.1: gated units, and an output kernel of its own).
"""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from bigjax import UsageError
from bigjax.models.layers import dot_float32, fields_of, stack
from bigjax.models.transformer import Attention, FeedForward, norm
from bigjax.sharding import constrain


class Spec(nn.Module):
    """The fields of a `T5`, which says what they mean, and of its parts."""

    vocabulary: int = 32128
    layers: int = 12
    decoder_layers: int | None = None
    width: int = 768
    heads: int = 12
    head: int = 64
    mlp: int = 3072
    activation: str = "relu"
    tied: bool = True
    scaled: bool | None = None
    buckets: int = 32
    distance: int = 128
    epsilon: float = 1e-6
    dropout: float = 0.1
    scan: bool = False
    remat: str = "none"
    dtype: str = "float32"


class Block(Spec):
    """Pre-norm: attention, with a memory to that too, then the mlp; returns (x_BLD, None) as `nn.scan` wants it."""

    deterministic: bool = True
    causal: bool = False

    @nn.compact
    def __call__(
        self, x_BLD: Array, bias: Array, mask: Array | None, memory_BLD: Array | None = None
    ) -> tuple[Array, None]:
        D, H, K = self.width, self.heads, self.head
        init = nn.initializers.normal
        drop = nn.Dropout(self.dropout, deterministic=self.deterministic)
        inits = {"kernel_init": init(D**-0.5), "q_init": init((D * K) ** -0.5), "out_init": init((H * K) ** -0.5)}
        fields = {"head": K, "bias": False, "scale": 1.0, "dtype": self.dtype, **inits}

        def normed(name: str) -> Array:
            return norm("rms", bias=False, dtype=self.dtype, epsilon=self.epsilon, name=name)(x_BLD)

        attend = Attention(H, H, causal=self.causal, **fields, name="attention")
        x_BLD = x_BLD + drop(attend(normed("attention_norm"), bias=bias, mask=None if self.causal else mask)[0])
        if memory_BLD is not None:
            look = Attention(H, H, causal=False, **fields, name="cross")
            x_BLD = x_BLD + drop(look(normed("cross_norm"), memory=memory_BLD, mask=mask)[0])
        inits = {"kernel_init": init(D**-0.5), "out_init": init(self.mlp**-0.5)}
        feed = FeedForward(self.mlp, self.activation, bias=False, dtype=self.dtype, **inits, name="mlp")
        return x_BLD + drop(feed(normed("mlp_norm"))), None


class Tower(Spec):
    """The encoder, or (`causal`) the decoder: its biases of positions, its blocks, its last norm."""

    deterministic: bool = True
    causal: bool = False

    @nn.compact
    def __call__(self, x_BLD: Array, *others: Array | None) -> Array:
        drop = nn.Dropout(self.dropout, deterministic=self.deterministic)
        init = nn.initializers.normal(self.width**-0.5)
        table = nn.Embed(self.buckets, self.heads, embedding_init=init, dtype=self.dtype, name="positions")
        which_LL = bucket(x_BLD.shape[1], self.buckets, self.distance, causal=self.causal)
        bias_1HLL = jnp.moveaxis(table(jnp.asarray(which_LL)), -1, 0)[None]
        fields = fields_of(self, Spec) | {"deterministic": self.deterministic, "causal": self.causal}
        x_BLD = stack(Block, **fields)(drop(x_BLD), bias_1HLL, *others)
        return drop(norm("rms", bias=False, dtype=self.dtype, epsilon=self.epsilon, name="norm")(x_BLD))


class T5(Spec):
    """tokens_BL, decoder_tokens_BM -> logits_BMV float32, where position m sees all that is read and written up to m.

    mask_BL is true where a token that is read is real. The decoder's tokens are the targets one later, after a start
    token (the padding, 0); their padding comes after them, and its logits mean nothing.

    decoder_layers: None for as many as layers. head: the size of one. mlp: hidden units.
    activation: "relu" (1.0), or "geglu" (1.1, Shazeer 2020).
    tied: the output kernel is the embedding. scaled: what it sees is divided by √width; None for as `tied` says.
    buckets, distance: of positions apart, half of them exact, then ever wider up to the distance; from there on one.
    dropout: on embeddings, before each addition and at the end. scan, remat: as of `GPT`.
    Sown: intermediates/features, (B, M, D), what the output kernel sees. Mistakes raise `UsageError`.

        model = T5()
        variables = model.init(jax.random.key(0), jnp.zeros((1, 512), "int32"), jnp.zeros((1, 114), "int32"))
        logits_BMV = model.apply(variables, tokens_BL, decoder_tokens_BM, mask_BL)
    """

    @nn.compact
    def __call__(
        self, tokens_BL: Array, decoder_tokens_BM: Array, mask_BL: Array | None = None, *, train: bool = False
    ) -> Array:
        for tokens in (tokens_BL, decoder_tokens_BM):
            if tokens.ndim != 2 or not jnp.issubdtype(tokens.dtype, jnp.integer):
                got = f"{tokens.dtype}{list(tokens.shape)}"
                raise UsageError(f"a T5 takes integer tokens (batch, length), not {got}")
        if self.activation not in ("relu", "geglu"):
            raise UsageError(f"activation {self.activation!r} is unknown: use relu or geglu")
        fields = fields_of(self, Spec) | {"deterministic": not train}
        init = nn.initializers.normal(1.0)
        embed = nn.Embed(self.vocabulary, self.width, embedding_init=init, dtype=self.dtype, name="embedding")
        mask = None if mask_BL is None else mask_BL.astype(bool)[:, None, None]
        memory_BLD = Tower(**fields, name="encoder")(constrain(embed(tokens_BL), "batch"), mask)
        fields["layers"] = self.decoder_layers or self.layers
        x_BMD = constrain(embed(decoder_tokens_BM), "batch")
        x_BMD = Tower(**fields, causal=True, name="decoder")(x_BMD, mask, memory_BLD)
        x_BMD = x_BMD * self.width**-0.5 if (self.tied if self.scaled is None else self.scaled) else x_BMD
        self.sow("intermediates", "features", x_BMD)
        if self.tied:
            return dot_float32(x_BMD, embed.embedding.astype(self.dtype), (((2,), (1,)), ((), ())))
        init = nn.initializers.normal(self.width**-0.5)
        options = {"use_bias": False, "kernel_init": init, "dtype": self.dtype, "dot_general": dot_float32}
        return nn.Dense(self.vocabulary, **options, name="unembedding")(x_BMD)


def bucket(length: int, buckets: int, distance: int, *, causal: bool) -> np.ndarray:
    """(L, L) int32: the bucket of each position as another sees it; of a decoder only what is not later has its own."""
    away = np.arange(length)[None] - np.arange(length)[:, None]
    first = np.zeros_like(away)
    if causal:
        away = np.maximum(-away, 0)
    else:
        buckets //= 2
        first, away = np.where(away > 0, buckets, 0), np.abs(away)
    exact = buckets // 2
    wider = np.log(np.maximum(away, 1).astype(np.float32) / exact) / math.log(distance / exact) * (buckets - exact)
    far = np.minimum(exact + wider.astype(np.int32), buckets - 1)
    return (first + np.where(away < exact, away, far)).astype(np.int32)


TINY = T5(vocabulary=11, layers=1, width=8, heads=2, head=3, mlp=12, buckets=4, distance=6)
TINY_INPUTS = (jax.ShapeDtypeStruct((2, 4), "int32"), jax.ShapeDtypeStruct((2, 3), "int32"))
