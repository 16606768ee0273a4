"""What a script takes of data, what data hold, and which script takes those."""

import ast
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bigjax import UsageError
from bigjax.data.pipeline import example
from bigjax.experiment import Split

WORDS = {"x": "x (numbers)"}  # a field's name, where it says little


def scripts() -> Path | None:
    """The folder of scripts: ./experiments, or the one beside the installed package's source."""
    folders = (Path("experiments"), Path(__file__).parents[2] / "experiments")
    return next((folder for folder in folders if any(folder.glob("*/*.py"))), None)


def declared(folder: Path, name: str) -> dict[str, Any]:
    """What the scripts give as their constant `name`, by SUBJECT/SCRIPT.py. UsageError: a script can't be read.

    It is read without running the script, so it holds plain literals.
    """
    found = {}
    for path in sorted(folder.glob("*/*.py")):
        try:
            body = ast.parse(path.read_bytes()).body
        except (SyntaxError, ValueError, OSError) as e:
            raise UsageError(f"{path} is no Python script that can be read ({e}): repair it") from e
        for node in body:
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == name:
                try:
                    found[path.relative_to(folder).as_posix()] = ast.literal_eval(node.value)
                except ValueError:
                    raise UsageError(
                        f"{path}: {name} is read without running the script: write it in literals"
                    ) from None
    return found


def check(split: Split | Sequence[str], takes: Sequence[str], *, name: str) -> None:
    """UsageError where a split (or these fields) lacks what a script takes: both are told, and who takes the data."""
    held = tuple(split) if isinstance(split, Mapping | tuple) else tuple(example(split))
    if set(takes) <= set(held):
        return
    others = taking(held)
    instead = f"use {', '.join(others)} for those, or give other data" if others else "give other data"
    raise UsageError(f"this script takes {_list(takes)}, but {name} holds {_list(held)}: {instead}")


def taking(held: Sequence[str]) -> list[str]:
    """The scripts that take data with these fields, those that use most of them."""
    try:
        folder = scripts()
        declaring = declared(folder, "TAKES") if folder else {}
    except UsageError:  # of a script that isn't asked for
        return []
    fit = {path: len(takes) for path, takes in declaring.items() if set(takes) <= set(held)}
    return [f"{folder.name}/{path}" for path, count in fit.items() if count == max(fit.values())]


def _list(fields: Sequence[str]) -> str:
    *most, last = (WORDS.get(field, field) for field in fields) if fields else ("nothing",)
    return f"{', '.join(most)} and {last}" if most else last
