"""TFDS sets on disk, as array_record files, read without TensorFlow."""

import difflib
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import numpy as np
from etils import epath

from bigjax import UsageError
from bigjax.data.files import THREADS, few, image_form, located
from bigjax.data.pipeline import Dataset
from bigjax.experiment import Split

NAMES = {"mnist": "mnist", "cifar10": "cifar10", "imdb": "imdb_reviews", "lm1b": "lm1b"}  # short names
IN_MEMORY = 2 * 2**30  # bytes: sets that are larger when decoded stay on disk and are read by index


class _Reader:
    """Examples of a TFDS split by index, read and decoded when asked for."""

    def __init__(self, source: Sequence[Mapping[str, Any]], fields: Sequence[str]) -> None:
        self._source, self._fields = source, fields

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, row: int) -> dict[str, np.ndarray]:
        example = self._source[row]
        values = {field: example["label" if field == "target" else field] for field in self._fields}
        if "label" in values:
            values["label"] = np.int32(values["label"])
        if "target" in values:
            values["target"] = np.float32(values["target"])
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


def folder() -> str:
    """Where TFDS sets are looked for: TFDS_DATA_DIR, or ~/tensorflow_datasets."""
    return str(located(os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"))


def prepared(where: str) -> list[str]:
    """The sets in a folder, by their names."""
    path = epath.Path(where)
    names = sorted(p.name for p in path.iterdir() if p.is_dir()) if path.is_dir() else []
    there = ("*/dataset_info.json", "*/*/dataset_info.json")  # of a version, of a configuration's version
    return [name for name in names if any(any((path / name).glob(pattern)) for pattern in there)]


def known(name: str) -> bool:
    """Whether a set of this name is in `folder()`, or is one of those that TFDS could build there."""
    import tensorflow_datasets as tfds

    name = re.split("[:/]", name)[0]
    return name in prepared(folder()) or name in tfds.list_builders(with_community_datasets=False)


def builder(name: str, where: str, **options: Any) -> Any:
    """TFDS's builder of the set `name`; UsageError for a name, version or configuration that there is not."""
    import tensorflow_datasets as tfds

    try:
        with _quiet():
            return tfds.builder(name, data_dir=where, **options)
    except tfds.core.registered.DatasetNotFoundError as e:
        near = difflib.get_close_matches(name, tfds.list_builders(with_community_datasets=False), n=1)
        hint = f" (did you mean tfds:{near[0]}?)" if near else ""
        raise UsageError(
            f"TFDS knows no set called {name!r}{hint}, and none is in {where}: see tensorflow.org/datasets/catalog"
        ) from e
    except AssertionError as e:  # what TFDS says of a version or configuration that there is not
        said = " ".join(str(e).split()).rpartition('": ')[2]
        raise UsageError(f"TFDS set {name}, looked for in {where}: {said} Name another, or none") from e


def prepare_command(name: str) -> str:
    return f"python -m bigjax prepare {name} --to {folder()}"


def read(name: str) -> Dataset:
    """The set `name` in `folder()`: in memory, or by index where it is large. UsageError: what is missing."""
    where = folder()
    prepare = f"prepare it by: {prepare_command(name)}, or use the embedded --data mnist5k"
    built = builder(name, where)
    splits = built.info.splits
    if not splits:
        raise UsageError(f"the TFDS set {name} is not in {where} (TFDS_DATA_DIR): {prepare}")
    features = built.info.features
    fields = [f for f in ("image", "text", "label") if f in features]
    classes = getattr(features["label"] if "label" in features else None, "num_classes", None)
    if "label" in fields and (classes is None or features["label"].shape):  # numbers, or several labels an example
        fields.remove("label")
        if not features["label"].shape and np.issubdtype(features["label"].np_dtype, np.number):
            fields.append("target")
    if not {"image", "text"} & set(fields):
        raise UsageError(
            f"the TFDS set {name} has {few(list(features))}, but neither image nor text: use another, or "
            "export it as .npz"
        )

    if "image" in fields:
        image_form(f"the TFDS set {name}", (None, *features["image"].shape))
        if (kind := np.dtype(features["image"].np_dtype)) not in (np.uint8, np.float32):
            raise UsageError(f"the TFDS set {name} has images of {kind}, not uint8: export it as .npz")

    def opened(split: str) -> Split:
        reader = _Reader(built.as_data_source(split), fields)
        reader[0]
        shape = features["image"].shape if "image" in fields else (splits[split].num_bytes // len(reader),)
        if None in shape or math.prod(shape) * len(reader) > IN_MEMORY:
            return reader
        return reader.in_memory()

    test = next((s for s in ("test", "validation") if s in splits), None)
    try:
        with _quiet():
            train = opened("train" if "train" in splits else next(iter(splits)))
            held = None if test is None else opened(test)
    except NotImplementedError as e:  # what TFDS says of TFRecord files
        raise UsageError(f"the TFDS set {name} is in {where}, but not as array_record files: {prepare}") from e
    for split in (train, held):
        if isinstance(split, dict) and "label" in split and split["label"].min(initial=0) < 0:
            raise UsageError(f"the TFDS set {name} hides labels (-1) of a split: give other data as --eval-data")
    return Dataset(train, held, classes, tuple(features["label"].names) if classes else None)
