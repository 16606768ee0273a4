"""Batches: which rows, in which order, read ahead of time.

Batch n is a pure function of (seed, n), row for row: the order comes from a NumPy Philox permutation of (seed, epoch),
and a process takes its contiguous rows of the global batch. So the data position is the step: resuming is starting at
n.

A split is a mapping of arrays with equal leading axes (in memory), or a random-access reader with `__len__` and
`__getitem__(int) -> dict[str, array]` for what must be read and decoded: Grain does that in threads, by index, in the
same order. Of rows that have lengths (`ByLength`) each batch is of like ones, and cut: as pure a function.
"""

import hashlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import numpy as np

from bigjax import UsageError
from bigjax.data.lengths import ByLength
from bigjax.data.order import batch_rows as batch_rows
from bigjax.data.order import generator, rows_of, width
from bigjax.data.prefetch import told
from bigjax.data.readers import View, gathered, stack
from bigjax.experiment import Split, size_of

READ_THREADS, READ_AHEAD = 16, 128  # examples read at once, and kept ready, from a reader
ENDLESS = 2**40  # batches

Batch = dict[str, np.ndarray]
Chosen = tuple[np.ndarray, np.ndarray, int | None]  # rows, mask, what they are cut to
Transform = Callable[[dict[str, np.ndarray], np.random.Generator], dict[str, np.ndarray]]


@dataclass(frozen=True)
class Dataset:
    """What a source gives.

    train, test: splits; of text for a language model its bytes or tokens. `test` is None while it is in one piece.
    classes: None where labels are not classes. class_names: None where they have no names.
    facts: what else is known of it, such as a hash.
    notes: lines on what was made of it: what was left out, how labels became classes, what was held out.
    """

    train: Split | Sequence[int]
    test: Split | Sequence[int] | None = None
    classes: int | None = None
    class_names: tuple[str, ...] | None = None
    name: str = ""
    facts: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def shape(self, name: str) -> tuple[int, ...]:
        """Of this field of an example, the first to train on."""
        return tuple(int(n) for n in example(self.train)[name].shape)

    def in_memory(self) -> "Dataset":
        """The same, with what is read by index read now."""
        return replace(self, train=in_memory(self.train), test=in_memory(self.test))


class Named(dict[str, np.ndarray]):
    """Arrays in memory, and the `names` (N,) of their rows."""

    def __init__(self, fields: Mapping[str, np.ndarray], names: np.ndarray) -> None:
        super().__init__(fields)
        self.names = names


def batches(
    split: Split,
    *,
    seed: int,
    batch_size: int,
    start: int = 0,
    rows: np.ndarray | None = None,
    transform: Transform | None = None,
) -> Iterator[Batch]:
    """Training batches without end, from batch `start`: of each global batch those `rows` (default: all).

    Each has the split's fields, `index` (B,) int32 (row in the data set) and `mask` (B,) float32 (ones).
    `transform(example, generator)` changes an example on the host (decoding, crops of varying size); its generator is a
    Philox one keyed by (seed, epoch, row), so what it draws depends neither on the batch size nor on the number of
    processes. UsageError: no examples; a batch larger than the data; a transform of rows that have lengths.
    """
    size = size_of(split)
    if not 1 <= batch_size <= size:
        raise UsageError(
            f"batch_size {batch_size} does not fit {size} training examples: pass --batch-size with a number from 1 "
            f"to {size}"
        )
    mine = np.arange(batch_size) if rows is None else rows
    if isinstance(split, ByLength) and transform is not None:
        raise UsageError("rows by length are cut by lengths that a transform may change: leave one of the two out")
    global_rows = rows_of(split, seed=seed, batch_size=batch_size)

    def chosen(n: int) -> Chosen:
        row_B = global_rows(n)
        return row_B[mine], np.ones(len(mine), np.float32), width(split, row_B)

    change = None
    if transform is not None:

        def change(example: dict[str, np.ndarray], n: int, j: int, row: int) -> dict[str, np.ndarray]:
            epoch = (n * batch_size + int(mine[j])) // size
            return transform(example, generator(seed, epoch, row))

    return _generate(split, chosen, range(start, ENDLESS), len(mine), change)


def eval_batches(split: Split, *, batch_size: int, rows: np.ndarray | None = None) -> Iterator[Batch]:
    """Every example exactly once, in order, in batches of which those `rows` are given (default: all).

    What is missing in the last batch is row 0 again, with `mask` 0 and `index` −1.
    """
    size = size_of(split)
    if batch_size < 1:
        raise UsageError(f"cannot evaluate in batches of {batch_size}: pass --batch-size with a number from 1")
    mine = np.arange(batch_size) if rows is None else rows

    def chosen(n: int) -> Chosen:
        place_B = np.arange(n * batch_size, (n + 1) * batch_size)
        row_B = np.where(place_B < size, place_B, 0)
        return row_B[mine], (place_B < size).astype(np.float32)[mine], width(split, row_B)

    return _generate(split, chosen, range(-(-size // batch_size)), len(mine), None)


def _generate(split: Split, rows: Callable, numbers: range, local: int, change: Callable | None) -> Iterator[Batch]:
    """One batch for each of `numbers`; `rows(n)` says which rows and masks, and what they are cut to, `change(example,
    n, j, row)` is the host transform."""
    if isinstance(split, Mapping) and change is None:
        for n in numbers:
            row_B, mask_B, size = rows(n)
            fields = split if size is None else split.narrow(size)
            yield _numbered({name: array[row_B] for name, array in fields.items()}, row_B, mask_B)
        return
    rows = lru_cache(maxsize=64)(rows)  # Grain asks for every example by itself
    with closing(_read(split, rows, numbers, local, change)) as examples:
        for n in numbers:
            row_B, mask_B, _ = rows(n)
            yield _numbered(stack(list(itertools.islice(examples, local)), row_B), row_B, mask_B)


def _read(
    split: Split, rows: Callable, numbers: range, local: int, change: Callable | None
) -> Iterator[dict[str, np.ndarray]]:
    """The examples of all batches, one by one, in order, read and decoded by Grain's threads ahead of time."""
    import grain

    def fetch(position: int) -> dict[str, np.ndarray]:
        n, j = numbers[position // local], position % local
        row = int(rows(n)[0][j])
        try:
            example = {k: v[row] for k, v in split.items()} if isinstance(split, Mapping) else split[row]
            return example if change is None else change(example, n, j, row)
        except UsageError as e:
            raise UsageError(f"example {row} of the data: {e}") from e
        except BaseException as e:  # also what would end the thread
            raise UsageError(
                f"example {row} of the data cannot be read or transformed ({told(e)}): repair or remove it"
            ) from e

    options = grain.ReadOptions(num_threads=READ_THREADS, prefetch_buffer_size=max(READ_AHEAD, local))
    examples = iter(grain.MapDataset.range(len(numbers) * local).map(fetch).to_iter_dataset(options))
    try:
        yield from examples
    finally:
        examples.close()


def _numbered(batch: Batch, row_B: np.ndarray, mask_B: np.ndarray) -> Batch:
    return batch | {"index": np.where(mask_B > 0, row_B, -1).astype(np.int32), "mask": mask_B}


def example(split: Split) -> dict[str, np.ndarray]:
    """The first example of a split, in memory or not."""
    return {name: array[0] for name, array in split.items()} if isinstance(split, Mapping) else split[0]


def whole(split: Split) -> Split:
    """The same rows, of which no batch is cut."""
    return dict(split) if isinstance(split, ByLength) else split


def in_memory(split: Split) -> Mapping[str, np.ndarray]:
    """A split with all its examples read."""
    return split if isinstance(split, Mapping) else gathered(split.__getitem__, range(size_of(split)))


def take(split: Split, rows: np.ndarray) -> Split:
    """The given rows of a split: copied arrays, or an index view of a reader."""
    if not isinstance(split, Mapping):
        return View(split, rows)
    if isinstance(split, ByLength):
        return split.part(rows)
    fields = {k: v[rows] for k, v in split.items()}
    return Named(fields, split.names[rows]) if isinstance(split, Named) else fields


def hold_out(split: Split, *, fraction: float, split_seed: int, purpose: str = "validation") -> tuple[Split, Split]:
    """(rest, held): about `fraction` of the examples held out, both in the order of `split`.

    Each row is held out or not by a hash, keyed by `split_seed` and `purpose`, of its name where rows have names, or
    else of its own fields but `label` and `target`, or else (of readers) of its number. So rows that are added or
    reordered, and labels that are corrected, move no other row, and rows that are alike stay on one side; the
    classes' shares are random (`shares`). At least one row is held out and one is left. UsageError: impossible.
    `index` of each part's batches counts that part's rows.
    """
    size, key, person = size_of(split), str(split_seed).encode(), purpose.encode()
    if not 0 < fraction < 1:
        raise UsageError(f"cannot hold out {fraction:g} of the examples: give a share between 0 and 1")
    hashes = (hashlib.blake2b(row, digest_size=8, key=key, person=person).digest() for row in _identities(split))
    place_N = np.frombuffer(b"".join(hashes), ">u8") / 2.0**64  # in [0, 1]
    held_N = (place_N < min(fraction, place_N.max())) | (place_N == place_N.min())
    if held_N.all():
        raise UsageError(
            f"cannot hold out {fraction:g} of {size} examples, which are all alike: give more data, or a separate file "
            "as --eval-data"
        )
    return take(split, np.flatnonzero(~held_N)), take(split, np.flatnonzero(held_N))


def _identities(split: Split) -> Iterator[bytes]:
    """By what `hold_out` knows each row."""
    names = getattr(split, "names", None)
    if names is not None or not isinstance(split, Mapping):
        yield from (str(name).encode() for name in (range(len(split)) if names is None else names))
        return
    fields = sorted(split.keys() - {"label", "target"}) or sorted(split)
    for row in range(size_of(split)):
        values = (split[field][row] for field in fields)
        parts = [v.encode() if isinstance(v, str) else np.asarray(v).tobytes() for v in values]
        yield b"".join(len(part).to_bytes(8, "big") + part for part in parts)


def shares(rest: Split, held: Split, *, fraction: float, class_names: Sequence[str] | None = None) -> str:
    """What `hold_out` gave, in one line: the total, and the classes that gave over a row more or less than their share.

    Of more than ten those that are furthest off.
    """
    said = f"{size_of(held)} of {size_of(rest) + size_of(held)} examples"
    labels = [s.get("label") if isinstance(s, Mapping) else getattr(s, "label", None) for s in (rest, held)]
    if any(label is None or label.ndim != 1 or not np.issubdtype(label.dtype, np.integer) for label in labels):
        return said
    classes = 1 + int(max(label.max() for label in labels))
    rest_C, held_C = (np.bincount(label, minlength=classes) for label in labels)
    off_C = np.abs(held_C - fraction * (rest_C + held_C))
    furthest = sorted(c for c in np.argsort(-off_C, kind="stable")[:10] if off_C[c] > 1)
    name = class_names or range(classes)
    told = ", ".join(f"{held_C[c]} of {rest_C[c] + held_C[c]} of class {name[c]}" for c in furthest)
    return f"{said}, not evenly by class: {told}" if told and np.sum(rest_C + held_C > 0) > 1 else said
