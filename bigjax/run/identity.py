"""A run's identity: one that is resumed trains the same program on the same data, or says what has changed."""

import hashlib
import json
import sys
import zlib
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import jax
import numpy as np
from etils import epath

from bigjax import UsageError, place, sharding
from bigjax.experiment import RunConfig, size_of
from bigjax.program import Program
from bigjax.run import manifest, processes
from bigjax.run.checkpoint import committed
from bigjax.run.source import versions
from bigjax.run.watch import watching
from bigjax.run.workdir import LENGTH, changes_of_state, devices, read_config, settings, write_json
from bigjax.step import to_float
from bigjax.task import Fields

SUMMED, ROWS, THREADS = 2**28, 64, 16  # bytes of a split that are all summed; rows of a larger one, and their readers


def fingerprint_of(split: Any) -> dict[str, Any]:
    """Size and fields of a split, and checksums: of all its bytes in memory, up to SUMMED; else of rows spread over it.

    A row that cannot be read has none: training says more when it comes to it, and it may be repaired.
    """
    if split is None:
        return {}
    size = size_of(split)
    if isinstance(split, Mapping) and sum(np.asarray(v).nbytes for v in split.values()) <= SUMMED:
        sums, row = {"all": checksum(split)}, {k: v[0] for k, v in split.items()}
    else:
        rows = np.unique(np.linspace(0, size - 1, ROWS).astype(int)).tolist()
        pool = ThreadPoolExecutor(THREADS, "bigjax-identity")
        try:
            read = {str(i): row for i, row in zip(rows, pool.map(partial(row_of, split), rows)) if row is not None}
        finally:
            pool.shutdown(wait=False, cancel_futures=True)  # an interrupt waits for no slow reader
        sums, row = {i: checksum(row) for i, row in read.items()}, next(iter(read.values()), {})
    fields = {k: str(np.asarray(v).dtype) + str(list(np.shape(v))) for k, v in sorted(row.items())}
    fields = {k: "text" if v[:2] in ("ob", "<U") else v for k, v in fields.items()}
    if sizes := getattr(split, "sizes", None):  # its batches are of rows of like length
        fields["by length"] = f"cut to {', '.join(map(str, sizes))}"
    return {"rows": size, "fields": fields, "checksums": sums}


def fingerprint_of_weights(program: Program) -> dict[str, dict[str, Any]]:
    """{"initial": that of the weights that the experiment begins with}, in the form of a split's, where it has one."""
    found = getattr(program.experiment.initial, "fingerprint", None)
    return {"initial": found()} if found else {}


def row_of(split: Any, row: int) -> dict[str, Any] | None:
    """An example; None of one that cannot be read."""
    try:
        return {k: v[row] for k, v in split.items()} if isinstance(split, Mapping) else split[row]
    except (Exception, SystemExit):
        return None


def checksum(fields: Mapping[str, Any]) -> int:
    """crc32 of names and values."""
    crc = 0
    for name, value in sorted(fields.items()):
        array = np.asarray(value)
        bits = repr(array.tolist()).encode() if array.dtype.kind in "OU" else np.ascontiguousarray(array)
        crc = zlib.crc32(bits, zlib.crc32(name.encode(), crc))
    return crc


def differences(name: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """What of a split differs, a line each; checksums are compared where both have them."""
    lines = [f"{name} data, {k}: {old.get(k)} -> {new.get(k)}" for k in ("rows", "fields") if old.get(k) != new.get(k)]
    before, after = old.get("checksums", {}), new.get("checksums", {})
    if not lines and (changed := [i for i in before.keys() & after.keys() if before[i] != after[i]]):
        first = "all" if changed == ["all"] else min((i for i in changed if i != "all"), key=int)
        which = "values" if first == "all" else f"example {first}"
        lines.append(f"{name} data, checksum of its {which}: {before[first]} -> {after[first]}")
    return lines


def fingerprint_of_program(program: Program) -> str:
    """A hash of what an update and an evaluation compute, as lowered for the mesh: the same in every process.

    Other code on the host (summaries, hooks, evaluators, galleries) is not in it, nor an evaluation of other shapes
    than those that are trained on, which may not be possible.
    """
    from bigjax.data import pipeline

    text, transform = program.lowered().as_text(), program.experiment.transform
    test = program.experiment.facts.get("own_test", program.experiment.test)
    if transform is not None:  # it runs on the host: what it makes of a few examples
        few = min(4, size_of(program.train))
        text += str(checksum(next(pipeline.batches(program.train, seed=0, batch_size=few, transform=transform))))
    row, trained = row_of(test, 0) if test is not None else None, program.batch_shapes
    if row and all(k not in trained or np.shape(v) == trained[k].shape[1:] for k, v in row.items()):
        example = {k: np.asarray(v)[None] for k, v in row.items()}
        example |= {"index": np.zeros(1, np.int32), "mask": np.ones(1, np.float32)}
        batch = sharding.batch_shapes(example, program.mesh, batch_size=program.config.batch_size)
        task, key = program.experiment.task, program.key
        evaluate = jax.jit(lambda params, state, batch: task.evaluate(params, state, Fields(to_float(batch)), key))
        with jax.set_mesh(program.mesh):
            text += evaluate.lower(*program.state_shapes.evaluated(), batch).as_text()
    return hashlib.sha256(text.encode()).hexdigest()


def circumstances(program: Program) -> str:
    """A hash of all that decides how the same code is lowered: versions, devices, mesh."""
    mesh = {k: int(n) for k, n in program.mesh.shape.items()}
    told = json.dumps({**versions(), **devices(), "mesh": mesh}, sort_keys=True)
    return hashlib.sha256(told.encode()).hexdigest()[:16]


def identify(
    home: epath.Path, program: Program, splits: Mapping[str, Any], *, accept: bool, tell: Callable[[str], None]
) -> Callable[[], None]:
    """Compares what trains, and on what, with what the run began with.

    The program is compared where versions and devices are the same, and `tell` hears where they are not. Raises
    UsageError with what differs, unless `accept`. What it gives records all this, once the run does go on.
    """
    where = circumstances(program)
    with watching("reading the data's first examples"):
        data = {k: fingerprint_of(v) for k, v in splits.items()} | fingerprint_of_weights(program)
    here = {"programs": {where: fingerprint_of_program(program)}, "data": data}
    agree(program, here["programs"][where], data)
    for name in data.keys() - {"train"}:
        if data[name] and data[name] == data.get("train") and "all" in data[name]["checksums"]:
            tell(f"the split {name!r} is the training data, row for row: it says nothing of other data")

    def compare() -> dict[str, Any]:
        record = read_config(home)
        known = record.get("identity", {"programs": {}, "data": {}})
        if "own_test" in program.experiment.facts:  # the verb evaluate was given other data
            known["data"].pop("eval", None)
        changes = []
        if known["programs"].get(where, here["programs"][where]) != here["programs"][where]:
            changes.append("program: what an update or an evaluation computes (model, loss, optimizer, a number there)")
            changes += changes_of_state(home, program.state_shapes)
        for name, new in here["data"].items():
            changes += differences(name, known["data"].get(name, new), new)
        if changes and not accept:
            raise UsageError(
                f"--workdir {home} belongs to a run with other code or data: put them back, use another --workdir, "
                "--no-resume to start over there, or --accept-changes to go on with an unfinished one\n  "
                + "\n  ".join(changes)
            )
        kept = {"programs": {**known["programs"], **here["programs"]}, "data": {**known["data"], **here["data"]}}
        said = {"changes": [*record.get("changes", []), *changes]} if changes else {}
        elsewhere = bool(known["programs"]) and where not in known["programs"]
        return {"record": {"identity": kept} | said, "elsewhere": elsewhere, "new": kept != known}

    found = processes.from_first(compare)
    if found["elsewhere"]:
        tell("on other devices or versions than before: whether the code is the same is not compared")

    def record() -> None:
        if found["new"] and processes.first():
            write_json(home / "config.json", read_config(home) | found["record"])

    return record


def agree(program: Program, code: str, data: Mapping[str, Any]) -> None:
    """Raises UsageError in all processes where one trains another program, or on other data: what `identify` found."""
    size = sum(x.size for x in jax.tree.leaves(program.state_shapes.params))
    about: dict[str, Any] = {"parameters": f"{size:,}"}
    for name, found in data.items():
        rows, sums = found.get("rows", 0), found.get("checksums", {})
        unread = 0 if "all" in sums else min(rows, ROWS) - len(sums)
        told = f"checksum {zlib.crc32(json.dumps(sums).encode())}" + f", {unread} of those tried unreadable" * (
            unread > 0
        )
        about[f"{name} data"] = f"{rows:,} rows ({told})"
        about[f"{name} fields"] = str(found.get("fields"))
    about["the program (model, loss, optimizer, or a number in them)"] = code[:8]
    about |= beginnings(program)
    for kind in ("evaluators", "gallery"):  # which all run, and may wait in for one another
        about[kind] = ", ".join(getattr(program.experiment, kind)) or "none"
    processes.agree(about, advice="give all the same code and data")


def beginnings(program: Program) -> dict[str, str]:
    """What several processes must begin with alike: how parameters are initialized, and those of --init-from."""
    if not processes.several():
        return {}
    with jax.set_mesh(program.mesh):
        text = program.initialize.lower(program.key).as_text()
    about = {"the initial parameters": hashlib.sha256(text.encode()).hexdigest()[:8]}
    if source := program.config.init_from:
        folder = place(source, "--init-from ") / "checkpoints"
        step = max(committed(folder), default=None)
        sums = None if step is None else json.dumps(manifest.read(folder, step), sort_keys=True)
        told = f"of step {step} (checksum {zlib.crc32(sums.encode())})" if sums else "no checkpoint"
        about["--init-from's parameters"] = told
    return about


def trial(program: Program, splits: Mapping[str, Any]) -> Program:
    """The same, which several processes may run: they agree on it."""
    if processes.several():
        agree(program, fingerprint_of_program(program), {k: fingerprint_of(v) for k, v in splits.items()})
    return program


def longer(home: epath.Path, config: RunConfig) -> bool:
    """Whether --extend asks for another length than the run there has."""

    def compare() -> bool:
        known, asked = (read_config(home)["config"], settings(config)) if config.extend else ({}, {})
        return any(known.get(k) != asked.get(k) for k in LENGTH)

    return processes.from_first(compare)


def extend(home: epath.Path, program: Program, *, before: int) -> Callable[[], None]:
    """Makes `program`, which is the run's own but for its length, what the run is from here on.

    UsageError where it is not longer than `before`, the number of updates that the run had. What it gives records all
    this, once the run does go on.
    """
    steps = program.steps
    if steps <= before:
        raise UsageError(f"--extend: the run in {home} has {before:,} updates, and {steps:,} are not more: give more")
    programs = {circumstances(program): fingerprint_of_program(program)}

    def record() -> None:
        if not processes.first():
            return
        (home / "result.json").unlink(missing_ok=True)  # first: without it the run of either length goes on
        known = read_config(home)
        said = {"config": settings(program.config), "steps": steps, "command": sys.argv}
        said["extended"] = [*known.get("extended", []), {"from": before, "to": steps}]
        said["identity"] = {**known.get("identity", {"data": {}}), "programs": programs}
        write_json(home / "config.json", known | said)

    return record
