"""A user's own files: .npz, .jsonl, .csv, a folder of images. What is wrong is said in one line, with file and line.

Shapes: N examples, H height, W width, C channels, D features.
"""

import csv
import io
import json
import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
from etils import epath

from bigjax import UsageError
from bigjax.data.pipeline import Dataset, Named

THREADS = 16


def _npz(path: epath.Path) -> Dataset:
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
    except (
        Exception
    ) as e:  # NumPy raises whatever the damaged bytes lead to: ValueError, BadZipFile, AttributeError, zlib.error, ...
        if "allow_pickle" in str(e) and "Object arrays" in str(e):
            raise UsageError(
                f"{path} holds Python objects (rows of different shapes?): save arrays of numbers, all rows alike"
            ) from e
        raise UsageError(f"{path} is not a readable .npz archive ({type(e).__name__}): write it by numpy.savez") from e
    return _checked(path, arrays, "arrays")


def _checked(path: epath.Path, arrays: dict[str, np.ndarray], what: str) -> Dataset:
    """Images or features with labels or targets, in the forms that models take."""
    given, wanted = ([n for n in pair if n in arrays] for pair in (("image", "x"), ("label", "target")))
    if len(given) != 1 or len(wanted) != 1:
        raise UsageError(
            f"{path} has the {what} {few(list(arrays))}: name one of them image or x, and one label (classes) or "
            "target (numbers)"
        )
    (given,), (wanted,) = given, wanted
    inputs, labels = arrays[given], arrays[wanted]
    if inputs.ndim < 2 or len(inputs) == 0 or labels.ndim < 1 or len(labels) != len(inputs):
        raise UsageError(
            f"{path}: {given} has shape {inputs.shape} and {wanted} {labels.shape}: both need the same number of "
            "examples, at least one"
        )
    if given == "image" and inputs.ndim == 3:
        inputs = inputs[..., None]
    if given == "image" and inputs.ndim != 4:
        raise UsageError(f"{path}: image has shape {inputs.shape}: it must be (N,H,W) or (N,H,W,C)")
    if given == "image" and np.issubdtype(inputs.dtype, np.integer):
        if inputs.min() < 0 or inputs.max() > 255:
            raise UsageError(
                f"{path}: image has integers from {inputs.min()} to {inputs.max()}: they must lie in 0 to 255, or be "
                "floats in 0 to 1"
            )
        inputs = inputs.astype(np.uint8)
    else:
        inputs = _floats(path, given, inputs)
        if given == "image" and (inputs.min() < 0 or inputs.max() > 1):
            raise UsageError(
                f"{path}: image has floats from {inputs.min():g} to {inputs.max():g}: they must lie in 0 to 1, or be "
                "uint8 in 0 to 255"
            )
    if wanted == "target":
        return Dataset({given: inputs, wanted: _floats(path, wanted, labels)})
    names = tuple(map(str, arrays["class_names"])) if "class_names" in arrays else None
    if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
        raise UsageError(
            f"{path}: label is {labels.dtype} of shape {labels.shape}: it must be (N,) integers; numbers to predict "
            "are called target"
        )
    classes = len(names) if names else len(labels)  # without names: more classes than examples can only be a mistake
    row = int(np.argmax((labels < 0) | (labels >= classes)))
    if not 0 <= labels[row] < classes:
        raise UsageError(
            f"{path}: label {labels[row]} of example {row} is out of range: labels count classes from 0, below "
            f"{classes} here"
        )
    fields = {given: inputs, wanted: labels.astype(np.int32)}
    return Dataset(fields, classes=len(names) if names else int(labels.max()) + 1, class_names=names)


def _floats(path: epath.Path, field: str, values: np.ndarray) -> np.ndarray:
    if not (np.issubdtype(values.dtype, np.number) or values.dtype == bool) or np.iscomplexobj(values):
        raise UsageError(f"{path}: {field} has dtype {values.dtype}: it must be real numbers")
    values = values.astype(np.float32)
    finite = np.isfinite(values)
    if not finite.all():
        row = int(np.argwhere(~finite)[0][0])
        raise UsageError(
            f"{path}: {field} has NaN or infinity ({(~finite).sum()} values, the first in example {row}): repair or "
            "remove these examples"
        )
    return values


def folder_of_images(path: epath.Path) -> Dataset:
    names = sorted(p.name for p in path.iterdir() if p.is_dir() and not p.name.startswith("."))
    files: list[tuple[epath.Path, int]] = []
    for label, name in enumerate(names):
        inside = sorted((p for p in (path / name).iterdir() if not p.name.startswith(".")), key=lambda p: p.name)
        if not inside or inside[0].is_dir():
            raise UsageError(
                f"{path / name} holds no image files: each sub-folder of {path} must be a class with its images in it"
            )
        files += [(p, label) for p in inside]
    if not files:
        raise UsageError(f"{path} has no sub-folders: put the images of each class into a sub-folder named after it")
    with ThreadPoolExecutor(THREADS) as pool:
        images = list(pool.map(lambda item: _image(item[0]), files))
    for (file, _), image in zip(files, images, strict=True):
        if image.shape[:2] != images[0].shape[:2]:
            (h, w), (h0, w0) = image.shape[:2], images[0].shape[:2]
            raise UsageError(
                f"images differ in size: {files[0][0]} is {w0}×{h0}, {file} is {w}×{h} pixels: resize or crop them "
                "all to one size"
            )
    channels = max(image.shape[2] for image in images)  # grey images among coloured ones become coloured
    image_NHWC = np.stack([np.broadcast_to(image, (*image.shape[:2], channels)) for image in images])
    fields = {"image": image_NHWC, "label": np.array([label for _, label in files], np.int32)}
    inside = np.array([f"{names[label]}/{file.name}" for file, label in files])
    return Dataset(Named(fields, inside), classes=len(names), class_names=tuple(names))


def _image(path: epath.Path) -> np.ndarray:
    from PIL import Image

    try:
        with path.open("rb") as file, Image.open(file) as image:
            if image.mode.startswith(("I", "F")):
                raise ValueError(f"mode {image.mode}, not 8 bits a channel")
            grey = image.mode in ("1", "L", "LA")
            return np.atleast_3d(np.asarray(image.convert("L" if grey else "RGB")))
    except Exception as e:  # Pillow raises whatever a damaged file leads to
        raise UsageError(f"{path} is not a readable image ({type(e).__name__}: {e}): repair or remove it") from e


def _jsonl(path: epath.Path) -> Dataset:
    rows = []
    for number, line in enumerate(path.read_bytes().decode("utf-8-sig").split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as e:
            raise UsageError(f"{path}, line {number} is not JSON ({e.msg}): each line must be one object") from e
        if not isinstance(row, dict):
            raise UsageError(
                f'{path}, line {number} is not a JSON object: write {{"text": ..., "label": ...}} in each line'
            )
        rows.append((number, row))
    return _rows(path, rows)


def _csv(path: epath.Path) -> Dataset:
    csv.field_size_limit(2**30)
    reader = csv.DictReader(io.StringIO(path.read_bytes().decode("utf-8-sig"), newline=""), strict=True)
    try:
        rows = [(reader.line_num, row) for row in reader]
    except csv.Error as e:
        raise UsageError(f"{path}, line {reader.line_num} is not CSV ({e}): repair its quotes") from e
    for number, row in rows:
        if None in row or None in row.values():
            raise UsageError(
                f"{path}, line {number} has not as many fields as the header's {len(reader.fieldnames)}: repair it"
            )
    return _rows(path, rows)


def _rows(path: epath.Path, rows: list[tuple[int, dict[str, Any]]]) -> Dataset:
    """Rows with their line numbers: text and label, source and target, or numbers."""
    if not rows:
        raise UsageError(f"{path} has no examples: give it at least one line of data")
    columns = list(rows[0][1])
    texts = next((pair for pair in (("text", "label"), ("source", "target")) if set(pair) <= set(columns)), None)
    if texts is None and (path.suffix == ".jsonl" or "text" in columns or "source" in columns):
        raise UsageError(f"{path} has the columns {few(columns)}: it needs text and label, or source and target")
    for number, row in rows:
        for column in texts or columns:
            if column not in row or (isinstance(row[column], str) and not row[column].strip()):
                raise UsageError(f"{path}, line {number} has no {column}: fill it in or remove the line")
            if column in ("text", "source", "target") and texts and not isinstance(row[column], str):
                raise UsageError(f"{path}, line {number}: {column} is {row[column]!r}, not a string")
    if texts == ("source", "target"):
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
            "the inputs"
        )
    data = _checked(path, arrays, "columns")
    return replace(data, classes=len(names), class_names=names) if "label" in columns else data


def _classes(path: epath.Path, rows: list[tuple[int, dict[str, Any]]]) -> tuple[np.ndarray, tuple[str, ...]]:
    """Labels as places among the sorted classes; in CSV, where all is text, integers are sorted as numbers."""
    kinds = (int, str) if path.suffix == ".jsonl" else (str,)
    for number, row in rows:
        label = row["label"]
        if (
            type(label) not in kinds
            or type(label) is not type(rows[0][1]["label"])
            or (isinstance(label, str) and _fraction(label))
        ):
            raise UsageError(
                f"{path}, line {number}: label is {label!r}: labels must all be integers, or all names; numbers to "
                "predict are called target"
            )
    values = [row["label"].strip() if isinstance(row["label"], str) else row["label"] for _, row in rows]
    if all(isinstance(v, int) or v.lstrip("+-").isdecimal() for v in values):
        values = [int(v) for v in values]
        if min(values) < 0:
            raise UsageError(
                f"{path}, line {rows[int(np.argmin(values))][0]}: label {min(values)} is negative: classes count from 0"
            )
    classes = sorted(set(values))
    place = {c: i for i, c in enumerate(classes)}
    return np.array([place[v] for v in values], np.int32), tuple(map(str, classes))


def _fraction(label: str) -> bool:
    try:
        return not label.strip().lstrip("+-").isdecimal() and math.isfinite(float(label))
    except ValueError:
        return False


def _number(path: epath.Path, line: int, column: str, value: str) -> float:
    try:
        return float(value)
    except ValueError as e:
        raise UsageError(
            f"{path}, line {line}: {column} is {value!r}, not a number: encode or remove the column"
        ) from e


def few(names: Sequence[str]) -> str:
    return ", ".join(map(str, names[:8])) + (", ..." if len(names) > 8 else "") if names else "none"


FILES: dict[str, Callable[[epath.Path], Dataset]] = {".npz": _npz, ".csv": _csv, ".jsonl": _jsonl}
