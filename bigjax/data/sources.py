"""Data by name: embedded sets, TFDS sets on disk, a user's own files. What is wrong is said in one line.

Shapes: N examples, H height, W width, C channels, D features. A `Dataset` has `image` (N,H,W,C) uint8 or float32 in [0,
1], or `x` (N,D) float32, or `text` (N,) strings; and `label` (N,) int32 or `target` (N,...) float32; or `source` and
`target` (N,), both strings.
"""

import difflib
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from bigjax import UsageError
from bigjax.data.files import few, located, npz, stray
from bigjax.data.matching import matched
from bigjax.data.pictures import folder_of_images, resize_split
from bigjax.data.pipeline import Dataset, example, hold_out, shares
from bigjax.data.tables import csv_rows, jsonl
from bigjax.data.takes import check
from bigjax.experiment import Split, size_of

HELD_OUT = 0.1  # of data without a test split
FILES = {".npz": lambda path, columns, takes: npz(path), ".csv": csv_rows, ".jsonl": jsonl}


def load(
    name: str,
    *,
    eval_data: str | None = None,
    split_seed: int = 0,
    takes: Sequence[str] = (),
    background: str = "white",
    resize: int | None = None,
    text_column: str | None = None,
    label_column: str | None = None,
    split: str | None = None,
    image_feature: str | None = None,
    text_feature: str | None = None,
    label_feature: str | None = None,
    source: str | None = None,
    target: str | None = None,
    undecoded: bool = False,
) -> Dataset:
    """The data called `name`: `mnist5k`, `digits`, `diabetes`, `mnist1d`, `python_topics`, `python_docstrings`, a name
    in `tfds.NAMES`, `tfds:NAME`, or a path (~ is expanded, file:/// and gs:// are read); a TFDS set on disk by its name
    alone, too.

    Own data: `.npz` with `image` (N,H,W[,C]) or `x` (N,D) and integer `label` (0, 1, ..., whose names are in
    `class_names` (C,), if given; without them any from 0, which are renumbered) or float `target`; a folder of images
    with a sub-folder a class; `.jsonl` or `.csv` with `text` and `label` (integers or names), or `source` and `target`;
    `.csv` with numbers in columns of any name and `label` or `target`.
    `eval_data` (own data or a name) becomes the test split, with the classes of the training data; where neither it nor
    the set gives a test split about a tenth is held out by `split_seed` (`hold_out`). Lines on stderr, also in `notes`,
    say what was held out, left out or renumbered. UsageError: what is missing or wrong, in which file and line, and
    what to do.

    takes: the fields that are needed; data without them are refused, with the script that takes those (`takes.check`).
    background, resize, the columns, split and the features: as in `reading`, whose groups of flags they are; a
        `label_column` is the target where a target is taken. UsageError: one of them says nothing about these data.
    source, target: the column of a file, or the feature of a TFDS set, that is it where pairs of texts are taken.
    undecoded: a folder of images is read by index, each an `Undecoded` of any size.
    """
    wanted = "target" if "target" in takes and "label" not in takes else "label"
    features = {"image": image_feature, "text": text_feature, "label": label_feature}
    how = {"takes": takes, "background": background, "resize": resize, "features": features, "split": split}
    how["undecoded"] = undecoded
    how["columns"] = {"text": text_column, wanted: label_column}
    names = [name] if eval_data is None else [name, eval_data]
    pair = {"source": source, "target": target}
    for field in (field for field, given in pair.items() if given is not None):
        if not any(_tfds(n) or n.lower().endswith((".csv", ".jsonl")) for n in names):
            raise UsageError(f"--{field} is for .csv, .jsonl and TFDS, and {' and '.join(names)} is none: leave it out")
    _of_use(names, columns=(text_column, label_column), background=background, features=features, split=split)
    if "source" in takes:
        how |= {"features": features | pair, "columns": how["columns"] | pair}
    data = _counted(replace(_open(name, **how, part="train" if eval_data is not None else None), name=name))
    if eval_data is not None:
        other = _open(eval_data, **how, part="test")
        test = matched(data, other, name, eval_data, takes)
        data = replace(data, test=test, notes=data.notes + other.notes)
    elif data.test is None:
        rest, held = hold_out(data.train, fraction=HELD_OUT, split_seed=split_seed, purpose="test")
        gave = shares(rest, held, fraction=HELD_OUT, class_names=data.class_names)
        note = f"{name}: held out for testing by --split-seed {split_seed}: {gave}"
        data = replace(data, train=rest, test=held, notes=(*data.notes, note))
    for note in data.notes:
        print(note, file=sys.stderr)
    return data


def fields_of(name: str) -> tuple[str, ...]:
    """The fields of the data called `name`. UsageError: as `load`."""
    how = {"background": "white", "resize": None, "columns": {}, "features": {}, "split": None, "undecoded": False}
    return tuple(example(_open(name, takes=(), **how).train))


def _of_use(
    names: Sequence[str],
    *,
    columns: tuple[str | None, ...],
    background: str,
    features: Mapping[str, str | None],
    split: str | None,
) -> None:
    """UsageError for a flag of `reading` that says nothing about any of the data."""
    from bigjax.data import tfds_splits

    told = " and ".join(names)
    if any(column is not None for column in columns):
        flag = "--label-column" if columns[0] is None else "--text-column"
        if not any(name.lower().endswith((".csv", ".jsonl")) for name in names):
            raise UsageError(f"{flag} names a column of a .csv or .jsonl, and {told} is none: leave it out")
    if background != "white" and not any(located(name).is_dir() for name in names if "://" not in name):
        raise UsageError(f"--background is for folders of pictures, and {told} is none: leave it out")
    flags = {f"--{field}-feature": names for field, feature in features.items() if feature is not None}
    flags |= {f"--split {k}=": [names[0] if k == "train" else names[-1]] for k in tfds_splits.parsed(split)}
    for flag, where in flags.items():
        if not any(map(_tfds, where)):
            raise UsageError(f"{flag} is for TFDS sets, and {' and '.join(where)} is none: leave it out")


def _counted(data: Dataset) -> Dataset:
    """Data whose labels without names are classes from 0: others are renumbered and become the names."""
    if data.classes is None or data.class_names is not None or not isinstance(data.train, Mapping):
        return data
    values, label_N = np.unique(data.train["label"], return_inverse=True)
    data = replace(data, train={**data.train, "label": label_N.astype(np.int32)}, classes=len(values))
    if values[-1] == len(values) - 1:
        return data
    gap = "do not start at 0" if values[0] else "leave numbers out"
    note = f"{data.name}: labels {gap}: the {len(values)} of the data ({few(values.tolist())}) are the classes, by name"
    return replace(data, class_names=tuple(map(str, values)), notes=(*data.notes, note))


def column_statistics(values: np.ndarray, *, names: Sequence[str] | None = None) -> tuple[Any, Any]:
    """(mean, std) of numbers (N,) or columns (N,D): floats, or a tuple with one a column. Give the training split's.

    What never varies has a deviation of 1, and a line on stderr says which, by `names` or by number.
    """
    values_ND = np.asarray(values, np.float64).reshape(len(values), -1)
    std_D = _deviations(values_ND.std(0), values_ND.min(0) == values_ND.max(0), names or np.arange(values_ND.shape[1]))
    mean, std = (tuple(map(float, v)) for v in (values_ND.mean(0), std_D))
    return (mean, std) if np.ndim(values) > 1 else (mean[0], std[0])


def _deviations(std_C: np.ndarray, constant_C: np.ndarray, names: Sequence[Any]) -> np.ndarray:
    """Deviations to divide by: 1 for what is constant, whatever rounding makes of it; a line says which."""
    constant_C = constant_C | (std_C == 0)
    if constant_C.any():
        which = few([name for name, constant in zip(names, constant_C, strict=True) if constant])
        print(f"never varies in the training data: {which}: taken with a deviation of 1", file=sys.stderr)
    return np.where(constant_C, 1.0, std_C)


def image_statistics(split: Split) -> tuple[Any, Any]:
    """(mean, std) of the pixels of `image`, in units of [0, 1]: floats, or a tuple with one a channel.

    Give the training split. Of a reader 2,000 examples, evenly spread, are read. A channel that never varies has a
    deviation of 1, and a line on stderr says which (counted from 0).
    """
    check(split, ("image",), name="the split")
    if isinstance(split, Mapping):
        blocks = [split["image"][i : i + 1000] for i in range(0, size_of(split), 1000)]
    else:
        rows = np.unique(np.linspace(0, len(split) - 1, 2000).astype(int))
        blocks = (np.asarray(split[int(row)]["image"]) for row in rows)
    count, total, squares, low, high = 0, 0.0, 0.0, np.inf, -np.inf
    for block in blocks:  # in blocks: float64 copies of a large set would not fit
        pixels_NC = block.reshape(-1, block.shape[-1]).astype(np.float64) / (255 if block.dtype == np.uint8 else 1)
        count, total, squares = count + len(pixels_NC), total + pixels_NC.sum(0), squares + np.square(pixels_NC).sum(0)
        low, high = np.minimum(low, pixels_NC.min(0)), np.maximum(high, pixels_NC.max(0))
    mean_C, std_C = total / count, np.sqrt(np.maximum(squares / count - (total / count) ** 2, 0))
    std_C = _deviations(std_C, low == high, [f"channel {c} of image" for c in range(len(std_C))])
    if len(mean_C) == 1:
        return float(mean_C[0]), float(std_C[0])
    return tuple(map(float, mean_C)), tuple(map(float, std_C))


def _open(name: str, *, takes: Sequence[str], resize: int | None, **how: Any) -> Dataset:
    """What `name` says, with no test split where it is in one piece; with the fields that are taken."""
    data = _read(name, takes=takes, resize=resize, **how)
    check(data.train, takes, name=name)
    if resize is None:
        return data
    first = example(data.train)
    if "image" not in first:
        raise UsageError(f"--resize is for images, and {name} holds {few(list(first))}: leave it out")
    if isinstance(data.train, Mapping) and first["image"].shape[:2] == (resize, resize):
        return data
    test = None if data.test is None else resize_split(data.test, resize)
    return replace(data, train=resize_split(data.train, resize), test=test)


def _tfds(name: str) -> str | None:
    """The name of a set for `tfds.read`; None of other data."""
    from bigjax.data import embedded, tfds

    if name in embedded.SETS:
        return None
    short, bracket, part = name.partition("[")
    if short in tfds.NAMES or name.startswith("tfds:"):
        return tfds.NAMES.get(short, short.removeprefix("tfds:")) + bracket + part
    if "://" in name or name.startswith(("tokens:", "/", "~", ".")):
        return None
    path = located(name)
    return name if path.suffix.lower() not in FILES and not path.exists() and tfds.known(name) else None


def _read(
    name: str,
    *,
    takes: Sequence[str],
    background: str,
    resize: int | None,
    columns: Mapping[str, str | None],
    features: Mapping[str, str | None],
    split: str | None,
    undecoded: bool,
    part: str | None = None,
) -> Dataset:
    from bigjax.data import embedded, tfds

    if not name.removeprefix("tfds:").removeprefix("tokens:").strip():
        raise UsageError(
            f"the name of the data, {name!r}, is empty: give a path, tfds:NAME, or {few(list(embedded.SETS))}"
        )
    if wrong := stray(name):
        raise UsageError(f"the name of the data, {ascii(name)}, is not UTF-8 ({wrong}): rename it")
    if name in embedded.SETS:
        return embedded.SETS[name]()
    if (known := _tfds(name)) is not None:
        return tfds.read(known, takes=takes, features=features, split=split, part=part)
    if name.startswith("tokens:"):
        check(("tokens",), takes, name=name)
        raise UsageError(f"{name} is text in tokens, which only a language model reads: give other --data")
    path = located(name)
    if path.is_dir():
        if described := next((p for n in range(3) for p in path.glob("*/" * n + "dataset_info.json")), None):
            raise UsageError(f"{path} is a set that TFDS prepared: {tfds.by_name(described)}")
        return folder_of_images(path, background=background, resize=resize, undecoded=undecoded)
    ending = path.suffix.lower()
    if ending not in FILES and not path.exists() and "://" not in name and not name.startswith(("/", "~", ".")):
        if "/" not in name:
            there = [n for n in tfds.prepared(tfds.folder()) if n not in tfds.NAMES.values()]
            names = [*embedded.SETS, *tfds.NAMES, *there]
            near = difflib.get_close_matches(name, names, n=1)
            hint = f" (did you mean {near[0]}?)" if near else ""
            raise UsageError(
                f"no data called {name!r}{hint}: use {', '.join(names)}, tfds:NAME, or the path of your own .npz, "
                ".csv, .jsonl or folder"
            )
    if not path.exists():
        raise UsageError(f"{path} does not exist: check the path given as data")
    if ending == ".txt":
        check(("text",), takes, name=name)
    if ending not in FILES:
        raise UsageError(
            f"{path}: files ending in {path.suffix or 'nothing'!r} are not read: use {', '.join(FILES)} or a folder "
            "of images"
        )
    try:
        if path.stat().length == 0:
            raise UsageError(f"{path} is empty: write it again")
        return FILES[ending](path, columns, takes)
    except UnicodeDecodeError as e:
        line = e.object.count(b"\n", 0, e.start) + 1
        raise UsageError(
            f"{path}, line {line} is not UTF-8 text, as a {ending} file must be (byte {e.start}): convert it"
        ) from e
    except OSError as e:
        raise UsageError(f"{path} cannot be read ({e.strerror or e}): check the file and its permissions") from e
