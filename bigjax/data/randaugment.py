"""RandAugment on the device: so many operations an image, each drawn from 14, of one magnitude.

Cubuk et al., "RandAugment: practical automated data augmentation with a reduced search space", 2020, with the ranges
that AutoAugment gave its operations. Of a batch all rows take all forms at once, and each keeps its own: where a
batch lies on several devices a loop over its rows would run on one after the other.

Shapes: B batch, H height, W width, C channels, N pixels, V 256 values, D draws.
"""

import jax
import jax.numpy as jnp
from jax import Array

from bigjax import UsageError
from bigjax.data.affine import bilinear

GREATEST = 10  # magnitude
OPERATIONS = (
    *("identity", "autocontrast", "equalize", "rotate", "solarize", "color", "posterize", "contrast", "brightness"),
    *("sharpness", "shear_x", "shear_y", "translate_x", "translate_y"),
)
ROTATE, SHEAR, TRANSLATE, ENHANCE, BITS = 30.0, 0.3, 150 / 331, 0.9, 4  # at the greatest; degrees, shares, bits
LUMA = (0.299, 0.587, 0.114)  # of red, green, blue


def randaugmented(image_BHWC: Array, key_B: Array, count: int, *, magnitude: float) -> Array:
    """Each image, floats in [0, 1], changed by `count` operations, one after the other, that its key draws.

    magnitude: 0 to 10. At the greatest rotate turns by 30 degrees, shear moves by 0.3 pixels a pixel, translate by 0.45
    of a side, solarize inverts all, posterize leaves 4 bits, and color, contrast, brightness and sharpness are enhanced
    by a factor of 1 ± 0.9; less in proportion, and in either direction by the key. autocontrast and equalize have no
    strength. Operations on values take an image in 256 levels, as Pillow does, but keep what lies between where they
    can. UsageError: neither 1 nor 3 channels.
    """
    if image_BHWC.shape[-1] not in (1, 3):
        raise UsageError(f"randaugment is for images of 1 or 3 channels, and these have {image_BHWC.shape[-1]}: pass 0")
    u_B2D = jax.vmap(lambda key: jax.random.uniform(key, (2, count)))(key_B)
    operation_DB = jnp.floor(u_B2D[:, 0] * len(OPERATIONS)).astype(jnp.int32).T
    sign_DB = jnp.where(u_B2D[:, 1] < 0.5, -1.0, 1.0).T

    def one(image_BHWC: Array, drawn: tuple[Array, Array]) -> tuple[Array, None]:
        return operated(image_BHWC, *drawn, magnitude=magnitude), None

    changed_BHWC, _ = jax.lax.scan(one, image_BHWC.astype(jnp.float32), (operation_DB, sign_DB))
    return changed_BHWC.astype(image_BHWC.dtype)


def operated(image_BHWC: Array, operation_B: Array, sign_B: Array, *, magnitude: float) -> Array:
    """Each image changed by the operation of this place in OPERATIONS, by ± the magnitude."""
    share = magnitude / GREATEST
    is_B = {name: operation_B == i for i, name in enumerate(OPERATIONS)}
    image_BHWC = moved(image_BHWC, is_B, share * sign_B)
    level_BHWC = jnp.round(255 * image_BHWC)
    low_B11C, high_B11C = (f(image_BHWC, axis=(1, 2), keepdims=True) for f in (jnp.min, jnp.max))
    span_B11C = jnp.where(high_B11C > low_B11C, high_B11C - low_B11C, 1)
    step = 2 ** round(share * BITS)
    forms = {
        "autocontrast": jnp.where(high_B11C > low_B11C, (image_BHWC - low_B11C) / span_B11C, image_BHWC),
        "equalize": equalized(level_BHWC.astype(jnp.int32)).astype(jnp.float32) / 255,
        "solarize": jnp.where(level_BHWC >= 256 * (1 - share), 1 - image_BHWC, image_BHWC),
        "posterize": jnp.floor(level_BHWC / step) * step / 255,
    }
    factor_B = 1 + ENHANCE * share * sign_B
    for name, without_BHWC in degenerate(image_BHWC).items():
        enhanced_BHWC = without_BHWC + _each(factor_B) * (image_BHWC - without_BHWC)
        forms[name] = jnp.clip(enhanced_BHWC, 0, 1)
    for name, form_BHWC in forms.items():
        image_BHWC = jnp.where(_each(is_B[name]), form_BHWC, image_BHWC)
    return image_BHWC


def moved(image_BHWC: Array, is_B: dict[str, Array], share_B: Array) -> Array:
    """Turned about the centre, sheared from the upper left corner or shifted, whichever each row is; else unchanged."""
    height, width = image_BHWC.shape[1:3]
    centre_y, centre_x = (height - 1) / 2, (width - 1) / 2
    angle_B = jnp.where(is_B["rotate"], jnp.deg2rad(ROTATE * share_B), 0)
    shear_y_B, shear_x_B = (jnp.where(is_B[f"shear_{axis}"], SHEAR * share_B, 0) for axis in "yx")
    down_B, right_B = (
        jnp.where(is_B[f"translate_{axis}"], jnp.round(TRANSLATE * share_B * side), 0)
        for axis, side in (("y", height), ("x", width))
    )
    y_BHW = jnp.arange(height).astype(jnp.float32)[None, :, None] - centre_y
    x_BHW = jnp.arange(width).astype(jnp.float32)[None, None, :] - centre_x
    cos, sin, shear_y, shear_x, down, right = (
        v_B[:, None, None] for v_B in (jnp.cos(angle_B), jnp.sin(angle_B), shear_y_B, shear_x_B, down_B, right_B)
    )
    from_y = cos * y_BHW + sin * x_BHW + shear_y * (x_BHW + width / 2) - down + centre_y
    from_x = cos * x_BHW - sin * y_BHW + shear_x * (y_BHW + height / 2) - right + centre_x
    return bilinear(image_BHWC, from_y, from_x)


def degenerate(image_BHWC: Array) -> dict[str, Array]:
    """What an enhancement of factor 0 leaves: black, the mean grey, grey, smoothed (its border as it is)."""
    channels = image_BHWC.shape[-1]
    grey_BHW1 = image_BHWC if channels == 1 else (image_BHWC * jnp.array([[[LUMA]]])).sum(-1, keepdims=True)
    rows_BHWC = image_BHWC[:, :-2] + image_BHWC[:, 1:-1] + image_BHWC[:, 2:]
    sums_BHWC = rows_BHWC[:, :, :-2] + rows_BHWC[:, :, 1:-1] + rows_BHWC[:, :, 2:]
    smooth_BHWC = (sums_BHWC + 4 * image_BHWC[:, 1:-1, 1:-1]) / 13
    return {
        "brightness": jnp.zeros_like(image_BHWC),
        "contrast": jnp.broadcast_to(grey_BHW1.mean((1, 2), keepdims=True), image_BHWC.shape),
        "color": jnp.broadcast_to(grey_BHW1, image_BHWC.shape),
        "sharpness": image_BHWC.at[:, 1:-1, 1:-1].set(smooth_BHWC),
    }


def equalized(level_BHWC: Array) -> Array:
    """Levels 0 to 255 changed so that each image's channels hold all of them about as often: Pillow's integers."""
    batch, height, width, channels = level_BHWC.shape
    level_MN = level_BHWC.transpose(0, 3, 1, 2).reshape(batch * channels, height * width)
    count_MV = histogram(level_MN)
    last_M1 = 255 - jnp.argmax(count_MV[:, ::-1] > 0, axis=1, keepdims=True)
    step_M1 = (height * width - jnp.take_along_axis(count_MV, last_M1, axis=1)) // 255
    before_MV = jnp.cumsum(count_MV, axis=1) - count_MV
    table_MV = jnp.minimum((step_M1 // 2 + before_MV) // jnp.maximum(step_M1, 1), 255)
    table_MV = jnp.where(step_M1 > 0, table_MV, jnp.arange(256)[None])
    return looked_up(table_MV, level_MN).reshape(batch, channels, height, width).transpose(0, 2, 3, 1)


# ---- tables of 256: an accelerator multiplies matrices faster than it scatters and gathers; a level is 16 a + b


def histogram(level_MN: Array) -> Array:
    """(M,256) int32: how often each level occurs in a row."""
    return jax.lax.platform_dependent(level_MN, cpu=counted_one_by_one, default=counted_by_products)


def looked_up(table_MV: Array, level_MN: Array) -> Array:
    """(M,N): the entries, 0 to 255, of each row's table at its levels."""
    return jax.lax.platform_dependent(table_MV, level_MN, cpu=read_one_by_one, default=read_by_products)


def counted_one_by_one(level_MN: Array) -> Array:
    return jax.vmap(lambda level_N: jnp.zeros(256, jnp.int32).at[level_N].add(1, mode="promise_in_bounds"))(level_MN)


def counted_by_products(level_MN: Array) -> Array:
    tens_MNA, ones_MNA = (jax.nn.one_hot(v, 16, dtype=jnp.bfloat16) for v in (level_MN // 16, level_MN % 16))
    count_MAB = jnp.einsum("mna,mnb->mab", tens_MNA, ones_MNA, preferred_element_type=jnp.float32)
    return count_MAB.reshape(len(level_MN), 256).astype(jnp.int32)


def read_one_by_one(table_MV: Array, level_MN: Array) -> Array:
    return jax.vmap(lambda table_V, level_N: table_V.at[level_N].get(mode="promise_in_bounds"))(table_MV, level_MN)


def read_by_products(table_MV: Array, level_MN: Array) -> Array:
    tens_MNA, ones_MNA = (jax.nn.one_hot(v, 16, dtype=jnp.bfloat16) for v in (level_MN // 16, level_MN % 16))
    table_MAB = table_MV.reshape(-1, 16, 16).astype(jnp.bfloat16)  # whole numbers to 256 are exact in it
    row_MNB = jnp.einsum("mna,mab->mnb", tens_MNA, table_MAB)
    return (row_MNB * ones_MNA).sum(-1).astype(jnp.int32)


def _each(value_B: Array) -> Array:
    return value_B[:, None, None, None]
