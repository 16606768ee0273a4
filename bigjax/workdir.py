"""The working directory of a run: what it holds, whether it may be resumed, and how to get a finished model back."""

import contextlib
import dataclasses
import fcntl
import importlib
import importlib.util
import json
import os
import resource
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import version
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from etils import epath

from bigjax import UsageError, processes
from bigjax.data.files import write_whole
from bigjax.experiment import Experiment, RunConfig
from bigjax.metrics import Metrics, per_class, read_log
from bigjax.optim import path_string

# Settings that may differ between a run and its resumption: they change no number.
FREE = {
    "workdir", "mesh", "distributed", "keep", "save_every", "save_minutes", "hang_seconds", "nonfinite", "resume",
    "tensorboard", "profile", "compilation_cache",
}  # fmt: skip
OURS = (
    "metrics.jsonl", "result.json", "report.html", "checkpoints", "gallery", "tensorboard", "profile", "source.patch",
    "config.json",
)  # fmt: skip
UNBEGUN = {".lock", ".writable", "source.patch", "config.json.part"}  # what a kill in the first moment leaves


def write_json(path: epath.Path, value: Any) -> None:
    """Atomically: the file is there whole or not at all."""
    write_whole(path, (json.dumps(value, indent=1) + "\n").encode())


def module_spec(module: nn.Module) -> dict[str, Any]:
    """A Linen module as JSON: its class and its fields."""

    cls = type(module)

    def value(name: str, v: Any) -> Any:
        if isinstance(v, nn.Module):
            return module_spec(v)
        if isinstance(v, tuple | list):
            return [value(name, part) for part in v]
        if v is not None and not isinstance(v, bool | int | float | str):
            raise UsageError(
                f"field {name} of {cls.__qualname__} is a {type(v).__name__}, which a run cannot record: make it "
                "a number, a text (a name to look up), a module or a tuple of these"
            )
        return v

    spec = {"class": f"{cls.__module__}.{cls.__qualname__}"}
    if cls.__module__ == "__main__" and hasattr(sys.modules["__main__"], "__file__"):
        spec["file"] = str(epath.Path(sys.modules["__main__"].__file__).resolve())
    names = [f.name for f in dataclasses.fields(module) if f.init and f.name not in ("parent", "name")]
    return {**spec, "fields": {n: value(n, getattr(module, n)) for n in names}}


def module_from(spec: Mapping[str, Any]) -> nn.Module:
    """The module that `module_spec` described."""
    where, _, name = spec["class"].rpartition(".")
    main = getattr(sys.modules["__main__"], "__file__", None)
    if "file" in spec and main and str(epath.Path(main).resolve()) == spec["file"]:
        module = sys.modules["__main__"]  # the script itself asks: it must not run once more
    elif "file" in spec:
        if not epath.Path(spec["file"]).exists():
            raise UsageError(f"the script {spec['file']} that defines {name} is gone: put it back to load this run")
        loader = importlib.util.spec_from_file_location("bigjax_run_script", spec["file"])
        module = sys.modules[loader.name] = importlib.util.module_from_spec(loader)  # dataclasses look their module up
        loader.loader.exec_module(module)
    else:
        module = importlib.import_module(where)

    def value(v: Any) -> Any:
        if isinstance(v, dict) and "class" in v:
            return module_from(v)
        return tuple(map(value, v)) if isinstance(v, list) else v

    return getattr(module, name)(**{k: value(v) for k, v in spec["fields"].items()})


def git(*arguments: str) -> str | None:
    """What git prints in the current folder, or None where there is no repository or no git."""
    try:
        done = subprocess.run(["git", *arguments], capture_output=True, encoding="utf-8", errors="replace", timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def versions() -> dict[str, str]:
    libraries = ("bigjax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
    return {"python": sys.version.split()[0], **{n: version(n) for n in libraries}}


def devices() -> dict[str, Any]:
    first = jax.devices()[0]
    count = {"count": jax.device_count(), "processes": jax.process_count()}
    return {"platform": first.platform, "kind": first.device_kind, **count}


def describe(experiment: Experiment, config: RunConfig) -> dict[str, Any]:
    """What config.json holds."""
    return {
        "experiment": experiment.name,
        "config": json.loads(json.dumps(dataclasses.asdict(config))),
        "steps": None,  # settled when training starts
        "models": {k: module_spec(m) for k, m in experiment.models().items()},
        "versions": versions(),
        "git_commit": (git("rev-parse", "HEAD") or "").strip() or None,
        "devices": devices(),
        "command": sys.argv,
    }


def difference(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """The settings that differ, as `learning_rate: 0.001 -> 0.01`; those of FREE are left out."""
    lines = []
    for k in sorted(old.keys() & new.keys()):  # a flag that came or went with a release must not orphan a run
        a, b = old[k], new[k]
        if (not prefix and k in FREE) or a == b:
            continue
        if isinstance(a, dict) and isinstance(b, dict):
            lines += difference(a, b, f"{prefix}{k}.")
        else:
            lines.append(f"{prefix}{k}: {a} -> {b}")
    return lines


def read_config(workdir: epath.PathLike) -> dict[str, Any]:
    """config.json of a working directory; UsageError where there is none."""
    path = epath.Path(workdir) / "config.json"
    if not path.exists():
        raise UsageError(f"{workdir} holds no run (no config.json): train first, or give the --workdir of a run")
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as e:
        raise UsageError(f"{path} is not readable as JSON ({e}): restore it, or use another --workdir") from None


def load(workdir: epath.PathLike, *, player: str | None = None) -> tuple[nn.Module, dict[str, Any]]:
    """(module, variables) of a finished or interrupted run, from its newest checkpoint, on the first device.

    `player` chooses among several (a GAN's "generator"). If the run kept averaged parameters (--ema), you get those.

        model, variables = bigjax.load("runs/mnist_cnn")
        logits_BC = model.apply(variables, images_BHWC)

    Raises UsageError if there is no run, no checkpoint or no such player.
    """
    from bigjax.checkpoint import Checkpoints, to_stderr

    models = read_config(workdir)["models"]
    if player is None and len(models) == 1:
        player = next(iter(models))
    if player not in models:
        raise UsageError(
            f"{workdir} has the players {', '.join(models)}: name one, as load(..., player={list(models)[-1]!r})"
        )
    checkpoints = Checkpoints(epath.Path(workdir) / "checkpoints", read_only=True)
    step = checkpoints.newest(tell=to_stderr)
    if step is None:
        raise UsageError(f"{workdir} holds no checkpoint yet: let it train until one is saved")
    state = checkpoints.shapes(step)["state"]
    chosen = {k: {player: state[k][player]} for k in ("params", "model_state", "ema") if player in (state.get(k) or {})}
    if "ema" in chosen:
        del chosen["params"]
    saved = checkpoints.restore(step, {"state": chosen})["state"]
    checkpoints.close()
    weights = saved.get("ema") or saved["params"]
    return module_from(models[player]), {"params": weights[player], **saved.get("model_state", {}).get(player, {})}


def clear(workdir: epath.Path) -> None:
    """Deletes what a run wrote, config.json last: as long as it is there, the rest is known to be a run's."""
    for name in OURS:
        if (path := workdir / name).exists():
            path.rmtree() if path.is_dir() else path.unlink()


@contextlib.contextmanager
def locked(workdir: epath.Path) -> Iterator[None]:
    """While it is entered no other process trains there; a kill leaves nothing behind that blocks.

    Raises UsageError that names the other. Not on gs://, which has no locks.
    """
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        file = None if "://" in str(workdir) or not processes.first() else open(workdir / ".lock", "a+")
    except OSError:  # of which open_workdir has more to say
        file = None
    if file is None:
        yield
        return
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            other = file.read().strip() or "another process"
            raise UsageError(f"--workdir {workdir} is in use by {other}: wait for its end, or use another") from None
        file.truncate(0)
        file.write(f"pid {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield


def open_workdir(
    workdir: epath.Path,
    description: Mapping[str, Any],
    *,
    resume: bool,
    tree: Callable[[], list[str]] = list,
) -> dict[str, Any] | None:
    """Makes the working directory ready for the run described; its result if the run is finished already.

    tree: how the state differs from what is saved there, asked if the settings differ.

    Raises UsageError for a file, a folder that cannot be written, one that holds other things or another run.
    """
    if workdir.exists() and not workdir.is_dir():
        raise UsageError(f"--workdir {workdir} is a file: name a folder")
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        probe = workdir / ".writable"
        probe.write_text("")
        probe.unlink()
    except OSError as e:
        raise UsageError(f"--workdir {workdir} cannot be written ({e.strerror or e}): choose another") from None
    config = workdir / "config.json"
    if not resume and config.exists():  # without it nothing there is known to be a run's
        clear(workdir)
    if not config.exists():
        there = workdir.iterdir() if workdir.is_dir() else ()  # in a bucket an empty folder is none
        if other := sorted(p.name for p in there if p.name not in UNBEGUN):
            raise UsageError(
                f"--workdir {workdir} holds no run, but other things ({', '.join(other[:3])}): "
                "name an empty or new folder"
            )
        (workdir / "source.patch").write_text(git("diff", "HEAD") or "")
        write_json(config, description)
        return None
    old = read_config(workdir)
    changes = difference(old["config"], description["config"])
    if old["experiment"] != description["experiment"]:
        changes.insert(0, f"experiment: {old['experiment']} -> {description['experiment']}")
    if changes:
        raise UsageError(
            f"--workdir {workdir} belongs to a run with other settings: use another --workdir, or --no-resume to "
            "start over there; to begin a new run with its parameters, add --init-from\n  "
            + "\n  ".join(changes + tree())
        )
    result = workdir / "result.json"
    return json.loads(result.read_text()) if result.exists() else None


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


def transfer(state: Any, source: epath.PathLike) -> tuple[Any, str]:
    """The state with those parameters of another run whose path and shape are the same, and lines that say which.

    A shape in which neighbouring axes are one, as heads are merged, counts as the same.

    Raises UsageError where the source has no checkpoint, or nothing fits.
    """
    from bigjax.checkpoint import Checkpoints, to_stderr

    read_config(source)
    checkpoints = Checkpoints(epath.Path(source) / "checkpoints", read_only=True)
    step = checkpoints.newest(tell=to_stderr)
    if step is None:
        raise UsageError(f"--init-from {source} holds no checkpoint: give a run that saved one")
    saved = checkpoints.shapes(step)["state"]["params"]
    there = {path_string(path): s for path, s in jax.tree.leaves_with_path(saved)}
    here = {path_string(path): x for path, x in jax.tree.leaves_with_path(state.params)}
    taken = {k for k, x in here.items() if k in there and regrouped(there[k].shape, x.shape)}
    if not taken:
        raise UsageError(f"--init-from {source}: none of its parameters has a path and shape of this model")
    same = {k: x.sharding for k, x in here.items() if k in taken and there[k].shape == x.shape}

    def placed(path: Any, s: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=same.get(path_string(path), s.sharding))

    abstract = jax.tree_util.tree_map_with_path(placed, saved)
    values = checkpoints.restore(step, {"state": {"params": abstract}})["state"]["params"]
    checkpoints.close()
    values = {path_string(path): x for path, x in jax.tree.leaves_with_path(values)}

    def choose(path: Any, x: Any) -> Any:
        k = path_string(path)
        if k in taken and k not in same:
            return jax.device_put(np.asarray(values[k]).reshape(x.shape).astype(x.dtype), x.sharding)
        return values[k].astype(x.dtype) if k in taken else x

    params = jax.tree_util.tree_map_with_path(choose, state.params)
    lists = {
        f"took {len(taken)} of {len(here)} parameters from {source} at step {step}": [k for k in here if k in taken],
        "reshaped": [f"{k} {there[k].shape} -> {x.shape}" for k, x in here.items() if k in taken and k not in same],
        "left as initialized": [
            f"{k} {x.shape}" + (f" (there {there[k].shape})" if k in there else "")
            for k, x in here.items()
            if k not in taken
        ],
        "not in this model": [k for k in there if k not in here],
    }
    ema = jax.tree.map(jax.numpy.copy, params) if state.ema else state.ema
    said = "\n  ".join(f"{what}: {', '.join(names)}" for what, names in lists.items() if names)
    return state.replace(params=params, ema=ema), said


def regrouped(old: tuple[int, ...], new: tuple[int, ...]) -> bool:
    """Whether two shapes are the same but for neighbouring axes that one of them has as one: (4, 6) and (4, 2, 3)."""
    ends = [set(np.cumprod((1, *shape)).tolist()) for shape in (old, new)]
    return np.prod(old) == np.prod(new) and (ends[0] <= ends[1] or ends[1] <= ends[0])


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
    numbers = {f"{split}/{k}": v for split, line in values.items() for k, v in line.items() if "/" not in k}
    result = {
        "experiment": experiment.name,
        "step": int(state.step),
        "skipped": int(state.skipped),
        "seed": config.seed,
        "parameters": sum(x.size for x in jax.tree.leaves(state.params)),
        "metrics": numbers,
        "published": [p.compare(numbers) for p in experiment.published],
        "seconds": {k: round(v, 3) for k, v in seconds.items()},
        "examples_per_second": round(examples / seconds["train"], 1) if seconds["train"] else None,
        "mfu": None,
        "peak_host_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "devices": devices(),
        "git_commit": (git("rev-parse", "HEAD") or "").strip() or None,
        "versions": versions(),
        **experiment.facts,
    }
    if "confusion" in counts:
        counts_CC = np.asarray(counts["confusion"][0])
        names = experiment.class_names or [str(i) for i in range(len(counts_CC))]
        scores = {k: v.tolist() for k, v in per_class(counts_CC).items()}
        result |= {"confusion": counts_CC.astype(int).tolist(), "class_names": list(names), "per_class": scores}
    return result
