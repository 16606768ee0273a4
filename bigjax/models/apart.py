"""Positions as biases of attention, by how far apart two are (Raffel et al. 2020, section 2.1).

B batch, L positions that ask, M positions that are looked at, H heads.
"""

import math

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jax import Array

from bigjax.models.cache import places


class Apart(nn.Embed):
    """(1 or B, H, L, M): of L positions as all of them see one another; of a cache of M as those at `position` see it.

    num_embeddings: of positions apart, half of them exact, then ever wider up to the distance. features: heads.
    """

    distance: int = 128
    causal: bool = False

    def __call__(self, length: int, *, position: Array | None = None, size: int | None = None) -> Array:
        if position is None:
            which_LL = jnp.asarray(bucket(length, self.num_embeddings, self.distance, causal=self.causal))
            return jnp.moveaxis(super().__call__(which_LL), -1, 0)[None]
        near_M = jnp.asarray(bucket(size, self.num_embeddings, self.distance, causal=True)[-1, ::-1])  # by how far
        away_BLM = jnp.maximum(places(position, length)[..., None] - jnp.arange(size)[None, None], 0)
        return jnp.moveaxis(super().__call__(near_M[away_BLM]), -1, 1)


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
