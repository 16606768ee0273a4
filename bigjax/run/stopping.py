"""How a run that is told to stop does so: all processes after the same update; and one that hangs, nevertheless."""

import contextlib
import json
import os
import signal
import threading
import time
from typing import Any, Self

import jax

from bigjax.run import processes, watch

GRACE = 7.0  # seconds without any progress, after which a run that is told to end may be one that hangs
IDLE = 0.02  # of a processor: what computes on the host uses more


class Hung:
    """Watches a run that has been told to end by a signal, and ends the process where it makes no progress any more.

    It hangs if it stands still for GRACE seconds, and what it is at takes SLOW times longer than its kind ever has, or,
    where it is the first of its kind, uses no processor. A save, which only a slow storage may hold up, is waited for,
    and Ctrl-C alone ends nothing so: that may be a notebook. A second SIGTERM or SIGHUP after those seconds ends it in
    any case.
    """

    def __init__(self, number: int, everybody: "All | None" = None):
        self.number, self.everybody, self.insisted, self.told = number, everybody, False, False
        self.over = threading.Event()
        self.mark()
        threading.Thread(target=self.watch, name="bigjax-stopping", daemon=True).start()

    def mark(self) -> None:
        self.beats, self.since, self.used = watch.dog().beats, time.monotonic(), time.process_time()

    def again(self, number: int) -> None:
        """Another signal."""
        if number != signal.SIGINT:
            self.number, self.insisted = number, self.still()

    def still(self) -> bool:
        """Whether nothing has gone on for GRACE seconds."""
        return watch.dog().beats == self.beats and time.monotonic() - self.since >= GRACE

    def stuck(self) -> bool | None:
        """Whether this process hangs, as far as it can know by itself; None of a save that stands still."""
        if not self.still() or not watch.dogs:
            return False
        if watch.dog().saving():
            return None
        slow, seconds = watch.dog().slow(), time.monotonic() - self.since
        return time.process_time() - self.used < IDLE * seconds if slow is None else slow

    def watch(self) -> None:
        """Until the run is over, one way or the other."""
        while not self.over.wait(0.5):
            self.look()

    def look(self) -> None:
        """Ends the process if it hangs; says once that it stands still."""
        if watch.dog().beats != self.beats:
            self.mark()
        stuck = self.stuck()
        if self.everybody:
            stuck = self.everybody.stuck(stuck)
        if self.insisted or (stuck and self.number != signal.SIGINT):
            self.end()
        elif self.still() and not self.told:
            self.told = True
            insist = f"kill {os.getpid()}" if self.number == signal.SIGINT else "the same signal again"
            self.say(f"still at {watch.dog().doing()}; {insist} ends the process without a save")

    def say(self, what: str) -> None:
        with contextlib.suppress(OSError):
            os.write(2, f"{signal.Signals(self.number).name}: {what}\n".encode())

    def end(self) -> None:
        seconds = time.monotonic() - watch.dog().begun
        self.say(
            f"{watch.dog().doing()} hangs, for {seconds:.0f} s so far: this process ends without a save; the same "
            "command goes on from the last checkpoint"
        )
        processes.end(128 + self.number)


class All:
    """All processes of a run, while it lasts: any of them may ask that all end, as often as there are runs.

    Who is asked says how often it has looked whether it is to stop (`stops`), and looks no more until all have said so:
    the most that any has, and one more, is where all stop. JAX's own way serves once in the life of a process.
    """

    def __init__(self) -> None:
        self.base = f"bigjax_stop/{processes.Session.number}"
        self.index, self.count = jax.process_index(), jax.process_count()
        self.lock, self.looked, self.stop = threading.Lock(), 0, None
        self.number: int | None = 0  # what was asked: None is that the run is over
        self.hung: Hung | None = None
        self.left = threading.Event()
        self.ticks: dict[int, tuple[Any, float]] = {}

    def __enter__(self) -> Self:
        self.thread = threading.Thread(target=self.listen, name="bigjax-listener", daemon=True)
        self.thread.start()
        return self

    def __exit__(self, kind: type | None, e: BaseException | None, _: object) -> None:
        failed = kind is not None and not issubclass(kind, KeyboardInterrupt)
        self.left.set()
        self.ask(None, f"{processes.name(self.index)} stopped ({processes.first_line(e)})" if failed else "")
        self.thread.join(timeout=10)  # who is asked answers, also at the very end
        if self.hung:
            self.hung.over.set()

    def ask(self, number: int | None, failed: str = "") -> None:
        """Tells all that a signal has come, or that this process is no more in the run; what came first counts."""
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            processes.store().key_value_set(f"{self.base}/asked", json.dumps([number, failed]))
        if number is not None and self.number is None and self.hung is None:  # the others have ended theirs
            self.hung = Hung(number)

    def again(self, number: int) -> None:
        if self.hung:
            self.hung.again(number)

    def stops(self) -> int | None:
        """The signal by which all end here; None where they go on."""
        with self.lock:
            self.looked += 1
            return self.number if self.stop is not None and self.looked >= self.stop else None

    def listen(self) -> None:
        """Waits for what is asked."""
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # the service is gone, as process 0 is
            while (asked := processes.get(f"{self.base}/asked", seconds=10)) is None:
                pass
            self.number, failed = asked
            if self.number is None:
                processes.Session.failed = failed
                return self.leave(failed)
            self.hung = Hung(self.number, self)
            with self.lock:
                processes.put(f"{self.base}/looked/{self.index}", self.looked)
                looked = []
                for i in range(self.count):
                    while (value := processes.get(f"{self.base}/looked/{i}")) is None:
                        pass
                    looked.append(value)
                self.stop = max(looked) + 1

    def leave(self, failed: str) -> None:
        """Ends this process if another has failed and what it waits for, a collective, never comes."""
        beats, since = watch.dog().beats, time.monotonic()
        while failed and not self.left.wait(0.5):
            if watch.dog().beats != beats:
                beats, since = watch.dog().beats, time.monotonic()
            if time.monotonic() - since > GRACE:
                action = "this process ends too; start all again to resume from the newest checkpoint"
                os.write(2, f"error: {failed}: {action}\n".encode())
                processes.end(3)

    def stuck(self, here: bool | None) -> bool:
        """Whether every process hangs, each as far as it knows; one that says nothing for GRACE seconds does.

        In a save they may wait for one that hangs elsewhere.
        """
        now = time.monotonic()
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            processes.put(f"{self.base}/stuck/{self.index}", [now, here])
            told = dict(processes.store().key_value_dir_get(f"{self.base}/stuck/"))
            told = {int(k.rpartition("/")[2]): json.loads(v) for k, v in told.items()}
            for i in range(self.count):
                if i not in self.ticks or self.ticks[i][0] != told.get(i):
                    self.ticks[i] = (told.get(i), now)
            said = [True if now - since >= GRACE else bool(t) and t[1] for t, since in self.ticks.values()]
            return False not in said and True in said
        return False
