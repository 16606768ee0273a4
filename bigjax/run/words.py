"""How what is wrong is told: in one line, which names what to change as whoever asked would write it.

Messages are written with flags. Where no flags were parsed, in a notebook or a script that calls `train.fit` itself,
they name what the flags are in Python: `--no-resume` is `RunConfig(resume=False)`.
"""

import contextlib
import os
import re
import sys
import traceback
import typing
from collections.abc import Iterator
from concurrent.futures import thread as pool
from pathlib import Path
from typing import Any, NoReturn

flags = False  # whether they were parsed: by a script's `cli.main`, or python -m bigjax
COMMAND = re.compile(r"(python -m bigjax [^,;)]*)")  # stays as it is
FLAG = re.compile(r"(?<![\w-])--(no-)?([a-z][a-z0-9-]*(?:\.[a-z]+)?)(?:[ =]('[^']*'|\"[^\"]*\"|[^\s,;)]*[^\s,;:.)]))?")
# what follows a flag in a sentence, and is no value of it
PROSE = {
    *"alone and asks belongs cannot chooses for holds is of on once or other out".split(),
    *"starts takes than that to which with".split(),
}


@contextlib.contextmanager
def by_flags() -> Iterator[None]:
    """While it is entered messages name flags."""
    global flags
    before, flags = flags, True
    try:
        yield
    finally:
        flags = before


def told(text: str) -> str:
    """The text of an error. From here on Python shows it as a script with flags does, where nobody catches it."""
    if sys.excepthook is sys.__excepthook__:  # a hook of others stays
        sys.excepthook = at_the_top
    return spoken(text)


def spoken(text: str) -> str:
    """A message, with flags or in Python."""
    if flags:
        return text
    text = text.replace("the same command", "the same call")
    if "--" not in text:
        return text
    parts = COMMAND.split(text)
    parts[::2] = [FLAG.sub(in_python, part).replace(") RunConfig(", ", ") for part in parts[::2]]
    return "".join(parts)


def in_python(found: re.Match) -> str:
    """`--log-every 5` as `RunConfig(log_every=5)`; what is no flag of RunConfig as the argument alone."""
    from bigjax.experiment import RunConfig

    no, flag, word = found.groups()
    group, _, name = flag.replace("-", "_").rpartition(".")
    kinds = typing.get_type_hints(RunConfig)
    if group in kinds:
        kinds = typing.get_type_hints(owner := kinds[group])
    ours = name in kinds
    value, rest = value_of(kinds.get(name), word)
    said = f"{name}={not no if kinds.get(name) is bool or no else value}"
    if ours and group:
        said = f"{group}={owner.__name__}({said})"
    return (f"RunConfig({said})" if ours else said) + rest


def value_of(kind: Any, word: str | None) -> tuple[str, str]:
    """What a flag of a kind (None: unknown) is set to by the word behind it, and what of that is not a value."""
    rest = "" if word is None else f" {word}"
    if word is None or kind is bool or word in PROSE:
        return "...", rest
    if re.fullmatch(r"-?\d[\d_.]*(e[+-]?\d+)?|None|[A-Z]+", word):
        return word, ""
    kinds = typing.get_args(kind) or (kind,)
    if str in kinds or kind is None or word in kinds:
        return (word if word[0] in "'\"" else repr(word).replace("'", '"')), ""
    return "...", rest


def line(e: BaseException) -> str:
    """What is shown of an error that the user can put right, or of an interrupt."""
    from bigjax import Interrupted, UsageError

    if isinstance(e, UsageError):
        return f"error: {e}"
    return str(e) if isinstance(e, Interrupted) else "stopped by SIGINT"


@contextlib.contextmanager
def leaving() -> Iterator[None]:
    """What a program is in: an error of the user, or an interrupt, ends it as `leave` says."""
    from bigjax import UsageError

    try:
        yield
    except (KeyboardInterrupt, UsageError) as e:
        leave(e)
    except SystemExit as e:
        if not typed():
            raise
        if e.code:  # of the parser of flags
            raise UsageError("these flags are not understood, as said above: correct them") from None


def leave(e: BaseException) -> NoReturn:
    """Ends the program by a UsageError or an interrupt: its line on stderr, and an exit status. In a notebook it is
    raised, which shows that line.
    """
    from bigjax import SaveError, UsageError
    from bigjax.run import processes

    if typed():
        raise e.with_traceback(None) from None
    print(line(e), file=sys.stderr, flush=True)
    wrong = isinstance(e, UsageError)
    status = 2 if wrong else 128 + getattr(e, "number", 2)
    if isinstance(e, SaveError) or (wrong and processes.several()) or reading():
        processes.end(status)  # Python would wait for the thread that is left behind, JAX for the other processes
    raise SystemExit(status) from None


def reading() -> bool:
    """Whether a thread of a pool, for which Python waits at its end, is still in a reader that bigjax called."""
    home = str(Path(__file__).parents[1])
    for frame in sys._current_frames().values():
        files = [f.f_code.co_filename for f, _ in traceback.walk_stack(frame)]
        if pool.__file__ in files and any(file.startswith(home) for file in files):
            return True
    return False


def at_the_top(kind: type[BaseException], e: BaseException, trace: Any) -> None:
    """Python's hook for what nobody has caught: an error of ours ends a script as `leave` says."""
    from bigjax import Interrupted, UsageError

    if not isinstance(e, UsageError | Interrupted):
        sys.__excepthook__(kind, e, trace)
    elif hasattr(sys, "ps1"):  # a prompt, which goes on
        print(line(e), file=sys.stderr, flush=True)
    else:
        leave(e)


def at_once(text: str) -> None:
    """Writes on stderr from another thread than the main one, which may be anywhere: in the middle of a line, too."""
    with contextlib.suppress(OSError, ValueError):  # a terminal that is gone
        if typed():  # a notebook's is no file
            print(text, end="", file=sys.stderr, flush=True)
        else:
            os.write(2, text.encode())


def typed() -> bool:
    """Whether what runs was typed into IPython or a notebook; not where these run a script, by %run."""
    shell = sys.modules.get("IPython")
    return bool(shell and shell.get_ipython()) and not hasattr(sys.modules["__main__"], "__file__")
