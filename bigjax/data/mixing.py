"""Images mixed with others of their batch: mixup, cutmix.

Shapes: B batch, H height, W width, C channels.
"""

import jax
import jax.numpy as jnp
from jax import Array

from bigjax import UsageError

Batch = dict[str, Array]
MIX_STREAM, BOX_STREAM, CHOICE_STREAM = 11, 14, 15  # folded into a key: what draws what


def mixed(batch: Batch, key: Array, key_B: Array, *, mixup: float, cutmix: float) -> Batch:
    """Each `image` (B,H,W,C) mixed with that of the next row of the batch, whose order is random already.

    mixup: λ·image + (1 − λ)·partner's, λ ~ Beta(mixup, mixup) (Zhang et al. 2018).
    cutmix: a box of the partner's in place of the image's, of the share 1 − λ, λ ~ Beta(cutmix, cutmix), around any
        pixel and clipped at the border (Yun et al. 2019). With both on, `key` decides for the batch, each half of them.
    key_B: of the rows. Of a batch over several devices only the rows at their edges travel. Give it the whole batch,
    not a microbatch. It adds `label_mix` (B,) int32, the partner's label, and `mix` (B,) float32, the image's own share
    of the pixels. UsageError: no labels.
    """
    if "label" not in batch:
        name = "mixup" if mixup else "cutmix"
        raise UsageError(f"{name} mixes labels, and this data has none: pass {name}=0")
    image_BHWC = batch["image"]
    other_BHWC, label_mix_B = jnp.roll(image_BHWC, -1, axis=0), jnp.roll(batch["label"], -1)
    if mixup:
        mix_B = jax.vmap(lambda k: jax.random.beta(jax.random.fold_in(k, MIX_STREAM), mixup, mixup))(key_B)
        own = mix_B[:, None, None, None].astype(image_BHWC.dtype)
        out_BHWC = own * image_BHWC + (1 - own) * other_BHWC
    if cutmix:
        box_BHW = boxes(key_B, *image_BHWC.shape[1:3], cutmix)
        cut_BHWC, left_B = jnp.where(box_BHW[..., None], other_BHWC, image_BHWC), 1 - box_BHW.mean((1, 2))
        if mixup:
            cuts = jax.random.bernoulli(jax.random.fold_in(jax.random.fold_in(key, 0), CHOICE_STREAM))
            cut_BHWC, left_B = jnp.where(cuts, cut_BHWC, out_BHWC), jnp.where(cuts, left_B, mix_B)
        out_BHWC, mix_B = cut_BHWC, left_B
    return batch | {"image": out_BHWC, "label_mix": label_mix_B, "mix": mix_B.astype(jnp.float32)}


def boxes(key_B: Array, height: int, width: int, strength: float) -> Array:
    """(B,H,W): which pixels lie in the box of each row."""

    def draw(key: Array) -> tuple[Array, Array]:
        share_key, place_key = jax.random.split(jax.random.fold_in(key, BOX_STREAM))
        return 1 - jax.random.beta(share_key, strength, strength), jax.random.uniform(place_key, (2,))

    share_B, u_B2 = jax.vmap(draw)(key_B)
    y_B, x_B = jnp.floor(u_B2[:, 0] * height), jnp.floor(u_B2[:, 1] * width)
    high_B1, wide_B1 = (jnp.floor(n * jnp.sqrt(share_B))[:, None] for n in (height, width))
    return inside(height, y_B, high_B1)[:, :, None] & inside(width, x_B, wide_B1)[:, None, :]


def inside(size: int, centre_B: Array, side: int | Array) -> Array:
    """(B, size): which places are in the span of `side`, a number or (B, 1), around the centre."""
    from_start = jnp.arange(size).astype(jnp.float32)[None] - (centre_B[:, None] - side // 2)
    return (from_start >= 0) & (from_start < side)
