"""Which features of a TFDS set are image, text and label, and what their values become."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from bigjax import UsageError
from bigjax.data.files import few, image_form

FIELDS = ("image", "text", "label")
PAIR = ("source", "target")
SYNONYMS = {
    "image": ("img", "picture", "images", "photo"),
    "text": ("sentence", "review", "content", "document", "review_body"),
    "label": ("labels", "class", "classes", "category", "fine_label", "y", "target"),
}


@dataclass(frozen=True)
class Fields:
    """Field -> the feature that it is read from; label is `target` where numbers are to be predicted.

    shapes: as declared, with None for sides that differ; names: of the classes, None where they are to be counted;
    decodes: images are files of pictures, to be decoded.
    """

    features: Mapping[str, str]
    shapes: Mapping[str, tuple[int | None, ...]]
    names: tuple[str, ...] | None
    decodes: bool
    notes: tuple[str, ...]


def chosen(name: str, info: Any, *, given: Mapping[str, str | None], takes: Sequence[str]) -> Fields:
    """What is read of the set called `name`; `given` says the feature of a field, None that it is found by its name.

    UsageError: there is no such feature, or it is not of the field's kind.
    """
    features, found, notes = dict(info.features), {}, []
    if "source" in takes:
        return _pair(name, features, info.supervised_keys or (), given)
    wanted = {"label" if field == "target" else field for field in takes}
    for field in FIELDS:
        feature = given.get(field)
        if feature is None:
            usual = [s for s in info.supervised_keys or () if isinstance(s, str)]
            names = [field, *usual, *SYNONYMS[field]]
            feature = next((n for n in names if _fits(field, features.get(n), exact=n == field)), None)
            if field == "text" and "image" in found and "text" not in wanted:
                feature = None  # what is written beside pictures
            if feature not in (None, field):
                notes.append(f"{name}: its {feature} is taken for the {field}; --{field}-feature names another")
        elif feature not in features:
            raise UsageError(f"{name} has no feature {feature!r}: it has {described(features)}: name one of these")
        elif not _fits(field, features[feature]):
            raise UsageError(
                f"--{field}-feature {feature}: it is no {field}, {name} has {described(features)}: name another"
            )
        if feature is not None:
            found[field] = feature
    for field in FIELDS:  # what has no such feature at all is told by `takes.check`, with the script that takes it
        others = [n for n in features if n not in found.values() and _fits(field, features[n], exact=False)]
        if field in wanted and field not in found and others:
            raise UsageError(
                f"{name} has no {field}, but {described(features)}: name the feature that is it by --{field}-feature"
            )
    if not {"image", "text"} & set(found):
        raise UsageError(
            f"{name} has neither image nor text, but {described(features)}: use another set, or export it as .npz"
        )
    names, decodes = None, False
    if "label" in found:
        names = _names(name, features, found, takes)
    if "image" in found:
        image = features[found["image"]]
        image_form(name, (None, *image.shape))
        kind, decodes = np.dtype(image.np_dtype), _kind(image) == "image" and np.issubdtype(image.np_dtype, np.integer)
        if kind not in (np.uint8, np.float32) and not decodes:
            raise UsageError(f"{name} has images of {kind}, not of uint8: use another set, or export it as .npz")
        if decodes and kind == np.uint16:
            notes.append(f"{name}: images of 16 bits become 8")
    shapes = {field: tuple(features[f].shape) if field == "image" else () for field, f in found.items()}
    return Fields(found, shapes, names, decodes, tuple(notes))


def _pair(name: str, features: Any, supervised: Sequence[Any], given: Mapping[str, str | None]) -> Fields:
    """The texts that are read and written: those that are told, else the set's own input and output."""
    texts = [n for n, feature in features.items() if _kind(feature) == "text"]
    usual = [n for n in supervised if isinstance(n, str) and n in texts]
    told = {field: feature for field in PAIR if (feature := given.get(field)) is not None}
    for field, feature in told.items():
        if feature not in texts:
            raise UsageError(f"--{field} {feature}: {name} has {described(features)}: name one that is text")
    found = {}
    for field in PAIR:
        free = [n for n in usual if n not in (*told.values(), *found.values())]
        found[field] = told.get(field) or next(iter(free), None)
    if None in found.values() or len({*found.values()}) < 2:
        raise UsageError(
            f"{name} has {described(features)}: name the text that is read by --source, and another that is to be "
            "written by --target"
        )
    note = f"{name}: its {found['source']} is read and its {found['target']} written: see --source and --target"
    return Fields(found, dict.fromkeys(PAIR, ()), None, False, () if len(told) == 2 else (note,))


def _names(name: str, features: Any, found: dict[str, str], takes: Sequence[str]) -> tuple[str, ...] | None:
    """The names of the classes; where numbers are predicted label becomes target, and without use it goes."""
    feature = features[found["label"]]
    if not _scalar(feature):
        if {"label", "target"} & set(takes):
            raise UsageError(
                f"{name} has {described(features)}: its {found['label']} is no single class an example: name another "
                "by --label-feature"
            )
        found.pop("label")
        return None
    names = feature.names if _kind(feature) == "class" else None
    if names is not None and ("label" in takes or "target" not in takes):
        return tuple(names)
    if "label" not in takes:
        number = np.issubdtype(feature.np_dtype, np.number)
        if "target" in takes and not number:
            raise UsageError(f"{name} has {described(features)}: its {found['label']} is no number to predict")
        label = found.pop("label")
        if number and names is None:
            found["target"] = label
    return None


def _scalar(feature: Any) -> bool:
    return getattr(feature, "shape", None) == () and _kind(feature) in ("text", "class", "number")


def _fits(field: str, feature: Any, *, exact: bool = True) -> bool:
    """Whether a feature can be this field; by another name than the field's own it must be of the kind for sure."""
    kind = None if feature is None else _kind(feature)
    if field == "image":
        return kind == "image" or (kind == "number" and len(feature.shape) == 3)
    if field == "text":
        return kind == "text"
    return kind is not None if exact else kind in ("class", "text", "number") and _scalar(feature)


def _kind(feature: Any) -> str:
    import tensorflow_datasets as tfds

    kinds = {"image": tfds.features.Image, "class": tfds.features.ClassLabel, "text": tfds.features.Text}
    found = next((kind for kind, form in kinds.items() if isinstance(feature, form)), None)
    if found == "class" and not feature.num_classes:
        return "number"
    if found or not isinstance(feature, tfds.features.Tensor):
        return found or type(feature).__name__
    dtype = np.dtype(feature.np_dtype)
    if np.issubdtype(dtype, np.number) or dtype.kind == "b":
        return "number"
    return "text" if feature.shape == () else "texts"


def described(features: Any) -> str:
    """image (28, 28, 1) uint8, label (one of 10 classes), ..."""
    told = []
    for name, feature in sorted(features.items()):  # their order in features.json is any
        kind, shape = _kind(feature), getattr(feature, "shape", ())
        if kind == "class":
            told.append(f"{name} (one of {feature.num_classes} classes)")
        elif kind in ("image", "number"):
            form = f" {tuple(shape)}" if shape else ""
            told.append(f"{name} ({kind}{form} of {np.dtype(feature.np_dtype).name})")
        else:
            told.append(f"{name} ({kind})")
    return few(told)
