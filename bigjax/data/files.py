"""A user's own arrays, .npz, and what all own data must hold. What is wrong is said in one line.

Shapes: N examples, H height, W width, C channels, D features.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from etils import epath

from bigjax import UsageError, place
from bigjax.data.pipeline import Dataset

THREADS = 16
FIELDS = ("image", "x", "text", "label", "source", "target", "class_names")


def named_once(path: epath.Path, names: Sequence[str], *, what: str) -> list[str]:
    """The names of columns or arrays without spaces around them, and those of FIELDS in lower case.

    UsageError: two are one then.
    """
    plain = [name.strip() for name in names]
    read = [name.lower() if name.lower() in FIELDS else name for name in plain]
    for i, name in enumerate(read):
        if (first := read.index(name)) < i:
            raise UsageError(
                f"{path} has two {what} of one name, number {first + 1} ({names[first]!r}) and number {i + 1} "
                f"({names[i]!r}): rename or remove one of them"
            )
    return read


def located(name: str) -> epath.Path:
    """`bigjax.place` of data. UsageError: also a bucket that can't be reached."""
    from bigjax.run.places import reached

    return reached(place(name, "data "))


def chosen(where: object, names: Sequence[str], columns: Mapping[str, str | None]) -> list[str]:
    """The names, with that of the column that is given for a field (None: none) made the field's.

    A column that has the field's name already is another one from then on. UsageError: no such column.
    """
    out = list(names)
    for field, column in columns.items():
        if column is None:
            continue
        wanted = column.strip().lower() if column.strip().lower() in FIELDS else column.strip()
        if wanted not in names:
            raise UsageError(f"{where} has no column {column!r}: there are {few(names)}")
        others = ("label", "target") if field in ("label", "target") else (field,)
        out = [f"{name} (another)" if name in others else name for name in out]
        out[names.index(wanted)] = field
    return out


def stray(text: str) -> str:
    """The first character that is none (half of a surrogate pair, a byte of a name that isn't UTF-8), or ''."""
    try:
        text.encode()
    except UnicodeEncodeError as e:
        return ascii(text[e.start])[1:-1]
    return ""


def npz(path: epath.Path) -> Dataset:
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            names = named_once(path, archive.files, what="arrays")
            arrays = {name: archive[given] for name, given in zip(names, archive.files, strict=True)}
    except UsageError:
        raise
    except Exception as e:  # NumPy raises what damaged bytes lead to: ValueError, BadZipFile, AttributeError, ...
        if "allow_pickle" in str(e) and "Object arrays" in str(e):
            raise UsageError(
                f"{path} holds Python objects (rows of different shapes?): save arrays of numbers, all rows alike"
            ) from e
        raise UsageError(f"{path} is not a readable .npz archive ({type(e).__name__}): write it by numpy.savez") from e
    return checked(path, arrays, "arrays")


def checked(path: epath.Path, arrays: dict[str, np.ndarray], what: str) -> Dataset:
    """Images or features with labels or targets, in the forms that models take."""
    given, wanted = ([n for n in pair if n in arrays] for pair in (("image", "x"), ("label", "target")))
    if len(given) != 1 or len(wanted) != 1:
        raise UsageError(
            f"{path} has the {what} {few(list(arrays))}: name one of them image or x, and one label (classes) or "
            "target (numbers)"
        )
    (given,), (wanted,) = given, wanted
    inputs, labels = arrays[given], arrays[wanted]
    if inputs.ndim < 2 or len(inputs) == 0 or labels.ndim < 1 or len(labels) != len(inputs):
        raise UsageError(
            f"{path}: {given} has shape {inputs.shape} and {wanted} {labels.shape}: both need the same number of "
            "examples, at least one"
        )
    if given == "image" and inputs.ndim == 3:
        inputs = inputs[..., None]
    if given == "image":
        image_form(path, inputs.shape)
    elif inputs.ndim != 2:
        raise UsageError(f"{path}: x has shape {inputs.shape}: it must be (N,D); images are called image")
    if given == "image" and np.issubdtype(inputs.dtype, np.integer):
        if inputs.min() < 0 or inputs.max() > 255:
            raise UsageError(
                f"{path}: image has integers from {inputs.min()} to {inputs.max()}: they must lie in 0 to 255, or be "
                "floats in 0 to 1"
            )
        inputs = inputs.astype(np.uint8)
    else:
        inputs = _floats(path, given, inputs)
        if given == "image" and (inputs.min() < 0 or inputs.max() > 1):
            raise UsageError(
                f"{path}: image has floats from {inputs.min():g} to {inputs.max():g}: they must lie in 0 to 1 (divide "
                "them by 255, or by their largest), or be uint8 in 0 to 255"
            )
    if wanted == "target":
        return Dataset({given: inputs, wanted: _floats(path, wanted, labels)})
    names, notes = tuple(map(str, arrays["class_names"])) if "class_names" in arrays else None, ()
    if (
        labels.dtype.kind in "fb"
        and labels.ndim == 1
        and (labels == np.round(labels)).all()
        and float(labels.max()) < 2**31
    ):
        notes = (f"{path}: label is {labels.dtype}, all of it whole numbers: they are taken for classes",)
        labels = labels.astype(np.int32)
    if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
        raise UsageError(
            f"{path}: label is {labels.dtype} of shape {labels.shape}: it must be (N,) integers; numbers to predict "
            "are called target"
        )
    row = int(np.argmax((labels < 0) | (labels >= (len(names) if names else np.inf))))
    if labels[row] < 0 or (names and labels[row] >= len(names)):
        below = f", below the {len(names)} class_names" if names else ""
        raise UsageError(
            f"{path}: label {labels[row]} of example {row} is out of range: labels count classes from 0{below}; "
            "number them anew, or leave such examples out"
        )
    wrong = next((name for name in names or () if stray(name)), None)
    if wrong is not None:
        raise UsageError(f"{path}: class_names holds {ascii(wrong)}, which is no text ({stray(wrong)}): rename it")
    classes = len(names or np.unique(labels))
    return Dataset({given: inputs, wanted: labels}, classes=classes, class_names=names, notes=notes)


def image_form(where: object, shape: Sequence[int | None]) -> None:
    """UsageError for what is no image (N,H,W,C) with 1, 3 or 4 channels."""
    if len(shape) != 4:
        raise UsageError(f"{where}: image has shape {tuple(shape)}: it must be (N,H,W) or (N,H,W,C)")
    if shape[3] in (1, 3, 4):
        return
    said = f"{where}: image has shape {tuple(shape)}, which is {shape[3]} channels, the last axis"
    if shape[1] in (1, 3, 4):
        raise UsageError(f"{said}: channels come first there, give image.transpose(0, 2, 3, 1)")
    raise UsageError(f"{said}: an image has 1 (grey), 3 (colour) or 4 (with alpha), leave out or average the others")


def _floats(path: epath.Path, field: str, values: np.ndarray) -> np.ndarray:
    if not (np.issubdtype(values.dtype, np.number) or values.dtype == bool) or np.iscomplexobj(values):
        raise UsageError(f"{path}: {field} has dtype {values.dtype}: it must be real numbers")
    values = values.astype(np.float32)
    finite = np.isfinite(values)
    if not finite.all():
        row = int(np.argwhere(~finite)[0][0])
        raise UsageError(
            f"{path}: {field} has NaN or infinity ({(~finite).sum()} values, the first in example {row}): repair or "
            "remove these examples"
        )
    return values


def few(names: Sequence[str]) -> str:
    return ", ".join(map(str, names[:8])) + (", ..." if len(names) > 8 else "") if names else "none"
