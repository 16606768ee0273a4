"""Copies of what files hold: in our layout and dtype, in one pass, where JAX on a CPU takes them over as they are."""

import functools
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor

import numpy as np

PIECE = 2**21  # bytes that stay in a processor's cache between being read and being written
ALIGNED = 64  # bytes, as memory has to be that JAX takes over: otherwise it copies it


def empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Memory of our own: the file may change, and what JAX takes over may not."""
    size = int(np.prod(shape)) * dtype.itemsize
    whole = np.empty(size + ALIGNED, np.uint8)
    start = -whole.ctypes.data % ALIGNED
    return whole[start : start + size].view(dtype).reshape(shape)


def pieces(out: np.ndarray, array: np.ndarray) -> Iterable[Callable[[], None]]:
    """What makes `out` equal to an array of a file, in parts that lie side by side in the file."""
    if not array.size:
        return
    axis = int(np.argmax([stride if n > 1 else 0 for stride, n in zip(array.strides, array.shape)] or [0]))
    size = array.shape[axis] if array.ndim else 1
    step = max(1, PIECE * size // out.nbytes)
    for start in range(0, size, step):
        at = (slice(None),) * axis + (slice(start, start + step),) if array.ndim else ()

        def copy(at: tuple[slice, ...] = at) -> None:
            out[at] = array[at].astype(out.dtype, copy=False)

        yield copy


@functools.cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor()


def fill(parts: Iterable[tuple[np.ndarray, np.ndarray]]) -> None:
    """Makes the first of each pair equal to the second, by all processors."""
    work = [copy for out, array in parts for copy in pieces(out, array)]
    if len(work) == 1:
        work[0]()
    else:
        list(_pool().map(lambda copy: copy(), work))
