"""Pieces that Transformers are composed of; each family composes its own block from them, in its own file.

B batch, L positions that ask, M positions that are looked at, D width, H query heads, G key/value heads, K head size.
Kernels are 2-D, (inputs, outputs) with heads side by side, so that layers stacked by `nn.scan` are stacks of matrices.
"""

import functools
import math
from collections.abc import Callable

import jax.numpy as jnp
from flax import linen as nn
from jax import Array, lax
from jax.nn.initializers import Initializer

from bigjax import UsageError
from bigjax.models.layers import OffsetRMSNorm, promoting
from bigjax.ops.attention import attention, splash_attention, together
from bigjax.sharding import splits_rows_and_heads

Scaling = tuple[float | Array] | tuple[float, float, float, int]  # factor; or with low, high, context
Cache = dict[str, Array]  # k and v, each (B, M, G, K): what Attention has seen so far

UNITS = {"gelu": nn.gelu, "gelu_erf": functools.partial(nn.gelu, approximate=False), "relu": nn.relu}
GATED = {"swiglu": nn.silu, "geglu": nn.gelu}
_normal = nn.initializers.normal


def rotary(x_BLHK: Array, positions: Array, *, base: float | Array = 10_000.0, scaling: Scaling | None = None) -> Array:
    """Turns each pair (i, i + K/2) of a head by position × base^(−2i/K) (RoFormer, Su et al. 2021).

    Dot products of turned queries and keys depend on positions, (L,) or (B, L), by their difference only. Angles are in
    float32.
    scaling: for contexts longer than in pretraining: all turns `factor` times slower (Chen et al. 2023); or only what
    turns less than `low` times in `context` positions, and what turns more than `high` times as before (Llama 3.1,
    Grattafiori et al. 2024).
    """
    half = x_BLHK.shape[-1] // 2
    positions_BL1 = jnp.atleast_2d(positions).astype(jnp.float32)[..., None]
    frequency_K = base ** (-jnp.arange(half) / half)
    if scaling is not None:
        factor, *band = scaling
        kept_K = jnp.zeros(half)
        if band:
            low, high, context = band
            kept_K = jnp.clip((frequency_K * context / (2 * math.pi) - low) / (high - low), 0.0, 1.0)
        frequency_K = frequency_K * (kept_K + (1.0 - kept_K) / factor)
    angle_BLK = positions_BL1 * frequency_K[None, None]
    cos, sin = jnp.cos(angle_BLK)[:, :, None], jnp.sin(angle_BLK)[:, :, None]
    a, b = x_BLHK[..., :half].astype(jnp.float32), x_BLHK[..., half:].astype(jnp.float32)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x_BLHK.dtype)


def norm(kind: str, *, bias: bool, dtype: str, name: str, epsilon: float | None = None) -> Callable[[Array], Array]:
    """LayerNorm (Ba et al. 2016) or RMSNorm (Zhang & Sennrich 2019), statistics in float32.

    kind: "layer"; "rms"; "rms_offset", whose scale is kept as what is added to 1. epsilon: None for 1e-5 (layer), 1e-6.
    """
    if kind == "layer":
        return promoting(nn.LayerNorm(epsilon=epsilon or 1e-5, use_bias=bias, dtype=dtype, name=name))
    if kind == "rms":
        return promoting(nn.RMSNorm(epsilon=epsilon or 1e-6, dtype=dtype, name=name))
    if kind == "rms_offset":
        return OffsetRMSNorm(epsilon=epsilon or 1e-6, dtype=dtype, name=name)
    raise UsageError(f"norm {kind!r} is unknown: use layer, rms or rms_offset")


class Attention(nn.Module):
    """Self-attention with kernels q, k, v, o: x_BLD -> (y_BLD, cache).

    With a cache (from `empty_cache`), x are the tokens at `position`, `position` + 1, …: their keys and values are
    written there, and each looks at everything up to itself. Without, x are all tokens from position 0, and the cache
    returned is None. kernel: "plain", or "splash" (for TPU), which shapes that it does not suit leave to the plain one.
    qkv_bias: None for as `bias` says. qk_norm: an RMSNorm over each head of q and k (Henry et al. 2020), or which kind
    of `norm`. window: how many positions, itself among them, one looks at. rope_base, rope_scaling, epsilon: of
    `rotary` and of that norm; these and window may be arrays, where layers differ. memory: what is looked at in place
    of x. bias (of a call): (1, H, L, M), added to the scores. scale: of the scores; None for 1 / √K. q_init: None for
    kernel_init. position: without a cache it may be (B, L), of rows with several texts, which don't see one another.
    """

    heads: int
    kv_heads: int
    head: int | None = None  # size of one; None for D / heads
    causal: bool = True
    rotary: bool = False
    kernel: str = "plain"
    bias: bool = True
    qkv_bias: bool | None = None
    qk_norm: bool | str = False
    window: int | Array | None = None
    rope_base: float | Array = 10_000.0
    rope_scaling: Scaling | None = None
    epsilon: float | None = None
    scale: float | None = None
    kernel_init: Initializer = _normal(0.02)
    out_init: Initializer = _normal(0.02)
    q_init: Initializer | None = None
    dtype: str = "float32"

    @nn.compact
    def __call__(
        self,
        x_BLD: Array,
        cache: Cache | None = None,
        *,
        position: Array | int = 0,
        mask: Array | None = None,
        memory: Array | None = None,
        bias: Array | None = None,
    ) -> tuple[Array, Cache | None]:
        B, L, D = x_BLD.shape
        H, G, K = self.heads, self.kv_heads, self.head or D // self.heads

        def project(name: str, heads: int, x: Array, init: Initializer = self.kernel_init) -> Array:
            biased = self.bias if self.qkv_bias is None else self.qkv_bias
            dense = nn.Dense(heads * K, use_bias=biased, dtype=self.dtype, kernel_init=init, name=name)
            return dense(x).reshape(B, x.shape[1], heads, K)

        seen = x_BLD if memory is None else memory
        q, k, v = project("q", H, x_BLD, self.q_init or self.kernel_init), project("k", G, seen), project("v", G, seen)
        if self.qk_norm:
            norms = {"bias": False, "dtype": self.dtype, "epsilon": self.epsilon}
            kind = self.qk_norm if isinstance(self.qk_norm, str) else "rms"
            q, k = norm(kind, **norms, name="q_norm")(q), norm(kind, **norms, name="k_norm")(k)
        q = q if self.scale is None else q * (self.scale * K**0.5)
        if self.rotary:
            positions = position if jnp.ndim(position) == 2 else position + jnp.arange(L)
            turning = {"base": self.rope_base, "scaling": self.rope_scaling}
            q, k = rotary(q, positions, **turning), rotary(k, positions, **turning)
        causal, window = self.causal, self.window
        if cache is None and jnp.ndim(position) == 2:
            mask = together(position, mask)
        if cache is not None:
            k, v = (
                lax.dynamic_update_slice(cache[n], x.astype(cache[n].dtype), (0, position, 0, 0))
                for n, x in (("k", k), ("v", v))
            )
            cache = {"k": k, "v": v}
            mask, causal = within(k.shape[1], position, L, window), False
        elif causal and window is not None and not (isinstance(window, int) and window >= L):
            near = within(L, 0, L, window)
            mask = near if mask is None else mask & near
        if self.kernel == "splash" and causal and mask is bias is None and L % 128 == 0 and splits_rows_and_heads(B, G):
            y_BLHK = splash_attention(q, k, v)
        else:
            y_BLHK = attention(q, k, v, mask=mask, causal=causal, bias=bias)
        out = nn.Dense(D, use_bias=self.bias, dtype=self.dtype, kernel_init=self.out_init, name="o")
        return out(y_BLHK.reshape(B, L, H * K)), cache


def within(M: int, position: Array | int, L: int, window: int | Array | None = None) -> Array:
    """(1, 1, L, M): of M positions those not later than `position` + l, and fewer than `window` before it."""
    seen_LM = jnp.arange(M)[None] <= position + jnp.arange(L)[:, None]
    if window is not None:
        seen_LM &= jnp.arange(M)[None] > position + jnp.arange(L)[:, None] - window
    return seen_LM[None, None]


def empty_cache(batch: int, size: int, kv_heads: int, head: int, dtype: str) -> Cache:
    return {n: jnp.zeros((batch, size, kv_heads, head), dtype) for n in ("k", "v")}


def unit(activation: str | Callable[[Array], Array]) -> Callable[[Array], Array]:
    """The element-wise function that is called so, or the function itself."""
    if not callable(activation) and activation not in UNITS:
        names = ", ".join([*UNITS, *GATED])
        raise UsageError(f"activation {activation!r} is unknown: use one of {names}, or a function")
    return activation if callable(activation) else UNITS[activation]


class FeedForward(nn.Module):
    """x_BLD -> (B, L, D) through `width` units (Vaswani et al. 2017, section 3.3).

    activation: of UNITS, "gelu" (tanh form, as GPT-2), "gelu_erf", "relu"; of GATED, "swiglu", "geglu" (Shazeer 2020;
    kernel `gate`); or a function.
    """

    width: int
    activation: str | Callable[[Array], Array] = "gelu"
    bias: bool = True
    kernel_init: Initializer = _normal(0.02)
    out_init: Initializer = _normal(0.02)
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x_BLD: Array) -> Array:
        def dense(name: str, width: int, init: Initializer) -> nn.Module:
            return nn.Dense(width, use_bias=self.bias, dtype=self.dtype, kernel_init=init, name=name)

        up = dense("up", self.width, self.kernel_init)(x_BLD)
        if self.activation in GATED:
            h = GATED[self.activation](dense("gate", self.width, self.kernel_init)(x_BLD)) * up
        else:
            h = unit(self.activation)(up)
        return dense("down", x_BLD.shape[-1], self.out_init)(h)
