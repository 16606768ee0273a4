"""Convolutions and pooling of images, in the form that is fastest where the program runs.

B batch, H height, W width, C channels, D channels of the output, K kernel size.
"""

import jax.numpy as jnp
from jax import Array, lax


def _native(x: Array, kernel: Array, stride: int, padding: str) -> Array:
    return lax.conv_general_dilated(x, kernel, (stride, stride), padding, dimension_numbers=("NHWC", "HWIO", "NHWC"))


def convolve(x_BHWC: Array, kernel_KKCD: Array, *, stride: int = 1, padding: str = "VALID") -> Array:
    """XLA's convolution; on CPU, where it pays, a few matrix products instead: shifted slices times the kernel's rows.

    XLA's gradients of convolutions are slow on CPU, inside a loop ten times as slow; with strides or few output
    channels it is still the faster one. What the program is compiled for decides, not where it was traced.
    """
    kh, kw, cin, cout = kernel_KKCD.shape

    def native(x: Array, kernel: Array) -> Array:
        return _native(x, kernel, stride, padding)

    def product(x: Array, kernel: Array) -> Array:
        pads = lax.padtype_to_pads(x.shape[1:3], (kh, kw), (1, 1), padding)
        if any(map(any, pads)):
            x = jnp.pad(x, ((0, 0), *pads, (0, 0)))
        h, w = x.shape[1] - kh + 1, x.shape[2] - kw + 1
        if cin == 1:  # slices of one channel are best laid one after the other
            patches = jnp.stack([x[:, i : i + h, j : j + w, 0] for i in range(kh) for j in range(kw)])
            return jnp.einsum("kbhw,kd->bhwd", patches, kernel.reshape(kh * kw, cout))
        # One product for each of the kernel's rows moves a third of the bytes that a single one would.
        wide = jnp.concatenate([x[:, :, j : j + w] for j in range(kw)], -1)
        return sum(wide[:, i : i + h] @ kernel[i].reshape(kw * cin, cout) for i in range(kh))

    if stride > 1 or cout < 8:
        return native(x_BHWC, kernel_KKCD)
    return lax.platform_dependent(x_BHWC, kernel_KKCD, cpu=product, default=native)


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


def upsample(x_BHWC: Array, kernel_44CD: Array) -> Array:
    """`lax.conv_transpose` with a 4×4 kernel, stride 2, "SAME": (B, H, W, C) to (B, 2H, 2W, D).

    On CPU as four 2×2 convolutions, one for each output pixel that an input pixel becomes: faster there.
    """

    def native(x: Array, kernel: Array) -> Array:
        return lax.conv_transpose(x, kernel, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    def product(x: Array, kernel: Array) -> Array:
        b, h, w, _ = x.shape
        x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
        pixels = [(x[:, i : i + h + 1, j : j + w + 1], kernel[i::2, j::2]) for i in range(2) for j in range(2)]
        y = jnp.stack([_native(x, kernel, 1, "VALID") for x, kernel in pixels]).reshape(2, 2, b, h, w, -1)
        return y.transpose(2, 3, 0, 4, 1, 5).reshape(b, 2 * h, 2 * w, -1)

    return lax.platform_dependent(x_BHWC, kernel_44CD, cpu=product, default=native)
