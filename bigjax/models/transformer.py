"""Pieces that Transformers are composed of; each family composes its own block from them, in its own file.

B batch, L positions that ask, M positions that are looked at, D width, H query heads, G key/value heads, K head size.
Kernels are 2-D, (inputs, outputs) with heads side by side, so that layers stacked by `nn.scan` are stacks of matrices.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array
from jax.nn.initializers import Initializer

from bigjax import UsageError
from bigjax.sharding import by_rows_and_heads, splits_rows_and_heads

Cache = dict[str, Array]  # k and v, each (B, M, G, K): what Attention has seen so far

_normal = nn.initializers.normal


def attention(q_BLHK: Array, k_BMGK: Array, v_BMGK: Array, *, mask: Array | None = None, causal: bool = False) -> Array:
    """softmax(Q Kᵀ / √K) V for each head (Vaswani et al. 2017, section 3.2) -> (B, L, H, K).

    Grouped queries (Ainslie et al. 2023): with G < H each key/value head serves H / G query heads, in order. `mask`,
    (B or 1, H or 1, L, M), is True where a position may be looked at; `causal` masks what comes later. The softmax is
    in float32. Causal attention over many positions goes in quarters of the queries, each against only the keys up to
    its end: 5/8 of the work. Values equal those of `jax.nn.dot_product_attention`, which is slower on CPU.
    """
    B, L, H, K = q_BLHK.shape
    M, G = k_BMGK.shape[1:3]
    q_BGRLK = jnp.swapaxes(q_BLHK * K**-0.5, 1, 2).reshape(B, G, H // G, L, K)  # R query heads a key/value head
    k_BGMK, v_BGMK = jnp.swapaxes(k_BMGK, 1, 2), jnp.swapaxes(v_BMGK, 1, 2)
    if mask is not None:  # (B, H, L, M) -> (B, G, R, L, M), where 1 stays 1
        mask = mask[:, :, None] if mask.shape[1] == 1 else mask.reshape(mask.shape[0], G, H // G, L, M)
    if causal:
        seen = (jnp.arange(M)[None] <= jnp.arange(L)[:, None])[None, None, None]
        mask = seen if mask is None else mask & seen
    if not causal or L != M or L % 4 or L < 128:
        y_BGRLK = _attend(q_BGRLK, k_BGMK, v_BGMK, mask)
    else:
        ends = [(end - L // 4, end) for end in range(L // 4, L + 1, L // 4)]
        parts = [_attend(q_BGRLK[..., a:b, :], k_BGMK[:, :, :b], v_BGMK[:, :, :b], mask[..., a:b, :b]) for a, b in ends]
        y_BGRLK = jnp.concatenate(parts, axis=3)
    return jnp.swapaxes(y_BGRLK.reshape(B, H, L, K), 1, 2)


def _attend(q_BGRLK: Array, k_BGMK: Array, v_BGMK: Array, mask: Array | None) -> Array:
    B, G, R, L, K = q_BGRLK.shape
    q_BGQK = q_BGRLK.reshape(B, G, R * L, K)  # one matrix product serves all R
    score = jnp.matmul(q_BGQK, jnp.swapaxes(k_BGMK, 2, 3), preferred_element_type=jnp.float32)
    score_BGRLM = score.reshape(B, G, R, L, -1)
    if mask is not None:
        score_BGRLM = jnp.where(mask, score_BGRLM, jnp.finfo(jnp.float32).min)
    weight_BGRLM = jax.nn.softmax(score_BGRLM, axis=-1).astype(v_BGMK.dtype)
    return (weight_BGRLM.reshape(B, G, R * L, -1) @ v_BGMK).reshape(q_BGRLK.shape)


def splash_attention(q_BLHK: Array, k_BMGK: Array, v_BMGK: Array, *, interpret: bool = False) -> Array:
    """Causal `attention` on TPU as a Pallas kernel that works block by block, so that nothing of size L × L is stored.

    FlashAttention (Dao et al. 2022) as in JAX's splash attention. L must be a multiple of 128. `interpret` runs the
    kernel on any device, slowly. Over a mesh each device works on its own rows and heads.
    """
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    L, K = q_BLHK.shape[1], q_BLHK.shape[3]
    block = next(n for n in (512, 256, 128) if L % n == 0)
    places = ("q", "kv", "q_dkv", "kv_dkv", "kv_dkv_compute", "q_dq", "kv_dq")
    sizes = kernels.BlockSizes(**{f"block_{place}": block for place in places})

    def local(q_BLHK: Array, k_BMGK: Array, v_BMGK: Array) -> Array:
        mask = masks.MultiHeadMask([masks.CausalMask((L, L))] * q_BLHK.shape[2])
        attend = kernels.make_splash_mha(mask, block_sizes=sizes, head_shards=1, q_seq_shards=1, interpret=interpret)
        q_BHLK, k_BGMK, v_BGMK = (jnp.swapaxes(x, 1, 2) for x in (q_BLHK * K**-0.5, k_BMGK, v_BMGK))
        return jnp.swapaxes(jax.vmap(attend)(q_BHLK, k_BGMK, v_BGMK), 1, 2)

    return by_rows_and_heads(local)(q_BLHK, k_BMGK, v_BMGK)


def rotary(x_BLHK: Array, positions_L: Array, *, base: float = 10_000.0) -> Array:
    """Turns each pair (i, i + K/2) of a head by position × base^(−2i/K) (RoFormer, Su et al. 2021).

    Dot products of turned queries and keys depend on positions by their difference only. Angles are in float32.
    """
    half = x_BLHK.shape[-1] // 2
    angle_LK = positions_L.astype(jnp.float32)[:, None] * (base ** (-jnp.arange(half) / half))[None]
    cos, sin = jnp.cos(angle_LK)[None, :, None], jnp.sin(angle_LK)[None, :, None]
    a, b = x_BLHK[..., :half].astype(jnp.float32), x_BLHK[..., half:].astype(jnp.float32)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x_BLHK.dtype)


def norm(kind: str, *, bias: bool, dtype: str, name: str) -> nn.Module:
    """LayerNorm (Ba et al. 2016) or RMSNorm (Zhang & Sennrich 2019), statistics in float32."""
    if kind == "layer":
        return nn.LayerNorm(epsilon=1e-5, use_bias=bias, dtype=dtype, name=name)
    if kind == "rms":
        return nn.RMSNorm(epsilon=1e-6, dtype=dtype, name=name)
    raise UsageError(f"norm {kind!r} is unknown: use layer or rms")


class Attention(nn.Module):
    """Self-attention with kernels q, k, v, o: x_BLD -> (y_BLD, cache).

    With a cache (from `empty_cache`), x are the tokens at `position`, `position` + 1, …: their keys and values are
    written there, and each looks at everything up to itself. Without, x are all tokens from position 0, and the cache
    returned is None. kernel: "plain", or "splash" (for TPU), which shapes that it does not suit leave to the plain one.
    """

    heads: int
    kv_heads: int
    head: int | None = None  # size of one; None for D / heads
    causal: bool = True
    rotary: bool = False
    kernel: str = "plain"
    bias: bool = True
    kernel_init: Initializer = _normal(0.02)
    out_init: Initializer = _normal(0.02)
    dtype: str = "float32"

    @nn.compact
    def __call__(
        self,
        x_BLD: Array,
        cache: Cache | None = None,
        *,
        position: Array | int = 0,
        mask: Array | None = None,
    ) -> tuple[Array, Cache | None]:
        B, L, D = x_BLD.shape
        H, G, K = self.heads, self.kv_heads, self.head or D // self.heads

        def project(name: str, heads: int) -> Array:
            dense = nn.Dense(heads * K, use_bias=self.bias, dtype=self.dtype, kernel_init=self.kernel_init, name=name)
            return dense(x_BLD).reshape(B, L, heads, K)

        q, k, v = project("q", H), project("k", G), project("v", G)
        if self.rotary:
            positions_L = position + jnp.arange(L)
            q, k = rotary(q, positions_L), rotary(k, positions_L)
        causal = self.causal
        if cache is not None:
            k, v = (
                jax.lax.dynamic_update_slice(cache[n], x.astype(cache[n].dtype), (0, position, 0, 0))
                for n, x in (("k", k), ("v", v))
            )
            cache = {"k": k, "v": v}
            seen_LM = jnp.arange(k.shape[1])[None] <= position + jnp.arange(L)[:, None]
            mask, causal = seen_LM[None, None], False
        if self.kernel == "splash" and causal and mask is None and L % 128 == 0 and splits_rows_and_heads(B, G):
            y_BLHK = splash_attention(q, k, v)
        else:
            y_BLHK = attention(q, k, v, mask=mask, causal=causal)
        out = nn.Dense(D, use_bias=self.bias, dtype=self.dtype, kernel_init=self.out_init, name="o")
        return out(y_BLHK.reshape(B, L, H * K)), cache


def empty_cache(batch: int, size: int, kv_heads: int, head: int, dtype: str) -> Cache:
    return {n: jnp.zeros((batch, size, kv_heads, head), dtype) for n in ("k", "v")}


class MLP(nn.Module):
    """x_BLD -> (B, L, D) through `width` units: GELU (tanh form, as GPT-2) or SwiGLU (Shazeer 2020; kernel `gate`)."""

    width: int
    activation: str = "gelu"
    bias: bool = True
    kernel_init: Initializer = _normal(0.02)
    out_init: Initializer = _normal(0.02)
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x_BLD: Array) -> Array:
        def dense(name: str, width: int, init: Initializer) -> nn.Module:
            return nn.Dense(width, use_bias=self.bias, dtype=self.dtype, kernel_init=init, name=name)

        up = dense("up", self.width, self.kernel_init)(x_BLD)
        if self.activation == "gelu":
            h = nn.gelu(up)
        elif self.activation == "swiglu":
            h = nn.silu(dense("gate", self.width, self.kernel_init)(x_BLD)) * up
        else:
            raise UsageError(f"activation {self.activation!r} is unknown: use gelu or swiglu")
        return dense("down", x_BLD.shape[-1], self.out_init)(h)
