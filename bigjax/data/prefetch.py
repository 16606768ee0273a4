"""Making what comes next while what is there is used: a background thread between the data and the devices."""

import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from bigjax import UsageError


class DataError(RuntimeError):
    """The thread that makes the next items is no more."""


def told(e: BaseException | None) -> str:
    """What an error says, and where it was raised."""
    if e is None:
        return "it is gone"
    where = traceback.extract_tb(e.__traceback__)[-1:]
    return f"{type(e).__name__}: {e}" + "".join(f", {Path(f.filename).name} line {f.lineno}" for f in where)


class Prefetcher:
    """An iterator whose items are made by a background thread, at most `depth` ahead. Made by `prefetch`.

    `wait_seconds` is the time that the consumer was blocked so far; `close()` (or leaving a `with` block) ends the
    thread.
    """

    def __init__(self, iterator: Iterator[Any], put: Callable[[Any], Any], *, depth: int) -> None:
        self.wait_seconds = 0.0
        self._ready: deque[Any] = deque()
        self._changed = threading.Condition()
        self._ended = self._closed = False
        self._error: BaseException | None = None
        self._thread = threading.Thread(
            target=self._fill, args=(iterator, put, depth), name="bigjax-prefetch", daemon=True
        )
        self._thread.start()

    def _fill(self, iterator: Iterator[Any], put: Callable[[Any], Any], depth: int) -> None:
        try:
            try:
                for item in iterator:
                    made = put(item)
                    with self._changed:
                        self._changed.wait_for(lambda: self._closed or len(self._ready) < depth)
                        if self._closed:
                            return
                        self._ready.append(made)
                        self._changed.notify_all()
            finally:  # in this thread: a generator can't be closed while another thread runs it
                if hasattr(iterator, "close"):
                    iterator.close()
        except BaseException as e:  # also SystemExit: the consumer must hear of every end
            self._error = e
        finally:
            with self._changed:
                self._ended = True
                self._changed.notify_all()

    def __iter__(self) -> "Prefetcher":
        return self

    def __next__(self) -> Any:
        before = time.perf_counter()
        with self._changed:
            while not (self._ready or self._ended or self._closed) and self._thread.is_alive():
                self._changed.wait(1)
            self.wait_seconds += time.perf_counter() - before
            if self._ready:
                self._changed.notify_all()
                return self._ready.popleft()
            if isinstance(self._error, UsageError):
                raise UsageError(str(self._error)) from self._error
            if self._error is not None or not (self._ended or self._closed):
                raise DataError(f"the data thread failed ({told(self._error)})") from self._error
            raise StopIteration

    def close(self) -> None:
        """Ends the thread, however full or empty the queue is, and drops what was read ahead. May be called twice."""
        with self._changed:
            self._closed = True
            self._ready.clear()
            self._changed.notify_all()
        if self._thread is not threading.current_thread():
            self._thread.join(timeout=30)  # a reader that hangs must not hang its consumer too: the thread is a daemon

    def __enter__(self) -> "Prefetcher":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def prefetch(iterator: Iterator[Any], put: Callable[[Any], Any], *, depth: int = 2) -> Prefetcher:
    """Applies `put` (placing on the device, say) to the items of `iterator` in a background thread, `depth` ahead.

    What fails there is raised in the consumer after the items made before, with the original as cause: a UsageError as
    such, anything else as DataError. The thread ends at exhaustion, failure or `close()`, and closes `iterator`.
    """
    return Prefetcher(iterator, put, depth=max(depth, 1))
