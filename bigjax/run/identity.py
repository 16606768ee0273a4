"""A run's identity: one that is resumed trains the same program on the same data, or says what has changed."""

import hashlib
import json
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epath

from bigjax import UsageError
from bigjax.experiment import size_of
from bigjax.program import Program
from bigjax.run import processes
from bigjax.run.workdir import devices, read_config, versions, write_json

SUMMED, ROWS = 2**28, 256  # bytes of a split that are all summed, and rows of a larger one


def fingerprint_of(split: Any) -> dict[str, Any]:
    """Size, fields and a checksum of a split: of all its bytes in memory, up to SUMMED; else of rows spread over it."""
    if split is None:
        return {}
    size = size_of(split)
    row = {k: v[0] for k, v in split.items()} if isinstance(split, Mapping) else split[0]
    fields = {k: f"{np.asarray(v).dtype.kind}{np.asarray(v).dtype.itemsize}{list(np.shape(v))}" for k, v in row.items()}
    if isinstance(split, Mapping) and sum(np.asarray(v).nbytes for v in split.values()) <= SUMMED:
        parts = (v for _, v in sorted(split.items()))
    else:
        rows = np.unique(np.linspace(0, size - 1, ROWS).astype(int)).tolist()
        examples = ({k: v[i] for k, v in split.items()} if isinstance(split, Mapping) else split[i] for i in rows)
        parts = (v for example in examples for _, v in sorted(example.items()))
    checksum = 0
    for part in parts:
        array = np.asarray(part)
        checksum = zlib.crc32(repr(array.tolist()).encode() if array.dtype.kind in "OU" else array.tobytes(), checksum)
    fields = {k: v if v[0] not in "OU" else "text" for k, v in fields.items()}
    return {"rows": size, "fields": fields, "checksum": checksum}


def identify(home: epath.Path, program: Program, splits: Mapping[str, Any], *, accept: bool) -> None:
    """Compares what trains, and on what, with what the run began with; keeps it where the run is new.

    The program is compared where versions and devices are the same. Raises UsageError with what differs; with `accept`
    it is recorded as a change instead.
    """
    mesh = {k: int(n) for k, n in program.mesh.shape.items()}
    circumstances = json.dumps({**versions(), **devices(), "mesh": mesh}, sort_keys=True)
    where = hashlib.sha256(circumstances.encode()).hexdigest()[:16]
    here = {"programs": {where: program.fingerprint()}, "data": {k: fingerprint_of(v) for k, v in splits.items()}}

    def compare() -> None:
        record = read_config(home)
        known = record.get("identity", {"programs": {}, "data": {}})
        changes = []
        if known["programs"].get(where, here["programs"][where]) != here["programs"][where]:
            changes.append("program: what an update or an evaluation computes (model, loss, optimizer, a number there)")
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
