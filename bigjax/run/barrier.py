"""Where processes wait for one another while they save; what fails in one is told to all, and none waits in vain."""

import itertools
import time
from collections.abc import Callable
from typing import Any

import jax

from bigjax import FULL
from bigjax.run import processes


class Apart(OSError):
    """A save that has failed in one process has failed in all."""


class Barrier:
    """Where all processes wait for one another, in threads too; each comes to the same ones, in the same order.

    One that has failed in between comes to another: then all are told why, where JAX's own would wait for 20 minutes.
    """

    made = itertools.count()

    def __init__(self) -> None:
        self.place, self.come, self.why, self.apart = "", itertools.count(), "", ""

    def failing(self, e: BaseException) -> None:
        """What has failed here, for the others to hear."""
        said = str(e) or type(e).__name__
        self.why = next((cause for cause in FULL if cause in said), said.strip().partition("\n")[0][:120])

    def __call__(self, *, key: str, timeout_ms: int) -> None:
        """Raises Apart where not all come to the same."""
        if not processes.several():
            return
        self.place = self.place or f"bigjax_barrier/{next(self.made)}"
        if not self.apart:
            self.apart = self.meet(key, f"{self.place}/{next(self.come)}", time.monotonic() + timeout_ms / 1000)
        if self.apart:
            raise Apart(self.apart)

    def meet(self, key: str, place: str, until: float) -> str:
        """Why not all have come to the same; nothing where they have."""

        def told(what: str) -> Any:
            while (value := processes.get(f"{place}/{what}")) is None:
                if time.monotonic() > until:
                    raise TimeoutError("the other processes have not come to their part of the save")
            return value

        index = jax.process_index()
        mine = [key, processes.name(index), self.why]
        if index:
            processes.put(f"{place}/{index}", mine)
            return told("all")
        all_ = [mine, *(told(str(i)) for i in range(1, jax.process_count()))]
        reasons = [f"{who}: {why}" for _, who, why in all_ if why]
        differ = [who for theirs, who, _ in all_ if theirs != key]
        apart = "; ".join(reasons) or (f"{processes.name(0)} or {' or '.join(differ)} has failed" if differ else "")
        processes.put(f"{place}/all", apart)
        return apart


class Part:
    """A future of orbax's, of what one process writes: `failing` hears its error."""

    def __init__(self, future: Any, failing: Callable[[BaseException], None]):
        self.future, self.failing = future, failing

    def result(self, timeout: float | None = None) -> Any:
        try:
            return self.future.result(timeout)
        except BaseException as e:
            self.failing(e)
            raise

    def cancel(self) -> None:
        self.future.cancel()
