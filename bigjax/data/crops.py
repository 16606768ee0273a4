"""Pictures of any size brought to one, on the host: a random part of each in training, the centre for evaluation."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any

import numpy as np

from bigjax import UsageError
from bigjax.data import sources
from bigjax.data.files import few
from bigjax.data.parts import Box, Undecoded, cut
from bigjax.data.pipeline import Dataset, Transform, example
from bigjax.data.readers import Mapped, Rows, View
from bigjax.experiment import Positive, Reader, Split

TRIES = 10
Example = dict[str, Any]


class Uncut:
    """An image of which a part is yet to be chosen; as an array the centre of it, as it is evaluated."""

    def __init__(self, image: np.ndarray | Undecoded, crops: "Crops") -> None:
        self.image, self.crops = image, crops

    @property
    def shape(self) -> tuple[int, ...]:
        return np.asarray(self).shape

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self.crops.centre(self.image), dtype)


@dataclass(frozen=True)
class Crops:
    """How images of any size are brought to one: a group of flags. Without a side they are taken as they are.

    In training a part is cut at random, of a random area and ratio of its sides, anew each time (Szegedy et al., "Going
    deeper with convolutions", 2015); for evaluation the centre. Either is decoded at the scale that it needs.
    """

    side: Annotated[int | None, Positive] = None  # pixels that images are cut to; else they are taken as they are
    crop_area: Annotated[float, Positive] = 0.08  # least share of its area that is cut of an image in training
    crop_ratio: Annotated[float, Positive] = 4 / 3  # of what is cut, at most, length to height and height to length
    crop_share: Annotated[float, Positive] = 0.875  # of the shorter side, that evaluation cuts from the centre

    def load(self, name: str, **how: Any) -> tuple[Dataset, Transform | None]:
        """`sources.load(name, **how)` and the `transform` of an experiment on it; None where there is no side.

        The splits are read by index then. UsageError: as there, and what is senseless here.
        """
        if self.side is None:
            return sources.load(name, **how), None
        for flag, value in (("--crop-area", self.crop_area), ("--crop-share", self.crop_share)):
            if value > 1:
                raise UsageError(f"{flag} {value:g}: give a share above 0, up to 1")
        if self.crop_ratio < 1:
            raise UsageError(f"--crop-ratio {self.crop_ratio:g}: give the longer side by the shorter, 1 or more")
        if how.get("resize") is not None:
            raise UsageError(f"--resize {how['resize']} and --side {self.side} both make images equal: leave one out")
        data = sources.load(name, **how, undecoded=True)
        if "image" not in (fields := example(data.train)):
            raise UsageError(f"--side is for images, and {name} holds {few(list(fields))}: leave it out")
        train = Mapped(undecoded(data.train), lambda e: {**e, "image": Uncut(e["image"], self)})
        test = data.test
        if test is not None:
            test = Mapped(undecoded(test), lambda e: {**e, "image": self.centre(e["image"])})
        return replace(data, train=train, test=test), self.transform

    def transform(self, example: Example, random: np.random.Generator) -> Example:
        """An example with a part of its image cut at random."""
        image, side = example["image"], self.side
        chosen = lambda height, width: random_box(height, width, random, area=self.crop_area, ratio=self.crop_ratio)  # noqa: E731
        return {**example, "image": cut(image.image if isinstance(image, Uncut) else image, chosen, side)}

    def centre(self, image: np.ndarray | Undecoded) -> np.ndarray:
        """The square around the centre whose side is `crop_share` of the image's shorter one."""

        def chosen(height: int, width: int) -> Box:
            size = self.crop_share * min(height, width)
            return (height - size) / 2, (width - size) / 2, size, size

        return cut(image, chosen, self.side)


def undecoded(split: Split) -> Reader:
    """A split as a reader, whose pictures are yet to be decoded where it reads such."""
    if isinstance(split, Mapping):
        return Rows(split)
    if isinstance(split, View):
        return View(undecoded(split.reader), split.rows)
    if isinstance(split, Mapped):
        return Mapped(undecoded(split.reader), split.change)
    return split.undecoded() if hasattr(split, "undecoded") else split


def random_box(height: int, width: int, random: np.random.Generator, *, area: float, ratio: float) -> Box:
    """A part of an image: of `area` to all of its area, evenly, and of 1/ratio to ratio in its sides, evenly by log.

    Where TRIES of them do not fit it is the largest around the centre of a ratio that is allowed.
    """
    for _ in range(TRIES):
        share, slope = random.uniform(area, 1), math.exp(random.uniform(-math.log(ratio), math.log(ratio)))
        high, wide = (round(math.sqrt(height * width * share * s)) for s in (1 / slope, slope))
        if 0 < high <= height and 0 < wide <= width:
            return int(random.integers(height - high + 1)), int(random.integers(width - wide + 1)), high, wide
    high, wide = min(height, round(width * ratio)), min(width, round(height * ratio))
    return (height - high) // 2, (width - wide) // 2, high, wide
