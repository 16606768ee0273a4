"""TFDS sets on disk, as array_record files, read without TensorFlow."""

import functools
import json
import shlex
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from etils import epath

from bigjax import UsageError
from bigjax.data import pipeline, tfds_features, tfds_folder, tfds_splits
from bigjax.data.files import few
from bigjax.data.pipeline import Dataset
from bigjax.data.tfds_folder import builder, folder, prepare_command, prepared
from bigjax.data.tfds_reader import TfdsReader, in_memory, labelled
from bigjax.experiment import Split

NAMES = {"mnist": "mnist", "cifar10": "cifar10", "imdb": "imdb_reviews", "lm1b": "lm1b"}  # short names
IN_MEMORY = 2 * 2**30  # bytes: sets that are larger when decoded stay on disk and are read by index
KINDS = {  # an embedded set that has this field
    "image": "mnist5k",
    "label": "python_topics",
    "text": "python",
    "source": "python_docstrings",
}


def known(name: str) -> bool:
    """Whether a set of this name is in `folder()`, or is one of those that TFDS could build there."""
    try:
        name = tfds_folder.asked(name).name
    except UsageError:
        return False
    if name in prepared(folder()) or tfds_folder.buildable(name):
        return True
    return tfds_folder.inside(tfds_folder.Asked(name), folder()) is not None


def by_name(described: epath.Path) -> str:
    """How a set is read whose dataset_info.json this is."""
    up, config = described.parent.parent, ""
    try:
        built = json.loads(described.read_text())["name"]
    except (ValueError, KeyError, TypeError):  # damaged, of which reading it says more
        return "name it by --data tfds:NAME, and the folder that holds it by TFDS_DATA_DIR"
    if up.name != built:
        up, config = up.parent, f"/{up.name}"
    return f"TFDS_DATA_DIR={shlex.quote(str(up.parent))} --data tfds:{built}{config} reads it"


def ready(name: str) -> bool:
    """Whether the set is in `folder()` and can be read by index. UsageError: it is damaged."""
    what = tfds_folder.asked(name)
    path = tfds_folder.located(what, folder())
    if path is None:
        builder(name, folder())  # there is such a set
        return False
    return bool(tfds_folder.formats(tfds_folder.opened(path, what, folder())) & tfds_folder.BY_INDEX)


def missing(what: tfds_folder.Asked, where: str, takes: Sequence[str], flag: str = "TFDS_DATA_DIR=") -> UsageError:
    """That a set is not there, and what to do; flag: what said `where` to look."""
    if up := tfds_folder.inside(what, where):
        return UsageError(f"{flag}{where} lies in the folder of {what.name} itself: give {flag}{up}")
    features = tuple(builder(str(what), where).info.features or ())
    fields = [f for f in (takes or features) if f in KINDS]
    kind = next(iter(fields), None)
    if {"text", "label"} <= set(fields) or (kind == "text" and not takes):
        kind = "label"
    instead = f", or use the embedded --data {KINDS[kind]}" if kind else ""
    there = "" if epath.Path(where).is_dir() else ", which does not exist"
    return UsageError(
        f"the TFDS set {what} is not in {where} (TFDS_DATA_DIR){there}: prepare it by: "
        f"{prepare_command(str(what))}{instead}"
    )


def read(
    text: str,
    *,
    takes: Sequence[str] = (),
    features: Mapping[str, str | None] | None = None,
    split: str | None = None,
    part: str | None = None,
) -> Dataset:
    """The set `text` (`tfds_folder.Asked`) in `folder()`: in memory, or by index where it is large or of several sizes.

    features: the features that are image, text and label, where they are told. split: as `tfds_splits.parsed`.
    part: "train" or "test", if only this one is wanted; it is given as `train`. UsageError: what is missing or wrong.
    """
    what, where, given = tfds_folder.asked(text), folder(), tfds_splits.parsed(split)
    path, name = tfds_folder.located(what, where), f"the TFDS set {what}"
    if path is None:
        raise missing(what, where, takes)
    built, cure = tfds_folder.opened(path, what, where), tfds_folder.repair(what, where)
    splits, formats = built.info.splits, tfds_folder.formats(built)
    if not formats & tfds_folder.BY_INDEX:
        raise UsageError(
            f"{name} is in {path}, but in {few(sorted(formats))} files, which are not read by index: convert them by: "
            f"{prepare_command(str(what), where)}"
        )
    fields = tfds_features.chosen(name, built.info, given=features or {}, takes=takes)
    notes, said = list(fields.notes), tfds_splits.described(splits)
    spoken = f"tfds:{what}"
    if what.slice and "train" in given:
        raise UsageError(f"{text} is a part, and so is --split train: write the part there alone, as train=train[:50%]")
    judge = part == "test"
    train = None if judge else given.get("train") or tfds_splits.to_train_on(name, spoken, splits) + what.slice
    tests = [given["test"]] if "test" in given else [s for s in tfds_splits.TESTS if s in splits and s != train]
    if part == "train":
        tests = []
    elif judge and "test" not in given:
        tests = [s + what.slice for s in tests or list(splits)[:1]]

    @functools.cache
    def reader(split: str) -> TfdsReader:
        return TfdsReader(built, split, tfds_splits.instructions(name, splits, split), fields, cure)

    names = fields.names
    if "label" in fields.features and names is None:
        names = _count(name, fields, [reader(split) for split in filter(None, [train, *tests])], notes)

    def kept(split: str) -> Split | None:
        """A split, without the examples that have no label (-1); None where none has one and labels are taken."""
        found = in_memory(reader(split), most=IN_MEMORY)
        if "label" not in fields.features:
            return found
        kept_N = labelled(found)
        if kept_N.all():
            return found
        if takes and "label" not in takes:
            in_one = isinstance(found, Mapping)
            return {k: found[k] for k in found if k != "label"} if in_one else found.without_labels()
        if not kept_N.any():
            return None
        notes.append(f"{name}: left out {(~kept_N).sum():,} examples of {split} without a label (-1)")
        return pipeline.take(found, np.flatnonzero(kept_N))

    hidden, trained, judged = [], None, None
    if train is not None and (trained := kept(train)) is None:
        raise UsageError(f"{name} hides the labels of {train} (-1): say another to train on by --split, of {said}")
    for split in tests:
        if train is not None:
            tfds_splits.apart(name, reader(train).pieces, reader(split).pieces)
        if (judged := kept(split)) is not None:
            if hidden or (split.partition("[")[0] != "test" and "test" not in given):
                notes.append(f"{name}: {_hides(hidden)}its split {split} is tested on")
            break
        hidden.append(split)
    if judged is None and (judge or hidden and "test" in given):
        raise UsageError(f"{name} hides the labels of {few(hidden)} (-1): say another to test on by --split, of {said}")
    if part is None and judged is None and (unused := [s for s in splits if s != "train"]) and train == "train":
        unused = f"its splits {few(unused)} are not used; --split test=... takes one to test on"
        notes.append(f"{name}: {_hides(hidden)}{unused}")
    if judge:
        trained, judged = judged, None
    return Dataset(trained, judged, len(names) if names else None, names, notes=tuple(notes))


def _hides(splits: Sequence[str]) -> str:
    return f"hides the labels of {few(splits)} (-1), " if splits else ""


def _count(name: str, fields: tfds_features.Fields, readers: Iterable[TfdsReader], notes: list[str]) -> tuple[str, ...]:
    """The values that are the labels of these readers, as names of classes. UsageError: they are no classes."""
    feature, values = fields.features["label"], set()
    for reader in readers:
        values |= set(reader.labels_of(range(len(reader))))
    if wrong := next((v for v in values if isinstance(v, float) and not v.is_integer()), None):
        raise UsageError(
            f"{name}: its {feature} holds {wrong:g}, which is no class: name another by --label-feature, or use a "
            "script that takes a target"
        )
    classes = sorted(v for v in values if isinstance(v, str) or v >= 0)
    for reader in readers:
        reader.count({value: place for place, value in enumerate(classes)})
    shown = [v if isinstance(v, str) else str(int(v)) for v in classes]
    notes.append(f"{name}: the {len(classes)} values of its {feature} ({few(shown)}) are the classes, by name")
    return tuple(shown)
