"""Images resampled: shifted, turned, magnified, sheared, warped.

Shapes: B batch, H height, W width, C channels.
"""

import jax
import jax.numpy as jnp
from jax import Array


def affine(
    image_BHWC: Array,
    *,
    shift_B2: Array,
    degrees_B: Array,
    scale_B: Array,
    shear_B: Array,
    warp_B2HW: Array | None = None,
) -> Array:
    """Each image sheared, magnified, turned counter-clockwise about its centre, then shifted by (down, right) pixels.

    In one bilinear resampling, each pixel looked up `warp` (down, right) pixels further; outside the image is 0.
    """
    height, width = image_BHWC.shape[1:3]
    centre_y, centre_x = (height - 1) / 2, (width - 1) / 2
    y_BHW = jnp.arange(height).astype(jnp.float32)[None, :, None] - centre_y - shift_B2[:, 0, None, None]
    x_BHW = jnp.arange(width).astype(jnp.float32)[None, None, :] - centre_x - shift_B2[:, 1, None, None]
    cos_B, sin_B = jnp.cos(jnp.deg2rad(degrees_B)) / scale_B, jnp.sin(jnp.deg2rad(degrees_B)) / scale_B
    # where each pixel of the result comes from: the inverse of the turn (y points down), then of the shear
    from_y = cos_B[:, None, None] * y_BHW + sin_B[:, None, None] * x_BHW
    from_x = cos_B[:, None, None] * x_BHW - sin_B[:, None, None] * y_BHW
    from_x = from_x - shear_B[:, None, None] * from_y
    if warp_B2HW is not None:
        from_y, from_x = from_y + warp_B2HW[:, 0], from_x + warp_B2HW[:, 1]
    return bilinear(image_BHWC, from_y + centre_y, from_x + centre_x)


def bilinear(image_BHWC: Array, y_BHW: Array, x_BHW: Array) -> Array:
    """Values at fractional positions. Four gathers from flat images: on CPU far faster than weight matrices."""
    batch, height, width, channels = image_BHWC.shape
    y_BHW, x_BHW = jnp.clip(y_BHW, -1, height), jnp.clip(x_BHW, -1, width)
    flat_BNC = jnp.pad(image_BHWC, ((0, 0), (1, 2), (1, 2), (0, 0))).reshape(batch, -1, channels)
    row = width + 3
    top_BHW, left_BHW = jnp.floor(y_BHW), jnp.floor(x_BHW)
    corner_BHW = (top_BHW.astype(jnp.int32) + 1) * row + left_BHW.astype(jnp.int32) + 1

    def at(offset: int) -> Array:
        values_BNC = jax.vmap(lambda flat, i: flat.at[i].get(mode="promise_in_bounds"))(
            flat_BNC, corner_BHW.reshape(batch, -1) + offset
        )
        return values_BNC.reshape(image_BHWC.shape)

    down, right = (f[..., None].astype(image_BHWC.dtype) for f in (y_BHW - top_BHW, x_BHW - left_BHW))
    above = at(0) * (1 - right) + at(1) * right
    below = at(row) * (1 - right) + at(row + 1) * right
    return above * (1 - down) + below * down
