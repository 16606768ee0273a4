"""Several processes, one run: what one tells the others, and what they must agree on.

They tell it over JAX's coordination service, not by a collective: what differs is known before one could hang.
"""

import contextlib
import ctypes
import itertools
import json
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax

from bigjax import Interrupted, UsageError
from bigjax.run import noise
from bigjax.run.meeting import Peers, changes, end, first_line, launched, meet
from bigjax.run.watch import watching
from bigjax.sharding import DistributedConfig

SILENT = 30  # seconds that one waits for another without a word
MEMORY = 1000  # values of process 0 that are kept for those that come later: none can be so far behind


def several() -> bool:
    """Whether this process is one of several. Asks no device while it is alone."""
    return jax.distributed.is_initialized() and jax.process_count() > 1


def first() -> bool:
    """Whether this process is the one that writes files and prints."""
    return not several() or jax.process_index() == 0


def name(index: int) -> str:
    """Of this process, for messages: where to look."""
    return f"process {index} ({socket.gethostname()}, pid {os.getpid()})"


class Session:
    """What is told between two calls of `begin`. failed: what has ended the run in another process, once it is known.

    Where the same call has failed in one process alone, the next one begins anew in all.
    """

    number, calls, failed = 0, itertools.count(), ""


def begin() -> None:
    """Where a call that all processes make begins."""
    Session.number, Session.calls, Session.failed = Session.number + 1, itertools.count(), ""
    if several() and first() and Session.number > 2:
        store().key_value_delete(f"bigjax/{Session.number - 2}/")


def store() -> Any:
    """The coordination service's values by name. JAX offers no public way; orbax goes the same."""
    from jax._src import distributed

    return distributed.global_state.client


def put(key: str, value: Any) -> None:
    """Tells JSON; the last one counts."""
    store().key_value_set(key, json.dumps(value), allow_overwrite=True)


def get(key: str, *, seconds: float = 1.0) -> Any:
    """What is told under a name, waiting so long for it; None: nothing yet."""
    try:
        return json.loads(store().blocking_key_value_get(key, round(seconds * 1000)))
    except jax.errors.JaxRuntimeError as e:
        if "DEADLINE_EXCEEDED" in str(e):
            return None
        raise


def wait_for(key: str, whose: int, *, timeout: float | None = None) -> Any:
    """As `get`, but until it is there: signals are heard, and the watchdog knows of it."""
    begun, silent = time.monotonic(), True
    with watching(f"process {jax.process_index()}'s wait for what process {whose} is to say"):
        while (value := get(key)) is None:
            if Session.failed:
                raise UsageError(Session.failed)
            waited = time.monotonic() - begun
            if silent and waited > SILENT:
                silent = False
                line = f"{name(jax.process_index())} waits for process {whose}, for {waited:.0f} s so far"
                print(line, file=sys.stderr, flush=True)
            if timeout and waited > timeout:
                raise UsageError(
                    f"process {whose} has not come to the same place within {timeout:g} s: call the same in all "
                    "processes, and see their output"
                )
    return value


def from_first(compute: Callable[[], Any], *, timeout: float | None = None) -> Any:
    """What `compute` gives (JSON) or the UsageError it raises on process 0, on all: each must call this."""
    if not several():
        return compute()
    call, mine = next(Session.calls), getattr(compute, "__qualname__", "")
    key = f"bigjax/{Session.number}/{call}"
    if first():
        try:
            heard = {"value": compute(), "by": mine}
        except UsageError as e:
            heard = {"error": str(e), "by": mine}
        put(key, heard)
        heard = json.loads(json.dumps(heard))  # the same on all
        if call > MEMORY:
            store().key_value_delete(f"bigjax/{Session.number}/{call - MEMORY}")
    else:
        heard = wait_for(key, 0, timeout=timeout)
    if heard["by"] != mine:
        index = jax.process_index()
        raise UsageError(f"{name(index)} is at {mine}, process 0 at {heard['by']}: call the same in all processes")
    if "error" in heard:
        raise UsageError(heard["error"])
    return heard["value"]


def to_first(value: Any, *, timeout: float | None = None) -> list[Any]:
    """The values (JSON) of all on process 0, by index; on the others nothing: each must call this."""
    key = f"bigjax/{Session.number}/{next(Session.calls)}"
    if not first():
        put(f"{key}/{jax.process_index()}", value)
        return []
    found = [value]
    for i in range(1, jax.process_count()):
        found.append(wait_for(f"{key}/{i}", i, timeout=timeout))
        store().key_value_delete(f"{key}/{i}")
    return found


def fail_together(what: str, wrong: Exception | None) -> None:
    """Raises UsageError in all processes where what all do has failed in some alone: each must call this after it.

    Who failed waits `SILENT` seconds for the others, who may wait for it in a collective.
    """
    if not several():
        return
    timeout = SILENT if wrong else None
    found = to_first(f"{name(jax.process_index())}: {first_line(wrong)}" if wrong else "", timeout=timeout)

    def compare() -> None:
        if any(found) and not all(found):
            raise UsageError(f"{what} failed in {'; '.join(filter(None, found))}, and not in all processes alike")

    from_first(compare, timeout=timeout)


def agree(about: Mapping[str, Any], *, advice: str, timeout: float | None = None) -> None:
    """Raises the same UsageError in all processes, with the advice, where what is compared is not equal in all."""
    if not several():
        return
    found = to_first([name(jax.process_index()), dict(about)], timeout=timeout)

    def compare() -> None:
        for who, theirs in found[1:]:
            if differs := changes(theirs, json.loads(json.dumps(about))):
                raise UsageError(f"{who} differs from {found[0][0]}: {differs}: {advice}")

    from_first(compare, timeout=timeout)


def agree_on_devices(*, timeout: float | None = None) -> None:
    """Raises UsageError in all processes where one has more devices of its own than another."""
    if not several():
        return
    found = to_first([name(jax.process_index()), jax.local_device_count()], timeout=timeout)

    def compare() -> None:
        if len({count for _, count in found}) > 1:
            counts = ", ".join(f"{who} {count}" for who, count in found)
            raise UsageError(
                f"the processes have unequal numbers of devices: {counts}: give each as many (JAX_NUM_CPU_DEVICES, "
                "XLA_FLAGS, CUDA_VISIBLE_DEVICES)"
            )

    from_first(compare, timeout=timeout)


@contextlib.contextmanager
def joined(config: DistributedConfig, about: Mapping[str, Any]) -> Iterator[None]:
    """While it is entered this process is one of those that were launched together; nothing where it is alone.

    about: what has to be equal in all of them, by name. Raises UsageError, after at most config.timeout seconds, where
    they do not all meet, or differ. If one of them fails or is gone, all end.
    """
    found = launched(config)
    if found is None:
        yield
        return
    coordinator, count, index = found
    me, about = name(index), {"--distributed.processes": count, **about}
    peers = Peers(*meet(coordinator, count, index, name=me, about=about, timeout=config.timeout))
    try:
        with noise.dropped():
            initialize(coordinator, count, index, timeout=config.timeout, by_flags=config.coordinator is not None)
            agree_on_devices(timeout=config.timeout)
            yield
    except Interrupted:  # all of them, at the same step
        peers.leave(None)
        raise
    except BaseException as e:
        if type(e) is not UsageError:
            time.sleep(3)  # if it failed because a process is gone, the watch says which, and ends this one
        peers.leave(f"{me} stopped ({first_line(e)})")
        if isinstance(e, UsageError):
            raise
        traceback.print_exc()
        end(1)
    peers.leave(None)


def slow_aborts() -> None:
    """A thread that aborts sleeps first, for 6 seconds (the signal's number), so that `Peers` can say why and end all.

    Gloo's own thread at times aborts where a process is gone, before it has been told to whom that happened.
    """
    libc = ctypes.CDLL(None)
    libc.signal(int(signal.SIGABRT), ctypes.cast(libc.sleep, ctypes.c_void_p))


def initialize(coordinator: str, processes: int, index: int, *, timeout: int, by_flags: bool) -> None:
    """jax.distributed.initialize, between CPUs too; its errors are one line."""
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    slow_aborts()
    with contextlib.suppress(AttributeError):  # SIGTERM is ours (`stopping`): JAX would take it, and swallow it
        jax.config.update("jax_enable_preemption_service", False)
    method = "deactivate" if by_flags else None  # else the launcher also says which devices this process has
    try:
        jax.distributed.initialize(
            coordinator, processes, index, initialization_timeout=timeout, cluster_detection_method=method
        )
    except (RuntimeError, ValueError) as e:
        raise UsageError(f"JAX cannot join {coordinator} as process {index} of {processes}: {first_line(e)}") from e
