"""Making what comes next while what is there is used: a background thread between the data and the devices."""

import contextlib
import queue
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from bigjax import UsageError
from bigjax.data import order
from bigjax.data.lengths import POOL
from bigjax.program import Program

END = object()


class DataError(RuntimeError):
    """The thread that makes the next items is no more."""


def told(e: BaseException | None) -> str:
    """What an error says, and where it was raised."""
    if e is None:
        return "it is gone"
    where = traceback.extract_tb(e.__traceback__)[-1:]
    return f"{type(e).__name__}: {e}" + "".join(f", {Path(f.filename).name} line {f.lineno}" for f in where)


class Prefetcher(Iterator[Any], contextlib.AbstractContextManager):
    """Applies `put` (placing on the device, say) to the items of `iterator` in a background thread, `depth` ahead.

    What fails there is raised in the consumer after the items made before, with the original as cause: a UsageError as
    such, anything else as DataError. The thread ends at exhaustion, failure or `close()`, and closes `iterator`.
    `wait_seconds` is the time that the consumer was blocked so far.
    """

    def __init__(self, iterator: Iterator[Any], put: Callable[[Any], Any], *, depth: int = 2) -> None:
        self.wait_seconds, self._closed = 0.0, False
        self._ready, self._room = queue.SimpleQueue(), threading.Semaphore(max(depth, 1))
        self._end: Any = None  # why the thread ended: END, or an error
        self._thread = threading.Thread(target=self._fill, args=(iterator, put), name="bigjax-prefetch", daemon=True)
        self._thread.start()

    def _fill(self, iterator: Iterator[Any], put: Callable[[Any], Any]) -> None:
        try:
            # closed in this thread: a generator can't be while another thread runs it
            with contextlib.closing(iterator) if hasattr(iterator, "close") else contextlib.nullcontext():
                for item in iterator:
                    made = put(item)
                    self._room.acquire()
                    if self._closed:
                        break
                    self._ready.put(made)
            self._end = END
        except BaseException as e:  # also SystemExit: the consumer must hear of every end
            self._end = e
        self._ready.put(END)

    def __next__(self) -> Any:
        before, item, alive = time.perf_counter(), END, True
        while alive and not self._closed:
            alive = self._thread.is_alive()  # before looking: what the thread put last is found
            with contextlib.suppress(queue.Empty):
                item = self._ready.get(timeout=1.0 if alive else 0.0)
                break
        self.wait_seconds += time.perf_counter() - before
        if item is not END:
            self._room.release()
            return item
        if self._closed or self._end is END:
            raise StopIteration
        if isinstance(self._end, UsageError):
            raise UsageError(str(self._end)) from self._end
        raise DataError(f"the data thread failed ({told(self._end)})") from self._end

    def close(self, patience: float = 30) -> None:
        """Ends the thread, however many items are ready, and drops these. May be called twice.

        patience: seconds. A reader that hangs must not hang its consumer too: the thread is a daemon.
        """
        self._closed, self._ready = True, queue.SimpleQueue()
        self._room.release()
        if self._thread is not threading.current_thread():
            self._thread.join(timeout=patience)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """An interrupt waits for no slow reader."""
        self.close(0.5 if kind and issubclass(kind, KeyboardInterrupt) else 30)


class Shapes:
    """Which of the batches that follow one another have a shape that none before had: their updates are compiled."""

    def __init__(self, program: Program) -> None:
        self.widths: set[int | None] = set()
        self.width = order.width_of(program.train, **order_of(program))

    def new(self, n: int) -> bool:
        """Whether batch `n` is the first of its shape; `widths` then has it."""
        before = len(self.widths)
        self.widths.add(self.width(n))
        return len(self.widths) > before

    def all(self) -> int:
        """How many batches from the first on have all the shapes that a pool of them has."""
        return 1 + max(n for n in range(POOL) if self.new(n))


def order_of(program: Program) -> dict[str, int]:
    """What decides which rows are in which batch."""
    return {"seed": program.config.seed, "batch_size": program.config.batch_size}


def doing(program: Program, step: int) -> str:
    """What the watchdog says of the update after `step`."""
    rows = order.rows_of(program.train, **order_of(program))(step)
    return f"update {step + 1} (batch {step}: examples {', '.join(map(str, rows[:8]))}, ...)"


def next_batch(batches: Iterator[Any], program: Program, step: int) -> Any:
    """Batch number `step`; what fails in the data thread is one line that names it."""
    again = "the same command goes on from the last checkpoint"
    try:
        if (batch := next(batches, None)) is not None:
            return batch
    except DataError as e:
        raise UsageError(f"{doing(program, step)}: {e}; {again}") from e
    raise UsageError(f"{doing(program, step)}: the data ended; {again}")
