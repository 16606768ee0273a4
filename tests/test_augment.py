"""Augmentation: B batch, H height, W width, C channels."""

from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import run_with_devices
from PIL import Image, ImageEnhance, ImageOps

from bigjax import UsageError, sharding
from bigjax.data import randaugment
from bigjax.data.augment import Augmentation, affine, augment_images, drop_tokens
from bigjax.tools import hlo

B, H, W = 8, 12, 12
ALL = dict(shift=2.0, rotate=20.0, scale=0.2, shear=0.2, flip=True, crop=2, cutout=4)


def batch_of(rows: np.ndarray | None = None, channels: int = 1) -> dict:
    image = jax.random.uniform(jax.random.key(9), (64, H, W, channels))
    rows = np.arange(B) if rows is None else rows
    return {"image": image[rows], "label": jnp.asarray(rows % 10, jnp.int32), "index": jnp.asarray(rows, jnp.int32)}


def still(batch: int = B, **changed) -> dict:
    zeros = jnp.zeros(batch)
    return dict(shift_B2=jnp.zeros((batch, 2)), degrees_B=zeros, scale_B=zeros + 1, shear_B=zeros) | changed


KEY = jax.random.key(0)


def test_zero_strength_is_identity() -> None:
    batch = batch_of()
    assert augment_images()(batch, KEY) is batch
    chex.assert_trees_all_close(affine(batch["image"], **still()), batch["image"], atol=1e-6)


@pytest.mark.parametrize(("down", "right"), [(1, 0), (0, 2), (-3, 1), (20, 0), (0, -30)])
def test_whole_shifts_equal_roll_with_zeros(down: int, right: int) -> None:
    image = np.asarray(batch_of(channels=3)["image"])
    expected = np.roll(np.pad(image, ((0, 0), (40, 40), (40, 40), (0, 0))), (down, right), (1, 2))[:, 40:-40, 40:-40]
    moved = affine(image, **still(shift_B2=jnp.tile(jnp.array([[down, right]], jnp.float32), (B, 1))))
    chex.assert_trees_all_close(moved, expected, atol=1e-6)


@pytest.mark.parametrize("quarters", [1, 2, 3, -1])
@pytest.mark.parametrize("size", [11, 12])
def test_quarter_turns_equal_rot90(quarters: int, size: int) -> None:
    image = batch_of(channels=3)["image"][:, :size, :size]
    turned = affine(image, **still(degrees_B=jnp.full(B, 90.0 * quarters)))
    chex.assert_trees_all_close(turned, np.rot90(np.asarray(image), quarters, (1, 2)), atol=1e-4)


def test_scale_magnifies_and_shear_moves_rows() -> None:
    dot = jnp.zeros((1, 11, 11, 1)).at[0, 5, 7].set(1.0).at[0, 3, 5].set(0.5)
    bigger = affine(dot, **still(1, scale_B=jnp.array([2.0])))
    assert bigger[0, 5, 9, 0] == 1 and bigger[0, 1, 5, 0] == 0.5  # twice as far from the centre (5, 5)
    sheared = affine(dot, **still(1, shear_B=jnp.array([1.0])))
    assert sheared[0, 5, 7, 0] == 1 and sheared[0, 3, 3, 0] == 0.5  # two rows above the centre: two pixels to the left


def test_half_a_pixel_is_the_mean_of_neighbours() -> None:
    image = batch_of()["image"]
    moved = affine(image, **still(shift_B2=jnp.tile(jnp.array([[0.0, 0.5]]), (B, 1))))
    chex.assert_trees_all_close(moved[:, :, 1:], (image[:, :, 1:] + image[:, :, :-1]) / 2, atol=1e-6)
    chex.assert_trees_all_close(moved[:, :, 0], image[:, :, 0] / 2, atol=1e-6)  # beside it is the outside


@pytest.mark.parametrize("name", [*ALL, "all"])
def test_by_key_and_index_alone(name: str) -> None:
    augment = jax.jit(augment_images(**(ALL if name == "all" else {name: ALL[name]})))
    order = np.array([5, 2, 7, 0, 1, 3, 6, 4])
    a, b = augment(batch_of(), KEY)["image"], augment(batch_of(order), KEY)["image"]
    chex.assert_shape(a, (B, H, W, 1))
    np.testing.assert_array_equal(a[order], b)
    np.testing.assert_array_equal(a[:4], augment(batch_of(np.arange(4)), KEY)["image"])  # a microbatch
    others = [augment(batch_of(), jax.random.key(k))["image"] for k in (1, 2)]
    assert not np.array_equal(a, others[0]) or not np.array_equal(a, others[1])
    assert not np.array_equal(a, batch_of()["image"])


def test_rows_draw_differently() -> None:
    same = {"image": jnp.tile(batch_of()["image"][:1], (B, 1, 1, 1)), "index": jnp.arange(B)}
    out = np.asarray(augment_images(rotate=30.0)(same, KEY)["image"])
    assert len({row.tobytes() for row in out}) == B


def test_what_one_draws_does_not_depend_on_the_others() -> None:
    crop = augment_images(crop=2)(batch_of(), KEY)
    both = augment_images(crop=2, flip=True)(batch_of(), KEY)["image"]
    flipped = augment_images(flip=True)(batch_of(), KEY)["image"]
    turned = np.asarray((flipped == batch_of()["image"]).all((1, 2, 3)))  # which rows stayed
    np.testing.assert_array_equal(both[turned], crop["image"][turned])


def test_under_vmap_and_grad() -> None:
    augment = augment_images(**ALL)
    keys = jax.random.split(KEY, 3)
    many = jax.jit(jax.vmap(lambda k: augment(batch_of(), k)["image"]))(keys)
    for key, image in zip(keys, many, strict=True):
        chex.assert_trees_all_close(augment(batch_of(), key)["image"], image, atol=1e-6)
    slope = jax.grad(lambda image: augment(batch_of() | {"image": image}, KEY)["image"].sum())(batch_of()["image"])
    chex.assert_tree_all_finite(slope)


def test_range_and_dtype_stay() -> None:
    for dtype in (jnp.float32, jnp.bfloat16):
        batch = batch_of() | {"image": jnp.ones((B, H, W, 1), dtype)}
        out = jax.jit(augment_images(**ALL, mixup=0.5, cutmix=0.5, randaugment=2))(batch, KEY)["image"]
        assert out.dtype == dtype and out.min() >= 0 and out.max() <= 1 + 1e-6


def test_flip_turns_about_half() -> None:
    rows = np.arange(64)
    image = np.asarray(batch_of(rows)["image"])
    out = np.asarray(augment_images(flip=True)(batch_of(rows), KEY)["image"])
    turned = np.array([np.array_equal(o, i[:, ::-1]) for o, i in zip(out, image, strict=True)])
    kept = np.array([np.array_equal(o, i) for o, i in zip(out, image, strict=True)])
    assert (turned ^ kept).all() and 16 < turned.sum() < 48


def test_crop_shifts_by_whole_pixels_up_to_its_size() -> None:
    rows = np.arange(64)
    image = np.asarray(batch_of(rows)["image"])
    padded = np.pad(image, ((0, 0), (2, 2), (2, 2), (0, 0)))
    seen = set()
    for i, out in enumerate(np.asarray(augment_images(crop=2)(batch_of(rows), KEY)["image"])):
        found = [(y, x) for y in range(5) for x in range(5) if np.array_equal(padded[i, y : y + H, x : x + W], out)]
        assert len(found) == 1
        seen |= set(found)
    assert {y for y, _ in seen} == {x for _, x in seen} == set(range(5))


def test_cutout_is_one_square_clipped_at_the_border() -> None:
    rows = np.arange(64)
    ones = batch_of(rows) | {"image": jnp.ones((64, H, W, 3))}
    holes = np.asarray(augment_images(cutout=4)(ones, KEY)["image"]) == 0
    for hole in holes:
        assert (hole == hole[..., :1]).all()
        y, x = np.flatnonzero(hole[..., 0].any(1)), np.flatnonzero(hole[..., 0].any(0))
        assert hole[..., 0].sum() == len(y) * len(x) and 2 <= len(y) <= 4 and 2 <= len(x) <= 4
        assert len(y) == y[-1] - y[0] + 1 and (len(y) == 4 or y[0] == 0 or y[-1] == H - 1)
    assert (holes[..., 0].sum((1, 2)) == 16).any()


def test_mixup_mixes_images_and_says_with_what() -> None:
    batch = batch_of()
    out = jax.jit(augment_images(mixup=0.4))(batch, KEY)
    chex.assert_shape([out["mix"], out["label_mix"]], (B,))
    assert out["label_mix"].dtype == jnp.int32 and out["mix"].dtype == jnp.float32
    partner = np.roll(np.arange(B), -1)
    np.testing.assert_array_equal(out["label_mix"], partner)  # labels are the rows here
    mix = np.asarray(out["mix"])[:, None, None, None]
    image = np.asarray(batch["image"])
    chex.assert_trees_all_close(out["image"], mix * image + (1 - mix) * image[partner], atol=1e-6)
    np.testing.assert_array_equal(out["label"], batch["label"])
    order = np.array([5, 2, 7, 0, 1, 3, 6, 4])
    shuffled = augment_images(mixup=0.4)(batch_of(order), KEY)
    chex.assert_trees_all_close(shuffled["mix"], out["mix"][order], atol=1e-6)
    np.testing.assert_array_equal(shuffled["label_mix"], np.roll(order, -1))


def in_eight() -> None:
    """Runs in another process, with 8 virtual devices."""
    batch = batch_of(np.arange(64))
    augment = jax.jit(augment_images(mixup=0.4, cutmix=1.0, randaugment=1))
    alone = augment(batch, KEY)
    for axes in (dict(data=8), dict(data=2, fsdp=2, tensor=2)):
        mesh = sharding.make_mesh(sharding.MeshConfig(**axes), batch_size=64)
        placed = jax.device_put(batch, sharding.batch_sharding(mesh))
        compiled = augment.lower(placed, KEY).compile()
        for name, value in compiled(placed, KEY).items():
            np.testing.assert_allclose(value, alone[name], atol=1e-6)
        found = hlo.collectives(hlo.parse(compiled.as_text()), mesh)
        one_row = H * W * 4
        assert {c.kind for c in found} == {"collective-permute"} and max(c.bytes for c in found) == one_row, found


def test_mixup_sends_edge_rows_only(tmp_path: Path) -> None:
    run_with_devices("import conftest, test_augment; test_augment.in_eight()", folder=tmp_path)


def test_mixup_weights_follow_beta() -> None:
    rows = np.arange(4096)
    batch = {"image": jnp.zeros((4096, 1, 1, 1)), "label": jnp.zeros(4096, jnp.int32), "index": jnp.asarray(rows)}
    mix = np.asarray(augment_images(mixup=0.5)(batch, KEY)["mix"])
    assert abs(mix.mean() - 0.5) < 0.03 and abs(mix.var() - 0.125) < 0.01  # of Beta(a, a): 1 / (4 (2 a + 1))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (dict(rotate=-3.0), r"rotate=-3.0 must be a number from 0 \(off\) upwards"),
        (dict(shift=float("nan")), "shift=nan must be a number"),
        (dict(scale=1.0), "scale=1.0 must be below 1"),
        (dict(crop=2.5), "crop=2.5 must be a whole number"),
        (dict(randaugment=1.5), "randaugment=1.5 must be a whole number"),
        (dict(randaugment_magnitude=-1.0), r"randaugment_magnitude=-1.0 must be a number from 0 \(off\) upwards"),
        (dict(randaugment_magnitude=11.0), "randaugment_magnitude=11.0 must be at most 10"),
    ],
)
def test_senseless_strengths_are_refused(options: dict, text: str) -> None:
    with pytest.raises(UsageError, match=text):
        augment_images(**options)


def test_wrong_batches_are_refused() -> None:
    with pytest.raises(UsageError, match="mixup mixes labels, and this data has none"):
        augment_images(mixup=1.0)({k: v for k, v in batch_of().items() if k != "label"}, KEY)
    with pytest.raises(UsageError, match="cutmix mixes labels, and this data has none: pass cutmix=0"):
        augment_images(cutmix=1.0)({k: v for k, v in batch_of().items() if k != "label"}, KEY)
    with pytest.raises(UsageError, match="images of 1 or 3 channels, and these have 4"):
        augment_images(randaugment=1)(batch_of(channels=4), KEY)
    with pytest.raises(TypeError, match="float images"):
        augment_images(flip=True)(batch_of() | {"image": jnp.zeros((B, H, W, 1), jnp.uint8)}, KEY)


def test_drop_tokens_leaves_padding_and_is_keyed_by_row() -> None:
    tokens_BL = np.tile(np.array([5] * 400 + [0] * 20, np.int32), (3, 1))
    batch = {"tokens": jnp.asarray(tokens_BL), "index": jnp.arange(3)}
    out_BL = np.asarray(drop_tokens(0.25)(batch, jax.random.key(0))["tokens"])
    assert (out_BL[:, 400:] == 0).all() and set(np.unique(out_BL[:, :400])) == {1, 5}
    assert 0.15 < (out_BL[:, :400] == 1).mean() < 0.35
    assert (out_BL[0] != out_BL[1]).any()
    turned = {"tokens": batch["tokens"][::-1], "index": batch["index"][::-1]}
    np.testing.assert_array_equal(drop_tokens(0.25)(turned, jax.random.key(0))["tokens"], out_BL[::-1])


def test_warp_looks_up_where_its_field_says() -> None:
    random = np.random.default_rng(0)
    image = jnp.asarray(random.random((2, 9, 9, 1)), jnp.float32)
    field = jnp.asarray(random.normal(size=(2, 2, 9, 9)), jnp.float32)
    none = jnp.zeros(2)
    out = affine(image, shift_B2=jnp.zeros((2, 2)), degrees_B=none, scale_B=none + 1, shear_B=none, warp_B2HW=field)
    place = jnp.stack(jnp.meshgrid(jnp.arange(9.0), jnp.arange(9.0), indexing="ij"))
    for i in range(2):
        expected = jax.scipy.ndimage.map_coordinates(image[i, ..., 0], place + field[i], order=1, mode="constant")
        np.testing.assert_allclose(out[i, ..., 0], expected, atol=1e-5)


def test_warp_differs_by_row_and_keeps_the_range() -> None:
    image = jnp.tile(jnp.asarray(np.random.default_rng(0).random((1, 12, 12, 1)), jnp.float32), (2, 1, 1, 1))
    out = augment_images(warp=1.0)({"image": image, "index": jnp.arange(2)}, jax.random.key(0))["image"]
    chex.assert_shape(out, (2, 12, 12, 1))
    assert jnp.abs(out[0] - out[1]).max() > 0.1 and jnp.abs(out[0] - image[0]).max() > 0.1
    assert out.min() >= 0 and out.max() <= 1


def test_augmentation_as_flags() -> None:
    strengths = dict(rotate=20.0, shift=2.0, scale=0.2, shear=0.3, warp=0.4, flip=True, crop=1, cutout=3)
    strengths |= dict(mixup=0.2, cutmix=1.0, randaugment=1, randaugment_magnitude=4.0)
    ours, expected = Augmentation(**strengths).function(), augment_images(**strengths)
    assert str(jax.make_jaxpr(ours)(batch_of(), KEY)) == str(jax.make_jaxpr(expected)(batch_of(), KEY))
    assert Augmentation(**strengths, augment=False).function() is None


# ---- cutmix


def test_cutmix_puts_a_box_of_the_next_row_and_says_its_share() -> None:
    rows = np.arange(64)
    batch = batch_of(rows) | {"image": jnp.asarray(np.broadcast_to(rows[:, None, None, None] / 64.0, (64, H, W, 1)))}
    augment = jax.jit(augment_images(cutmix=1.0))
    out, partner = augment(batch, KEY), np.roll(rows, -1)
    np.testing.assert_array_equal(out["label_mix"], partner % 10)
    share = []
    for row, image in enumerate(np.asarray(out["image"])[..., 0]):
        box = image == np.float32(partner[row] / 64)
        assert (box | (image == np.float32(row / 64))).all()
        y, x = np.flatnonzero(box.any(1)), np.flatnonzero(box.any(0))
        assert box.sum() == len(y) * len(x) and (not len(y) or (np.ptp(y) < len(y) and np.ptp(x) < len(x)))
        np.testing.assert_allclose(out["mix"][row], 1 - box.mean(), atol=1e-6)
        share.append(box.mean())
    assert min(share) < 0.1 and max(share) > 0.6 and 0.2 < np.mean(share) < 0.5  # uniform, but for what is clipped
    order = np.random.default_rng(0).permutation(64)
    shuffled = augment({k: v[order] for k, v in batch.items()}, KEY)
    np.testing.assert_array_equal(shuffled["mix"], out["mix"][order])


def test_of_mixup_and_cutmix_the_key_chooses_one_for_the_batch() -> None:
    ways = [augment_images(mixup=a, cutmix=b) for a, b in ((0.4, 0.0), (0.0, 1.0), (0.4, 1.0))]
    three = jax.jit(jax.vmap(lambda batch, key: [way(batch, key) for way in ways], (None, 0)))
    mixed, cut, either = three(batch_of(), jax.random.split(KEY, 40))
    cuts = np.array([bool((a == b).all()) for a, b in zip(either["mix"], cut["mix"], strict=True)])
    assert 10 < cuts.sum() < 30
    for name in ("image", "mix", "label_mix"):
        expected = np.where(cuts.reshape(-1, *[1] * (either[name].ndim - 1)), cut[name], mixed[name])
        chex.assert_trees_all_close(either[name], expected, atol=1e-6)


# ---- RandAugment


def pillow(name: str, image: Image.Image, share: float) -> Image.Image:
    """The operation as AutoAugment's published code has it in Pillow; share: ± of the greatest magnitude."""
    width, height = image.size
    smooth, fine = Image.Resampling.BILINEAR, Image.Transform.AFFINE
    down, right = (round(randaugment.TRANSLATE * share * n) for n in (height, width))
    enhancers = {"color": "Color", "contrast": "Contrast", "brightness": "Brightness", "sharpness": "Sharpness"}
    match name:
        case "identity":
            return image
        case "autocontrast" | "equalize":
            return getattr(ImageOps, name)(image)
        case "solarize":
            return ImageOps.solarize(image, round(256 * (1 - abs(share))))
        case "posterize":
            return ImageOps.posterize(image, 8 - round(4 * abs(share)))
        case "rotate":
            return image.rotate(30 * share, smooth)
        case "shear_x":
            return image.transform(image.size, fine, (1, 0.3 * share, 0, 0, 1, 0), smooth)
        case "shear_y":
            return image.transform(image.size, fine, (1, 0, 0, 0.3 * share, 1, 0), smooth)
        case "translate_x":
            return image.transform(image.size, fine, (1, 0, -right, 0, 1, 0), smooth)
        case "translate_y":
            return image.transform(image.size, fine, (1, 0, 0, 0, 1, -down), smooth)
    return getattr(ImageEnhance, enhancers[name])(image).enhance(1 + 0.9 * share)


EXACT = {"identity", "equalize", "solarize", "posterize", "translate_x", "translate_y"}
MOVED = {"rotate", "shear_x", "shear_y"}  # Pillow repeats the border where we have the 0 outside: compared within
PICTURES = np.random.default_rng(3).integers(0, 256, (2, 4, 5, 3)).astype(np.uint8)


@pytest.fixture(scope="module")
def pictures() -> np.ndarray:
    """Smooth images with a narrow range in one channel, and one with few levels: (2, 40, 50, 3)."""
    wide = [np.asarray(Image.fromarray(p).resize((50, 40), Image.Resampling.BICUBIC)) for p in PICTURES]
    wide[0] = np.stack([wide[0][..., 0] // 3 + 60, wide[0][..., 1], wide[0][..., 2]], axis=-1)
    wide[1] = wide[1] // 64 * 64
    return np.stack(wide).astype(np.uint8)


@pytest.mark.parametrize(("channels", "share"), [(3, 0.9), (3, -0.5), (1, 0.5)])
def test_operations_are_pillows(channels: int, share: float, pictures: np.ndarray) -> None:
    """To 1.5 levels of 256 where Pillow truncates, also what it blends with; else exactly."""
    images = pictures[..., :channels]
    given = jnp.tile(jnp.asarray(images, jnp.float32) / 255, (14, 1, 1, 1))
    run = jax.jit(lambda x, o, s: randaugment.operated(x, o, s, magnitude=10 * abs(share)))
    out = 255 * np.asarray(run(given, jnp.repeat(jnp.arange(14), 2), jnp.full(28, np.sign(share))))
    for name, ours in zip(randaugment.OPERATIONS, out.reshape(14, 2, *images.shape[1:]), strict=True):
        for image, one in zip(images, ours, strict=True):
            theirs = pillow(name, Image.fromarray(image if channels == 3 else image[..., 0]), share)
            wrong = np.abs(one - np.asarray(theirs).reshape(image.shape))
            if name in MOVED:
                wrong = wrong[within(np.asarray(pillow(name, Image.new("L", (50, 40), 255), share)) == 255)]
            assert wrong.max() <= (1e-3 if name in EXACT else 1.5), f"{name}: {wrong.max()} levels"
        did = np.abs(ours - images).max() > 2
        assert did == (name != "identity" and (name, channels) != ("color", 1)), f"{name} did {did}"


def within(inside_HW: np.ndarray) -> np.ndarray:
    """Without what has something outside beside it."""
    padded = np.pad(inside_HW, 1)
    height, width = inside_HW.shape
    return np.all([padded[y : y + height, x : x + width] for y in range(3) for x in range(3)], axis=0)


def test_tables_are_the_same_by_products_as_one_by_one() -> None:
    random = np.random.default_rng(0)
    level_MN, table_MV = random.integers(0, 256, (3, 500)), random.integers(0, 256, (3, 256))
    counted = np.stack([np.bincount(row, minlength=256) for row in level_MN])
    read = np.take_along_axis(table_MV, level_MN, axis=1)
    for count, look in (
        (randaugment.counted_by_products, randaugment.read_by_products),
        (randaugment.counted_one_by_one, randaugment.read_one_by_one),
    ):
        np.testing.assert_array_equal(count(jnp.asarray(level_MN)), counted)
        np.testing.assert_array_equal(look(jnp.asarray(table_MV), jnp.asarray(level_MN)), read)


def test_randaugment_draws_each_operation_anew_and_evenly() -> None:
    """The two operations of 700 images, written down in them as one number."""
    keys = jax.vmap(jax.random.fold_in, (None, 0))(KEY, jnp.arange(700))

    def write(image: jax.Array, operation_B: jax.Array, sign_B: jax.Array, magnitude: float) -> jax.Array:
        new = [v.astype(jnp.float32) for v in (operation_B, sign_B > 0, sign_B)]
        noted = image[:, 0, 0] * jnp.array([[14.0, 2.0, 1.0]]) + jnp.stack(new, axis=-1)
        return image.at[:, 0, 0].set(noted)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(randaugment, "operated", write)
        noted = randaugment.randaugmented(jnp.zeros((700, 1, 1, 3)), keys, 2, magnitude=5.0)
    first, second = np.divmod(np.asarray(noted)[:, 0, 0, 0].astype(int), 14)
    for drawn in (first, second):
        assert (np.abs(np.bincount(drawn, minlength=14) - 50) < 25).all()
    assert abs((first == second).mean() - 1 / 14) < 0.04
    assert (np.abs(np.bincount(np.asarray(noted)[:, 0, 0, 1].astype(int)) - 175) < 50).all()


def test_randaugment_keeps_rows_apart() -> None:
    rows, order = np.arange(32), np.random.default_rng(0).permutation(32)
    augment = jax.jit(augment_images(randaugment=2))
    out = np.asarray(augment(batch_of(rows, channels=3), KEY)["image"])
    chex.assert_trees_all_close(augment(batch_of(order, channels=3), KEY)["image"], out[order], atol=1e-6)
    changed = np.abs(out - batch_of(rows, channels=3)["image"]).max((1, 2, 3)) > 0.01
    assert changed.sum() > 24
