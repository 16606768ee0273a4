"""The watchdog by itself: `test_faults.py` has it in a run."""

import os
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from bigjax import guard

ENDED: list[int] = []  # the exit statuses that it would have ended this process with


@pytest.fixture
def watchdog(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[float], guard.Watchdog]]:
    """watchdog(seconds) makes one that would end the process once, and is closed with the test."""
    made: list[guard.Watchdog] = []

    def end(status: int) -> None:
        ENDED.append(status)
        made[0].closed.set()

    def make(seconds: float) -> guard.Watchdog:
        made.append(guard.Watchdog(seconds, lambda: "update 7"))
        return made[0]

    ENDED.clear()
    monkeypatch.setattr(os, "_exit", end)
    yield make
    made[0].closed.set()
    for thread in watching():
        thread.join(timeout=10)


def watching() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name == "bigjax-watchdog"]


def test_the_watchdog_ends_what_takes_too_long(
    watchdog: Callable[[float], guard.Watchdog], capfd: pytest.CaptureFixture
) -> None:
    dog = watchdog(0.2)
    dog.start()
    dog.closed.wait(10)
    assert ENDED == [guard.HUNG]
    said = capfd.readouterr().err
    assert "Thread 0x" in said and "error: update 7 took longer than --hang-seconds 0.2" in said


def test_the_watchdog_leaves_alone_what_goes_on_and_what_it_does_not_watch(
    watchdog: Callable[[float], guard.Watchdog],
) -> None:
    dog = watchdog(1.0)
    time.sleep(1.5)  # not started
    dog.start()
    for _ in range(15):
        time.sleep(0.1)
        dog.beat()
    dog.stop()
    time.sleep(1.5)
    assert len(watching()) == 1 and ENDED == []


def test_a_watchdog_of_0_seconds_does_not_watch(watchdog: Callable[[float], guard.Watchdog]) -> None:
    watchdog(0).start()
    assert not watching()
