"""A user's own pictures, a folder with a sub-folder a class; and images made equal in size.

Shapes: N examples, H height, W width, C channels.
"""

import io
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from etils import epath

from bigjax import UsageError
from bigjax.data.files import THREADS, few, stray
from bigjax.data.parts import Undecoded, cut
from bigjax.data.pipeline import Dataset, Named
from bigjax.data.readers import Mapped
from bigjax.experiment import Split

NO_CLASSES = ("__MACOSX", "@eaDir", "__pycache__")  # folders that archives and machines leave behind
KINDS = "pictures have 1, 3 or 4 channels of 8 bits or 1 of 16 bits"


def folder_of_images(
    path: epath.Path, *, background: str = "white", resize: int | None = None, undecoded: bool = False
) -> Dataset:
    """`image` (N,H,W,C) uint8, C of 1 where all are grey, else 3, and `label`: the places of the sub-folders' names.

    Pictures are turned as their EXIF data say; what is transparent shows `background`, any colour by name or #rrggbb;
    16 bits become 8; `resize` as in `resized`. What is no picture is left out, and counted in a note.
    undecoded: read by index, with `image` an `Undecoded`, of any size; what is damaged inside is found when it is.
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
            return _image(file, behind, None if undecoded else lambda pixels: _sized(pixels, resize))
        except UsageError as e:  # all of them are told at once
            return e

    with ThreadPoolExecutor(THREADS) as pool:
        read = list(zip(files, pool.map(image, files), strict=True))
    wrong = {f"{p.parent.name}/{p.name}": str(e) for p, e in read if isinstance(e, UsageError)}
    others += [f"{p.parent.name}/{p.name}" for p, image in read if image is None]
    kept = [(p, image) for p, image in read if not (image is None or isinstance(image, UsageError))]
    filled = {p.parent.name for p, image in read if image is not None}
    wrong |= {p.name: _hollow(p, path) for p in folders if p.name not in filled}
    if wrong:
        (_, said), *more = wrong.items()
        raise UsageError(said + (f"; so must {len(more)} more: {few([name for name, _ in more])}" if more else ""))
    names = tuple(p.name for p in folders)
    label_N = np.array([names.index(p.parent.name) for p, _ in kept], np.int32)
    inside = np.array([f"{p.parent.name}/{p.name}" for p, _ in kept])
    notes = (f"{path}: left out {len(others)} files that are no pictures of a class: {few(others)}",) if others else ()
    if undecoded:
        split = Files([p for p, _ in kept], label_N, inside, channels=max(image for _, image in kept), behind=behind)
        return Dataset(split, classes=len(names), class_names=names, notes=notes)
    (first, image0), *_ = kept
    for file, image in kept:
        if image.shape[:2] != image0.shape[:2]:
            (h, w), (h0, w0) = image.shape[:2], image0.shape[:2]
            raise UsageError(
                f"images differ in size: {first} is {w0}×{h0}, {file} is {w}×{h} pixels: make them equal, by "
                "--resize N or by cropping (--side N, where the script has it)"
            )
    channels = max(image.shape[2] for _, image in kept)  # grey images among coloured ones become coloured
    image_NHWC = np.stack([np.broadcast_to(image, (*image.shape[:2], channels)) for _, image in kept])
    split = Named({"image": image_NHWC, "label": label_N}, inside)
    return Dataset(split, classes=len(names), class_names=names, notes=notes)


def _hollow(folder: epath.Path, path: epath.Path, what: str = "no image files") -> str:
    return f"{folder} holds {what}: each sub-folder of {path} must be a class with its images in it"


def _hidden(path: epath.Path) -> bool:
    return path.name.startswith(".") or path.name in NO_CLASSES


def _image(path: epath.Path, behind: tuple[int, ...], made: Callable[[np.ndarray], Any] | None) -> Any:
    """What is `made` of (H,W,C) uint8, C of 1 or 3, or (None) its C alone, without decoding it; None for what is no
    picture, neither by its content nor by its name.
    """
    from PIL import Image

    try:
        with path.open("rb") as file, Image.open(file) as image:
            if made is None:
                return 1 if image.mode.startswith("I") or _is_grey(image, behind) else 3
            return made(np.atleast_3d(np.asarray(_plain(path, image, behind))))
    except UsageError:
        raise
    except Exception as e:  # Pillow raises whatever a damaged file leads to
        if Image.registered_extensions().get(path.suffix.lower()) not in Image.OPEN:
            return None
        raise _damaged(path, e) from e


def _damaged(path: epath.Path, e: Exception) -> UsageError:
    from PIL import UnidentifiedImageError

    why = f"{type(e).__name__}: {e}"
    if isinstance(e, UnidentifiedImageError):
        why = f"damaged, or of a kind that is not read: {KINDS}"
    return UsageError(f"{path} is not a readable image ({why}): repair, convert or remove it")


def _is_grey(image: Any, behind: tuple[int, ...]) -> bool:
    return image.mode in ("1", "L", "LA") and (len(set(behind)) == 1 or not image.has_transparency_data)


def _plain(path: epath.Path, image: Any, behind: tuple[int, ...]) -> Any:
    """An image of mode L or RGB, upright, with nothing transparent."""
    from PIL import Image, ImageOps

    image = ImageOps.exif_transpose(image)
    if (deep_HWC := _eight_bits(path, image)) is not None:
        return Image.fromarray(deep_HWC[..., 0])
    grey = _is_grey(image, behind)
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, (*behind, 255)), image.convert("RGBA"))
    return _as(image, "L" if grey else "RGB")


def _as(image: Any, mode: str) -> Any:
    return image if image.mode == mode else image.convert(mode)


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
        return np.atleast_3d(np.asarray(as_channels(image, channels)))


def as_channels(image: Any, channels: int | None) -> Any:
    """An image of Pillow's, of mode L, RGB or RGBA by so many channels; None: L where it is grey, or RGB."""
    from PIL import Image

    grey = image.mode in ("1", "L", "LA")
    if (deep_HWC := _eight_bits("it", image)) is not None:
        image, grey = Image.fromarray(deep_HWC[..., 0]), True
    return _as(image, {1: "L", 3: "RGB", 4: "RGBA"}[channels or (1 if grey else 3)])


class Files:
    """Pictures in files, read by index, undecoded; grey ones among coloured ones become coloured."""

    def __init__(
        self,
        paths: Sequence[epath.Path],
        label: np.ndarray,
        names: np.ndarray,
        *,
        channels: int,
        behind: tuple[int, ...],
    ) -> None:
        self.paths, self.label, self.names, self.channels, self.behind = paths, label, names, channels, behind
        self.shapes = {"image": (None, None, channels), "label": ()}

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, row: int) -> dict[str, Any]:
        path, mode = self.paths[row], {1: "L", 3: "RGB"}[self.channels]
        plain = lambda image: _as(_plain(path, image, self.behind), mode)  # noqa: E731
        image = Undecoded(path.read_bytes(), plain, wrong=lambda e: _damaged(path, e), turns=True)
        return {"image": image, "label": self.label[row]}


# ---- one size


def resized(image_HWC: np.ndarray, side: int) -> np.ndarray:
    """An image, uint8 or float32, in `side` × `side` pixels, whatever its shape was: bilinear, and smoothed where it
    shrinks, so that no value leaves the range.
    """
    return cut(image_HWC, lambda height, width: (0, 0, height, width), side)


def _sized(image_HWC: np.ndarray, side: int | None) -> np.ndarray:
    return image_HWC if side is None else resized(image_HWC, side)


def resize_split(split: Split, side: int) -> Split:
    """A split whose images are `side` × `side` pixels."""
    if not isinstance(split, Mapping):
        return Mapped(split, lambda example: {**example, "image": resized(example["image"], side)})
    with ThreadPoolExecutor(THREADS) as pool:
        image_NHWC = np.stack(list(pool.map(lambda image: resized(image, side), split["image"])))
    fields = {**split, "image": image_NHWC}
    return Named(fields, split.names) if isinstance(split, Named) else fields
