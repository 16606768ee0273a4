"""Whether a checkpoint is what was saved: a checksum of every file, taken when the save was complete.

For the checkpoint folder C/STEP the manifest is C/manifests/STEP.json: {"files": {path: [bytes, crc32]}}.
"""

import json
import zlib
from collections.abc import Mapping
from types import MappingProxyType

import fsspec
from etils import epath

from bigjax.run.atomic import write_whole

LAST = "_CHECKPOINT_METADATA"  # the time of the commit is written into it at the very end
PIECE = 2**22  # bytes read at a time


def files(folder: epath.Path, *, known: Mapping[str, list[int]] = MappingProxyType({})) -> dict[str, list[int]]:
    """[size, crc32] of every file below a folder, by its path there, but for those already known."""
    system, root = fsspec.core.url_to_fs(str(folder))  # lists them in one request, of which a bucket makes you wait
    found = {}
    for path in system.find(root):
        name = path.removeprefix(f"{root}/")
        if name not in known:
            size = crc = 0
            with system.open(path, "rb") as f:
                while piece := f.read(PIECE):
                    size, crc = size + len(piece), zlib.crc32(piece, crc)
            found[name] = [size, crc]
    return found


def write(checkpoints: epath.Path, step: int, *, where: epath.Path | None = None) -> None:
    """Writes the manifest of a complete checkpoint, atomically.

    where: the folder, if it is still to be renamed. Its file LAST changes once more then, and is left to a second call.
    """
    path = checkpoints / "manifests" / f"{step}.json"
    if where is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        found = {name: sums for name, sums in files(where).items() if name != LAST}
    elif path.exists() and (checkpoints / str(step)).exists():
        found = json.loads(path.read_text())["files"]
        found |= files(checkpoints / str(step), known=found)
    else:
        return
    write_whole(path, json.dumps({"files": found}).encode())


def read(checkpoints: epath.Path, step: int) -> dict[str, list[int]] | None:
    """What the manifest of a checkpoint says; None if there is none."""
    path = checkpoints / "manifests" / f"{step}.json"
    try:
        return json.loads(path.read_text())["files"] if path.exists() else None
    except (ValueError, KeyError):
        return None  # the manifest itself is damaged: the checkpoint need not be


def damage(checkpoints: epath.Path, step: int) -> str | None:
    """What is wrong with a checkpoint, "" if it is what was saved, None if no manifest says what that was."""
    if (saved := read(checkpoints, step)) is None:
        return None
    here = files(checkpoints / str(step))
    for name, (size, crc) in saved.items():
        if name not in here:
            return f"its file {name} is missing"
        if here[name][0] != size:
            return f"its file {name} has {here[name][0]} bytes, not {size}"
        if here[name][1] != crc:
            return f"its file {name} is not what was saved (crc32)"
    return ""


def ended(checkpoints: epath.Path, *, after: int) -> list[int]:
    """The steps after `after`, in order, whose checkpoints were committed when their manifests were written."""
    folder = checkpoints / "manifests"
    steps = sorted(int(p.stem) for p in folder.iterdir() if p.stem.isdigit()) if folder.exists() else []
    return [n for n in steps if n > after and LAST in (read(checkpoints, n) or ())]


def forget(checkpoints: epath.Path, kept: list[int]) -> None:
    """Deletes the manifests of checkpoints that are no more."""
    folder = checkpoints / "manifests"
    for path in folder.iterdir() if folder.exists() else ():
        if path.stem.isdigit() and int(path.stem) not in kept:
            path.unlink()


def extent(folder: epath.Path) -> tuple[int, float]:
    """(bytes, seconds since 1970 of the newest file) of all files below a folder."""
    stats = [extent(p) if p.is_dir() else (p.stat().length, p.stat().mtime) for p in folder.iterdir()]
    return sum(n for n, _ in stats), max((t for _, t in stats), default=0.0)
