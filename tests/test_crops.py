"""Pictures of any size brought to one: H height, W width, C channels."""

import io
import itertools
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tfds_fixture import build_set

from bigjax import UsageError
from bigjax.data import pipeline, sources
from bigjax.data.crops import Crops, random_box
from bigjax.data.parts import Undecoded, cut
from bigjax.data.pictures import folder_of_images

RANDOM = np.random.default_rng(0)
CORNERS = {(0, 0): (255, 0, 0), (0, 1): (0, 255, 0), (1, 0): (0, 0, 255), (1, 1): (255, 255, 255)}  # by (down, right)
TAKES = ("image", "label")


def corners(height: int, width: int) -> np.ndarray:
    """(H,W,3): each quarter of a colour of its own."""
    image_HWC = np.zeros((height, width, 3), np.uint8)
    for (down, right), colour in CORNERS.items():
        image_HWC[down * height // 2 :, right * width // 2 :] = colour
    return image_HWC


def encoded(image_HWC: np.ndarray, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image_HWC[..., 0] if image_HWC.shape[2] == 1 else image_HWC).save(buffer, kind, **options)
    return buffer.getvalue()


def undecoded(content: bytes, seen: list | None = None, **options: object) -> Undecoded:
    """seen: gets the size of what was decoded."""

    def plain(image: Image.Image) -> Image.Image:
        image.load()
        (seen if seen is not None else []).append(image.size)
        return image

    return Undecoded(content, plain, wrong=lambda e: UsageError(f"torn: {type(e).__name__}"), **options)


def pixels(split: object, row: int) -> np.ndarray:
    return np.asarray(split[row]["image"])


# ---- which part


def test_boxes_are_of_all_areas_and_ratios_that_are_asked_for() -> None:
    random = np.random.default_rng(0)
    boxes = np.array([random_box(300, 400, random, area=0.08, ratio=4 / 3) for _ in range(3000)])
    top, left, high, wide = boxes.T
    assert (top >= 0).all() and (left >= 0).all() and (top + high <= 300).all() and (left + wide <= 400).all()
    area, ratio = high * wide / 120_000, wide / high
    assert 0.078 < area.min() < 0.09 and area.max() > 0.97 and abs(area[area < 0.4].mean() - 0.24) < 0.01  # evenly
    assert 0.74 < ratio.min() < 0.76 and 1.32 < ratio.max() < 1.35 and abs(np.log(ratio[area < 0.4]).mean()) < 0.02
    for size, start, whole in ((high, top, 300), (wide, left, 400)):
        place = (start / np.maximum(whole - size, 1))[size < whole - 20]
        assert place.min() < 0.01 and place.max() > 0.99 and abs(place.mean() - 0.5) < 0.03


@pytest.mark.parametrize(
    ("size", "box"),
    [((10, 1000), (0, 493, 10, 13)), ((1000, 10), (493, 0, 13, 10)), ((1, 1), (0, 0, 1, 1))],
)
def test_where_no_box_fits_it_is_the_centre(size: tuple[int, int], box: tuple[int, int, int, int]) -> None:
    assert random_box(*size, np.random.default_rng(0), area=0.9, ratio=4 / 3) == box


def test_evaluation_is_the_shorter_side_resized_and_the_centre_cut() -> None:
    smooth = Image.fromarray(RANDOM.integers(0, 256, (4, 5, 3)).astype(np.uint8)).resize((500, 375))
    expected = smooth.resize((341, 256), Image.Resampling.BILINEAR).crop((58, 16, 282, 240))
    out = Crops(side=224).centre(np.asarray(smooth))
    assert out.shape == (224, 224, 3) and out.dtype == np.uint8
    assert np.abs(out.astype(int) - np.asarray(expected)).max() <= 3


# ---- what is decoded of it


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize("corner", CORNERS)
def test_a_part_is_where_it_was_and_decoded_no_larger_than_it_must_be(kind: str, corner: tuple[int, int]) -> None:
    seen, (down, right) = [], corner
    picture = undecoded(encoded(corners(480, 640), kind), seen)
    box = (down * 240 + 10, right * 320 + 10, 220, 300)
    out = cut(picture, lambda height, width: box if (height, width) == (480, 640) else None, 50)
    assert out.shape == (50, 50, 3) and np.abs(out.astype(int) - CORNERS[corner]).max() <= 3
    assert seen == [(160, 120) if kind == "JPEG" else (640, 480)]  # 220 / 50: at a quarter
    assert np.asarray(picture).shape == (480, 640, 3)


def test_parts_of_arrays_are_those_of_pictures() -> None:
    image = RANDOM.integers(0, 256, (20, 30, 3)).astype(np.uint8)
    box = lambda height, width: (3, 4, 12, 9)  # noqa: E731
    out = cut(undecoded(encoded(image, "PNG")), box, 5)
    np.testing.assert_array_equal(cut(image, box, 5), out)
    floats = cut(image.astype(np.float32) / 255, box, 5)
    assert floats.dtype == np.float32 and np.abs(255 * floats - out).max() <= 1.01
    assert cut(image[..., :1], box, 5).shape == (5, 5, 1)
    with pytest.raises(UsageError, match="torn: OSError"):
        cut(undecoded(encoded(RANDOM.integers(0, 256, (99, 99, 3)).astype(np.uint8), "PNG")[:2000]), box, 5)


# ---- folders, TFDS sets, arrays


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Pictures of all sizes in two classes; one lies on its side, as its EXIF data say."""
    lying = Image.Exif()
    lying[0x0112] = 6
    for n in range(12):
        (tmp_path / "photos" / "ab"[n % 2]).mkdir(parents=True, exist_ok=True)
        name = tmp_path / "photos" / "ab"[n % 2] / f"{n}"
        image = corners(60 + 8 * n, 100 - 4 * n)
        if n == 0:
            upright = Image.fromarray(corners(90, 60)).transpose(Image.Transpose.ROTATE_90)
            name.with_suffix(".jpg").write_bytes(encoded(np.asarray(upright), "JPEG", exif=lying))
        else:
            name.with_suffix(".png").write_bytes(encoded(image[..., :1] if n == 1 else image, "PNG"))
    (tmp_path / "photos" / "a" / "notes.txt").write_text("no picture")
    return tmp_path / "photos"


def test_a_folder_of_pictures_of_all_sizes(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UsageError, match=r"images differ in size.*by --resize N or by cropping \(--side N"):
        sources.load(str(photos))
    capsys.readouterr()
    data, transform = Crops(side=16).load(str(photos), takes=TAKES)
    assert "left out 1 files" in capsys.readouterr().err
    assert data.class_names == ("a", "b") and data.shape("image") == (16, 16, 3)
    rest, held = pipeline.hold_out(data.train, fraction=0.2, split_seed=0)
    (batch,) = itertools.islice(pipeline.batches(rest, seed=1, batch_size=5, transform=transform), 1)
    assert batch["image"].shape == (5, 16, 16, 3) and batch["image"].dtype == np.uint8
    names = rest.names[batch["index"]]
    assert [name[0] == "b" for name in names] == list(batch["label"])
    plain = sources.load(str(photos), resize=16)  # the same rows are held out
    assert plain.test.names.tolist() == data.test.names.tolist()
    for split in (held, data.test):
        for judged in pipeline.eval_batches(split, batch_size=3):
            image = judged["image"][judged["mask"] > 0]
            assert image.shape[1:] == (16, 16, 3)
            grey = (split.names[judged["index"][judged["mask"] > 0]] == "b/1.png")[:, None]
            expected = np.where(grey, 0, CORNERS[0, 1])
            assert (np.abs(image[:, 1, 14].astype(int) - expected)[~grey[:, 0]] <= 40).all()
    sources.image_statistics(data.train)


@pytest.mark.parametrize("corner", CORNERS)
def test_a_picture_on_its_side_is_turned_before_it_is_cut(corner: tuple[int, int], photos: Path) -> None:
    files = folder_of_images(photos, undecoded=True).train
    ((row,),) = np.nonzero(files.names == "a/0.jpg")
    box = (corner[0] * 45 + 5, corner[1] * 30 + 5, 35, 20)
    out = cut(files[row]["image"], lambda height, width: box if (height, width) == (90, 60) else None, 8)
    assert np.abs(out.astype(int) - CORNERS[corner]).max() <= 40


def test_a_damaged_picture_is_named(photos: Path) -> None:
    path = photos / "a" / "2.png"
    path.write_bytes(encoded(RANDOM.integers(0, 256, (50, 50, 3)).astype(np.uint8), "PNG")[:3000])
    data, transform = Crops(side=8).load(str(photos), takes=TAKES)
    with pytest.raises(UsageError, match=r"photos/a/2.png is not a readable image \(OSError: .*repair, convert or rem"):
        for split in (data.train, data.test):
            for row in range(len(split)):
                transform(split[row], RANDOM)
                np.asarray(split[row]["image"])


def test_a_tfds_set_is_cut_where_it_is_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = [RANDOM.integers(0, 256, (20 + n, 40 - n, 3)).astype(np.uint8) for n in range(8)]
    rows = [{"image": image, "label": n % 2} for n, image in enumerate(images)]
    features = lambda f: {"image": f.Image(shape=(None, None, 3)), "label": f.ClassLabel(num_classes=2)}  # noqa: E731
    build_set(tmp_path, "sizes", "1.0.0", features, {"train": rows, "test": rows[:3]})
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    whole = sources.load("tfds:sizes")
    data, transform = Crops(side=8, crop_area=0.3).load("tfds:sizes", takes=TAKES)
    for row in range(8):
        image, draw = whole.train[row]["image"], np.random.default_rng(row)
        chosen = lambda height, width: random_box(height, width, draw, area=0.3, ratio=4 / 3)  # noqa: E731, B023
        np.testing.assert_array_equal(data.train[row]["image"].image, image)
        made = transform(data.train[row], np.random.default_rng(row))
        np.testing.assert_array_equal(made["image"], cut(image, chosen, 8))
        assert made["label"] == whole.train[row]["label"]
    np.testing.assert_array_equal(pixels(data.test, 1), Crops(side=8).centre(whole.test[1]["image"]))
    image = data.train[0]["image"].image
    broken = Undecoded(image.content[:9], image.plain, wrong=image.wrong)
    with pytest.raises(UsageError, match=r"sizes-train.*cannot be read \(Unidentified.*copy it there again"):
        cut(broken, lambda height, width: (0, 0, height, width), 8)


@pytest.fixture
def arrays(tmp_path: Path) -> str:
    """The path of 40 grey images, floats, each of one value."""
    image_NHWC = np.tile(np.arange(40, dtype=np.float32)[:, None, None, None] / 64, (1, 9, 8, 1))
    np.savez(tmp_path / "grey.npz", image=image_NHWC, label=np.arange(40) % 2)
    return str(tmp_path / "grey.npz")


def test_arrays_in_memory_are_cut_too(arrays: str) -> None:
    plain, (data, transform) = sources.load(arrays), Crops(side=6).load(arrays, takes=TAKES)
    (batch,) = itertools.islice(pipeline.batches(data.train, seed=0, batch_size=4, transform=transform), 1)
    (judged, *_) = pipeline.eval_batches(data.test, batch_size=2)
    for made, given in ((batch, plain.train), (judged, plain.test)):
        expected = np.broadcast_to(given["image"][made["index"], :6, :6], made["image"].shape)
        np.testing.assert_allclose(made["image"], expected, atol=1e-6)
        np.testing.assert_array_equal(made["label"], given["label"][made["index"]])
    np.testing.assert_array_equal(data.train.label, plain.train["label"])
    unchanged, none = Crops().load(arrays, takes=TAKES)
    assert none is None and isinstance(unchanged.train, dict)


# ---- what makes no sense


@pytest.mark.parametrize(
    ("crops", "name", "how", "said"),
    [
        (Crops(side=8, crop_area=1.5), "digits", {}, "--crop-area 1.5: give a share above 0, up to 1"),
        (Crops(side=8, crop_share=2.0), "digits", {}, "--crop-share 2: give a share above 0, up to 1"),
        (Crops(side=8, crop_ratio=0.5), "digits", {}, "--crop-ratio 0.5: give the longer side by the shorter, 1 or"),
        (Crops(side=8), "digits", {"resize": 9}, "--resize 9 and --side 8 both make images equal: leave one out"),
        (Crops(side=8), "x.csv", {}, "--side is for images, and x.csv holds x, target: leave it out"),
    ],
)
def test_what_makes_no_sense_is_refused(
    crops: Crops, name: str, how: dict, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("x.csv").write_text("a,target\n" + "".join(f"{n},{n / 2}\n" for n in range(20)))
    with pytest.raises(UsageError) as caught:
        crops.load(name, **how)
    assert str(caught.value).startswith(said)
