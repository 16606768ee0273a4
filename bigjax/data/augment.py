"""Augmentation of images: pure JAX functions of (batch, key), to be run on the device inside the step.

Shapes: B batch, H height, W width, C channels, D draws of one row. Images are floats in [0, 1]; what comes in from
outside is 0. Every row draws from its own key, `fold_in(key, index)`: what happens to an example depends on (key, its
row in the data set) alone, not on its place in the batch, the microbatch or the device; but for whom it is mixed with.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Annotated

import jax
import jax.numpy as jnp
from jax import Array

from bigjax import UsageError
from bigjax.data.affine import affine
from bigjax.data.mixing import inside, mixed
from bigjax.data.randaugment import GREATEST, randaugmented
from bigjax.experiment import Fraction, NonNegative

Batch = dict[str, Array]
Augment = Callable[[Batch, Array], Batch]
WARP_KNOTS = 5  # a side: on 28 pixels a bump is as wide as a stroke is long
DRAWS = ("shift_y", "shift_x", "rotate", "scale", "shear", "flip", "crop_y", "crop_x", "cutout_y", "cutout_x")
WARP_STREAM, OPERATIONS_STREAM = 12, 13  # folded into a row's key: what these draw does not depend on DRAWS


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
    cutmix: float = 0.0,
    randaugment: int = 0,
    randaugment_magnitude: float = 9.0,
) -> Augment:
    """A function (batch, key) -> batch that varies `image` (B,H,W,C) by the row's key; the other fields stay.

    shift: up to so many pixels up or down and left or right; rotate: up to so many degrees either way;
    scale: magnified by a factor in 1 ± scale; shear: up to so many pixels sideways per pixel of height.
    warp: an elastic distortion by a smooth random field, so many pixels of standard deviation (Simard et al. 2003).
    These five are one bilinear resampling.
    flip: left-right, half of the rows.
    crop: padded by so many pixels and cropped back, a shift by whole pixels (He et al. 2016).
    cutout: a square of this side set to 0 around any pixel, so it may lie partly outside (DeVries & Taylor 2017).
    mixup, cutmix: each image mixed with another, or a box of it replaced, as in `mixing.mixed`, which adds `label_mix`
    and `mix`: loss = mix·loss(label) + (1 − mix)·loss(label_mix).
    randaugment: so many operations one after the other, each one of 14, of randaugment_magnitude 0 to 10
    (`randaugment.randaugmented`); before what is cut out and mixed.

    Strengths of zero change nothing. What one augmentation draws does not depend on which others are on. UsageError: a
    strength that makes no sense; mixup or cutmix of a batch without labels; randaugment of other than 1 or 3 channels.
    """
    strengths = {"shift": shift, "rotate": rotate, "scale": scale, "shear": shear, "warp": warp, "flip": flip}
    strengths |= {"crop": crop, "cutout": cutout, "mixup": mixup, "cutmix": cutmix, "randaugment": randaugment}
    for name, value in {**strengths, "randaugment_magnitude": randaugment_magnitude}.items():
        if not 0 <= value < float("inf"):
            raise UsageError(f"augmentation {name}={value} must be a number from 0 (off) upwards")
        if name in ("crop", "cutout", "randaugment") and value != int(value):
            raise UsageError(f"augmentation {name}={value} must be a whole number")
    if scale >= 1:
        raise UsageError(f"augmentation scale={scale} must be below 1: images are magnified by a factor in 1 ± scale")
    if randaugment_magnitude > GREATEST:
        raise UsageError(f"augmentation randaugment_magnitude={randaugment_magnitude} must be at most {GREATEST}")

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
        if randaugment:
            operations_key_B = jax.vmap(jax.random.fold_in, (0, None))(key_B, OPERATIONS_STREAM)
            image_BHWC = randaugmented(image_BHWC, operations_key_B, randaugment, magnitude=randaugment_magnitude)
        if cutout:
            y_B, x_B = jnp.floor(u["cutout_y"] * height), jnp.floor(u["cutout_x"] * width)
            hole_BHWC = inside(height, y_B, cutout)[:, :, None, None] & inside(width, x_B, cutout)[:, None, :, None]
            image_BHWC = jnp.where(hole_BHWC, 0, image_BHWC)
        batch = batch | {"image": image_BHWC}
        return mixed(batch, key, key_B, mixup=mixup, cutmix=cutmix) if mixup or cutmix else batch

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


def _crop(image_BHWC: Array, top_B: Array, left_B: Array, *, pad: int) -> Array:
    padded_BHWC = jnp.pad(image_BHWC, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    cut = lambda image, top, left: jax.lax.dynamic_slice(image, (top, left, 0), image_BHWC.shape[1:])  # noqa: E731
    return jax.vmap(cut)(padded_BHWC, top_B, left_B)


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
    flip: bool = False  # left-right, half of the images
    crop: Annotated[int, NonNegative] = 0  # padded by so many pixels and cropped back
    cutout: Annotated[int, NonNegative] = 0  # pixels a side of a square that is set to 0
    randaugment: Annotated[int, NonNegative] = 0  # operations an image, of the 14 of RandAugment
    randaugment_magnitude: Annotated[float, NonNegative] = 9.0  # their strength, 0 to 10
    mixup: Annotated[float, NonNegative] = 0.0  # mixed with another by a share of Beta(mixup, mixup); 0: not
    cutmix: Annotated[float, NonNegative] = 0.0  # a box of another, its share of Beta(cutmix, cutmix); 0: none

    def function(self) -> Augment | None:
        strengths = asdict(self)
        return augment_images(**strengths) if strengths.pop("augment") else None
