"""bigjax: functional Flax models, one sharded train step, from a laptop's CPU to a TPU pod."""

import importlib.util
import os
import re
import signal
from pathlib import Path
from typing import Any
from urllib.parse import unquote

__all__ = ["Interrupted", "SaveError", "UsageError", "load", "pretrained"]
__version__ = "0.1.0"


class Told(BaseException):
    """What is told in one line, without a traceback: of flags, or of what they are in Python (run/words.py)."""

    def __init__(self, text: str):
        from bigjax.run.words import told

        super().__init__(told(text))

    def _render_traceback_(self) -> list[str]:  # what IPython shows
        return [f"{type(self).__name__}: {self}"]


class UsageError(Told, Exception):
    """Something the user can put right. The text is one line: the cause, then the next action."""


class SaveError(UsageError):
    """What a run must keep could not be written; a failed save of a checkpoint leaves a thread that waits forever."""


class Interrupted(Told, KeyboardInterrupt):
    """A run stopped by the signal `number`; `where` says what is saved."""

    def __init__(self, number: int, where: str):
        self.number = number
        super().__init__(f"stopped by {signal.Signals(number).name} {where}: the same command goes on")


def place(path: Any, flag: str = "") -> Any:
    """Where a user says that something lies, as an epath.Path: ~ expanded, file:// as the local path that it is.

    UsageError, with the `flag` that said so, where nothing is: an empty name, or storage other than gs://.
    """
    from etils import epath

    text = str(path)
    scheme, slashes, rest = re.fullmatch(r"(?:([A-Za-z][\w+.-]+):(/+))?(.*)", text, re.S).groups()
    if scheme == "file" and (rest.startswith("localhost/") or len(slashes) != 2):
        return epath.Path(unquote("/" + rest.removeprefix("localhost/")))
    if not text.strip() or os.path.expanduser(text).startswith("~") or (scheme and (scheme, slashes) != ("gs", "//")):
        raise UsageError(
            f"{flag}{text!r} cannot be read or written here: give a local path (download it first), or gs://bucket/folder"
        )
    if scheme and not any(map(importlib.util.find_spec, ("gcsfs", "tensorflow"))):
        raise UsageError(f'{flag}{text} needs gcsfs: pip install -e ".[gcs]"')
    return epath.Path(path).expanduser()


def defined(folder: str, kind: str) -> dict[str, str]:
    """What stands at the top of a folder's files, as `class` or `def`: public name -> file, which is only read."""
    paths = sorted(Path(folder).glob("[a-z]*.py"))
    return {name: p.stem for p in paths for name in re.findall(rf"^{kind} ([A-Za-z]\w*)", p.read_text(), re.M)}


def member(package: str, folder: str, kind: str, name: str) -> Any:
    """What a package's `__getattr__` gives: the file that defines `name` is imported when it is first asked for."""
    if (file := defined(folder, kind).get(name)) is None:
        raise AttributeError(f"module {package!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{package}.{file}"), name)


def __dir__() -> list[str]:
    return [name for name in sorted({*globals(), *__all__}) if name in __all__ or name.startswith("__")]


def __getattr__(name: str) -> Any:  # lazily, so that importing bigjax.models stays as cheap as importing flax
    if name in ("load", "pretrained"):
        module = importlib.import_module("bigjax.run.restore" if name == "load" else "bigjax.pretrained")
        return module.load if name == "load" else module
    raise AttributeError(f"module 'bigjax' has no attribute {name!r}")
