"""The live line of a notebook."""

import time
from collections.abc import Callable
from typing import Any

from rich.text import Text


class Cell:
    """One output of the cell that is updated, at most `a_second` times a second, and at the end once more.

    It has the part of rich's Live that a display uses. What is printed meanwhile stands below it.
    """

    def __init__(self, get_renderable: Callable[[], Text], *, a_second: float = 4) -> None:
        self.render, self.pause, self.shown, self.handle = get_renderable, 1 / a_second, 0.0, None

    def start(self) -> None:
        from IPython.display import display

        self.handle = display(self.bundle(), raw=True, display_id=True)

    def refresh(self) -> None:
        if time.monotonic() - self.shown > self.pause:
            self.handle.update(self.bundle(), raw=True)

    def stop(self) -> None:
        self.handle.update(self.bundle(), raw=True)

    def bundle(self) -> dict[str, Any]:
        self.shown = time.monotonic()
        return {"text/plain": self.render().plain}
