"""Evaluation data against the training data: the same fields, shapes and classes, in memory or read by index."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from bigjax import UsageError
from bigjax.data.files import few
from bigjax.data.pipeline import Dataset, example
from bigjax.data.readers import Mapped
from bigjax.experiment import Split

Shape = tuple[int | None, ...]


def matched(data: Dataset, other: Dataset, name: str, eval_data: str, takes: Sequence[str]) -> Split:
    """The evaluation split of `other`, with the fields (those that are taken) and shapes of `data`, and its classes.

    Classes go by their names where both have some. UsageError: what differs.
    """
    split = other.train if other.test is None else other.test
    ours, theirs = shapes(data.train), shapes(split)
    for field in takes or {**ours, **theirs}:
        a, b = (f"has shape {_told(s[field])}" if field in s else "is missing" for s in (ours, theirs))
        if field not in ours or field not in theirs or not _alike(ours[field], theirs[field]):
            raise UsageError(
                f"{field} of an example {a} in {name} but {b} in {eval_data}: give evaluation data of the same form"
            )
    if data.classes is None or "label" not in theirs:
        return split
    known, names = data.class_names, other.class_names
    label_N = split["label"] if isinstance(split, Mapping) else None
    if all(n is None or all(c.isdecimal() for c in n) for n in (known, names)):  # numbers, on both sides
        known = known or tuple(map(str, range(data.classes)))
        if names is None and label_N is not None:
            values, label_N = np.unique(label_N, return_inverse=True)
            names = tuple(map(str, values))
    if not (known and names):
        if label_N is not None and label_N.max() >= data.classes:
            raise UsageError(
                f"{eval_data} has label {label_N.max()}, but {name} has {data.classes} classes (0 to "
                f"{data.classes - 1}): remove it or train on it too"
            )
        return split if label_N is None else {**split, "label": label_N.astype(np.int32)}
    place_C = np.array([known.index(c) if c in known else -1 for c in names], np.int32)

    def check(labels: Any) -> None:
        """Only classes that occur must be known."""
        if new := [names[label] for label in np.unique(labels) if place_C[label] < 0]:
            raise UsageError(
                f"{eval_data} has the class {new[0]!r}, which {name} has not ({few(known)}): remove it or train on "
                "it too"
            )

    if label_N is not None:
        check(label_N)
        return {**split, "label": place_C[label_N]}
    if (place_C < 0).all():
        check(range(len(names)))

    def change(read: dict[str, Any]) -> dict[str, Any]:
        check(read["label"])
        return {**read, "label": place_C[read["label"]]}

    return Mapped(split, change)


def shapes(split: Split) -> dict[str, Shape]:
    """Of each field of an example, with None for sides that differ from one to the next."""
    declared = getattr(split, "shapes", {})
    return {field: declared.get(field, np.shape(value)) for field, value in example(split).items()}


def _alike(a: Shape, b: Shape) -> bool:
    return len(a) == len(b) and all(m == n or None in (m, n) for m, n in zip(a, b, strict=True))


def _told(shape: Shape) -> str:
    return str(tuple(int(n) if n is not None else "any" for n in shape)).replace("'any'", "any")
