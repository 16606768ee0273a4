"""Data by name: embedded sets, TFDS sets on disk, a user's own files. What is wrong is said in one line.

Shapes: N examples, H height, W width, C channels, D features. A `Dataset` has `image` (N,H,W,C) uint8 or float32 in [0,
1], or `x` (N,D) float32, or `text` (N,) strings; and `label` (N,) int32 or `target` (N,...) float32; or `source` and
`target` (N,), both strings.
"""

import difflib
import sys
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from etils import epath

from bigjax import UsageError
from bigjax.data.files import FILES, few, folder_of_images
from bigjax.data.pipeline import Dataset, hold_out, shares
from bigjax.experiment import Split, size_of

HELD_OUT = 0.1  # of data without a test split


def load(name: str, *, eval_data: str | None = None, split_seed: int = 0) -> Dataset:
    """The data called `name`: `mnist5k`, `digits`, `diabetes`, `mnist1d`, `python_topics`, a name in `tfds.NAMES`,
    `tfds:NAME`, or a path.

    Own data: `.npz` with `image` (N,H,W[,C]) or `x` (N,D) and integer `label` (0, 1, ...; names in `class_names` (C,),
    if given) or float `target`; a folder of images with a sub-folder a class; `.jsonl` or `.csv` with `text` and
    `label` (integers or names), or `source` and `target`; `.csv` with numbers in columns of any name and `label` or
    `target`. `eval_data` (own data or a name) becomes the test split, with the classes of the training data; where
    neither it nor the set gives a test split about a tenth is held out by `split_seed` (`hold_out`), and a line on
    stderr, also in `note`, says what that gave. UsageError: what is missing or wrong, in which file and line, and what
    to do.
    """
    data = replace(_open(name), name=name)
    if eval_data is not None:
        return replace(data, test=_matched(data, _open(eval_data), name, eval_data))
    if data.test is not None:
        return data
    rest, held = hold_out(data.train, fraction=HELD_OUT, split_seed=split_seed, purpose="test")
    gave = shares(rest, held, fraction=HELD_OUT, class_names=data.class_names)
    note = f"{name}: held out for testing by --split-seed {split_seed}: {gave}"
    print(note, file=sys.stderr)
    return replace(data, train=rest, test=held, note=note)


def image_statistics(split: Split) -> tuple[Any, Any]:
    """(mean, std) of the pixels of `image`, in units of [0, 1]: floats, or a tuple with one a channel.

    Give the training split. Of a reader 2,000 examples, evenly spread, are read.
    """
    if isinstance(split, Mapping):
        blocks = [split["image"][i : i + 1000] for i in range(0, size_of(split), 1000)]
    else:
        rows = np.unique(np.linspace(0, len(split) - 1, 2000).astype(int))
        blocks = [split[int(row)]["image"] for row in rows]
    count, total, squares = 0, 0.0, 0.0
    for block in blocks:  # in blocks: float64 copies of a large set would not fit
        pixels_NC = block.reshape(-1, block.shape[-1]) / (255.0 if block.dtype == np.uint8 else 1.0)
        count, total, squares = count + len(pixels_NC), total + pixels_NC.sum(0), squares + np.square(pixels_NC).sum(0)
    mean_C, std_C = total / count, np.sqrt(np.maximum(squares / count - (total / count) ** 2, 0))
    if len(mean_C) == 1:
        return float(mean_C[0]), float(std_C[0])
    return tuple(map(float, mean_C)), tuple(map(float, std_C))


def _open(name: str) -> Dataset:
    """What `name` says, with no test split where it is in one piece."""
    from bigjax.data import embedded, tfds

    if name in embedded.SETS:
        return embedded.SETS[name]()
    if name in tfds.NAMES or name.startswith("tfds:"):
        return tfds.read(tfds.NAMES.get(name, name.removeprefix("tfds:")))
    if name.startswith("tokens:"):
        raise UsageError(f"{name} is text in tokens, which only a language model reads: give other --data")
    path = epath.Path(name).expanduser()
    if path.is_dir():
        return folder_of_images(path)
    if path.suffix not in FILES and not path.exists() and "/" not in name:
        names = [*embedded.SETS, *tfds.NAMES]
        near = difflib.get_close_matches(name, names, n=1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise UsageError(
            f"no data called {name!r}{hint}: use {', '.join(names)}, tfds:NAME, or the path of your own .npz, .csv, "
            ".jsonl or folder"
        )
    if not path.exists():
        raise UsageError(f"{path} does not exist: check the path given as data")
    if path.suffix not in FILES:
        raise UsageError(
            f"{path}: files ending in {path.suffix or 'nothing'!r} are not read: use {', '.join(FILES)} or a folder "
            "of images"
        )
    try:
        if path.stat().length == 0:
            raise UsageError(f"{path} is empty: write it again")
        return FILES[path.suffix](path)
    except UnicodeDecodeError as e:
        raise UsageError(
            f"{path} is not UTF-8 text, as a {path.suffix} file must be (byte {e.start}): convert it"
        ) from e
    except OSError as e:
        raise UsageError(f"{path} cannot be read ({e.strerror or e}): check the file and its permissions") from e


def _matched(data: Dataset, other: Dataset, name: str, eval_data: str) -> Split:
    """The evaluation split of `other`, with the fields, shapes and classes of `data`."""
    split = other.train if other.test is None else other.test
    if not (isinstance(split, Mapping) and isinstance(data.train, Mapping)):
        return split
    for field in {**data.train, **split}:
        a, b = (f"has shape {s[field].shape[1:]}" if field in s else "is missing" for s in (data.train, split))
        if a != b:
            raise UsageError(
                f"{field} of an example {a} in {name} but {b} in {eval_data}: give evaluation data of the same form"
            )
    if data.classes is None:
        return split
    label_N, known = split["label"], data.class_names
    if known and other.class_names:
        used = [other.class_names[i] for i in np.unique(label_N)]
        new = [c for c in used if c not in known]
        if new:
            raise UsageError(
                f"{eval_data} has the class {new[0]!r}, which {name} has not ({few(known)}): remove it or train on "
                "it too"
            )
        label_N = np.array([known.index(c) if c in known else -1 for c in other.class_names], np.int32)[label_N]
    elif label_N.max() >= data.classes:
        raise UsageError(
            f"{eval_data} has label {label_N.max()}, but {name} has {data.classes} classes (0 to "
            f"{data.classes - 1}): remove it or train on it too"
        )
    return {**split, "label": label_N}
