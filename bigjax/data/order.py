"""Which rows are in which batch, and in which order: a pure function of (seed, n), row for row."""

from collections.abc import Callable
from functools import lru_cache, partial

import numpy as np

from bigjax.data.lengths import ByLength, pool_of
from bigjax.experiment import Split, size_of


@lru_cache(maxsize=3)  # a batch can straddle two epochs, and reading ahead is in the next one
def _permutation(seed: int, epoch: int, size: int) -> np.ndarray:
    rows = generator(seed, epoch).permutation(size)
    rows.flags.writeable = False
    return rows


def generator(seed: int, stream: int, row: int = -1, pool: int = -1) -> np.random.Generator:
    """Philox keyed by (seed, stream); rows and pools start in disjoint blocks of its counter, apart from the one of the
    permutation (-1)."""
    key = np.array([seed % 2**64, stream], np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=np.array([0, row + 1, pool + 1, 0], np.uint64)))


def batch_rows(n: int, *, seed: int, batch_size: int, size: int) -> np.ndarray:
    """The data-set rows of global batch `n`: (batch_size,) int64.

    Position p = n·batch_size + j is place p mod `size` in epoch p div `size`; each epoch is a permutation of all rows,
    so that every example is seen exactly once an epoch, and batches straddle epochs: nothing is dropped.
    """
    epoch_B, place_B = np.divmod(np.arange(n * batch_size, (n + 1) * batch_size, dtype=np.int64), size)
    return np.concatenate([_permutation(seed, int(e), size)[place_B[epoch_B == e]] for e in np.unique(epoch_B)]).astype(
        np.int64
    )


def rows_of(split: Split, *, seed: int, batch_size: int) -> Callable[[int], np.ndarray]:
    """n -> the rows of global batch n: `batch_rows`; of a `ByLength` those of a pool of batches, sorted by length.

    A pool is of consecutive batches within an epoch; their rows are sorted, ties by position, cut into batches again,
    and the batches put in a random order that depends on seed, epoch and pool alone. A batch that straddles two epochs
    stays as it is: so every example is still seen exactly once an epoch.
    """
    plain = partial(batch_rows, seed=seed, batch_size=batch_size, size=size_of(split))
    if not isinstance(split, ByLength):
        return plain

    @lru_cache(maxsize=2)  # of pools: the next may be read ahead
    def sorted_rows(epoch: int, numbers: range) -> np.ndarray:
        row_N = np.concatenate([plain(n) for n in numbers])
        row_NB = row_N[np.argsort(split.lengths[row_N], kind="stable")].reshape(-1, batch_size)
        return row_NB[generator(seed, epoch, pool=numbers.start).permutation(len(numbers))]

    def rows(n: int) -> np.ndarray:
        pool = pool_of(n, batch_size=batch_size, size=size_of(split))
        return plain(n) if pool is None else sorted_rows(*pool)[n - pool[1].start]

    return rows


def width(split: Split, row_B: np.ndarray) -> int | None:
    """What a global batch of these rows is cut to, in all processes; None where it is not."""
    return split.width(row_B) if isinstance(split, ByLength) else None


def width_of(split: Split, *, seed: int, batch_size: int) -> Callable[[int], int | None]:
    """n -> what global batch n is cut to."""
    if not isinstance(split, ByLength):
        return lambda n: None
    rows = rows_of(split, seed=seed, batch_size=batch_size)
    return lambda n: split.width(rows(n))
