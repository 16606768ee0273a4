"""The working directory of a run: what it holds, and whether it may be resumed."""

import contextlib
import dataclasses
import fcntl
import json
import os
import re
import socket
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
from etils import epath

from bigjax import UsageError, place
from bigjax.experiment import Experiment, RunConfig
from bigjax.metrics import Metrics
from bigjax.program import Program
from bigjax.run import alike, machine, processes, source, spoken
from bigjax.run.atomic import write_whole
from bigjax.run.frozen import frozen_of
from bigjax.run.log import json_text, read_log
from bigjax.run.modules import module_spec
from bigjax.run.places import one_place, reached
from bigjax.run.shown import for_report, own_metric

# Settings that may differ between a run and its resumption: they change no number.
FREE = {
    "workdir", "mesh", "distributed", "keep", "save_every", "save_minutes", "hang_seconds", "nonfinite", "resume",
    "tensorboard", "peak_tflops", "profile", "compilation_cache", "accept_changes", "extend", "log_every", "eval_every",
}  # fmt: skip
LENGTH = ("steps", "epochs", "minutes")  # may differ with --extend
OURS = (
    "metrics.jsonl", "result.json", "report.html", "checkpoints", "gallery", "tensorboard", "profile", "source.patch",
    "tokenizer", "config.json",
)  # fmt: skip
NORMS = re.compile("(grad|param|update)_norm/")  # of layers: in the log alone
UNBEGUN = {".lock", ".writable", "source.patch", "tokenizer", "config.json"}  # what a kill in the first moment leaves


def write_json(path: epath.Path, value: Any) -> None:
    """Atomically: the file is there whole or not at all."""
    write_whole(path, (json_text(value, indent=1) + "\n").encode())


def devices() -> dict[str, Any]:
    first = jax.devices()[0]
    count = {"count": jax.device_count(), "processes": jax.process_count()}
    return {"platform": first.platform, "kind": first.device_kind, **count}


def settings(config: RunConfig) -> dict[str, Any]:
    """A configuration as JSON has it."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def describe(experiment: Experiment, config: RunConfig) -> dict[str, Any]:
    """What config.json holds."""
    return {
        "experiment": experiment.name,
        "config": settings(config),
        **for_report(experiment, config, settings(config), settings(type(config)())),
        "steps": None,  # settled when training starts
        "models": {k: module_spec(m) for k, m in experiment.task.models.items()},
        "tokenizer": spoken.described(experiment.tokenizer),
        "versions": source.versions(),
        "git_commit": source.commit(),
        "git_repository": str(source.repository() or "") or None,
        "devices": devices(),
        "command": sys.argv,
        "folder": os.getcwd(),
    }


def restored(default: Any, record: Mapping[str, Any]) -> Any:
    """A dataclass like `default` with the values that JSON has for its fields."""
    values = {}
    for f in dataclasses.fields(default):
        usual = getattr(default, f.name)
        value = record.get(f.name, record if dataclasses.is_dataclass(usual) else ...)  # of old, groups were flat
        if value is not ...:
            group = dataclasses.is_dataclass(usual) and isinstance(value, Mapping)
            values[f.name] = restored(usual, value) if group else tuple(value) if isinstance(value, list) else value
    return dataclasses.replace(default, **values)


def difference(
    old: Mapping[str, Any], new: Mapping[str, Any], defaults: Mapping[str, Any], prefix: str = "", folder: str = ""
) -> list[str]:
    """The settings that differ, as `learning_rate: 0.001 -> 0.01`; those of FREE are left out.

    A flag that a release or an edit of the script has added counts as its default there; one that has gone is left out.
    Flags that have since become a group are looked for where they were.
    """
    lines = []
    for k in sorted(new):
        b, usual = new[k], defaults.get(k)
        a = old.get(k, {**usual, **old} if isinstance(usual, dict) and isinstance(b, dict) else usual)
        if (not prefix and k in FREE) or a == b or one_place(a, b, folder):
            continue
        if isinstance(a, dict) and isinstance(b, dict):
            lines += difference(a, b, usual if isinstance(usual, dict) else {}, f"{prefix}{k}.", folder)
        else:
            lines.append(f"{prefix}{k}: {a} -> {b}")
    return lines


def agree(record: Mapping[str, Any], experiment: Experiment, config: RunConfig) -> list[str]:
    """How these settings differ from those that config.json records."""
    lines = difference(record["config"], settings(config), settings(type(config)()), folder=record.get("folder", ""))
    if record["experiment"] != experiment.name:
        lines.insert(0, f"experiment: {record['experiment']} -> {experiment.name}")
    return lines


def read_config(workdir: epath.PathLike) -> dict[str, Any]:
    """config.json of a working directory; UsageError where there is none."""
    path = reached(place(workdir)) / "config.json"
    if not path.exists():
        raise UsageError(f"{workdir} holds no run (no config.json): train first, or give the --workdir of a run")
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as e:
        raise UsageError(f"{path} is not readable as JSON ({e}): restore it, or use another --workdir") from None


def clear(workdir: epath.Path) -> None:
    """Deletes what a run wrote, config.json last: as long as it is there, the rest is known to be a run's."""
    for name in OURS:
        if (path := workdir / name).exists():
            path.rmtree() if path.is_dir() else path.unlink()


@contextlib.contextmanager
def locked(workdir: epath.Path) -> Iterator[None]:
    """While it is entered no other run trains there, and all processes of this one do; a kill leaves nothing behind
    that blocks.

    Raises UsageError, in all processes, that names the other, or those that don't see it. gs:// has no locks.
    """
    with contextlib.ExitStack() as stack:
        processes.from_first(lambda: lock(workdir, stack))
        alike.one_folder(workdir)
        yield


def lock(workdir: epath.Path, stack: contextlib.ExitStack) -> None:
    """Keeps the lock until the stack is closed."""
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        file = None if "://" in str(workdir) else stack.enter_context(open(workdir / ".lock", "a+"))
    except OSError:  # of which open_workdir has more to say
        return
    if file is None:
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        other = file.read().strip() or "another process"
        raise UsageError(f"--workdir {workdir} is in use by {other}: wait for its end, or use another") from None
    file.truncate(0)
    file.write(f"pid {os.getpid()} on {socket.gethostname()}\n")
    file.flush()


def open_workdir(workdir: epath.Path, experiment: Experiment, config: RunConfig) -> dict[str, Any] | None:
    """Makes the working directory ready for the run; its result if it is finished already. All processes call this.

    Raises UsageError for a file, a folder that cannot be written, one that holds other things or another run.
    """
    description = describe(experiment, config)
    return processes.from_first(lambda: _open(workdir, description, experiment, config))


def _open(
    workdir: epath.Path, description: Mapping[str, Any], experiment: Experiment, config: RunConfig
) -> dict[str, Any] | None:
    if workdir.exists() and not workdir.is_dir():
        raise UsageError(f"--workdir {workdir} is a file: name a folder")
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        probe = workdir / ".writable"
        probe.write_text("")
        probe.unlink()
    except OSError as e:
        raise UsageError(f"--workdir {workdir} cannot be written ({e.strerror or e}): choose another") from None
    path = workdir / "config.json"
    if not config.resume and path.exists():  # without it nothing there is known to be a run's
        clear(workdir)
    if not path.exists():
        there = workdir.iterdir() if workdir.is_dir() else ()  # in a bucket an empty folder is none
        if other := sorted(p.name for p in there if ".".join(p.name.split(".")[:2]) not in UNBEGUN):
            raise UsageError(
                f"--workdir {workdir} holds no run, but other things ({', '.join(other[:3])}): "
                "name an empty or new folder"
            )
        (workdir / "source.patch").write_text(source.edits())
        spoken.keep(experiment.tokenizer, workdir)
        write_json(path, description)
        return None
    record = read_config(workdir)
    changes = agree(record, experiment, config)
    length = [line for line in changes if line.startswith(tuple(f"{k}:" for k in LENGTH))]
    if changes and changes == length and not config.extend:
        both = [{k: v for k in LENGTH if (v := c.get(k)) is not None} for c in (record["config"], settings(config))]
        had, asks = (" ".join(f"--{k} {v}" for k, v in given.items()) for given in both)
        raise UsageError(
            f"--workdir {workdir} belongs to a run of another length (it has {had}, not {asks}): add --extend to go on "
            "to the new one, or use another --workdir, or --no-resume to start over there"
        )
    if changes := [line for line in changes if line not in length or not config.extend]:
        shapes = Program(experiment, config, experiment.train, steps=1).state_shapes
        raise UsageError(
            f"--workdir {workdir} belongs to a run with other settings: use another --workdir, or --no-resume to "
            "start over there; to begin a new run with its parameters, add --init-from\n  "
            + "\n  ".join(changes + changes_of_state(workdir, shapes))
        )
    result = workdir / "result.json"
    return json.loads(result.read_text()) if result.exists() else None


def changes_of_state(workdir: epath.Path, shapes: Any) -> list[str]:
    """How the newest state saved differs from these shapes; nothing among several processes."""
    from bigjax.run.checkpoint import Checkpoints

    if processes.several():  # opening checkpoints waits for all of them
        return []
    with contextlib.closing(Checkpoints(workdir / "checkpoints", read_only=True)) as checkpoints:
        step = checkpoints.latest()
        return checkpoints.changes(step, {"state": shapes}) if step is not None else []


def once(workdir: epath.Path, key: str, compute: Callable[[], Any]) -> Any:
    """A value settled at the run's first start and kept in config.json, the same at every resumption and process."""
    value = processes.from_first(lambda: read_config(workdir).get(key))
    if value is not None:
        return value
    computed = compute()  # on every process, since it may train

    def keep() -> Any:
        write_json(workdir / "config.json", read_config(workdir) | {key: computed})
        return computed

    return processes.from_first(keep)


def last_line(workdir: epath.Path, split: str) -> dict[str, float]:
    """The newest values of a split in metrics.jsonl."""
    lines = [r for r in read_log(workdir / "metrics.jsonl") if r["split"] == split]
    return {k: v for k, v in lines[-1].items() if k not in ("step", "split")} if lines else {}


def make_result(
    experiment: Experiment,
    config: RunConfig,
    *,
    state: Any,
    values: Mapping[str, Mapping[str, float]],
    counts: Metrics,
    seconds: Mapping[str, float],
    examples: int,
) -> dict[str, Any]:
    """The content of result.json: what was reached, what was published, how long it took, on what.

    values: the last numbers by split; counts: the test split's merged metrics; examples: trained on in this session.
    """
    numbers = {f"{split}/{k}": v for split, line in values.items() for k, v in line.items() if not NORMS.match(k)}
    frozen = frozen_of(state.model_state)
    result = {
        "experiment": experiment.name,
        "step": int(state.step),
        "skipped": int(state.skipped),
        "seed": config.seed,
        "parameters": sum(x.size for x in jax.tree.leaves((state.params, frozen))),
        **({"trained_parameters": sum(x.size for x in jax.tree.leaves(state.params))} if frozen else {}),
        "metrics": numbers,
        "metric": own_metric(experiment, config),
        "published": [p.compare(numbers) for p in experiment.published],
        "seconds": {k: round(v, 3) for k, v in seconds.items()},
        "examples_per_second": round(examples / seconds["train"], 1) if seconds["train"] else None,
        "peak_host_bytes": machine.peak_bytes(),
        "devices": devices(),
        "git_commit": source.commit(),
        "versions": source.versions(),
        **experiment.facts,
    }
    if counts:
        result |= experiment.task.details(counts)
    if "per_class" in result:
        result["class_names"] = list(experiment.class_names or map(str, range(len(result["per_class"]["recall"]))))
    return result
