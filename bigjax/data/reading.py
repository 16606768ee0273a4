"""How a user's own data and TFDS sets are read: groups of flags, each for scripts whose data can be of that kind.

Their fields are arguments of `sources.load`: `sources.load(c.data, **vars(c.images))`.
"""

from dataclasses import dataclass
from typing import Annotated

from bigjax.experiment import Positive


@dataclass(frozen=True)
class Sets:
    """Which splits of a TFDS set are read."""

    split: str | None = None  # of a TFDS set, as train=validation,test=test or train=train[:50%]; else train and test


@dataclass(frozen=True)
class Images(Sets):
    """How images are read."""

    resize: Annotated[int | None, Positive] = None  # to so many pixels a side, whatever their shape was
    background: str = "white"  # what transparent parts of a folder's pictures show: a colour by name or #rrggbb
    image_feature: str | None = None  # of a TFDS set, else the one called image, or img, picture, ...
    label_feature: str | None = None  # of a TFDS set, else the one called label, or labels, class, ...


@dataclass(frozen=True)
class Label:
    """Which column of a .csv is to be predicted; all others are inputs."""

    label_column: str | None = None  # else the one called label or target


@dataclass(frozen=True)
class Text(Sets):
    """Which column of a .csv or .jsonl, or which feature of a TFDS set, is read."""

    text_column: str | None = None  # else the one called text
    text_feature: str | None = None  # of a TFDS set, else the one called text, or sentence, review, ...


@dataclass(frozen=True)
class Pair(Sets):
    """Which columns of a .csv or .jsonl, or which features of a TFDS set, are read."""

    source: str | None = None  # what is read, else the column called source, or the input that a TFDS set names
    target: str | None = None  # what is to be written, else the column called target, or the output that a set names


@dataclass(frozen=True)
class Columns(Text):
    """Which columns of a .csv or .jsonl, or which features of a TFDS set, are read."""

    label_column: str | None = None  # else the one called label
    label_feature: str | None = None  # of a TFDS set, else the one called label, or labels, class, ...
