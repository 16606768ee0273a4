"""What is learned: losses and their metrics, a kind a file; each function gives a `Task`."""

from typing import Any

from bigjax import defined, member


def __dir__() -> list[str]:
    return sorted(defined(__path__[0], "def"))


def __getattr__(name: str) -> Any:  # each file is read when it is first asked for
    return member(__name__, __path__[0], "def", name)
