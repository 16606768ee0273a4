"""GPT: a decoder-only Transformer, from GPT-2's form (the defaults) to Llama's by its fields.

B batch, L positions, D width, V vocabulary. Sources: Radford et al. 2019 (GPT-2, its initialisation included); Touvron
et al. 2023 (Llama: rotary positions, RMSNorm, SwiGLU, no biases).
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from bigjax import UsageError
from bigjax.models.layers import REMAT, fields_of
from bigjax.models.transformer import Attention, Cache, FeedForward, Scaling, dot_float32, empty_cache, norm
from bigjax.sharding import constrain


class Spec(nn.Module):
    """The fields of a `GPT`, which says what they mean, and of its blocks."""

    vocabulary: int = 50257
    layers: int = 12
    width: int = 768
    heads: int = 12
    kv_heads: int | None = None
    head: int | None = None
    context: int = 1024
    mlp: int | None = None
    position: str = "learned"
    norm: str = "layer"
    activation: str | Callable[[Array], Array] = "gelu"
    tied: bool = True
    bias: bool = True
    qkv_bias: bool | None = None
    qk_norm: bool = False
    window: int | None = None
    rope_base: float = 10_000.0
    rope_scaling: Scaling | None = None
    epsilon: float | None = None
    dropout: float = 0.0
    attention: str = "plain"
    split_residual: bool = False
    scan: bool = False
    remat: str = "none"
    dtype: str = "float32"


class Block(Spec):
    """Pre-norm: x + attention(norm(x)), then x + mlp(norm(x)); returns (x_BLD, cache) as `nn.scan` wants it."""

    deterministic: bool = True

    @nn.compact
    def __call__(self, x_BLD: Array, cache: Cache | None, position: Array) -> tuple[Array, Cache | None]:
        init = nn.initializers.normal(0.02)
        residual = nn.initializers.normal(0.02 / (2 * self.layers) ** 0.5)  # the sum keeps one layer's size
        shared = {"bias": self.bias, "kernel_init": init, "out_init": residual, "dtype": self.dtype}
        names = ("qkv_bias", "qk_norm", "window", "rope_base", "rope_scaling", "epsilon")
        attention = {"rotary": self.position == "rotary", "kernel": self.attention, **shared}
        attention |= {name: getattr(self, name) for name in names}
        norms = {"bias": self.bias, "dtype": self.dtype, "epsilon": self.epsilon}
        hidden = self.mlp or (-(-self.width // 3) * 8 if self.activation == "swiglu" else 4 * self.width)
        if self.split_residual:
            x_BLD = constrain(x_BLD, "residual")
        attend = Attention(self.heads, self.kv_heads or self.heads, self.head, **attention, name="attention")
        y, cache = attend(norm(self.norm, **norms, name="attention_norm")(x_BLD), cache, position=position)
        x_BLD = x_BLD + nn.Dropout(self.dropout)(y, deterministic=self.deterministic)
        feed = FeedForward(hidden, self.activation, **shared, name="mlp")
        y = feed(norm(self.norm, **norms, name="mlp_norm")(x_BLD))
        return x_BLD + nn.Dropout(self.dropout)(y, deterministic=self.deterministic), cache


class GPT(Spec):
    """tokens_BL int32 -> logits_BLV float32, where position l sees tokens 0…l (Radford et al. 2019).

    `length_B` says how many tokens of a row are real; padding comes after them, no real position sees it, and its own
    logits mean nothing (the loss leaves them out).

    width: D. kv_heads: None for as many as heads. head: size of one; None for width / heads.
    mlp: hidden units; None for 4 × width or 8/3 × width, up to a multiple of 8 (SwiGLU).
    position: "learned" or "rotary". norm: "layer" or "rms". activation: "gelu", "swiglu", or a function.
    attention: "plain", or "splash": a Pallas kernel for TPU (`ops.attention.splash_attention`).
    split_residual: splits the stream between blocks over the mesh's tensor axis too: less memory, more traffic.
    tied: the output kernel is the embedding. bias: in all kernels and LayerNorms, but never in the output.
    qkv_bias: in q, k and v; None for as `bias` says. qk_norm: an RMSNorm over each head of q and k (Qwen3).
    window: how many positions, itself among them, one looks at (Mistral, Jiang et al. 2023); None for all before it.
    rope_base, rope_scaling: how fast rotary positions turn; (factor, low, high, context) as `transformer.rotary` says.
    epsilon: of the norms; None for 1e-5 (layer) or 1e-6 (rms).
    dropout: on the embedding and before each addition to the residual stream.
    scan: layers by `nn.scan`, their parameters stacked on a leading axis under "layers", so that compile time doesn't
        grow with depth; else unrolled, under "layer_0", …, which is faster on CPU.
    remat: what the backward pass recomputes: "none", "full" (every block) or "dots" (all but matrix products).
    Sown: intermediates/features, (B, L, D), what the output kernel sees. Mistakes raise `UsageError`.

        model = GPT()
        variables = model.init(jax.random.key(0), jnp.zeros((1, 1024), "int32"))
        logits_BLV = model.apply(variables, tokens_BL)
    """

    def __call__(self, tokens_BL: Array, length_B: Array | None = None, *, train: bool = False) -> Array:
        if length_B is not None:  # whatever the padding holds, all results are the same
            real_BL = jnp.arange(tokens_BL.shape[1])[None] < length_B[:, None]
            tokens_BL = jnp.where(real_BL, tokens_BL, 0)
        return self._run(tokens_BL, None, jnp.zeros((), jnp.int32), train=train)[0]

    def decode(self, tokens_BL: Array, cache: Cache, position: Array) -> tuple[Array, Cache]:
        """Logits of the tokens at `position`, `position` + 1, …, given what is cached before; the cache with them."""
        return self._run(tokens_BL, cache, jnp.asarray(position, jnp.int32), train=False)

    def empty_cache(self, batch: int, size: int) -> Cache:
        """Room for `size` tokens in every layer: k and v, each (layers, batch, size, kv_heads, head)."""
        one = empty_cache(batch, size, self.kv_heads or self.heads, self.head or self.width // self.heads, self.dtype)
        return {n: jnp.broadcast_to(x, (self.layers, *x.shape)) for n, x in one.items()}

    @nn.compact
    def _run(self, tokens_BL: Array, cache: Cache | None, position: Array, *, train: bool) -> tuple:
        self._check(tokens_BL)
        init = nn.initializers.normal(0.02)
        embed = nn.Embed(self.vocabulary, self.width, embedding_init=init, dtype=self.dtype, name="embedding")
        x_BLD = constrain(embed(tokens_BL), "batch")
        if self.position == "learned":
            positions_L = position + jnp.arange(tokens_BL.shape[1])
            positions = nn.Embed(self.context, self.width, embedding_init=init, dtype=self.dtype, name="positions")
            x_BLD = x_BLD + positions(positions_L)[None]
        x_BLD = nn.Dropout(self.dropout)(x_BLD, deterministic=not train)
        x_BLD, cache = self._stack(x_BLD, cache, position, deterministic=not train)
        x_BLD = norm(self.norm, bias=self.bias, dtype=self.dtype, epsilon=self.epsilon, name="norm")(x_BLD)
        self.sow("intermediates", "features", x_BLD)
        if self.tied:
            return dot_float32(x_BLD, embed.embedding.astype(self.dtype), (((2,), (1,)), ((), ()))), cache
        fields = {"use_bias": False, "kernel_init": init, "dtype": self.dtype, "dot_general": dot_float32}
        return nn.Dense(self.vocabulary, **fields, name="unembedding")(x_BLD), cache

    def _stack(self, x_BLD: Array, cache: Cache | None, position: Array, *, deterministic: bool) -> tuple:
        spec = fields_of(self, Spec) | {"deterministic": deterministic}
        block = Block
        if self.remat != "none":
            block = nn.remat(Block, policy=REMAT[self.remat], prevent_cse=not self.scan)
        if self.scan:
            stack = nn.scan(
                block,
                variable_axes={"params": 0, "intermediates": 0},
                split_rngs={"params": True, "dropout": True},
                in_axes=(0, nn.broadcast),
                length=self.layers,
            )
            return stack(**spec, name="layers")(x_BLD, cache, position)
        caches = []
        for n in range(self.layers):
            layer_cache = None if cache is None else {k: v[n] for k, v in cache.items()}
            x_BLD, layer_cache = block(**spec, name=f"layer_{n}")(x_BLD, layer_cache, position)
            caches.append(layer_cache)
        return x_BLD, None if cache is None else jax.tree.map(lambda *x: jnp.stack(x), *caches)

    def _check(self, tokens_BL: Array) -> None:
        D, H, G = self.width, self.heads, self.kv_heads or self.heads
        if tokens_BL.ndim != 2 or not jnp.issubdtype(tokens_BL.dtype, jnp.integer):
            got = f"{tokens_BL.dtype}{list(tokens_BL.shape)}"
            raise UsageError(f"a GPT takes integer tokens (batch, length), not {got}")
        if (D % H and not self.head) or H % G:
            raise UsageError(f"width {D} must be a multiple of heads ({H}), and heads of kv_heads ({G})")
        if self.position not in ("learned", "rotary"):
            raise UsageError(f"position {self.position!r} is unknown: use learned or rotary")
        if self.attention not in ("plain", "splash"):
            raise UsageError(f"attention {self.attention!r} is unknown: use plain or splash")
        if self.position == "rotary" and (size := self.head or D // H) % 2:
            raise UsageError(f"rotary positions need heads of even size, not {size}")
        if self.window is not None and self.window < 1:
            raise UsageError(f"window {self.window}: a position looks at least at itself, so give at least 1")
        if self.remat not in REMAT:
            raise UsageError(f"remat {self.remat!r} is unknown: use one of {', '.join(REMAT)}")
        if tokens_BL.shape[1] > self.context:
            got = tokens_BL.shape[1]
            raise UsageError(f"{got} tokens are more than the context ({self.context}): cut them or raise context")


TINY = GPT(vocabulary=11, layers=2, width=8, heads=2, context=6, dropout=0.1)
TINY_INPUTS = (jax.ShapeDtypeStruct((2, 4), "int32"),)
