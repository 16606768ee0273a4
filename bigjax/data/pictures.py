"""A user's own pictures, a folder with a sub-folder a class; and images made equal in size.

Shapes: N examples, H height, W width, C channels.
"""

import io
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from etils import epath

from bigjax import UsageError
from bigjax.data.files import THREADS, few, stray
from bigjax.data.pipeline import Dataset, Named
from bigjax.data.readers import Mapped
from bigjax.experiment import Split

NO_CLASSES = ("__MACOSX", "@eaDir", "__pycache__")  # folders that archives and machines leave behind
KINDS = "pictures have 1, 3 or 4 channels of 8 bits or 1 of 16 bits"


def folder_of_images(path: epath.Path, *, background: str = "white", resize: int | None = None) -> Dataset:
    """`image` (N,H,W,C) uint8, C of 1 where all are grey, else 3, and `label`: the places of the sub-folders' names.

    Pictures are turned as their EXIF data say; what is transparent shows `background`, any colour by name or #rrggbb;
    16 bits become 8; `resize` as in `resized`. What is no picture is left out, and counted in a note.
    """
    from PIL import ImageColor

    try:
        behind = ImageColor.getrgb(background)[:3]
    except ValueError as e:
        raise UsageError(f"background {background!r} is no colour: give a name, as white, or #rrggbb") from e
    seen = [p for p in sorted(path.iterdir(), key=lambda p: p.name) if not _hidden(p)]
    folders = [p for p in seen if p.is_dir()]
    files, others = [], [p.name for p in seen if not p.is_dir()]
    for folder in folders:
        inside = [p for p in sorted(folder.iterdir(), key=lambda p: p.name) if not _hidden(p)]
        deeper = next((p for p in inside if p.is_dir()), None)
        if deeper is not None:
            raise UsageError(_hollow(folder, path, f"a folder, {deeper.name}"))
        files += inside
    if not folders:
        raise UsageError(f"{path} has no sub-folders: put the images of each class into a sub-folder named after it")
    for file in [*folders, *files]:
        if wrong := stray(file.name):
            shown = str(file).encode(errors="backslashreplace").decode()
            raise UsageError(f"the name of {shown} is not UTF-8 ({wrong}): rename it")

    def image(file: epath.Path) -> Any:
        try:
            return _image(file, behind, resize)
        except UsageError as e:  # all of them are told at once
            return e

    with ThreadPoolExecutor(THREADS) as pool:
        read = list(zip(files, pool.map(image, files), strict=True))
    wrong = {f"{p.parent.name}/{p.name}": str(e) for p, e in read if isinstance(e, UsageError)}
    others += [f"{p.parent.name}/{p.name}" for p, image in read if image is None]
    kept = [(p, image) for p, image in read if isinstance(image, np.ndarray)]
    filled = {p.parent.name for p, image in read if image is not None}
    wrong |= {p.name: _hollow(p, path) for p in folders if p.name not in filled}
    if wrong:
        (_, said), *more = wrong.items()
        raise UsageError(said + (f"; so must {len(more)} more: {few([name for name, _ in more])}" if more else ""))
    (first, image0), *_ = kept
    for file, image in kept:
        if image.shape[:2] != image0.shape[:2]:
            (h, w), (h0, w0) = image.shape[:2], image0.shape[:2]
            raise UsageError(
                f"images differ in size: {first} is {w0}×{h0}, {file} is {w}×{h} pixels: make them equal, by "
                "--resize N or by cropping"
            )
    channels = max(image.shape[2] for _, image in kept)  # grey images among coloured ones become coloured
    image_NHWC = np.stack([np.broadcast_to(image, (*image.shape[:2], channels)) for _, image in kept])
    names = tuple(p.name for p in folders)
    label_N = np.array([names.index(p.parent.name) for p, _ in kept], np.int32)
    inside = np.array([f"{p.parent.name}/{p.name}" for p, _ in kept])
    notes = (f"{path}: left out {len(others)} files that are no pictures of a class: {few(others)}",) if others else ()
    split = Named({"image": image_NHWC, "label": label_N}, inside)
    return Dataset(split, classes=len(names), class_names=names, notes=notes)


def _hollow(folder: epath.Path, path: epath.Path, what: str = "no image files") -> str:
    return f"{folder} holds {what}: each sub-folder of {path} must be a class with its images in it"


def _hidden(path: epath.Path) -> bool:
    return path.name.startswith(".") or path.name in NO_CLASSES


def _image(path: epath.Path, behind: tuple[int, ...], resize: int | None) -> np.ndarray | None:
    """(H,W,C) uint8, C of 1 or 3; None for what is no picture, neither by its content nor by its name."""
    from PIL import Image, ImageOps

    try:
        with path.open("rb") as file, Image.open(file) as image:
            pixels_HWC = _pixels(path, ImageOps.exif_transpose(image), behind)
            return pixels_HWC if resize is None else resized(pixels_HWC, resize)
    except UsageError:
        raise
    except Exception as e:  # Pillow raises whatever a damaged file leads to
        if Image.registered_extensions().get(path.suffix.lower()) not in Image.OPEN:
            return None
        why = f"{type(e).__name__}: {e}"
        if isinstance(e, Image.UnidentifiedImageError):
            why = f"damaged, or of a kind that is not read: {KINDS}"
        raise UsageError(f"{path} is not a readable image ({why}): repair, convert or remove it") from e


def _pixels(path: epath.Path, image: Any, behind: tuple[int, ...]) -> np.ndarray:
    from PIL import Image

    if (deep_HWC := _eight_bits(path, image)) is not None:
        return deep_HWC
    grey = image.mode in ("1", "L", "LA")
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, (*behind, 255)), image.convert("RGBA"))
        grey = grey and len(set(behind)) == 1
    return np.atleast_3d(np.asarray(image.convert("L" if grey else "RGB")))


def _eight_bits(where: object, image: Any) -> np.ndarray | None:
    """Of one channel of 16 bits, which is I;16 or I; None of an image with channels of 8 bits."""
    if not image.mode.startswith(("I", "F")):
        return None
    values_HW = np.asarray(image)
    if image.mode == "F" or values_HW.min() < 0 or values_HW.max() > 65535:
        kind = "floats" if image.mode == "F" else "integers"
        raise UsageError(
            f"{where} holds 32-bit {kind} from {values_HW.min():g} to {values_HW.max():g}, but {KINDS}: convert it"
        )
    return np.round(values_HW / 257).astype(np.uint8)[..., None]


def decoded(content: bytes, *, channels: int | None) -> np.ndarray:
    """The picture that a file of these bytes holds, (H,W,C) uint8 of so many channels; None: 1 where it is grey, or 3.

    As TensorFlow has it: not turned by EXIF data, and without what says where it is transparent unless there are 4.
    """
    from PIL import Image

    with Image.open(io.BytesIO(content)) as image:
        if (deep_HWC := _eight_bits("it", image)) is not None:
            return np.repeat(deep_HWC, channels or 1, axis=2)
        mode = {1: "L", 3: "RGB", 4: "RGBA"}[channels or (1 if image.mode in ("1", "L", "LA") else 3)]
        return np.atleast_3d(np.asarray(image.convert(mode)))


# ---- one size


def resized(image_HWC: np.ndarray, side: int) -> np.ndarray:
    """An image, uint8 or float32, in `side` × `side` pixels, whatever its shape was: bilinear, and smoothed where it
    shrinks, so that no value leaves the range.
    """
    from PIL import Image

    size, bilinear = (side, side), Image.Resampling.BILINEAR
    planes = (Image.fromarray(np.ascontiguousarray(image_HWC[..., c])) for c in range(image_HWC.shape[2]))
    return np.stack([np.asarray(plane.resize(size, bilinear)) for plane in planes], axis=-1)


def resize_split(split: Split, side: int) -> Split:
    """A split whose images are `side` × `side` pixels."""
    if not isinstance(split, Mapping):
        return Mapped(split, lambda example: {**example, "image": resized(example["image"], side)})
    with ThreadPoolExecutor(THREADS) as pool:
        image_NHWC = np.stack(list(pool.map(lambda image: resized(image, side), split["image"])))
    fields = {**split, "image": image_NHWC}
    return Named(fields, split.names) if isinstance(split, Named) else fields
