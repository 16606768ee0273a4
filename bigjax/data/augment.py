"""Augmentation of images: pure JAX functions of (batch, key), to be run on the device inside the step.

Shapes: B batch, H height, W width, C channels, D draws of one row. Images are floats in [0, 1]; what comes in from
outside is 0. Every row draws from its own key, `fold_in(key, index)`: what happens to an example depends on (key, its
row in the data set) alone, not on its place in the batch, the microbatch or the device; but for mixup's partner.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Annotated

import jax
import jax.numpy as jnp
from jax import Array

from bigjax import UsageError
from bigjax.experiment import Fraction, NonNegative

Batch = dict[str, Array]
Augment = Callable[[Batch, Array], Batch]
WARP_KNOTS = 5  # a side: on 28 pixels a bump is as wide as a stroke is long
DRAWS = ("shift_y", "shift_x", "rotate", "scale", "shear", "flip", "crop_y", "crop_x", "cutout_y", "cutout_x")
MIX_STREAM, WARP_STREAM = 11, 12  # folded into a row's key: what these two draw does not depend on DRAWS


def augment_images(
    *,
    shift: float = 0.0,
    rotate: float = 0.0,
    scale: float = 0.0,
    shear: float = 0.0,
    warp: float = 0.0,
    flip: bool = False,
    crop: int = 0,
    cutout: int = 0,
    mixup: float = 0.0,
) -> Augment:
    """A function (batch, key) -> batch that varies `image` (B,H,W,C) by the row's key; the other fields stay.

    shift: up to so many pixels up or down and left or right; rotate: up to so many degrees either way;
    scale: magnified by a factor in 1 ± scale; shear: up to so many pixels sideways per pixel of height.
    warp: an elastic distortion by a smooth random field, so many pixels of standard deviation (Simard et al. 2003).
    These five are one bilinear resampling.
    flip: left-right, half of the rows.
    crop: padded by so many pixels and cropped back, a shift by whole pixels (He et al. 2016).
    cutout: a square of this side set to 0 around any pixel, so it may lie partly outside (DeVries & Taylor 2017).
    mixup: λ·image + (1 − λ)·partner's, λ ~ Beta(mixup, mixup) (Zhang et al. 2018). The partner is the next row of the
    batch, whose order is random already: of a batch over several devices only the rows at their edges travel. Give it
    the whole batch, not a microbatch. It adds `label_mix` (B,) int32, the partner's label, and `mix` (B,) float32, the
    weight λ: loss = mix·loss(label) + (1 − mix)·loss(label_mix).

    Strengths of zero change nothing. What one augmentation draws does not depend on which others are on. UsageError: a
    strength that makes no sense; mixup of a batch without labels.
    """
    strengths = {"shift": shift, "rotate": rotate, "scale": scale, "shear": shear, "warp": warp, "flip": flip}
    strengths |= {"crop": crop, "cutout": cutout, "mixup": mixup}
    for name, value in strengths.items():
        if not 0 <= value < float("inf"):
            raise UsageError(f"augmentation {name}={value} must be a number from 0 (off) upwards")
    if scale >= 1:
        raise UsageError(f"augmentation scale={scale} must be below 1: images are magnified by a factor in 1 ± scale")

    def augment(batch: Batch, key: Array) -> Batch:
        image_BHWC = batch["image"]
        if not any(strengths.values()):
            return batch
        if image_BHWC.ndim != 4 or not jnp.issubdtype(image_BHWC.dtype, jnp.floating):
            raise TypeError(
                f"augment_images takes float images (B,H,W,C) in [0, 1], not {image_BHWC.dtype}{image_BHWC.shape}"
            )
        height, width = image_BHWC.shape[1:3]
        key_B = jax.vmap(jax.random.fold_in, (None, 0))(key, batch["index"])
        uniform_BD = jax.vmap(lambda k: jax.random.uniform(k, (len(DRAWS),)))(key_B)
        u = {name: uniform_BD[:, i] for i, name in enumerate(DRAWS)}  # each (B,), in [0, 1)
        about = {name: 2 * u_B - 1 for name, u_B in u.items()}  # in [-1, 1)
        if shift or rotate or scale or shear or warp:
            warp_B2HW = None
            if warp:
                field_key_B = jax.vmap(jax.random.fold_in, (0, None))(key_B, WARP_STREAM)
                knots_B2KK = jax.vmap(lambda k: jax.random.normal(k, (2, WARP_KNOTS, WARP_KNOTS)))(field_key_B)
                warp_B2HW = warp * jax.image.resize(knots_B2KK, (*knots_B2KK.shape[:2], height, width), "cubic")
            image_BHWC = affine(
                image_BHWC,
                shift_B2=jnp.stack([shift * about["shift_y"], shift * about["shift_x"]], axis=-1),
                degrees_B=rotate * about["rotate"],
                scale_B=1 + scale * about["scale"],
                shear_B=shear * about["shear"],
                warp_B2HW=warp_B2HW,
            )
        if flip:
            image_BHWC = jnp.where(_each(u["flip"] < 0.5), image_BHWC[:, :, ::-1], image_BHWC)
        if crop:
            top_B, left_B = (jnp.floor(u[f"crop_{axis}"] * (2 * crop + 1)).astype(jnp.int32) for axis in "yx")
            image_BHWC = _crop(image_BHWC, top_B, left_B, pad=crop)
        if cutout:
            y_B, x_B = jnp.floor(u["cutout_y"] * height), jnp.floor(u["cutout_x"] * width)
            hole_BHWC = _inside(height, y_B, cutout)[:, :, None, None] & _inside(width, x_B, cutout)[:, None, :, None]
            image_BHWC = jnp.where(hole_BHWC, 0, image_BHWC)
        if not mixup:
            return batch | {"image": image_BHWC}
        if "label" not in batch:
            raise UsageError("mixup mixes labels, and this data has none: pass mixup=0")
        mix_B = jax.vmap(lambda k: jax.random.beta(jax.random.fold_in(k, MIX_STREAM), mixup, mixup))(key_B)
        own = _each(mix_B).astype(image_BHWC.dtype)
        image_BHWC = own * image_BHWC + (1 - own) * jnp.roll(image_BHWC, -1, axis=0)
        label_mix_B = jnp.roll(batch["label"], -1)
        return batch | {"image": image_BHWC, "label_mix": label_mix_B, "mix": mix_B.astype(jnp.float32)}

    return augment


def drop_tokens(share: float, *, unknown: int = 1) -> Augment:
    """A function (batch, key) -> batch that replaces so large a share of the real `tokens` (B, L) by `unknown`, at
    random.

    Padding (token 0) stays. Each row's choice is keyed by its `index` (word dropout: Iyyer et al. 2015).
    """

    def augment(batch: Batch, key: Array) -> Batch:
        tokens_BL = batch["tokens"]
        keys_B = jax.vmap(jax.random.fold_in, (None, 0))(key, batch["index"])
        drop_BL = jax.vmap(lambda key: jax.random.bernoulli(key, share, tokens_BL.shape[1:]))(keys_B)
        return {**batch, "tokens": jnp.where(drop_BL & (tokens_BL != 0), unknown, tokens_BL)}

    return augment


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
    return _bilinear(image_BHWC, from_y + centre_y, from_x + centre_x)


def _bilinear(image_BHWC: Array, y_BHW: Array, x_BHW: Array) -> Array:
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


def _crop(image_BHWC: Array, top_B: Array, left_B: Array, *, pad: int) -> Array:
    padded_BHWC = jnp.pad(image_BHWC, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    cut = lambda image, top, left: jax.lax.dynamic_slice(image, (top, left, 0), image_BHWC.shape[1:])  # noqa: E731
    return jax.vmap(cut)(padded_BHWC, top_B, left_B)


def _inside(size: int, centre_B: Array, side: int) -> Array:
    """(B, size): which places are in the span of `side` around the centre."""
    from_start = jnp.arange(size).astype(jnp.float32)[None] - (centre_B[:, None] - side // 2)
    return (from_start >= 0) & (from_start < side)


def _each(value_B: Array) -> Array:
    return value_B[:, None, None, None]


@dataclass(frozen=True)
class Augmentation:
    """How training images are varied, inside the step: a group of flags for `augment_images`."""

    augment: bool = True  # --no-augment: not at all
    rotate: Annotated[float, NonNegative] = 0.0  # degrees at most
    shift: Annotated[float, NonNegative] = 0.0  # pixels at most
    scale: Annotated[float, Fraction] = 0.0  # magnified by a factor in 1 ± scale
    shear: Annotated[float, NonNegative] = 0.0  # pixels sideways a pixel of height, at most
    warp: Annotated[float, NonNegative] = 0.0  # pixels, standard deviation of the elastic distortion

    def function(self) -> Augment | None:
        strengths = asdict(self)
        return augment_images(**strengths) if strengths.pop("augment") else None
