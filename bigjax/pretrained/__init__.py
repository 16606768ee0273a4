"""Models with everybody's weights: `load`, `save`, `tokenizer`, `features`, of a folder with config.json and
safetensors files.

A family is a file with the two tables that make its names and its config.json ours, and back; `families` lists them.
"""

import importlib
from typing import Any

_FILES = {"features": "vectors", "load": "reading", "save": "writing", "tokenizer": "tokens"}
__all__ = ["features", "load", "save", "tokenizer"]


def __dir__() -> list[str]:
    return sorted(__all__)


def __getattr__(name: str) -> Any:  # each file is read when it is first asked for
    if name not in _FILES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_FILES[name]}"), name)
