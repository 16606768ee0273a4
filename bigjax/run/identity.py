"""A run's identity: one that is resumed trains the same program on the same data, or says what has changed."""

import hashlib
import json
import zlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from etils import epath

from bigjax import UsageError, sharding
from bigjax.experiment import size_of
from bigjax.program import Program
from bigjax.run import processes
from bigjax.run.workdir import changes_of_state, devices, read_config, versions, write_json
from bigjax.step import to_float
from bigjax.task import Fields

SUMMED, ROWS = 2**28, 64  # bytes of a split that are all summed, and rows of a larger one


def fingerprint_of(split: Any) -> dict[str, Any]:
    """Size, fields and a checksum of a split: of all its bytes in memory, up to SUMMED; else of rows spread over it."""
    if split is None:
        return {}
    size = size_of(split)
    whole = isinstance(split, Mapping) and sum(np.asarray(v).nbytes for v in split.values()) <= SUMMED
    rows = np.unique(np.linspace(0, size - 1, ROWS).astype(int)).tolist()
    parts = [dict(split)] if whole else [row_of(split, i) for i in rows]
    checksum = 0
    for part in parts:
        for name, value in sorted(part.items()):
            array = np.asarray(value)
            text = repr(array.tolist()).encode() if array.dtype.kind in "OU" else np.ascontiguousarray(array)
            checksum = zlib.crc32(text, zlib.crc32(name.encode(), checksum))
    fields = {k: str(np.asarray(v).dtype) + str(list(np.shape(v))) for k, v in row_of(split, 0).items()}
    fields = {k: "text" if v[:2] in ("ob", "<U") else v for k, v in sorted(fields.items())}
    return {"rows": size, "fields": fields, "checksum": checksum}


def row_of(split: Any, row: int) -> dict[str, Any]:
    """An example; of one that cannot be read only why: training says more when it comes to it."""
    if isinstance(split, Mapping):
        return {k: v[row] for k, v in split.items()}
    try:
        return split[row]
    except Exception as e:
        return {"unreadable": type(e).__name__}


def fingerprint_of_program(program: Program) -> str:
    """A hash of what an update and an evaluation compute, as lowered for the mesh: the same in every process."""
    text, test = program.lowered().as_text(), program.experiment.test
    if test is not None:
        example = {k: np.asarray(v)[None] for k, v in row_of(test, 0).items()}
        example |= {"index": np.zeros(1, np.int32), "mask": np.ones(1, np.float32)}
        batch = sharding.batch_shapes(example, program.mesh, batch_size=program.config.batch_size)
        task, key = program.experiment.task, program.key
        evaluate = jax.jit(lambda params, state, batch: task.evaluate(params, state, Fields(to_float(batch)), key))
        with jax.set_mesh(program.mesh):
            text += evaluate.lower(*program.state_shapes.evaluated(), batch).as_text()
    return hashlib.sha256(text.encode()).hexdigest()


def identify(home: epath.Path, program: Program, splits: Mapping[str, Any], *, accept: bool) -> None:
    """Compares what trains, and on what, with what the run began with; keeps it where the run is new.

    The program is compared where versions and devices are the same. Raises UsageError with what differs; with `accept`
    it is recorded as a change instead.
    """
    mesh = {k: int(n) for k, n in program.mesh.shape.items()}
    circumstances = json.dumps({**versions(), **devices(), "mesh": mesh}, sort_keys=True)
    where = hashlib.sha256(circumstances.encode()).hexdigest()[:16]
    here = {
        "programs": {where: fingerprint_of_program(program)},
        "data": {k: fingerprint_of(v) for k, v in splits.items()},
    }

    def compare() -> None:
        record = read_config(home)
        known = record.get("identity", {"programs": {}, "data": {}})
        changes = []
        if known["programs"].get(where, here["programs"][where]) != here["programs"][where]:
            changes.append("program: what an update or an evaluation computes (model, loss, optimizer, a number there)")
            changes += changes_of_state(home, program.state_shapes)
        for name, new in here["data"].items():
            old = known["data"].get(name, new)
            changes += [
                f"{name} data, {part}: {old.get(part)} -> {new.get(part)}"
                for part in ("rows", "fields", "checksum")
                if old.get(part) != new.get(part)
            ]
        if changes and not accept:
            raise UsageError(
                f"--workdir {home} belongs to a run with other code or data: put them back, use another --workdir, "
                "--no-resume to start over there, or --accept-changes to go on with it\n  " + "\n  ".join(changes)
            )
        kept = {"programs": {**known["programs"], **here["programs"]}, "data": {**known["data"], **here["data"]}}
        if kept != known:
            said = {"changes": [*record.get("changes", []), *changes]} if changes else {}
            write_json(home / "config.json", record | {"identity": kept} | said)

    processes.from_first(compare)
