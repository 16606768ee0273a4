"""What a program sets in its process before it trains: memory, the compilation cache, a terminal that may be lost."""

import ctypes
import io
import os
import resource
import sys

import jax

from bigjax import UsageError, place

REPEATABLE = "--xla_gpu_deterministic_ops=true"


def keep_memory() -> None:
    """Lets glibc keep the memory of large arrays instead of returning it to the system after each use.

    XLA allocates its temporaries anew in every step; on CPU the page faults are a large part of a small model's
    step. A C library without `mallopt` is left as it is.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return
    for parameter, value in ((-3, 1 << 30), (-1, 2**31 - 1), (-8, 1)):  # mmap threshold, trim threshold, arenas
        mallopt(parameter, value)


def cache_compilations(on: bool) -> None:
    """JAX's persistent compilation cache, in the user's cache folder unless JAX_COMPILATION_CACHE_DIR says where."""
    jax.config.update("jax_enable_compilation_cache", on)
    if on:
        usual = os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "bigjax", "compiled")
        folder = place(jax.config.jax_compilation_cache_dir or usual, "JAX_COMPILATION_CACHE_DIR ")
        jax.config.update("jax_compilation_cache_dir", str(folder))


def repeat_bits(on: bool) -> None:
    """Has XLA leave out what gives a GPU other bits from run to run; on CPU and TPU there is nothing of that kind.

    Raises UsageError where JAX has a GPU already, without it.
    """
    from jax._src.xla_bridge import backends_are_initialized  # JAX offers no public way to ask

    given = os.environ.get("XLA_FLAGS", "").split()
    if not on or REPEATABLE in given:
        return
    if not backends_are_initialized():
        os.environ["XLA_FLAGS"] = " ".join([*given, REPEATABLE])
    elif jax.default_backend() == "gpu":
        raise UsageError(
            f"--deterministic: JAX has started without it: set XLA_FLAGS={REPEATABLE} before, and run again"
        )


def peak_bytes() -> int:
    """The most memory that this process has held so far. `getrusage` also counts the one that it was started by."""
    try:
        with open("/proc/self/status") as status:
            return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class Terminal(io.FileIO):
    """Standard output or error. Once it takes nothing any more, what is written there is dropped, and training goes on.

    A closed pipe (`| head`), a terminal that is gone, a full disk behind `> out.txt`: the other of the two is told.
    """

    def write(self, data: bytes) -> int:
        try:
            return super().write(data)
        except OSError as e:
            number, nowhere = self.fileno(), os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, number)  # for all that write there, C++ too
            os.close(nowhere)
            if number != 2:  # 1, or what stands in for it (`noise`)
                told = f"standard output takes nothing any more ({e.strerror}): the run goes on without it"
                print(told, file=sys.stderr, flush=True)
            return len(data)


def forgive_terminal() -> None:
    """Makes standard output and error, where they are the process's own, a `Terminal`.

    Characters that its encoding does not have are shown as escapes.
    """
    for name in ("stdout", "stderr"):
        old = getattr(sys, name)
        if old is None or old is not getattr(sys, f"__{name}__") or isinstance(getattr(old.buffer, "raw", 0), Terminal):
            continue
        old.flush()
        raw = io.BufferedWriter(Terminal(old.fileno(), "w", closefd=False))
        new = io.TextIOWrapper(raw, old.encoding, "backslashreplace", line_buffering=old.line_buffering)
        new.mode = old.mode
        setattr(sys, name, new)
        setattr(sys, f"__{name}__", new)  # the old one has nothing left to write at the end
