"""T5: an encoder reads a text, a decoder writes another; positions enter as biases of attention.

B batch, L positions of the text read, M of the text written, D width, H heads, K head size, V vocabulary. Sources:
Raffel et al. 2020 (1.0, the defaults); Shazeer 2020 (1.1: gated units, and an output kernel of its own).
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from bigjax import UsageError
from bigjax.models.apart import Apart
from bigjax.models.cache import empty_cache
from bigjax.models.layers import fields_of, stack, unembed
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
    """Pre-norm: attention, with a memory to that too, then the mlp; returns (x_BLD, cache) as `nn.scan` wants it.

    cache: `own`, of what is written, and `cross`, the memory's keys and values, {} before the first call.
    """

    deterministic: bool = True
    causal: bool = False

    @nn.compact
    def __call__(
        self,
        x_BLD: Array,
        bias: Array,
        mask: Array | None,
        memory_BLD: Array | None = None,
        position: Array | int = 0,
        cache: Any = None,
    ) -> tuple[Array, Any]:
        D, H, K = self.width, self.heads, self.head
        init = nn.initializers.normal
        drop = nn.Dropout(self.dropout, deterministic=self.deterministic)
        inits = {"kernel_init": init(D**-0.5), "q_init": init((D * K) ** -0.5), "out_init": init((H * K) ** -0.5)}
        fields = {"head": K, "bias": False, "scale": 1.0, "dtype": self.dtype, **inits}

        def normed(name: str) -> Array:
            return norm("rms", bias=False, dtype=self.dtype, epsilon=self.epsilon, name=name)(x_BLD)

        own, cross = (None, None) if cache is None else (cache["own"], cache["cross"])
        attend = Attention(H, H, causal=self.causal, **fields, name="attention")
        options = {"bias": bias, "mask": None if self.causal else mask, "position": position}
        y_BLD, own = attend(normed("attention_norm"), own, **options)
        x_BLD = x_BLD + drop(y_BLD)
        if memory_BLD is not None or cross:
            look = Attention(H, H, causal=False, **fields, name="cross")
            y_BLD, cross = look(normed("cross_norm"), cross, memory=cross or memory_BLD, mask=mask)
            x_BLD = x_BLD + drop(y_BLD)
        inits = {"kernel_init": init(D**-0.5), "out_init": init(self.mlp**-0.5)}
        feed = FeedForward(self.mlp, self.activation, bias=False, dtype=self.dtype, **inits, name="mlp")
        x_BLD = x_BLD + drop(feed(normed("mlp_norm")))
        return x_BLD, None if cache is None else {"own": own, "cross": cross}


class Tower(Spec):
    """The encoder, or (`causal`) the decoder: its biases of positions, its blocks, its last norm."""

    deterministic: bool = True
    causal: bool = False

    @nn.compact
    def __call__(
        self, x_BLD: Array, mask: Array | None, memory_BLD: Array | None = None, position: Any = 0, cache: Any = None
    ) -> Any:
        drop = nn.Dropout(self.dropout, deterministic=self.deterministic)
        init = nn.initializers.normal(self.width**-0.5)
        seen = {"distance": self.distance, "causal": self.causal}
        apart = Apart(self.buckets, self.heads, embedding_init=init, dtype=self.dtype, **seen, name="positions")
        blocks = stack(Block, **fields_of(self, Spec), deterministic=self.deterministic, causal=self.causal)
        last = norm("rms", bias=False, dtype=self.dtype, epsilon=self.epsilon, name="norm")
        if cache is None:
            return drop(last(blocks(drop(x_BLD), apart(x_BLD.shape[1]), mask, memory_BLD)))
        own = (cache if self.scan else cache[0])["own"]["k"]
        bias = apart(x_BLD.shape[1], position=position, size=own.shape[-2])
        x_BLD, cache = blocks(x_BLD, bias, mask, memory_BLD, position, each=cache)
        return last(x_BLD), cache


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

    def __call__(
        self, tokens_BL: Array, decoder_tokens_BM: Array, mask_BL: Array | None = None, *, train: bool = False
    ) -> Array:
        return self._run(tokens_BL, decoder_tokens_BM, mask_BL, train=train)

    def encode(self, tokens_BL: Array, mask_BL: Array, cache: dict[str, Any]) -> dict[str, Any]:
        """The cache, from `empty_cache`, with what is read in it."""
        return cache | self._run(tokens_BL, None, mask_BL)

    def decode(
        self, tokens_BM: Array, cache: dict[str, Any], position: Array, at_B: Array | None = None
    ) -> tuple[Array, dict[str, Any]]:
        """(logits_BMV, the cache with these tokens), given what was read and is written before them.

        The first are the start token, and maybe more, at position 0. at_B: as of `GPT`.
        """
        return self._run(None, tokens_BM, cache=cache, position=jnp.asarray(position, jnp.int32), at_B=at_B)

    def empty_cache(self, batch: int, size: int) -> dict[str, Any]:
        """Room for `size` tokens to be written, in every layer, stacked where layers are."""
        shape = (batch, size, self.heads, self.head, self.dtype)
        layers = tuple({"own": empty_cache(*shape), "cross": {}} for _ in range(self.decoder_layers or self.layers))
        return {"layers": jax.tree.map(lambda *x: jnp.stack(x), *layers) if self.scan else layers}

    def pick(self, cache: dict[str, Any], rows_R: Array) -> dict[str, Any]:
        """The cache of some rows, or of rows several times."""
        axes = {k: int(self.scan and k == "layers") for k in cache}
        return {k: jax.tree.map(lambda x: jnp.take(x, rows_R, axis=axes[k]), v) for k, v in cache.items()}  # noqa: B023

    @nn.compact
    def _run(
        self, tokens_BL: Any, written_BM: Any, mask_BL: Any = None, *, train: bool = False, cache: Any = None, **at: Any
    ) -> Any:
        """Logits; with nothing written the memory and its mask; with a cache, which has these, (logits, cache)."""
        for tokens in (tokens_BL, written_BM):
            if tokens is not None and (tokens.ndim != 2 or not jnp.issubdtype(tokens.dtype, jnp.integer)):
                got = f"{tokens.dtype}{list(tokens.shape)}"
                raise UsageError(f"a T5 takes integer tokens (batch, length), not {got}")
        if self.activation not in ("relu", "geglu"):
            raise UsageError(f"activation {self.activation!r} is unknown: use relu or geglu")
        fields = fields_of(self, Spec) | {"deterministic": not train}
        init = nn.initializers.normal(1.0)
        embed = nn.Embed(self.vocabulary, self.width, embedding_init=init, dtype=self.dtype, name="embedding")
        if cache is None:
            mask = None if mask_BL is None else mask_BL.astype(bool)[:, None, None]
            memory_BLD = Tower(**fields, name="encoder")(constrain(embed(tokens_BL), "batch"), mask)
            if written_BM is None:
                return {"memory": memory_BLD, "mask": mask}
        fields["layers"] = self.decoder_layers or self.layers
        x_BMD, decoder = constrain(embed(written_BM), "batch"), Tower(**fields, causal=True, name="decoder")
        if cache is None:
            return self._logits(decoder(x_BMD, mask, memory_BLD), embed)
        x_BMD, layers = decoder(x_BMD, cache["mask"], cache.get("memory"), at["position"], cache["layers"])
        if at["at_B"] is not None:
            x_BMD = jnp.take_along_axis(x_BMD, at["at_B"][:, None, None], axis=1)
        return self._logits(x_BMD, embed), {"layers": layers, "mask": cache["mask"]}

    def _logits(self, x_BMD: Array, embed: nn.Embed) -> Array:
        x_BMD = x_BMD * self.width**-0.5 if (self.tied if self.scaled is None else self.scaled) else x_BMD
        self.sow("intermediates", "features", x_BMD)
        return unembed(self, x_BMD, embed if self.tied else None, init=nn.initializers.normal(self.width**-0.5))


TINY = T5(vocabulary=11, layers=1, width=8, heads=2, head=3, mlp=12, buckets=4, distance=6)
TINY_INPUTS = (jax.ShapeDtypeStruct((2, 4), "int32"), jax.ShapeDtypeStruct((2, 3), "int32"))
