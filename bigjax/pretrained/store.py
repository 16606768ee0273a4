"""Folders of the hub: where one is, its config.json, and its tensors, of which any part is read by itself."""

import json
import math
import os
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np

from bigjax import UsageError, place

INDEX, WHOLE, CONFIG = "model.safetensors.index.json", "model.safetensors", "config.json"
DTYPES = {
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16, "I64": np.int64,
    "I32": np.int32, "I16": np.int16, "I8": np.int8, "U8": np.uint8, "BOOL": np.bool_,
    "F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2,
}  # fmt: skip
INTEGERS = ("I64", "I32", "I16", "I8", "U8", "BOOL")
Row = tuple[str, tuple[int, ...], Any, Callable[[], np.ndarray]]
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


def folder_of(source: Any) -> Path:
    """The local folder that is meant, or the one that a hub id was fetched to."""
    text = str(source)
    if re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", text) and not Path(text).exists():
        return _fetched(text)
    if text.startswith("gs://"):
        raise UsageError(f"{text} is in a bucket, and tensors are read from files: copy the folder here, and give that")
    path = Path(place(text))
    if not path.is_dir():
        if path.is_file():
            raise UsageError(f"{path} is a file: give the folder that holds config.json and the safetensors files")
        raise UsageError(f"{text} is no folder here and no hub id: give a folder, or owner/name")
    return path


def _fetched(name: str) -> Path:
    try:
        import huggingface_hub
    except ImportError:
        raise UsageError(
            f'{name} is no folder here, and a hub id needs huggingface_hub: pip install -e ".[hub]", or give a folder'
        ) from None
    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=["*.json", "*.jinja", "*.safetensors"]))
    except Exception as e:  # whatever the network says: it has many kinds
        said = next(iter(str(e).strip().splitlines()), type(e).__name__)
        raise UsageError(
            f"{name} is no folder here, and the hub did not give it ({said[:200]}): check its name and the network, "
            "or download it elsewhere and give the folder"
        ) from None


def read_json(path: Path) -> dict[str, Any]:
    """An object of a JSON file."""
    try:
        found = json.loads(path.read_text("utf-8"))
    except (ValueError, OSError) as e:
        raise UsageError(f"{path} cannot be read ({str(e).splitlines()[0]}): fetch it again") from None
    if not isinstance(found, dict):
        raise UsageError(f"{path} holds no JSON object: fetch it again")
    return found


def config_of(folder: Path) -> dict[str, Any]:
    """config.json of a folder."""
    try:
        here = (folder / CONFIG).is_file()
    except OSError as e:
        raise UsageError(f"{folder} cannot be read ({e.strerror}): make it readable, or give another folder") from None
    if not here:
        raise UsageError(f"{folder} has no config.json, which says what the model is: add the one of these weights")
    return read_json(folder / CONFIG)


class Tensors:
    """The tensors of a folder by name, one file or several with an index; only headers are read at first."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.places: dict[str, tuple[Path, tuple[int, ...], str, int]] = {}
        self.maps: dict[Path, np.ndarray] = {}
        index = self._index()
        for file in self._files(index):
            found = _header(folder / file)
            self.places |= {name: place for name, place in found.items() if index.get(name, file) == file}

    def _index(self) -> dict[str, str]:
        """Which file each tensor is in, where one says so."""
        if not (self.folder / INDEX).is_file():
            return {}
        index = read_json(self.folder / INDEX).get("weight_map")
        if not (isinstance(index, dict) and index and all(isinstance(file, str) for file in index.values())):
            raise UsageError(f"{self.folder / INDEX} does not say which file each tensor is in: fetch it again")
        return index

    def _files(self, index: dict[str, str]) -> list[str]:
        if index:
            files = sorted(set(index.values()))
            if lost := [f for f in files if not (self.folder / f).is_file()]:
                raise UsageError(f"{self.folder} lacks {', '.join(lost)}, of its {len(files)} files: fetch them")
            return files
        files = (
            [WHOLE] if (self.folder / WHOLE).is_file() else sorted(p.name for p in self.folder.glob("*.safetensors"))
        )
        if len(files) == 1:
            return files
        if files:
            raise UsageError(f"{self.folder} has {', '.join(files)} but no {INDEX}, which says what is in them: add it")
        if pickles := sorted(p.name for kind in PICKLES for p in self.folder.glob(kind)):
            raise UsageError(
                f"{self.folder} holds pickles ({', '.join(pickles)}), which can run any code when they are read: where "
                "you trust them, let transformers write safetensors, from_pretrained(FOLDER).save_pretrained(FOLDER)"
            )
        raise UsageError(f"{self.folder} has no {WHOLE}: add the weights")

    def equal(self, name: str, other: str) -> bool:
        """Whether two tensors hold the same, a part at a time."""
        a, b, rows = self.read(name), self.read(other), 1024
        return a.shape == b.shape and all(
            np.array_equal(a[n : n + rows], b[n : n + rows]) for n in range(0, len(a), rows)
        )

    def shape(self, name: str) -> tuple[int, ...]:
        return self.places[name][1]

    def merge(self, name: str, shape: tuple[int, ...]) -> None:
        """From now on its last axes are one, where that makes it of this shape."""
        file, there, dtype, start = self.places[name]
        if there[: len(shape) - 1] == shape[:-1] and math.prod(there) == math.prod(shape):
            self.places[name] = (file, shape, dtype, start)

    def dtypes(self) -> list[str]:
        """Those that occur, most bytes first."""
        sizes: dict[str, int] = {}
        for _, shape, dtype, _ in self.places.values():
            sizes[dtype] = sizes.get(dtype, 0) + int(np.prod(shape)) * np.dtype(DTYPES[dtype]).itemsize
        return sorted(sizes, key=lambda d: -sizes[d])

    def read(self, name: str, index: Sequence[slice] = ()) -> np.ndarray:
        """A part of a tensor as a view of its file: pages are read where they are looked at."""
        file, shape, dtype, start = self.places[name]
        kind = np.dtype(DTYPES[dtype])
        size = int(np.prod(shape)) * kind.itemsize
        if file not in self.maps:
            self.maps[file] = np.memmap(file, np.uint8, "r")
        return np.asarray(self.maps[file])[start : start + size].view(kind).reshape(shape)[tuple(index)]


def _header(file: Path) -> dict[str, tuple[Path, tuple[int, ...], str, int]]:
    """name -> (file, shape, dtype, first byte). UsageError where the file is not what its header says."""
    try:
        size = file.stat().st_size
        with open(file, "rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            if not 2 <= length <= min(size - 8, 2**27):
                raise ValueError(f"{size} bytes do not hold a header of {length}")
            entries = json.loads(opened.read(length))
        entries.pop("__metadata__", None)
        found, end = {}, 8 + length
        for name, e in entries.items():
            if e["dtype"] not in DTYPES:
                raise UsageError(f"{name} in {file} is {e['dtype']}: only {', '.join(DTYPES)} are read here")
            start, stop = (8 + length + int(n) for n in e["data_offsets"])
            if stop - start != math.prod(e["shape"]) * np.dtype(DTYPES[e["dtype"]]).itemsize or start < 8 + length:
                raise ValueError(f"{name} has a size that its shape does not have")
            if not all(isinstance(n, int) and n >= 0 for n in e["shape"]):
                raise ValueError(f"{name} has the shape {e['shape']}")
            found[name], end = (file, tuple(e["shape"]), e["dtype"], start), max(end, stop)
        if end != size:
            raise ValueError(f"{size} bytes, where its header says {end}")
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise UsageError(f"{file} is truncated or damaged ({e}): fetch it again") from None
    except OSError as e:
        raise UsageError(f"{file} cannot be read ({e.strerror}): put it right, or fetch it again") from None
    return found


def write_folder(folder: Any, tensors: str, rows: Iterable[Row], about: str, said: Any) -> None:
    """Writes both files of a folder, the tensors and the JSON that says what they are; of several processes the first
    does, and all must call it. UsageError: it cannot be written."""
    path, real = Path(place(folder)), jax.process_index() == 0
    try:
        path.mkdir(parents=True, exist_ok=True)
        write_tensors(path / tensors, rows, real=real)
        if real:
            (path / about).write_text(json.dumps(said, indent=2) + "\n")
    except OSError as e:
        raise UsageError(
            f"{path} cannot be written ({e.strerror}): make room there, or choose another folder"
        ) from None


def write_tensors(file: Path, rows: Iterable[Row], *, real: bool = True) -> None:
    """Writes (name, shape, dtype, what gives it) as a safetensors file, one at a time; whole, or not at all.

    Where it is not `real`, all are asked for and nothing is written.
    """
    names, entries, end = {kind: name for name, kind in DTYPES.items()}, {}, 0
    rows = sorted(rows, key=lambda row: row[0])
    for name, shape, dtype, _ in rows:
        size = math.prod(shape) * np.dtype(dtype).itemsize
        entries[name] = {"dtype": names[np.dtype(dtype).type], "shape": shape, "data_offsets": [end, end + size]}
        end += size
    header = json.dumps({"__metadata__": {"format": "pt"}} | entries).encode()
    header += b" " * (-len(header) % 8)
    half = file.with_name(file.name + ".partial") if real else Path(os.devnull)
    with open(half, "wb") as opened:
        opened.write(len(header).to_bytes(8, "little") + header)
        for _, _, dtype, give in rows:
            opened.write(np.ascontiguousarray(give(), dtype).tobytes())
    if real:
        half.replace(file)
