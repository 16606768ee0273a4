"""Rows of different lengths: batches of rows that are about as long, cut to few lengths.

Few lengths, since each is a shape for which the update is compiled. N rows, L positions, B rows of a batch.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from bigjax import UsageError

POOL = 50  # batches whose rows are sorted together
SIZES = 5  # lengths that batches are cut to, at most
MULTIPLE = 8  # of which they are


class ByLength(dict[str, np.ndarray]):
    """Arrays in memory whose rows have `lengths` (N,): of each batch the fields of `cut`, (N, L, ...), are cut to the
    smallest of `sizes` that holds its longest row; one that has less room stays whole.

    The batches of training hold rows of like length (`pipeline.rows_of`); evaluation keeps the order of the rows.
    lengths: None for the field `length`; else of the longest of the fields that are cut. sizes: None for those that
    leave least padding. UsageError: no such field, or a row longer than its field.
    """

    def __init__(
        self,
        fields: Mapping[str, np.ndarray],
        *,
        cut: Sequence[str] = ("tokens",),
        lengths: np.ndarray | None = None,
        sizes: Sequence[int] | None = None,
    ) -> None:
        super().__init__(fields)
        if missing := {*cut, *(("length",) if lengths is None else ())} - self.keys():
            raise UsageError(f"rows by length have no field {min(missing)!r}: there are {', '.join(self) or 'none'}")
        self.cut, self.lengths = tuple(cut), np.asarray(self["length"] if lengths is None else lengths)
        rooms, longest = [self[name].shape[1] for name in self.cut], int(self.lengths.max(initial=0))
        most = min(rooms) if lengths is None else max(rooms)
        if longest > most:
            raise UsageError(f"a row has the length {longest}, but {' and '.join(cut)} only {most} places: correct it")
        self.sizes = tuple(best_sizes(self.lengths, most=most) if sizes is None else sizes)

    def width(self, row_B: np.ndarray) -> int:
        """What a batch of these rows is cut to."""
        return self.sizes[np.searchsorted(self.sizes, self.lengths[row_B].max())]

    def part(self, rows: np.ndarray) -> "ByLength":
        """Some rows, cut to the same sizes."""
        fields = {name: array[rows] for name, array in self.items()}
        return ByLength(fields, cut=self.cut, lengths=self.lengths[rows], sizes=self.sizes)

    def narrow(self, width: int) -> dict[str, np.ndarray]:
        """All rows, cut: views."""
        return {name: array[:, :width] if name in self.cut else array for name, array in self.items()}


def best_sizes(length_N: np.ndarray, *, most: int, count: int = SIZES) -> list[int]:
    """At most `count` lengths, each a multiple of MULTIPLE or `most`, that leave least padding if each row is cut to
    the smallest that holds it; the last holds every row.
    """
    rounded_N = np.clip(-(-length_N // MULTIPLE) * MULTIPLE, 1, most)
    size_M, rows_M = np.unique(rounded_N, return_counts=True)
    behind_M = np.cumsum(rows_M)  # rows that a size and those below it hold
    # to cut the rows above size i (−1: all) up to size j
    cost_MM = (behind_M[None] - np.concatenate([[0], behind_M])[:, None]) * size_M[None].astype(float)
    cost_MM[np.arange(len(size_M) + 1)[:, None] > np.arange(len(size_M))[None]] = np.inf
    best_M, chosen = cost_MM[0], []
    for _ in range(min(count, len(size_M)) - 1):
        total_MM = best_M[:, None] + cost_MM[1:]
        chosen.append(total_MM.argmin(0))
        best_M = total_MM.min(0)
    place = len(size_M) - 1
    out = [place]
    for before_M in reversed(chosen):
        out.append(place := int(before_M[place]))
    return [int(size_M[i]) for i in reversed(out)]


def pool_of(n: int, *, batch_size: int, size: int) -> tuple[int, range] | None:
    """(epoch, numbers of the batches) of the pool of batch `n`; None of a batch that holds rows of two epochs."""
    epoch = n * batch_size // size
    first, end = -(-epoch * size // batch_size), (epoch + 1) * size // batch_size  # its whole batches
    if n >= end:
        return None
    start = first + (n - first) // POOL * POOL
    return epoch, range(start, min(start + POOL, end))
