"""Which splits of a TFDS set are trained and judged on."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from bigjax import UsageError
from bigjax.data.files import few

TESTS = ("test", "validation", "val", "valid", "dev")  # the first that has labels


def parsed(text: str | None) -> dict[str, str]:
    """`train=validation,test=test` as a dict. UsageError: it is none."""
    given = {}
    for part in (text or "").split(",") if text is not None else ():
        role, _, split = (p.strip() for p in part.partition("="))
        if role not in ("train", "test") or not split or role in given:
            raise UsageError(
                f"--split {text}: give train=SPLIT, test=SPLIT or both: train=validation,test=test or train=train[9%:]"
            )
        given[role] = split
    return given


def described(splits: Mapping[str, Any]) -> str:
    """test (8 examples), validation (10)"""
    return few([f"{name} ({s.num_examples:,}{'' if i else ' examples'})" for i, (name, s) in enumerate(splits.items())])


def instructions(name: str, splits: Any, split: str) -> list[Any]:
    """The pieces of files that a split is, TFDS's slices too. UsageError: there is no such split, or nothing in it."""
    try:
        pieces = [piece for piece in splits[split].file_instructions if piece.take]
    except Exception as e:  # ValueError, AssertionError, ... : TFDS has its own for each mistake
        known = set(re.findall(r"[A-Za-z_][\w-]*(?=\[|\+|\s|$)", split)) <= {*splits, "all"}
        how = "write a part as [:50%], [10%:20%] or [:1000]" if known else "name one of these"
        raise UsageError(f"{name} has no split {split!r}, but {described(splits)}: {how}") from e
    if not pieces:
        raise UsageError(f"the split {split!r} of {name} has no examples: there are {described(splits)}")
    return pieces


def to_train_on(name: str, spoken: str, splits: Mapping[str, Any]) -> str:
    """`train`; UsageError where there is none. spoken: what --data was given."""
    if "train" in splits:
        return "train"
    tests = [s for s in TESTS if s in splits] or list(splits)
    says = f"train={tests[-1]}" + (f",test={tests[0]}" if len(tests) > 1 else "")
    raise UsageError(
        f"{name} has no split train, but {described(splits)}: a trained run is judged on it by evaluate --data "
        f"{spoken}, or --eval-data {spoken}; to train on it say --split {says}"
    )


def apart(name: str, train: Sequence[Any], test: Sequence[Any]) -> None:
    """UsageError where pieces of files are in both splits: nothing could be judged."""
    shared = 0
    for a in train:
        for b in (b for b in test if b.filename == a.filename):
            shared += max(0, min(a.skip + a.take, b.skip + b.take) - max(a.skip, b.skip))
    if shared:
        raise UsageError(
            f"--split takes {shared:,} examples of {name} both to train and to test on: choose parts that are apart, "
            "as train=train[10%:],test=train[:10%]"
        )


def place(pieces: Sequence[Any], row: int) -> str:
    """The file that an example of a split lies in, and its number there."""
    for piece in pieces:
        if row < piece.take:
            break
        row -= piece.take
    return f"{piece.filename}: example {piece.skip + row} of it"
