"""Convolutions and pooling of images, in the form that is fastest where the program runs.

B batch, H height, W width, C channels, D channels of the output, K kernel size.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from bigjax.sharding import BATCH, WHOLE, our_mesh

_NHWC = lax.conv_dimension_numbers((1, 1, 1, 1), (1, 1, 1, 1), ("NHWC", "HWIO", "NHWC"))


def conv_general_dilated(
    lhs: Array,
    rhs: Array,
    window_strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    lhs_dilation: Sequence[int] | None = None,
    rhs_dilation: Sequence[int] | None = None,
    dimension_numbers: Any = None,
    **options: Any,
) -> Array:
    """`lax.conv_general_dilated`, for `nn.Conv(conv_general_dilated=…)`; on CPU as matrix products where that pays.

    XLA's gradients of convolutions are slow on CPU, inside a loop ten times as slow; with strides, dilation, groups or
    few output channels XLA's is still the faster one. What the program is compiled for decides, not where it was
    traced. The products serve 2-D convolutions of stride 1, and the transposed convolution that doubles an image
    (a 4×4 kernel, `lhs_dilation` and padding 2).

    Convolutions by groups are done by each device on its own rows where the mesh has an axis that splits no rows: left
    to itself XLA gets their kernel's gradient wrong there, without a word.
    """

    def native(x: Array, kernel: Array) -> Array:
        return lax.conv_general_dilated(
            x, kernel, window_strides, padding, lhs_dilation, rhs_dilation, dimension_numbers, **options
        )

    mesh = our_mesh()
    if options.get("feature_group_count", 1) > 1 and mesh is not None and mesh.shape["tensor"] > 1:
        if lhs.shape[0] % (mesh.shape["data"] * mesh.shape["fsdp"]) == 0:
            return jax.shard_map(native, in_specs=(BATCH, WHOLE), out_specs=BATCH)(lhs, rhs)
    plain = all(v in (None, 1) for v in options.values())  # one group, and neither precision nor type asked for
    plain &= lax.conv_dimension_numbers(lhs.shape, rhs.shape, dimension_numbers) == _NHWC
    if not plain or {*window_strides, *(rhs_dilation or ())} != {1}:
        return native(lhs, rhs)
    pads = lax.padtype_to_pads(lhs.shape[1:3], rhs.shape[:2], (1, 1), padding) if isinstance(padding, str) else padding
    grown = set(lhs_dilation or (1,))
    if grown == {1} and rhs.shape[3] >= 8:
        return lax.platform_dependent(lhs, rhs, cpu=lambda x, kernel: _product(x, kernel, pads), default=native)
    if grown == {2} and rhs.shape[:2] == (4, 4) and {n for pad in pads for n in pad} == {2}:
        return lax.platform_dependent(lhs, rhs, cpu=_double, default=native)
    return native(lhs, rhs)


def _product(x: Array, kernel_KKCD: Array, pads: Sequence[tuple[int, int]]) -> Array:
    """Shifted slices times the kernel's rows."""
    kh, kw, cin, cout = kernel_KKCD.shape
    if any(map(any, pads)):
        x = lax.pad(x, jnp.zeros((), x.dtype), ((0, 0, 0), *((*pad, 0) for pad in pads), (0, 0, 0)))
    h, w = x.shape[1] - kh + 1, x.shape[2] - kw + 1
    if cin == 1:  # slices of one channel are best laid one after the other
        patches = jnp.stack([x[:, i : i + h, j : j + w, 0] for i in range(kh) for j in range(kw)])
        return jnp.einsum("kbhw,kd->bhwd", patches, kernel_KKCD.reshape(kh * kw, cout))
    # One product for each of the kernel's rows moves a third of the bytes that a single one would.
    wide = jnp.concatenate([x[:, :, j : j + w] for j in range(kw)], -1)
    return sum(wide[:, i : i + h] @ kernel_KKCD[i].reshape(kw * cin, cout) for i in range(kh))


def _double(x: Array, kernel_44CD: Array) -> Array:
    """Four 2×2 convolutions, one for each output pixel that an input pixel becomes: (B, H, W, C) to (B, 2H, 2W, D)."""
    b, h, w, _ = x.shape
    x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    pixels = [(x[:, i : i + h + 1, j : j + w + 1], kernel_44CD[i::2, j::2]) for i in range(2) for j in range(2)]
    y = jnp.stack([lax.conv_general_dilated(*p, (1, 1), "VALID", dimension_numbers=_NHWC) for p in pixels])
    d = kernel_44CD.shape[-1]
    return y.reshape(2, 2, b, h, w, d).transpose(2, 3, 0, 4, 1, 5).reshape(b, 2 * h, 2 * w, d)


def max_pool(x_BHWC: Array) -> Array:
    """2×2 maximum with stride 2; an odd last row or column is dropped, NaN is kept.

    The first of equal values gets the gradient. On CPU that of `reduce_window` is slow.
    """
    b, h, w, c = x_BHWC.shape
    x = x_BHWC[:, : h // 2 * 2, : w // 2 * 2].reshape(b, h // 2, 2, w // 2, 2, c)

    def larger(a: Array, b: Array) -> Array:
        return jnp.where((a >= b) | jnp.isnan(a), a, b)

    x = larger(x[:, :, 0], x[:, :, 1])
    return larger(x[:, :, :, 0], x[:, :, :, 1])
