"""What ends a run from outside: signals that ask it to stop, and files that can't be written."""

import contextlib
import errno
import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Any

from etils import epath

from bigjax.run import processes, stopping, words
from bigjax.run.atomic import unwritten
from bigjax.run.attempt import Attempts


def quiet() -> None:
    """Where a program starts: what fails in a save reaches the user as one line, a SaveError, and in no other form.

    Not also as orbax logs it with a traceback, nor as tensorstore prints what it can't tell orbax any more, a hundred
    times. Nor is there a word of an old checkpoint that a kill left half deleted: manifests say what is whole.
    """
    logger, shown = logging.getLogger("absl"), sys.unraisablehook
    if _needed in logger.filters:
        return
    logger.addFilter(_needed)

    def hook(unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            shown(unraisable)

    sys.unraisablehook = hook


def _needed(record: logging.LogRecord) -> bool:
    known = record.exc_info or str(record.msg).startswith("Metadata file does not exist")
    return not (known and "orbax" in record.pathname)


ENDING = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP") if hasattr(signal, name))
SAVING = getattr(signal, "SIGUSR1", None)


class Signals(Attempts):
    """What has been asked of the run from outside since it began: to end (ENDING), or to save and go on (SAVING)."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[int] = []
        self.all = stopping.All() if processes.several() else None

    def __call__(self, step: int) -> int | None:
        """The signal by which the run ends after `step`: asked at every step, by all processes at the same."""
        if self.all:
            return self.all.stops()
        return next((n for n in self.seen if n != SAVING), None)

    def save(self) -> bool:
        """Whether a save was asked for since this was last asked."""
        asked = SAVING in self.seen
        while SAVING in self.seen:
            self.seen.remove(SAVING)
        return asked

    def note(self, number: int, _: Any) -> None:
        self.seen.append(number)
        if number != SAVING:
            self.end(number)


@contextlib.contextmanager
def signals() -> Iterator[Signals]:
    """While it is entered signals do nothing but to be told by what it gives, and to be answered at once on stderr.

    Among several processes one that ends any of them is told to all, at the same step; one that saves is heard by
    process 0. Outside the main thread, where Python allows no handlers, signals do what they did; and a SIGHUP that was
    ignored, as under `nohup`, is ignored.
    """
    asked = Signals()
    with asked.all or contextlib.nullcontext():
        if threading.current_thread() is not threading.main_thread():
            yield asked
            return
        nohup = getattr(signal, "SIGHUP", None)
        heard = [n for n in (*ENDING, SAVING) if n and (n != nohup or signal.getsignal(n) != signal.SIG_IGN)]
        before = {n: signal.signal(n, asked.note) for n in heard}
        read, write = os.pipe()
        os.set_blocking(write, False)
        waked = signal.set_wakeup_fd(write, warn_on_full_buffer=False)
        answering = threading.Thread(target=answer, args=(read, asked), name="bigjax-signals", daemon=True)
        answering.start()
        try:
            yield asked
        finally:
            signal.set_wakeup_fd(waked)
            os.close(write)
            answering.join(timeout=1)  # what it says comes before what follows
            for number, handler in before.items():
                signal.signal(number, handler)


def answer(read: int, asked: Signals) -> None:
    """Says at once that a signal has come: the main thread hears of it only when what it computes is done.

    One that ends the run is told to all processes; and where the run hangs, so that it can't be obeyed, to `stopping`.
    """
    hung = None
    with open(read, "rb", buffering=0) as numbers:
        while byte := numbers.read(1):
            if (number := byte[0]) not in (*ENDING, SAVING):
                continue
            what = "saving after this update" if number == SAVING else f"stopping {asked.when()}"
            words.at_once(f"\n{signal.Signals(number).name}: {what}\n")
            if number == SAVING:
                continue
            if asked.all:
                asked.all.ask(number)
            elif hung is None:
                hung = stopping.Hung(number)
            (asked.all or hung).again(number)
    if hung:
        hung.over.set()


REFUSED = {getattr(errno, name) for name in "ENOSPC EDQUOT EROFS EACCES EPERM EIO EFBIG ESTALE".split()}


@contextlib.contextmanager
def storage(workdir: epath.Path) -> Iterator[None]:
    """What the file system refuses in the working directory while it is entered becomes one line, a SaveError."""
    try:
        yield
    except OSError as e:
        if e.errno not in REFUSED or str(workdir) not in str(e.filename or workdir):
            raise
        raise unwritten(e, f"the run in {workdir} cannot go on: its files cannot be written") from e
