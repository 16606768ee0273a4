"""How a user's own data are read: groups of flags, each for scripts whose data can be of that kind.

Their fields are arguments of `sources.load`: `sources.load(c.data, **vars(c.images))`.
"""

from dataclasses import dataclass
from typing import Annotated

from bigjax.experiment import Positive


@dataclass(frozen=True)
class Images:
    """How images are read."""

    resize: Annotated[int | None, Positive] = None  # to so many pixels a side, whatever their shape was
    background: str = "white"  # what transparent parts of a folder's pictures show: a colour by name or #rrggbb


@dataclass(frozen=True)
class Label:
    """Which column of a .csv is to be predicted; all others are inputs."""

    label_column: str | None = None  # else the one called label or target


@dataclass(frozen=True)
class Text:
    """Which column of a .csv or .jsonl is read."""

    text_column: str | None = None  # else the one called text


@dataclass(frozen=True)
class Columns(Text):
    """Which columns of a .csv or .jsonl are read."""

    label_column: str | None = None  # else the one called label
