"""What a signal that ends the run may break off at once, where it is in Python, without harm to the run."""

from collections.abc import Callable
from typing import Any

from bigjax.run import processes


class Broken(KeyboardInterrupt):
    """An attempt, by a signal."""


class Attempts:
    """Calls of what a user wrote that may take long and change nothing of the run: readers, evaluators, galleries."""

    def __init__(self) -> None:
        self.under_way = False
        self.ended = False  # a signal has been heard that ends the run
        self.broken = False  # and has broken off an attempt

    def attempt(self, call: Callable[..., Any], *arguments: Any) -> Any:
        """What the call gives; None where a signal has ended it, or came before.

        Several processes go on to the next step: one of them would wait for the others in a collective.
        """
        if processes.several():
            return call(*arguments)
        try:
            self.under_way = True
            given = None if self.ended else call(*arguments)
            self.under_way = False
            return given
        except Broken:
            return None
        finally:
            self.under_way = False

    def end(self) -> None:
        """Called by the handler of a signal that ends the run, in the main thread."""
        self.ended = True
        if self.under_way:
            self.under_way, self.broken = False, True  # what is closed because of it is left in peace
            raise Broken

    def when(self) -> str:
        """When the run ends, for who has asked."""
        return "now" if self.under_way or self.broken else "after this update"
