"""What takes too long: a thread that knows what the main thread is at, and ends the process where it hangs.

Every part of a run says what it is by `watching`; what is not told in particular is told by the part around it.
"""

import contextlib
import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator

HUNG = 4  # exit status
SLOW = 3  # times the longest of its kind that something may take, once it is asked to end
UPDATE = "update"  # the kind of each update
SAVE = "save"  # the kind of what storage may hold up, however healthy it is
What = str | Callable[[], str]


class Watchdog:
    """Ends the process where something watched takes longer than `seconds` (0: never), with the stacks of all threads.

    Each `beat` begins the time anew.
    """

    def __init__(self, seconds: float):
        self.seconds, self.begun, self.beats = seconds, time.monotonic(), 0
        self.watched: list[tuple[What, str | None]] = []
        self.longest: dict[str, float] = {}  # seconds, by kind, without the first of each, which compiles
        self.closed = threading.Event()
        if seconds:
            threading.Thread(target=self.watch, name="bigjax-watchdog", daemon=True).start()

    @contextlib.contextmanager
    def watching(self, what: What, kind: str | None = None) -> Iterator[None]:
        """what: says what is watched while it is entered. kind: of things that take about equally long."""
        self.watched.append((what, kind))
        self.begun, self.beats = time.monotonic(), self.beats + 1
        try:
            yield
        finally:
            self.beat()
            self.watched.pop()

    def close(self) -> None:
        self.closed.set()

    def beat(self) -> None:
        """What is watched goes on."""
        now = time.monotonic()
        if self.watched and (kind := self.watched[-1][1]):
            known = self.longest.get(kind)
            self.longest[kind] = 0.0 if known is None else max(known, now - self.begun)
        self.begun, self.beats = now, self.beats + 1

    def doing(self) -> str:
        what, _ = (self.watched or [("what is not watched", None)])[-1]
        return what if isinstance(what, str) else what()

    def saving(self) -> bool:
        return bool(self.watched) and self.watched[-1][1] == SAVE

    def slow(self) -> bool | None:
        """Whether what goes on takes far longer than its kind ever has; None if that isn't known.

        What is of no kind may wait for an update.
        """
        _, kind = (self.watched or [("", None)])[-1]
        usual, seconds = self.longest.get(kind or ""), time.monotonic() - self.begun
        if usual:
            return seconds > SLOW * usual
        return None if seconds > SLOW * self.longest.get(UPDATE, 0.0) else False

    def watch(self) -> None:
        while not self.closed.wait(min(self.seconds / 4, 1.0)):
            if self.watched and time.monotonic() - self.begun > self.seconds:
                faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
                print(
                    f"error: {self.doing()} took longer than --hang-seconds {self.seconds:g}; above is where each "
                    "thread stood; the same command goes on from the last checkpoint",
                    file=sys.stderr,
                    flush=True,
                )
                os._exit(HUNG)


NOBODY = Watchdog(0)
dogs: list[Watchdog] = []


def dog() -> Watchdog:
    """The one of the run that is under way: of one inside another, its own."""
    return (dogs or [NOBODY])[-1]


@contextlib.contextmanager
def watched(seconds: float, what: What) -> Iterator[Watchdog]:
    """While it is entered all is watched: what `watching` tells, and what is between by the name `what`."""
    with contextlib.closing(Watchdog(seconds)) as mine, mine.watching(what):
        dogs.append(mine)
        try:
            yield mine
        finally:
            dogs.remove(mine)


def watching(what: What, kind: str | None = None) -> contextlib.AbstractContextManager[None]:
    """A part of the run under way; nothing where none is."""
    return dog().watching(what, kind)
