"""What ends a run from outside or from within: signals that ask it to stop, and updates that never end."""

import contextlib
import errno
import faulthandler
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from etils import epath
from jax.experimental.multihost_utils import reached_preemption_sync_point

from bigjax import SaveError
from bigjax.run import processes

HUNG = 4  # exit status


def quiet() -> None:
    """Where a program starts: what fails in a save reaches the user as one line, a SaveError, and in no other form.

    Not also as orbax logs it with a traceback, nor as tensorstore prints what it can't tell orbax any more, a hundred
    times.
    """
    logger, shown = logging.getLogger("absl"), sys.unraisablehook
    if _not_twice in logger.filters:
        return
    logger.addFilter(_not_twice)

    def hook(unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            shown(unraisable)

    sys.unraisablehook = hook


def _not_twice(record: logging.LogRecord) -> bool:
    return not (record.exc_info and "orbax" in record.pathname)


@contextlib.contextmanager
def signals() -> Iterator[Callable[[int], int | None]]:
    """While it is entered SIGTERM and SIGINT do nothing but to be told by what it gives, asked at every step.

    Among several processes one signal to any of them is told to all, at the same step. Outside the main thread, where
    Python allows no handlers, signals do what they did.
    """
    seen: list[int] = []

    def told(step: int) -> int | None:
        together = processes.several() and reached_preemption_sync_point(step)  # JAX hears SIGTERM and agrees with all
        return (seen or [signal.SIGTERM])[0] if together or (seen and not processes.several()) else None

    def note(number: int, _: Any) -> None:
        seen.append(number)
        if processes.several():
            os.kill(os.getpid(), signal.SIGTERM)

    if threading.current_thread() is not threading.main_thread():
        yield lambda step: None
        return
    heard = [signal.SIGINT] if processes.several() else [signal.SIGTERM, signal.SIGINT]
    before = {n: signal.signal(n, note) for n in heard}
    try:
        yield told
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


REFUSED = {getattr(errno, name) for name in "ENOSPC EDQUOT EROFS EACCES EPERM EIO EFBIG ESTALE".split()}


@contextlib.contextmanager
def storage(workdir: epath.Path) -> Iterator[None]:
    """What the file system refuses in the working directory while it is entered becomes one line, a SaveError."""
    try:
        yield
    except OSError as e:
        if e.errno not in REFUSED or str(workdir) not in str(e.filename or workdir):
            raise
        raise SaveError.by(e, f"the run in {workdir} cannot go on: its files cannot be written") from e


class Watchdog:
    """Ends the process where something watched takes longer than `seconds` (0: never), with the stacks of all threads.

    Each `beat` begins the time anew.
    """

    def __init__(self, seconds: float):
        self.seconds, self.deadline = seconds, float("inf")
        self.closed = threading.Event()
        if seconds:
            threading.Thread(target=self.watch, name="bigjax-watchdog", daemon=True).start()

    @contextlib.contextmanager
    def watching(self, what: Callable[[], str]) -> Iterator[None]:
        """what: says what is watched while it is entered."""
        self.what = what
        self.beat()
        try:
            yield
        finally:
            self.deadline = float("inf")

    def close(self) -> None:
        self.closed.set()

    def beat(self) -> None:
        self.deadline = time.monotonic() + self.seconds

    def watch(self) -> None:
        while not self.closed.wait(min(self.seconds / 4, 1.0)):
            if time.monotonic() > self.deadline:
                faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
                print(
                    f"error: {self.what()} took longer than --hang-seconds {self.seconds:g}; above is where each "
                    "thread stood; the same command goes on from the last checkpoint",
                    file=sys.stderr,
                    flush=True,
                )
                os._exit(HUNG)
