"""Whether processes that are to be one run are one: flags, code, switches, devices, the working directory."""

import contextlib
import dataclasses
import hashlib
import json
import os
import re
import secrets
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from etils import epath

import bigjax
from bigjax import UsageError
from bigjax.experiment import RunConfig
from bigjax.run import processes, source
from bigjax.run.meeting import CODE_OF

# Switches of JAX that say where something lies or what is told, and change no number; devices are compared by number.
OWN = re.compile("cache|dump|_log|logging|traceback|timeout|leaked|pprint|num_cpu_devices|visible_devices|address")
OWN_FLAGS = re.compile(r"--xla_(dump|force_host_platform_device_count)")
VISIBLE = 5.0  # seconds that a shared file system may take to show a new file
ADVICE = "give all the same flags, code and versions"


def shared(name: str, verb: str, config: RunConfig) -> dict[str, Any]:
    """What must be equal in processes that run together: the verb, every flag, the versions, code and switches.

    The working directory, which each may see by another name, is compared by what is in it (`one_folder`).
    """
    given = dataclasses.asdict(config)
    flags: dict[str, Any] = {}
    for k in given.keys() - {"distributed", "workdir"}:
        group = given[k] if isinstance(given[k], dict) else {k: given[k]}
        flags |= {f"--{'mesh.' * (k == 'mesh')}{inner.replace('_', '-')}": v for inner, v in group.items()}
    about = {"experiment": f"{name} {verb}", **flags, **source.versions(), **code(), **switches()}
    return json.loads(json.dumps(about, sort_keys=True))


def code() -> dict[str, str]:
    """A hash of each module of the user's that is loaded, the script among them; one of bigjax itself."""
    library, found, ours = Path(bigjax.__file__).resolve().parent, {}, hashlib.sha256()
    for path in sorted(library.rglob("*.py")):
        ours.update(path.read_bytes())
    for name, module in list(sys.modules.items()):
        path = Path(getattr(module, "__file__", None) or "").resolve()
        if path.suffix == ".py" and not source.installed(path) and library not in path.parents:
            with contextlib.suppress(OSError):
                told = path.name if name == "__main__" else name
                found[f"{CODE_OF} {told}"] = hashlib.sha256(path.read_bytes()).hexdigest()[:8]
    return {**found, f"{CODE_OF} bigjax": ours.hexdigest()[:8]}


def switches() -> dict[str, str]:
    """What JAX and XLA were told that may change numbers."""
    values = {k: str(v) for k, v in jax.config.values.items() if not OWN.search(k)}
    for name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS"):
        values[name] = " ".join(sorted(f for f in os.environ.get(name, "").split() if not OWN_FLAGS.match(f)))
    return values


@contextlib.contextmanager
def ready(name: str, verb: str, config: RunConfig, **more: Any) -> Iterator[None]:
    """Where a call begins that all processes make: what each checks by itself while it is entered.

    Raises UsageError in all if they are not alike, in `more` either, or if one finds something wrong.
    """
    processes.begin()
    if not processes.several():
        yield
        return
    about = {**shared(name, verb, config), **{k: hashed(v) for k, v in more.items()}}
    timeout, wrong = config.hang_seconds or None, None
    processes.agree(about, advice=ADVICE, timeout=timeout)
    processes.agree_on_devices(timeout=timeout)
    try:
        yield
    except Exception as e:
        wrong = e
    said = f"{processes.name(jax.process_index())}: {processes.first_line(wrong)}" if wrong else ""
    found = processes.to_first(said, timeout=timeout)

    def compare() -> None:
        if lines := "; ".join(filter(None, found)):
            raise UsageError(lines)

    try:
        processes.from_first(compare, timeout=timeout)
    except UsageError as e:
        raise (wrong or e) from None


def hashed(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:8]


def one_folder(home: epath.Path) -> None:
    """Raises UsageError in all processes where one doesn't see what process 0 writes there, or can't write."""
    if not processes.several():
        return
    index, token = jax.process_index(), processes.from_first(lambda: secrets.token_hex(8))
    file = home / f".writable.{token}"

    def write() -> None:
        try:
            home.mkdir(parents=True, exist_ok=True)
            file.write_text(token)
        except Exception as e:  # whatever a bucket's client raises
            why = getattr(e, "strerror", None) or processes.first_line(e)
            raise UsageError(f"--workdir {home} cannot be written ({why}): choose another") from None

    def missing() -> str:
        until = time.monotonic() + VISIBLE
        try:
            while not (file.exists() and file.read_text() == token):
                if time.monotonic() > until:
                    return "sees nothing of it"
                time.sleep(0.1)
            own = home / f".writable.{token}.{index}"
            own.write_text("")
            own.unlink()
        except Exception as e:
            return f"cannot write there: {processes.first_line(e)}"
        return ""

    processes.from_first(write)
    why = missing()
    there = str(home) if "://" in str(home) else os.path.realpath(home)
    found = processes.to_first(why and f"{processes.name(index)}, to which it is {there}, {why}")

    def compare() -> None:
        with contextlib.suppress(OSError):
            file.unlink()
        if wrong := "; ".join(filter(None, found)):
            raise UsageError(
                f"--workdir {home} is not one folder that all processes see, where process 0 writes: {wrong}: give one "
                "on a shared file system, or gs://bucket/folder"
            )

    processes.from_first(compare)
