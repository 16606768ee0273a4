"""What attention keeps of the tokens before: keys and values, where they are written and which of them are seen.

B batch, L positions that ask, M positions that are looked at, G key/value heads, K head size.
"""

import jax
import jax.numpy as jnp
from jax import Array, lax

from bigjax.sharding import constrain

Cache = dict[str, Array]  # k and v, each (B, G, M, K): what one Attention has seen so far
Caches = tuple[Cache, ...] | Cache  # of each layer; or, where layers are scanned, stacked


def places(position: Array | int, L: int) -> Array:
    """(1 or B, L): `position`, `position` + 1, …; (B, L) is that already."""
    return position if jnp.ndim(position) == 2 else jnp.reshape(position, (-1, 1)) + jnp.arange(L)[None]


def within(M: int, position: Array | int, L: int, window: int | Array | None = None) -> Array:
    """(1 or B, 1, L, M): of M positions those not later than `position` + l, and fewer than `window` before it."""
    here_BL1, M_11M = places(position, L)[..., None], jnp.arange(M)[None, None]
    seen_BLM = M_11M <= here_BL1
    if window is not None:
        seen_BLM &= M_11M > here_BL1 - window
    return seen_BLM[:, None]


def written(cache_BGMK: Array, x_BLGK: Array, position: Array | int) -> Array:
    """The cache with x from `position` on, of each row its own where it is (B,)."""
    x_BGLK, write = jnp.swapaxes(x_BLGK, 1, 2).astype(cache_BGMK.dtype), lax.dynamic_update_slice
    if jnp.ndim(position) == 0:
        return constrain(write(cache_BGMK, x_BGLK, (0, 0, position, 0)), "heads")
    return constrain(jax.vmap(lambda row, x, p: write(row, x, (0, p, 0)))(cache_BGMK, x_BGLK, position), "heads")


def empty_cache(batch: int, size: int, kv_heads: int, head: int, dtype: str) -> Cache:
    return {n: jnp.zeros((batch, kv_heads, size, head), dtype) for n in ("k", "v")}
