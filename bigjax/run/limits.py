"""Which numbers a configuration has, and what each of them may be."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, get_type_hints

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
