"""Logits over a vocabulary, and those that are never held whole: made, used and dropped a part at a time.

B batch, L positions, D width, V vocabulary.
"""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from bigjax.ops.counted import plainly
from bigjax.sharding import Axes, locally, our_mesh

MOST = 2**28  # bytes of float32 logits on a device; more are made in parts, each of at most so many


@functools.partial(jax.custom_jvp, nondiff_argnums=(2, 3))
def dot_float32(x: Array, kernel: Array, dimensions: tuple, precision: lax.PrecisionLike = None) -> Array:
    """`lax.dot_general` with sums and result in float32, for output layers; gradients multiply in the inputs' dtype."""
    return lax.dot_general(x, kernel, dimensions, precision, preferred_element_type=jnp.float32)


@dot_float32.defjvp
def _dot_float32_tangent(dimensions: tuple, precision: lax.PrecisionLike, primals: tuple, tangents: tuple) -> tuple:
    (x, kernel), (dx, dkernel) = primals, tangents
    tangent = lax.dot_general(dx, kernel, dimensions, precision) + lax.dot_general(x, dkernel, dimensions, precision)
    return dot_float32(*primals, dimensions, precision), tangent.astype(jnp.float32)


class Factors(NamedTuple):
    """What logits_BLV are the product of: x_BLD and kernel_VD, and what is added to it, bias_V or None."""

    x_BLD: Array
    kernel_VD: Array
    bias_V: Array | None = None

    def logits(self) -> Array:
        """(B, L, V) float32."""
        logits_BLV = dot_float32(self.x_BLD, self.kernel_VD, (((2,), (1,)), ((), ())))
        return logits_BLV if self.bias_V is None else logits_BLV + self.bias_V[None, None]


def unmultiplied(logits: Any, sown: Mapping[str, Any]) -> Any:
    """The `Factors` of logits that are too many, if a model has sown them; else the logits.

    Logits that nobody asks for are then multiplied by nobody. A vocabulary that is split over devices leaves it.
    """
    shape, mesh = getattr(logits, "shape", ()), our_mesh()
    ways = 1 if mesh is None else mesh.shape["data"] * mesh.shape["fsdp"]
    split = mesh is not None and (mesh.shape["tensor"] > 1 or shape[:1] and shape[0] % ways)
    few = 4 * math.prod(shape) <= MOST * ways
    return logits if "logits" not in sown or few or split or plainly("vocabulary") else sown["logits"][0]


def in_parts(rows: Callable[..., Any], factors: Factors, *each_BL: Array) -> Any:
    """rows(logits, *each), which gives sums over the positions of each row, (B,), whatever tree they are in.

    It is called with a part of the positions at a time, whose logits are made again in the backward pass; behind the
    last position parts are filled up with zeros. Over a mesh each device goes through its own rows, and gives its part
    of the kernel's gradient once.
    """
    split: Axes = ("rows",)
    local = lambda x, kernel, bias, *each: _in_parts(rows, Factors(x, kernel, bias), *each)  # noqa: E731
    return locally(local, (split, (), (), *(split for _ in each_BL)), split)(*factors, *each_BL)


def _in_parts(rows: Callable[..., Any], factors: Factors, *each_BL: Array) -> Any:
    x_BLD, kernel_VD, bias_V = factors
    B, L, V = *x_BLD.shape[:2], len(kernel_VD)
    count = min(-(-4 * B * L * V // MOST), L)
    size = -(-L // count)

    def parts(x: Array) -> Array:
        x = jnp.pad(x, [(0, 0), (0, count * size - L), *[(0, 0)] * (x.ndim - 2)])
        return jnp.moveaxis(x.reshape(B, count, size, *x.shape[2:]), 1, 0)

    def one(x_BlD: Array, kernel_VD: Array, bias_V: Array | None, each_Bl: tuple[Array, ...]) -> Any:
        return rows(Factors(x_BlD, kernel_VD, bias_V).logits(), *each_Bl)

    again = jax.checkpoint(one, prevent_cse=False)
    split = (parts(x_BLD), tuple(map(parts, each_BL)))
    shapes = jax.eval_shape(one, split[0][0], kernel_VD, bias_V, tuple(x[0] for x in split[1]))

    def body(total: Any, part: tuple[Array, tuple[Array, ...]]) -> tuple[Any, None]:
        x_BlD, each_Bl = part
        return jax.tree.map(jnp.add, total, again(x_BlD, kernel_VD, bias_V, each_Bl)), None

    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    return jax.lax.scan(body, zeros, split)[0]
