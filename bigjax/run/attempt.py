"""What a signal that ends the run may break off at once, where it is in Python, without harm to the run."""

from collections.abc import Callable
from typing import Any

from bigjax import Interrupted
from bigjax.run import processes


class Broken(KeyboardInterrupt):
    """An attempt, by a signal."""


class Attempts:
    """Calls of what a user wrote that may take long and change nothing of the run: readers, evaluators, galleries."""

    def __init__(self) -> None:
        self.under_way = False
        self.ended: int | None = None  # the signal that ends the run, once one is heard
        self.broken = False  # and has broken off an attempt

    def attempt(self, call: Callable[..., Any], *arguments: Any, where: str | None = None) -> Any:
        """What the call gives; None where a signal has ended it, or came before, or with `where` Interrupted.

        Several processes go on to the next step: one of them would wait for the others in a collective.
        """
        if processes.several():
            return call(*arguments)
        try:
            self.under_way = True
            if self.ended is None:
                given = call(*arguments)
                self.under_way = False
                return given
        except Broken:
            pass
        finally:
            self.under_way = False
        if where is not None:
            raise Interrupted(self.ended, where)
        return None

    def end(self, number: int) -> None:
        """Called by the handler of a signal that ends the run, in the main thread."""
        self.ended = number
        if self.under_way:
            self.under_way, self.broken = False, True  # what is closed because of it is left in peace
            raise Broken

    def when(self) -> str:
        """When the run ends, for who has asked."""
        return "now" if self.under_way or self.broken else "after this update"
