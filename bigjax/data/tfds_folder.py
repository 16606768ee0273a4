"""What stands in a folder of TFDS sets, and what repairs it. No example is read here."""

import difflib
import fnmatch
import json
import os
import re
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from etils import epath

from bigjax import UsageError, place
from bigjax.data.files import few

VERSION = re.compile(r"\d+\.\d+\.\d+")
LEAST = 2**16  # bytes of an array_record file that is whole
BY_INDEX = {"array_record", "parquet"}  # formats
ABOUT = ("dataset_info.json", "features.json")


class Damaged(UsageError):
    """A set that can't be read; `why`: what of it, without what to do."""

    def __init__(self, why: str, said: str) -> None:
        super().__init__(said)
        self.why = why


@contextmanager
def quiet() -> Iterator[None]:
    """TFDS logs a missing folder, and a missing OpenCV, as warnings."""
    from absl import logging

    before = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)
    try:
        yield
    finally:
        logging.set_verbosity(before)


@dataclass(frozen=True)
class Asked:
    """NAME[/CONFIG][:VERSION][SLICE], as a user writes it; the slice is of the split that is read, as [:50%]."""

    name: str
    config: str | None = None
    version: str | None = None
    slice: str = ""

    def __str__(self) -> str:
        return self.name + (f"/{self.config}" if self.config else "") + (f":{self.version}" if self.version else "")


def asked(text: str) -> Asked:
    """UsageError: it is no such name."""
    found = re.fullmatch(r"(\w[\w.-]*)(?:/([^:\[\]]+))?(?::([\d.*]+))?(\[[^\[\]]*\])?", text.strip())
    if found is None:
        raise UsageError(
            f"{text!r} is no name of a TFDS set: write NAME, NAME/CONFIG or NAME:VERSION, with [:50%] behind for a part"
        )
    return Asked(*found.groups(default=None)[:3], found[4] or "")


def folder() -> str:
    """Where TFDS sets are looked for: TFDS_DATA_DIR, or ~/tensorflow_datasets."""
    return str(place(os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets", "TFDS_DATA_DIR "))


def prepared(where: str) -> list[str]:
    """The sets in a folder, by their names."""
    path = epath.Path(where)
    names = sorted(p.name for p in path.iterdir() if p.is_dir()) if path.is_dir() else []
    return [name for name in names if standing(where, name)]


def standing(where: str, name: str) -> dict[Asked, epath.Path]:
    """The folders of a set's configurations and versions, whole or not, the newest version last."""
    path, found = epath.Path(where) / name, []
    below = [p for p in path.iterdir() if p.is_dir()] if path.is_dir() else []
    for inner in below:
        if VERSION.fullmatch(inner.name):
            found.append((Asked(name, None, inner.name), inner))
        else:
            versions = (p for p in inner.iterdir() if p.is_dir() and VERSION.fullmatch(p.name))
            found += [(Asked(name, inner.name, p.name), p) for p in versions]
    return dict(sorted(found, key=lambda item: (item[0].config or "", [int(n) for n in item[0].version.split(".")])))


def buildable(name: str) -> bool:
    """Whether TFDS has a builder of this name."""
    import tensorflow_datasets as tfds

    return name in tfds.list_builders(with_community_datasets=False)


def hidden(name: str) -> bool:
    """Whether TFDS has code of this name that cannot be imported here: it imports TensorFlow."""
    import tensorflow_datasets as tfds

    folder = Path(tfds.__file__).parent
    return not buildable(name) and any(any(folder.glob(f"*/{name}{end}")) for end in (".py", "/__init__.py"))


def builder(name: str, where: str, **options: Any) -> Any:
    """TFDS's own builder of the set; UsageError for a name, version or configuration that there is not."""
    import tensorflow_datasets as tfds

    try:
        with quiet():
            return tfds.builder(name, data_dir=where, **options)
    except tfds.core.registered.DatasetNotFoundError as e:
        if hidden(asked(name).name):
            raise UsageError(
                f"TFDS's code of {name} needs TensorFlow: install bigjax[prepare], here or on another machine, and run "
                f"`python -m bigjax prepare {name} --to {where}`"
            ) from e
        near = difflib.get_close_matches(asked(name).name, tfds.list_builders(with_community_datasets=False), n=1)
        hint = f" (did you mean tfds:{near[0]}?)" if near and near[0] != name else ""
        raise UsageError(
            f"TFDS knows no set called {name!r}{hint}, and none is in {where}: see tensorflow.org/datasets/catalog"
        ) from e
    except Exception as e:  # what it says of a version or configuration that there is not
        known = tfds.builder_cls(asked(name).name)
        configs = [c.name for c in getattr(known, "BUILDER_CONFIGS", ())]
        has = [f"the configurations {few(configs)}"] if configs else []
        has += [f"the version {known.VERSION}"] if known.VERSION else []
        there = few([str(a) for a in standing(where, known.name)])
        raise UsageError(
            f"TFDS has no set called {name}: {known.name} has {' and '.join(has)}, and {where} holds {there}: name "
            "one of these"
        ) from e


def prepare_command(name: str, where: str | None = None) -> str:
    return shlex.join(["python", "-m", "bigjax", "prepare", name, "--to", where or folder()])


def repair(what: Asked, where: str) -> str:
    """What to do about a set that is damaged."""
    if buildable(what.name):
        return f"repair it by: {prepare_command(str(what), where)}"
    return f"copy it there again, or build it by its own builder (TFDS has none called {what.name})"


def located(what: Asked, where: str) -> epath.Path | None:
    """The folder of the set that is asked for, the newest version of it; None where there is none of this name.

    UsageError: others of this name are there.
    """
    import tensorflow_datasets as tfds

    there = standing(where, what.name)
    fit = [a for a in there if what.config in (None, a.config) and fnmatch.fnmatch(a.version, what.version or "*")]
    if there and not fit:
        can = f", or prepare it by: {prepare_command(str(what), where)}" if buildable(what.name) else ""
        raise UsageError(
            f"there is no {what} in {where} (TFDS_DATA_DIR), but {few([str(a) for a in there])}: name one of these{can}"
        )
    if len({a.config for a in fit}) > 1:
        usual = None
        if buildable(what.name):
            usual = next((c.name for c in tfds.builder_cls(what.name).BUILDER_CONFIGS), None)
        if usual not in {a.config for a in fit}:
            names = sorted({f"{a.name}/{a.config}" for a in fit})
            raise UsageError(f"{where} holds several configurations of {what.name}: give one of {few(names)}")
        fit = [a for a in fit if a.config == usual]
    return there[fit[-1]] if fit else None


def inside(what: Asked, where: str) -> epath.Path | None:
    """The folder of sets that `where` lies in, if it is the set's own folder or one in it."""
    path = epath.Path(where)
    around = (up for up in list(path.parents)[:3] if (up / what.name) in (path, *path.parents))
    return next((up for up in around if standing(str(up), what.name)), None)


def opened(path: epath.Path, what: Asked, where: str) -> Any:
    """The builder that reads what stands in a folder; Damaged: the file about it that is missing or damaged."""
    import tensorflow_datasets as tfds

    try:
        with quiet():
            made = tfds.builder_from_directory(str(path))
        if all([split.file_instructions for split in made.info.splits.values()]) and made.info.splits:
            return made
        why = f"{path / ABOUT[0]} names no examples"
    except Exception as e:  # TFDS raises what a damaged file leads to
        found = filter(None, (_wrong(path / name) for name in ABOUT))
        why = next(found, f"{path}: {ABOUT[0]} or {ABOUT[1]} is damaged ({brief(e)})")
    raise Damaged(why, f"{why}: {repair(what, where)}")


def _wrong(file: epath.Path) -> str:
    if not file.exists():
        return f"{file} is missing"
    try:
        json.loads(file.read_bytes())
    except ValueError as e:
        return f"{file} is damaged ({brief(e)})"
    return ""


def torn(file: epath.Path) -> str:
    """What is wrong with an array_record file, by its size; '' if nothing."""
    if not file.exists():
        return f"{file} is missing"
    size = file.stat().length
    return "" if size >= LEAST else f"{file} is {f'cut off, {size} bytes are left' if size else 'empty'}"


def brief(e: BaseException) -> str:
    """What an error says, in a few words."""
    said = " ".join(str(e).split()).partition("; ")[0].partition(" (")[0]
    return f"{type(e).__name__}: {said[:120]}" if said else type(e).__name__


def formats(built: Any) -> set[str]:
    """The formats of a set's files that are there."""
    return {form.value for form in built.info.available_file_formats() if form}
