"""How several processes meet before JAX connects them, and what the others do when one is gone.

Process 0 listens at the coordinator's address until the others have said who they are and what they are to run. Then
JAX's own service takes the address over, and these connections stay open only to be watched: one that closes without
a last word tells at once that its process is gone, and which, where a collective would wait.
"""

import contextlib
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Mapping
from typing import Any, NoReturn

from bigjax import UsageError
from bigjax.sharding import DistributedConfig

CODE_OF = "the code of"


def first_line(e: BaseException) -> str:
    return str(e).strip().partition("\n")[0] or type(e).__name__


def launched(config: DistributedConfig) -> tuple[str, int, int] | None:
    """(coordinator, processes, index) by the flags or by the launcher; None for a process that is alone."""
    given = {"coordinator": config.coordinator, "processes": config.processes, "index": config.index}
    missing = [f"--distributed.{k}" for k, v in given.items() if v is None]
    if config.processes is not None and config.processes < 1:
        raise UsageError(f"--distributed.processes {config.processes}: give a number above 0")
    if config.processes == 1 and (config.index or 0) == 0:
        return None
    if len(missing) == 3:
        return detected(config.timeout)
    if missing:
        raise UsageError(f"{' and '.join(missing)} missing: give all three of {', '.join(given)}, or none of them")
    if not 0 <= config.index < config.processes:
        raise UsageError(
            f"--distributed.index {config.index}: there are {config.processes} processes, use 0 to "
            f"{config.processes - 1}"
        )
    if not config.coordinator.rpartition(":")[0] or not config.coordinator.rpartition(":")[2].isdecimal():
        raise UsageError(
            f"--distributed.coordinator {config.coordinator}: give HOST:PORT of process 0, as 10.0.0.2:8476"
        )
    return config.coordinator, config.processes, config.index


def detected(timeout: int) -> tuple[str, int, int] | None:
    """What Cloud TPU, GKE, SLURM or Open MPI says of this process, as far as JAX knows them."""
    from jax._src.clusters import ClusterEnv  # JAX offers no public way to ask before it connects

    try:
        found = ClusterEnv.auto_detect_unset_distributed_params(None, None, None, None, None, timeout)[:3]
    except Exception as e:
        raise UsageError(
            f"what the launcher says of this process cannot be read ({first_line(e)}): give "
            "--distributed.coordinator, --distributed.processes and --distributed.index, or --distributed.processes 1"
        ) from e
    return found if None not in found and found[1] > 1 else None


def meet(
    coordinator: str, processes: int, index: int, *, name: str, about: Mapping[str, Any], timeout: int
) -> tuple[dict[int, socket.socket], dict[int, str]]:
    """Connections to the others and their names, by index: process 0 has them all, the others only process 0."""
    host, _, port = coordinator.rpartition(":")
    address, deadline = (host.strip("[]"), int(port)), time.monotonic() + timeout
    if index:
        return greet(address, {"index": index, "name": name, "about": about}, deadline=deadline, timeout=timeout)
    sockets, names, wrong = {}, {0: name}, None
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    try:
        server = socket.create_server(("", address[1]), family=family, dualstack_ipv6=both)
    except OSError as e:
        raise UsageError(
            f"process 0 cannot listen at port {port} ({e.strerror or e}): end what uses it, or choose another port in "
            "--distributed.coordinator"
        ) from None
    with server:
        while len(sockets) < processes - 1 and not wrong:
            try:
                server.settimeout(max(deadline - time.monotonic(), 0.01))
                peer, _ = server.accept()
            except TimeoutError:
                lost = [str(i) for i in range(1, processes) if i not in sockets]
                which = f"process {lost[0]} has" if len(lost) == 1 else f"processes {', '.join(lost)} have"
                wrong = f"{which} not come to {coordinator} within {timeout} s: start all {processes}, see their output"
                break
            peer.settimeout(10)
            try:
                hello = json.loads(hear(peer))
                i, theirs = hello["index"], dict(hello["about"])
            except (OSError, ValueError, KeyError, TypeError, AttributeError):  # not one of ours
                peer.close()
                continue
            if differs := changes(theirs, about):
                wrong = f"{hello['name']} differs from {name}: {differs}: give all the same flags, code and versions"
            elif i in names:
                wrong = f"{hello['name']} and {names[i]} have the same --distributed.index: give each its own"
            else:
                sockets[i], names[i] = peer, hello["name"]
                continue
            say(peer, {"error": wrong})
    for peer in sockets.values():
        say(peer, {"error": wrong, "name": name})
    if wrong:
        raise UsageError(wrong)
    return sockets, names


def greet(
    address: tuple[str, int], hello: Mapping[str, Any], *, deadline: float, timeout: int
) -> tuple[dict[int, socket.socket], dict[int, str]]:
    """Process 0 by its address, once it has seen all."""
    where, why = f"the coordinator {address[0]}:{address[1]}", ""
    while (left := deadline - time.monotonic()) > 0:
        try:
            peer = socket.create_connection(address, timeout=left)
            if peer.getsockname() != peer.getpeername():  # on one machine a port without listener can meet itself
                break
            peer.close()
        except OSError as e:
            why = f" ({e.strerror or e})"
        time.sleep(min(0.2, left))
    else:
        raise UsageError(
            f"{where} could not be reached within {timeout} s{why}: start process 0 there, or correct "
            "--distributed.coordinator"
        )
    say(peer, hello)
    peer.settimeout(timeout + 5)  # process 0's time began before this connection: it answers first
    try:
        answer = json.loads(hear(peer))
    except (OSError, ValueError):
        raise UsageError(
            f"{where} does not answer {hello['name']} as process 0 of a run that is starting: start all processes "
            "together, or choose another port in --distributed.coordinator"
        ) from None
    if answer["error"]:
        raise UsageError(answer["error"])
    return {0: peer}, {0: answer["name"]}


def changes(theirs: Mapping[str, Any], mine: Mapping[str, Any]) -> str:
    """What differs, as `--batch-size 16, not 8`; nothing where all is equal."""
    pairs = {k: (theirs.get(k), mine.get(k)) for k in {**mine, **theirs}}
    lazy = {k for k, pair in pairs.items() if None in pair and k.startswith(CODE_OF)}  # a module that one uses alone
    lines = [f"{k} {his}, not {mine}" for k, (his, mine) in pairs.items() if his != mine and k not in lazy]
    return "; ".join(lines[:6]) + f"; and {len(lines) - 6} more" * (len(lines) > 6)


def say(peer: socket.socket, value: Any) -> None:
    """Sends a line of JSON to a process that may be gone."""
    with contextlib.suppress(OSError):
        peer.sendall(json.dumps(value).encode() + b"\n")


def hear(peer: socket.socket) -> str:
    """The next line of a process; ValueError if it ends before."""
    with peer.makefile("rb", buffering=0) as lines:  # what follows the line is left to the next call
        if not (line := lines.readline()).endswith(b"\n"):
            raise ValueError("closed")
        return line.decode()


class Peers:
    """The open connections, each watched by a thread until its process says its last word: None, or why it failed."""

    def __init__(self, sockets: Mapping[int, socket.socket], names: Mapping[int, str]):
        self.sockets, self.names, self.open, self.failed = sockets, names, set(sockets), False
        for index, peer in sockets.items():
            peer.settimeout(None)
            peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)  # for a machine that is gone with its process
            for option, value in {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 4}.items():
                if hasattr(socket, option):
                    peer.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
            threading.Thread(target=self.watch, args=(index,), daemon=True).start()

    def watch(self, index: int) -> None:
        """Ends this process if another one fails, with a line that says which."""
        peer = self.sockets[index]
        try:
            reason = json.loads(hear(peer))
            time.sleep(1 if reason else 0)  # this process may be about to fail by itself, of the same cause
        except (OSError, ValueError):
            reason = f"{self.names[index]} is gone"
            self.open.discard(index)
        if reason and not self.failed:
            action = "this process ends too; start all again to resume from the newest checkpoint"
            print(f"error: {reason}: {action}", file=sys.stderr, flush=True)
            self.leave(reason)
            end(3)
        with contextlib.suppress(OSError):
            peer.recv(1)  # until it is closed
        self.open.discard(index)

    def leave(self, reason: str | None) -> None:
        """The last word of this process to the others, which end if it is a reason. Process 0 tells all of any's.

        Process 0 then lets the others end before it does, since JAX aborts those that it leaves behind.
        """
        self.failed = reason is not None
        for peer in self.sockets.values():
            say(peer, reason)
        deadline = time.monotonic() + 5
        while self.failed and 0 not in self.sockets and self.open and time.monotonic() < deadline:
            time.sleep(0.05)


def end(status: int) -> NoReturn:
    """Ends this process, and whatever waits in it for one that is gone."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
