"""What libraries print from C++, where nothing in Python can stop it."""

import contextlib
import io
import os
import re
import sys
import threading
from collections.abc import Iterator

from bigjax.run.machine import Terminal

# What gloo tells of each group of devices that meets. Several threads print it piece by piece, into one another.
GLOO = re.compile(
    rb"(\[Gloo\] Rank | is connected to | peer ranks\. |Expected number of connected peer ranks is : |\d+|\s+)*"
)


@contextlib.contextmanager
def dropped() -> Iterator[None]:
    """While it is entered gloo's greetings don't reach stdout; all other lines do, and Python prints there as ever.

    Only where stdout is the process's own: nothing happens in a notebook.
    """
    shown = sys.stdout
    try:
        own = shown.fileno() == 1
    except (AttributeError, OSError, ValueError):
        own = False
    if not own:
        yield
        return
    shown.flush()
    real = os.dup(1)
    out, into = os.pipe()
    os.dup2(into, 1)
    os.close(into)
    thread = threading.Thread(target=pass_on, args=(out, real), name="bigjax-noise", daemon=True)
    thread.start()
    how = {k: getattr(shown, k) for k in ("encoding", "errors", "line_buffering", "write_through")}
    sys.stdout = io.TextIOWrapper(io.BufferedWriter(Terminal(os.dup(real), "w")), **how)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # a terminal that is gone
            sys.stdout.flush()
        os.dup2(real, 1)  # the pipe ends, unless a child has it too
        sys.stdout = shown
        thread.join(1)


def pass_on(out: int, real: int) -> None:
    """The lines from one file descriptor to another, to their end; without gloo's."""
    gloo = False
    with os.fdopen(out, "rb") as lines:
        for line in lines:
            gloo = bool(GLOO.fullmatch(line)) and (gloo or b"e" in line)  # a number may be somebody else's
            with contextlib.suppress(OSError):
                if not gloo:
                    os.write(real, line)
