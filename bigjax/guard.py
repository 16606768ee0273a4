"""What ends a run from outside or from within: signals that ask it to stop, and updates that never end."""

import contextlib
import faulthandler
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator

from bigjax import processes

HUNG = 4  # exit status


class Interrupted(KeyboardInterrupt):
    """A run stopped by a signal, after it was saved; `number` is the signal's."""

    def __init__(self, number: int, step: int):
        self.number = number
        super().__init__(
            f"stopped by {signal.Signals(number).name} at step {step}, which is saved: the same command goes on"
        )


@contextlib.contextmanager
def signals() -> Iterator[Callable[[], int | None]]:
    """While it is entered SIGTERM and SIGINT do nothing but to be told by what it gives: the first one's number.

    Outside the main thread, where Python allows no handlers, and where several processes would have to stop at the
    same step, signals do what they did.
    """
    seen: list[int] = []
    if threading.current_thread() is not threading.main_thread() or processes.several():
        yield lambda: None
        return
    before = {n: signal.signal(n, lambda number, _: seen.append(number)) for n in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield lambda: seen[0] if seen else None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Watchdog:
    """Ends the process where an update takes longer than `seconds` (0: never), with the stacks of all threads.

    It watches between `start` and `stop`, and each `beat` begins the time anew. describe: says what is worked on.
    """

    def __init__(self, seconds: float, describe: Callable[[], str]):
        self.seconds, self.describe = seconds, describe
        self.deadline = float("inf")
        self.closed = threading.Event()
        if seconds:
            threading.Thread(target=self.watch, name="bigjax-watchdog", daemon=True).start()

    def start(self) -> None:
        self.deadline = time.monotonic() + self.seconds

    beat = start

    def stop(self) -> None:
        self.deadline = float("inf")

    def watch(self) -> None:
        while not self.closed.wait(min(self.seconds / 4, 1.0)):
            if time.monotonic() > self.deadline:
                faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
                print(
                    f"error: {self.describe()} took longer than --hang-seconds {self.seconds:g}; above is where each "
                    "thread stood; the same command goes on from the last checkpoint",
                    file=sys.stderr,
                    flush=True,
                )
                os._exit(HUNG)
