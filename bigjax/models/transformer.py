"""Pieces that Transformers are composed of; each family composes its own block from them, in its own file.

B batch, L positions that ask, M positions that are looked at, D width, H query heads, G key/value heads, K head size.
Kernels are 2-D, (inputs, outputs) with heads side by side, so that layers stacked by `nn.scan` are stacks of matrices.
"""

import functools
import math
from collections.abc import Callable

import jax.numpy as jnp
from flax import linen as nn
from jax import Array
from jax.nn.initializers import Initializer

from bigjax import UsageError
from bigjax.models.cache import Cache, places, within, written
from bigjax.models.layers import OffsetRMSNorm, promoting
from bigjax.ops.attention import cached_attention, together
from bigjax.ops.kernels import attend

Scaling = tuple[float | Array] | tuple[float, float, float, int]  # factor; or with low, high, context

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

    With a cache (from `empty_cache`), x are the tokens at `position`, `position` + 1, …, (B,) where rows differ: their
    keys and values are written there, and each looks at everything up to itself. Without, x are all tokens from
    position 0, and the cache returned is None. kernel: of `ops.kernels.FORMS`.
    qkv_bias: None for as `bias` says. qk_norm: an RMSNorm over each head of q and k (Henry et al. 2020), or which kind
    of `norm`. window: how many positions, itself among them, one looks at. rope_base, rope_scaling, epsilon: of
    `rotary` and of that norm; these and window may be arrays, where layers differ. memory: what is looked at in place
    of x; called with the cache {}, its keys and values are returned, to be given as the memory from then on. bias (of a
    call): (1, H, L, M), added to the scores. scale: of the scores; None for 1 / √K. q_init: None for
    kernel_init. position: without a cache it may be (B, L), of rows with several texts, which don't see one another.
    """

    heads: int
    kv_heads: int
    head: int | None = None  # size of one; None for D / heads
    causal: bool = True
    rotary: bool = False
    kernel: str = "auto"
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
        memory: Array | Cache | None = None,
        bias: Array | None = None,
    ) -> tuple[Array, Cache | None]:
        B, L, D = x_BLD.shape
        H, G, K = self.heads, self.kv_heads, self.head or D // self.heads

        def project(name: str, heads: int, x: Array, init: Initializer = self.kernel_init) -> Array:
            biased = self.bias if self.qkv_bias is None else self.qkv_bias
            dense = nn.Dense(heads * K, use_bias=biased, dtype=self.dtype, kernel_init=init, name=name)
            return dense(x).reshape(B, x.shape[1], heads, K)

        seen, kept = (x_BLD if memory is None else memory), isinstance(memory, dict)
        q = project("q", H, x_BLD, self.q_init or self.kernel_init)
        k, v = (memory["k"], memory["v"]) if kept else (project("k", G, seen), project("v", G, seen))
        if self.qk_norm:
            norms = {"bias": False, "dtype": self.dtype, "epsilon": self.epsilon}
            kind = self.qk_norm if isinstance(self.qk_norm, str) else "rms"
            q, k = norm(kind, **norms, name="q_norm")(q), norm(kind, **norms, name="k_norm")(k)
        q = q if self.scale is None else q * (self.scale * K**0.5)
        if self.rotary:
            positions = places(position, L)
            turning = {"base": self.rope_base, "scaling": self.rope_scaling}
            q, k = rotary(q, positions, **turning), rotary(k, positions, **turning)
        causal, window = self.causal, self.window
        if cache is None and jnp.ndim(position) == 2:
            mask = together(position, mask)
        if kept:
            cache = memory
        elif cache is not None and memory is not None:
            cache = {"k": jnp.swapaxes(k, 1, 2), "v": jnp.swapaxes(v, 1, 2)}
        elif cache is not None:
            cache = {"k": written(cache["k"], k, position), "v": written(cache["v"], v, position)}
            mask = within(cache["k"].shape[2], position, L, window)
        elif causal and window is not None and not (isinstance(window, int) and window >= L):
            near = within(L, 0, L, window)
            mask = near if mask is None else mask & near
        if cache is not None:
            y_BLHK = cached_attention(q, cache["k"], cache["v"], mask=mask, bias=bias)
        else:
            y_BLHK = attend(q, k, v, mask=mask, causal=causal, bias=bias, form=self.kernel)
        out = nn.Dense(D, use_bias=self.bias, dtype=self.dtype, kernel_init=self.out_init, name="o")
        return out(y_BLHK.reshape(B, L, H * K)), cache


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
