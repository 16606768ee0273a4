"""A user's own rows: .jsonl and .csv. What is wrong is said in one line, with file and line."""

import csv
import io
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from reprlib import repr as shortened
from typing import Any

import numpy as np
from etils import epath

from bigjax import UsageError
from bigjax.data.files import checked, chosen, few, named_once, stray
from bigjax.data.pipeline import Dataset
from bigjax.data.takes import check

INTEGER, DIGITS = r"[+-]?\d+", 1000  # the most of a whole number


# A file's columns for fields, where they are given: {"text": "review", "label": None}
Columns = Mapping[str, str | None]


def jsonl(path: epath.Path, columns: Columns, takes: Sequence[str]) -> Dataset:
    rows, known = [], {}
    for number, line in enumerate(path.read_bytes().decode("utf-8-sig").split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line, object_pairs_hook=_object, parse_int=_integer)
        except TooLong as e:
            raise UsageError(f"{path}, line {number} has {e}: shorten it, or write it as a string") from e
        except (ValueError, RecursionError) as e:
            why = "nested too deep" if isinstance(e, RecursionError) else getattr(e, "msg", str(e).partition("; ")[0])
            raise UsageError(f"{path}, line {number} is not JSON ({why}): each line must be one object") from e
        if not isinstance(row, dict):
            raise UsageError(
                f'{path}, line {number} is not a JSON object: write {{"text": ..., "label": ...}} in each line'
            )
        if (keys := tuple(row)) not in known:
            where = f"{path}, line {number}"
            known[keys] = chosen(where, named_once(where, keys, what="fields"), columns)
        rows.append((number, dict(zip(known[keys], row.values(), strict=True))))
    return _rows(path, rows, takes)


class TooLong(Exception):
    """A number of more digits than are read."""


def _integer(digits: str) -> int:
    if len(digits) > DIGITS:
        raise TooLong(f"a number of {len(digits.lstrip('-')):,} digits")
    return int(digits)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; the library would keep the last of two fields of one name."""
    made = dict(pairs)
    if len(made) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"two fields called {next(n for n in names if names.count(n) > 1)!r}")
    return made


def csv_rows(path: epath.Path, columns: Columns, takes: Sequence[str]) -> Dataset:
    csv.field_size_limit(2**30)
    reader = csv.reader(io.StringIO(path.read_bytes().decode("utf-8-sig"), newline=""), strict=True)
    try:
        lines = [(reader.line_num, values) for values in reader if values]
    except csv.Error as e:
        raise UsageError(f"{path}, line {reader.line_num} is not CSV ({e}): repair its quotes") from e
    (_, header), *lines = lines or [(0, [])]
    if len(header) == 1 and (other := next((c for c in ";\t|" if c in header[0]), None)):
        raise UsageError(f"{path} separates columns by {other!r}: write it with commas")
    for number, values in lines:
        if len(values) != len(header):
            raise UsageError(f"{path}, line {number} has not as many fields as the header's {len(header)}: repair it")
    index = 0  # columns in front that are pandas' index: without a name, or with that of one read and written again
    while index < len(header) and re.fullmatch(r"|Unnamed: \d+(\.\d+)*", header[index].strip()):
        index += 1
    if (unnamed := next((i for i, name in enumerate(header[index:], index) if not name.strip()), None)) is not None:
        raise UsageError(f"{path}: column {unnamed + 1} has no name: name or remove it")
    names = chosen(path, named_once(path, header, what="columns")[index:], columns)
    rows = [(number, dict(zip(names, values[index:], strict=True))) for number, values in lines]
    data = _rows(path, rows, takes)
    which = "the first column" if index == 1 else f"the first {index} columns"
    return replace(data, notes=(f"{path}: left out {which}, an index without a name",)) if index else data


def _rows(path: epath.Path, rows: list[tuple[int, dict[str, Any]]], takes: Sequence[str]) -> Dataset:
    """Rows with their line numbers: text and label, source and target, or numbers; text alone if no more is taken."""
    if not rows:
        raise UsageError(f"{path} has no examples: give it at least one line of data")
    columns = list(rows[0][1])
    alone = "text" in takes and "label" not in takes
    forms = (("text",) if alone else ("text", "label"), ("source", "target"))
    texts = next((form for form in forms if set(form) <= set(columns)), None)
    predicted = [c for c in ("label", "target") if c in columns]
    inputs = [v for c, v in rows[0][1].items() if c not in predicted]
    words = not {"text", "source"}.isdisjoint(takes) and not all(map(_is_number, inputs))
    if texts is None and (words or path.suffix.lower() == ".jsonl" or {"text", "source"} & set(columns)):
        if "source" in takes:
            known = f"{path} has the columns {few(columns)}: it needs source and target"
            raise UsageError(f"{known}: rename yours, or name them by --source and --target")
        if takes and "text" not in takes:
            check(tuple(columns), takes, name=str(path))
        needed = "text" if alone else "text and label" + ", or source and target" * (not takes)
        flags = "--text-column" if alone else "--text-column and --label-column"
        hint = f": rename yours, or name them by {flags}" if "text" in takes else ""
        raise UsageError(f"{path} has the columns {few(columns)}: it needs {needed}{hint}")
    if texts or predicted or "x" not in takes:
        check(texts or ("x", *predicted), takes, name=str(path))
    for number, row in rows:
        for column in texts or columns:
            if column not in row or (isinstance(row[column], str) and not row[column].strip()):
                raise UsageError(f"{path}, line {number} has no {column}: fill it in or remove the line")
            if column in ("text", "source", "target") and texts and not isinstance(row[column], str):
                raise UsageError(f"{path}, line {number}: {column} is {shortened(row[column])}, not a string")
            if isinstance(row[column], str) and (wrong := stray(row[column])):
                raise UsageError(
                    f"{path}, line {number}: {column} has {wrong}, half of a surrogate pair, which is no character: "
                    "repair or remove the line"
                )
    if texts in (("source", "target"), ("text",)):
        return Dataset({name: np.array([row[name] for _, row in rows], object) for name in texts})
    arrays: dict[str, np.ndarray] = {}
    if "label" in columns:
        arrays["label"], names = _classes(path, rows)
    if texts:
        fields = {"text": np.array([row["text"] for _, row in rows], object), **arrays}
        return Dataset(fields, classes=len(names), class_names=names)
    numbers = [c for c in columns if c not in ("label", "target")]
    table = np.array(
        [[_number(path, n, c, row[c]) for c in [*numbers, *({"target"} & set(columns))]] for n, row in rows], np.float32
    )
    arrays["x"] = table[:, : len(numbers)]
    if "target" in columns:
        arrays["target"] = table[:, -1]
    if not numbers or len(arrays) != 2:
        raise UsageError(
            f"{path} has the columns {few(columns)}: name one of them label (classes) or target (numbers), beside "
            f"the inputs{', or say which by --label-column' if 'x' in takes else ''}"
        )
    data = replace(checked(path, arrays, "columns"), facts={"columns": tuple(numbers)})
    return replace(data, classes=len(names), class_names=names) if "label" in columns else data


def _classes(path: epath.Path, rows: list[tuple[int, dict[str, Any]]]) -> tuple[np.ndarray, tuple[str, ...]]:
    """Labels as places among the sorted classes; in CSV, where all is text, integers are sorted as numbers."""
    kinds = (int, str) if path.suffix.lower() == ".jsonl" else (str,)
    for number, row in rows:
        label = row["label"]
        if (
            type(label) not in kinds
            or type(label) is not type(rows[0][1]["label"])
            or (isinstance(label, str) and _no_class(label.strip()))
        ):
            raise UsageError(
                f"{path}, line {number}: label is {shortened(label)}: labels must all be integers, or all names; "
                "numbers to predict are called target"
            )
    values = [row["label"].strip() if isinstance(row["label"], str) else row["label"] for _, row in rows]
    if all(isinstance(v, int) or re.fullmatch(INTEGER, v) for v in values):
        values = [int(v) for v in values]
        if min(values) < 0:
            raise UsageError(
                f"{path}, line {rows[int(np.argmin(values))][0]}: label {min(values)} is negative: classes count from 0"
            )
    classes = sorted(set(values))
    place = {c: i for i, c in enumerate(classes)}
    return np.array([place[v] for v in values], np.int32), tuple(map(str, classes))


def _no_class(label: str) -> bool:
    """Whether a label is a number, but no integer that can be read: `0.5`, `--1`, 5,000 digits."""
    if re.fullmatch(INTEGER, label):
        return len(label) > DIGITS
    if re.fullmatch(r"[+-]+\d+", label):
        return True
    return _is_number(label)


def _is_number(value: Any) -> bool:
    try:
        return math.isfinite(float(value))
    except (TypeError, ValueError):
        return False


def _number(path: epath.Path, line: int, column: str, value: str) -> float:
    try:
        return float(value)
    except ValueError as e:
        raise UsageError(
            f"{path}, line {line}: {column} is {shortened(value)}, not a number: encode or remove the column"
        ) from e
