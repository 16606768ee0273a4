"""Whether a checkpoint is what was saved: a checksum of every file, taken when the save was complete.

For the checkpoint folder C/STEP the manifest is C/manifests/STEP.json: {"files": {path: [bytes, crc32]}}. Of several
processes each takes those of the files that it wrote, C/manifests/STEP.INDEX.part, of which process 0 makes the whole.
"""

import json
import zlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from types import MappingProxyType

import fsspec
from etils import epath

from bigjax.run.atomic import write_whole

LAST = "_CHECKPOINT_METADATA"  # the time of the commit is written into it at the very end
PIECE = 2**22  # bytes read at a time


THREADS = 8  # crc32 lets others work meanwhile, as does a bucket's answer


def files(
    folder: epath.Path, *, below: str = "", known: Mapping[str, list[int]] = MappingProxyType({})
) -> dict[str, list[int]]:
    """[size, crc32] of every file in a folder (only of a part `below` it), by its path there, but for those known."""
    system, root = fsspec.core.url_to_fs(str(folder))  # lists them in one request, of which a bucket makes you wait
    names = [path.removeprefix(f"{root}/") for path in system.find(f"{root}/{below}".rstrip("/"))]

    def sums(name: str) -> list[int]:
        size = crc = 0
        with system.open(f"{root}/{name}", "rb") as f:
            while piece := f.read(PIECE):
                size, crc = size + len(piece), zlib.crc32(piece, crc)
        return [size, crc]

    unknown = [name for name in names if name not in known]
    with ThreadPoolExecutor(THREADS) as pool:
        return dict(zip(unknown, pool.map(sums, unknown), strict=True))


def write_part(checkpoints: epath.Path, step: int, index: int, *, state: epath.Path) -> None:
    """Writes the checksums of what process `index` has written into the folder of a state."""
    path = checkpoints / "manifests" / f"{step}.{index}.part"
    path.parent.mkdir(parents=True, exist_ok=True)
    found = files(state, below=f"ocdbt.process_{index}")  # as orbax calls what each process writes
    write_whole(path, json.dumps({f"state/{name}": sums for name, sums in found.items()}).encode())


def write(checkpoints: epath.Path, step: int, *, where: epath.Path | None = None, processes: int = 1) -> None:
    """Writes the manifest of a complete checkpoint, atomically; what other processes wrote is as their parts say.

    where: the folder, if it is still to be renamed. Its file LAST changes once more then, and is left to a second call.
    """
    path = checkpoints / "manifests" / f"{step}.json"
    parts = [path.with_name(f"{step}.{index}.part") for index in range(1, processes)]
    if where is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        found = {name: sums for part in parts for name, sums in json.loads(part.read_text()).items()}
        found |= files(where, known={**found, LAST: []})
    elif path.exists() and (checkpoints / str(step)).exists():
        found = json.loads(path.read_text())["files"]
        found |= files(checkpoints / str(step), known=found)
    else:
        return
    write_whole(path, json.dumps({"files": found}).encode())
    for part in parts if where is not None else ():
        part.unlink()


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
    """Deletes the manifests of checkpoints that are no more, and the parts that a killed save left."""
    folder = checkpoints / "manifests"
    for path in folder.iterdir() if folder.exists() else ():
        step = path.name.partition(".")[0]
        if step.isdigit() and int(step) not in kept:
            path.unlink()


def extent(folder: epath.Path) -> tuple[int, float]:
    """(bytes, seconds since 1970 of the newest file) of all files below a folder."""
    stats = [extent(p) if p.is_dir() else (p.stat().length, p.stat().mtime) for p in folder.iterdir()]
    return sum(n for n, _ in stats), max((t for _, t in stats), default=0.0)
