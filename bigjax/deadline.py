"""Waiting for what may never answer: storage, other machines, drivers."""

import queue
import threading
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def within(seconds: float, work: Callable[[], T]) -> T:
    """What `work` returns or raises; TimeoutError after so many seconds, its thread being left behind."""
    outcome: queue.Queue[tuple[T | None, BaseException | None]] = queue.Queue()

    def go() -> None:
        try:
            outcome.put((work(), None))
        except BaseException as e:
            outcome.put((None, e))

    threading.Thread(target=go, daemon=True).start()
    try:
        value, error = outcome.get(timeout=seconds)
    except queue.Empty:
        raise TimeoutError from None
    if error is not None:
        raise error
    return value
