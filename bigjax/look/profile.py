"""A trace of some updates, to be looked at in TensorBoard or Perfetto."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
from etils import epath

from bigjax.run.shown import only_shown


@contextlib.contextmanager
def tracing(
    home: epath.Path, tell: Callable[[str], Any] = print
) -> Iterator[Callable[[int, str, Mapping[str, float]], None]]:
    """Gives a hook for `on_log` that traces from the first training line that it hears to the next, into home/profile.

    The updates before are not traced, since the first compiles. What is still traced at the exit ends there.
    """
    heard = 0

    def stop() -> None:
        with only_shown("the profile", tell):
            jax.profiler.stop_trace()

    def on_log(step: int, split: str, values: Mapping[str, float]) -> None:
        nonlocal heard
        if split != "train":
            return
        heard += 1
        if heard == 1:
            with only_shown("the profile", tell):
                jax.profiler.start_trace(str(home / "profile"))
        elif heard == 2:
            stop()

    try:
        yield on_log
    finally:
        if heard == 1:
            stop()
