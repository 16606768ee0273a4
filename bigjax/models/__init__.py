"""Models: Flax Linen modules, architecture only. `from bigjax.models import CNN`; `init`, `apply`, nothing else.

A family a file. At its end a file has `TINY`, a small instance of its model, or a dict with one of each of its models;
`TINY_INPUTS` are the shapes of what it is called with. That is all it takes: the models of this package are the
classes that a `TINY` calls, and the tests of every model run on them.
"""

import importlib
import re
from pathlib import Path
from typing import Any


def _files() -> dict[str, str]:
    """Model -> file; the text is read, nothing is imported."""
    found = {}
    for path in sorted(Path(__path__[0]).glob("[a-z]*.py")):
        top, _, tiny = path.read_text("utf-8").partition("\nTINY = ")
        called = set(re.findall(r"\w+(?=\()", tiny))
        found |= {name: path.stem for name in re.findall(r"^class (\w+)", top, re.M) if name in called}
    return found


def __dir__() -> list[str]:
    return sorted(_files())


def __getattr__(name: str) -> Any:  # a family's file is imported when it is first asked for
    files = _files()
    if name == "__all__":
        return sorted(files)
    if name not in files:
        raise AttributeError(
            f"module {__name__!r} has no attribute {name!r}: a model is what the TINY of its file calls"
        )
    return getattr(importlib.import_module(f"{__name__}.{files[name]}"), name)
