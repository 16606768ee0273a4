"""What is measured: metrics are (sum, count) pairs, merged by adding, on any number of devices.

B batch.
"""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

Metrics = dict[str, tuple[Array, Array]]


def merge(a: Metrics, b: Metrics) -> Metrics:
    """Adds two sets of metrics, name by name."""
    return jax.tree.map(jnp.add, a, b)


def means(metrics: Metrics) -> dict[str, float]:
    """sum / count of every metric whose sum is one number; nan where nothing was counted."""
    host = jax.device_get(metrics)
    return {k: float(s) / float(n) if n else float("nan") for k, (s, n) in host.items() if np.ndim(s) == 0}


@flax.struct.dataclass
class Bins:
    """What each row counts for in a histogram: row b adds weight_B[b] (None: one, in integers) to the bin index[b].

    index: one array (B,) for each axis of the histogram. A row whose bin is not there is not counted.
    """

    index: tuple[Array, ...]
    shape: tuple[int, ...] = flax.struct.field(pytree_node=False)
    weight_B: Array | None = None


def rows_of(values: Any) -> int | None:
    """How many rows a metric's values have; None if they are no rows."""
    array = values.index[0] if isinstance(values, Bins) else values
    return array.shape[0] if getattr(array, "ndim", 0) else None


def total(values: Array | Bins, mask_B: Array) -> Array:
    """The sum over the rows whose mask is not 0; whole numbers stay whole numbers."""
    if not isinstance(values, Bins):
        dtype = jnp.float32 if jnp.issubdtype(values.dtype, jnp.inexact) else jnp.int32
        return (values.astype(dtype) * mask_B.astype(dtype).reshape(-1, *(1,) * (values.ndim - 1))).sum(0)
    weight_B = mask_B.astype(jnp.int32) if values.weight_B is None else values.weight_B * mask_B
    index = tuple(jnp.where(i < 0, n, i) for i, n in zip(values.index, values.shape))  # not counted from the end
    return jnp.zeros(values.shape, weight_B.dtype).at[index].add(weight_B, mode="drop")
