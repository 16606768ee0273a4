"""Parts of images in another size; of pictures that are yet to be decoded no more is decoded than they need.

Shapes: H height, W width, C channels.
"""

import io
import math
from collections.abc import Callable
from typing import Any

import numpy as np

from bigjax import UsageError

Box = tuple[float, float, float, float]  # top, left, height, width, in pixels
ORIENTATION = 0x0112  # of EXIF data: 1 is upright


class Undecoded:
    """A picture in a file's bytes, decoded when it is asked for: whole, as an array (H,W,C) uint8, or a part of it.

    plain: makes an image as Pillow opens it one of mode L, RGB or RGBA, upright if `turns`.
    wrong: what is raised where a file is damaged.
    """

    def __init__(
        self,
        content: bytes,
        plain: Callable[[Any], Any],
        *,
        wrong: Callable[[Exception], UsageError],
        turns: bool = False,
    ) -> None:
        self.content, self.plain, self.wrong, self.turns = content, plain, wrong, turns

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return self._read(lambda image: np.atleast_3d(np.asarray(self.plain(image), dtype)))

    def cut(self, chosen: Callable[[int, int], Box], side: int) -> np.ndarray:
        """The part that `chosen(height, width)` says, in `side` × `side` pixels, as `cut` has it.

        A JPEG of which that part is twice or more as large is decoded at a half, a quarter or an eighth.
        """

        def part(image: Any) -> np.ndarray:
            if self.turns and image.getexif().get(ORIENTATION, 1) != 1:
                image = self.plain(image)
            size = width, height = image.size
            top, left, high, wide = chosen(height, width)
            image.draft(None, (math.ceil(width * side / wide), math.ceil(height * side / high)))
            image = self.plain(image)
            x, y = (now / before for now, before in zip(image.size, size, strict=True))
            return _cut(image, (top * y, left * x, high * y, wide * x), side)

        return self._read(part)

    def _read(self, read: Callable[[Any], Any]) -> Any:
        from PIL import Image

        try:
            with Image.open(io.BytesIO(self.content)) as image:
                return read(image)
        except Exception as e:  # Pillow raises whatever a damaged file leads to
            raise (e if isinstance(e, UsageError) else self.wrong(e)) from e


def cut(image: np.ndarray | Undecoded, chosen: Callable[[int, int], Box], side: int) -> np.ndarray:
    """The part of an image, uint8 or float32, that `chosen(height, width)` says, in `side` × `side` pixels (H,W,C).

    Bilinear, and smoothed where it shrinks, so that no value leaves the range.
    """
    from PIL import Image

    if isinstance(image, Undecoded):
        return image.cut(chosen, side)
    box, image = chosen(*image.shape[:2]), np.ascontiguousarray(image)
    if image.dtype == np.uint8 and image.shape[2] == 3:
        return _cut(Image.fromarray(image), box, side)
    planes = (Image.fromarray(np.ascontiguousarray(image[..., c])) for c in range(image.shape[2]))
    return np.concatenate([_cut(plane, box, side) for plane in planes], axis=-1)


def _cut(image: Any, box: Box, side: int) -> np.ndarray:
    from PIL import Image

    top, left, high, wide = box
    corners = (left, top, min(left + wide, image.width), min(top + high, image.height))  # rounding may go beyond
    return np.atleast_3d(np.asarray(image.resize((side, side), Image.Resampling.BILINEAR, box=corners)))
