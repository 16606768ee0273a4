"""Which numbers a configuration has, what each of them may be, and which flags exclude each other."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, get_type_hints

from bigjax import UsageError
from bigjax.experiment import Within


def numbers(config: Any, prefix: str = "") -> Iterator[tuple[str, float, Sequence[Within]]]:
    """(flag, number, what its annotation allows) of all the numbers in a configuration, groups and tuples among it."""
    hints = [get_type_hints(kind, include_extras=True) for kind in type(config).__mro__]
    for f in dataclasses.fields(config):
        # a script that gives a flag another default need not say again what is allowed
        notes = next(filter(None, (getattr(hint.get(f.name), "__metadata__", ()) for hint in hints)), ())
        value, flag = getattr(config, f.name), prefix + f.name.replace("_", "-")
        if dataclasses.is_dataclass(value):
            yield from numbers(value, prefix if notes else f"{flag}.")  # cli.Flat: without the group's name
        allowed = [note for note in notes if isinstance(note, Within)]
        for v in value if isinstance(value, tuple | list) else (value,):
            if isinstance(v, int | float) and not isinstance(v, bool):
                yield flag, v, allowed


def recipe(config: Any, flag: str, *sets: str) -> bool:
    """Whether a flag is given that stands for a recipe, as --classic; UsageError beside one of the flags that it sets.

    sets: fields, or groups of them.
    """
    if not getattr(config, flag):
        return False
    usual = type(config)()
    for name in sets:
        ours, default = getattr(config, name), getattr(usual, name)
        parts = [f.name for f in dataclasses.fields(ours)] if dataclasses.is_dataclass(ours) else []
        pairs = [(part, getattr(ours, part), getattr(default, part)) for part in parts] or [(name, ours, default)]
        for changed in (part for part, is_now, was in pairs if is_now != was):
            given = changed.replace("_", "-")
            raise UsageError(f"--{flag} brings its own --{given}: leave one of the two out")
    return True
