"""Splits that are read by index: some rows of one, what is made of one, and examples put together."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from bigjax import UsageError
from bigjax.experiment import Reader

THREADS = 16  # that read examples
Example = dict[str, np.ndarray]


class View:
    """Some rows of a reader, as a reader."""

    def __init__(self, reader: Reader, rows: np.ndarray) -> None:
        self.reader, self.rows = reader, rows
        label, names = (getattr(reader, name, None) for name in ("label", "names"))
        self.label = None if label is None else label[rows]
        self.names = rows if names is None else names[rows]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> Example:
        return self.reader[int(self.rows[row])]


class Rows:
    """Arrays in memory, as a reader."""

    def __init__(self, fields: Mapping[str, np.ndarray]) -> None:
        self.fields = fields
        for name, values in (("label", fields.get("label")), ("names", getattr(fields, "names", None))):
            if values is not None:
                setattr(self, name, values)

    def __len__(self) -> int:
        return len(next(iter(self.fields.values())))

    def __getitem__(self, row: int) -> Example:
        return {name: values[row] for name, values in self.fields.items()}


class Mapped:
    """A reader of the examples that `change` makes of those of another."""

    def __init__(self, reader: Reader, change: Callable[[Example], Example]) -> None:
        self.reader, self.change = reader, change
        for name in ("label", "names"):
            if hasattr(reader, name):
                setattr(self, name, getattr(reader, name))

    def __len__(self) -> int:
        return len(self.reader)

    def __getitem__(self, row: int) -> Example:
        return self.change(self.reader[row])


def stack(examples: Sequence[Example], row_B: Sequence[int]) -> Example:
    """Examples as one batch. UsageError: their shapes differ."""
    batch = {}
    for name in examples[0]:
        values = [np.asarray(e[name]) for e in examples]
        for row, value in zip(row_B, values, strict=True):
            if value.shape != values[0].shape:
                raise UsageError(
                    f"{name} has shape {values[0].shape} in example {row_B[0]} but {value.shape} in example {row}: "
                    "give a transform that makes them equal (of images --resize N), or prepare the data in one size"
                )
        batch[name] = np.stack(values)
    return batch


def gathered(read: Callable[[int], Example], rows: Iterable[int]) -> Example:
    """Examples read in threads, as one batch; texts as objects. UsageError: their shapes differ."""
    rows = list(map(int, rows))
    with ThreadPoolExecutor(THREADS) as pool:
        examples = list(pool.map(read, rows))
    texts = [k for k, v in examples[0].items() if isinstance(v, str)]
    batch = stack([{k: v for k, v in e.items() if k not in texts} for e in examples], rows)
    batch |= {k: np.array([e[k] for e in examples], object) for k in texts}
    return {k: batch[k] for k in examples[0]}
