"""What libraries print from C++, where nothing in Python can stop it."""

import contextlib
import io
import os
import sys
import threading
from collections.abc import Iterator

DROPPED = (b"[Gloo] ",)  # how lines begin that tell a user nothing: each group of processes says that it has met


@contextlib.contextmanager
def dropped() -> Iterator[None]:
    """While it is entered such lines don't reach stdout; all other lines do, and what Python prints goes there as ever.

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
    sys.stdout = io.TextIOWrapper(os.fdopen(os.dup(real), "wb"), **how)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # a terminal that is gone
            sys.stdout.flush()
        os.dup2(real, 1)  # the pipe ends, unless a child has it too
        sys.stdout = shown
        thread.join(1)


def pass_on(out: int, real: int) -> None:
    """The lines from one file descriptor to another, to their end; without those of DROPPED."""
    with os.fdopen(out, "rb") as lines:
        for line in lines:
            with contextlib.suppress(OSError):
                if not line.startswith(DROPPED):
                    os.write(real, line)
