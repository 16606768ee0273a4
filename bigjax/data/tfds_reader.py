"""A split of a TFDS set, read and decoded by index."""

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from etils import epath

from bigjax import UsageError
from bigjax.data import tfds_features, tfds_folder, tfds_splits
from bigjax.data.files import THREADS
from bigjax.data.parts import Undecoded
from bigjax.data.pictures import as_channels, decoded
from bigjax.data.readers import gathered
from bigjax.experiment import Split

SAMPLE = 64  # examples of a split that is read by index whose labels are looked at first


class TfdsReader:
    """Examples of a TFDS split by index, read and decoded when asked for.

    shapes: of its fields, as the set declares them: None for sides that differ.
    """

    def __init__(self, built: Any, split: str, pieces: Sequence[Any], fields: tfds_features.Fields, cure: str) -> None:
        import tensorflow_datasets as tfds

        self.shapes, self._features, self._names, self._cure = fields.shapes, fields.features, fields.names, cure
        self.pieces, self._places, self._later = pieces, {}, False
        files = (epath.Path(p.filename) for p in pieces if ".array_record-" in p.filename)
        if wrong := next(filter(None, map(tfds_folder.torn, files)), ""):
            raise UsageError(f"{wrong}: {cure}")
        self._decoded = fields.features["image"] if fields.decodes else None
        skip = {self._decoded: tfds.decode.SkipDecoding()} if fields.decodes else None
        try:
            with tfds_folder.quiet():
                self._source = built.as_data_source(split, decoders=skip)
        except Exception as e:
            raise UsageError(f"{pieces[0].filename} cannot be opened ({tfds_folder.brief(e)}): {cure}") from e

    def __len__(self) -> int:
        return sum(piece.take for piece in self.pieces)

    def __getitem__(self, row: int) -> dict[str, np.ndarray]:
        example = self.any(row)
        if example.get("label", 0) < 0:
            raise UsageError(f"{tfds_splits.place(self.pieces, row)} has no label (-1): say another split by --split")
        return example

    def any(self, row: int) -> dict[str, np.ndarray]:
        """An example, with label -1 where it has none."""

        def values() -> dict[str, np.ndarray]:
            example = self._source[row]
            read = {field: example[feature] for field, feature in self._features.items()}
            if self._decoded:
                read["image"] = (self._undecoded if self._later else self._image)(read["image"], row)
            if "label" in read:
                read["label"] = self._class(read["label"])
            if "target" in read and "source" not in read:
                read["target"] = np.float32(read["target"])
            texts = tfds_features.PAIR if "source" in read else ("text",)
            read |= {field: _text(read[field]) for field in texts if field in read}
            return read

        return self._tried(values, row)

    def labels_of(self, rows: Sequence[int]) -> list[Any]:
        """The labels of these examples as they are in the set, whose images are not decoded."""
        feature = self._features["label"]
        one = lambda row: self._tried(lambda: _plain(self._source[row][feature]), row)  # noqa: E731
        with ThreadPoolExecutor(THREADS) as pool:
            return list(pool.map(one, map(int, rows)))

    def without_labels(self) -> "TfdsReader":
        out = copy.copy(self)
        out._features = {field: feature for field, feature in self._features.items() if field != "label"}
        return out

    def undecoded(self) -> "TfdsReader":
        """The same with each `image` an `Undecoded`, where the set holds pictures."""
        out = copy.copy(self)
        out._later = True
        return out

    def count(self, places: Mapping[Any, int]) -> None:
        """Labels are from now on the places of their values among the classes."""
        self._places = places

    def _undecoded(self, content: bytes, row: int) -> Undecoded:
        channels = self.shapes["image"][2]
        return Undecoded(content, lambda image: as_channels(image, channels), wrong=lambda e: self._unreadable(e, row))

    def _image(self, content: bytes, row: int) -> np.ndarray:
        shape = self.shapes["image"]
        image_HWC = decoded(content, channels=shape[2])
        if any(n not in (None, m) for m, n in zip(image_HWC.shape, shape, strict=True)):
            raise ValueError(f"its image is {image_HWC.shape}, not {shape} as the set says")
        return image_HWC

    def _class(self, value: Any) -> np.ndarray:
        if self._names is None:
            return np.int32(self._places.get(_plain(value), -1))
        if value >= len(self._names):
            raise ValueError(f"its label is {value}, and there are {len(self._names)} classes")
        return np.int32(value)

    def _tried(self, read: Callable[[], Any], row: int) -> Any:
        try:
            return read()
        except Exception as e:  # what a damaged file, or a damaged example in it, leads to
            raise self._unreadable(e, row) from e

    def _unreadable(self, e: Exception, row: int) -> UsageError:
        where = tfds_splits.place(self.pieces, row)
        return UsageError(f"{where} cannot be read ({tfds_folder.brief(e)}): {self._cure}")


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def _plain(value: Any) -> Any:
    """A label as a number or a string."""
    return _text(value) if isinstance(value, bytes | str) else np.asarray(value).item()


def in_memory(reader: TfdsReader, *, most: int) -> Split:
    """A split in memory; the reader itself where it holds more than so many bytes, or images of several sizes."""
    if (shape := reader.shapes.get("image")) is None:
        rows = np.unique(np.linspace(0, len(reader) - 1, SAMPLE).astype(int))
        texts = (v for row in rows for v in reader.any(int(row)).values() if isinstance(v, str))
        size = sum(len(v.encode()) for v in texts) / len(rows)
    else:
        size = math.inf if None in shape else math.prod(shape)
    return reader if size * len(reader) > most else gathered(reader.any, range(len(reader)))


def labelled(split: Split) -> np.ndarray:
    """Which examples have a label; of a reader all are looked at only where one of SAMPLE has none."""
    if isinstance(split, Mapping):
        return split["label"] >= 0
    rows = np.unique(np.linspace(0, len(split) - 1, SAMPLE).astype(int))
    good = lambda rows: np.array([isinstance(v, str) or v >= 0 for v in split.labels_of(rows)])  # noqa: E731
    return np.ones(len(split), bool) if good(rows).all() else good(range(len(split)))
