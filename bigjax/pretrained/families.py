"""The families that are known: which file of this folder speaks for an architecture, or for a model of ours."""

import dataclasses
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax

from bigjax import UsageError
from bigjax.pretrained.names import Row

Config = dict[str, Any]
FILES = ("gpt",)


@dataclasses.dataclass(frozen=True)
class Family:
    """How the models of one class are known to others.

    architectures: what config.json calls them. kind: our class. read: config.json -> fields of ours. write: a model ->
    its config.json; UsageError where they have no such model. table: of a model, which of their modules is which of
    ours. ours: their names in a file -> those of the table (regular expressions). ignored: what a file may hold beside.
    inputs: shapes of what a model is called with.
    """

    architectures: tuple[str, ...]
    kind: type[nn.Module]
    read: Callable[[Config], Config]
    write: Callable[[nn.Module], Config]
    table: Callable[[nn.Module], list[Row]]
    inputs: Callable[[nn.Module], tuple[jax.ShapeDtypeStruct, ...]]
    ours: tuple[tuple[str, str], ...] = ()
    ignored: tuple[str, ...] = ()

    def architecture(self, config: Config) -> str:
        """That of config.json's which is known here."""
        names = config.get("architectures") or [config.get("architecture")]
        return next(name for name in names if name in self.architectures)


def families() -> list[Family]:
    return [importlib.import_module(f"bigjax.pretrained.{file}").FAMILY for file in FILES]


def family_of(config: Config, folder: Path) -> Family:
    """By config.json, which names one architecture."""
    known = {name: family for family in families() for name in family.architectures}
    names = config.get("architectures") or [config.get("architecture")]
    found = [name for name in names if name in known]
    if not found:
        said = ", ".join(map(str, filter(None, names))) or "no architecture"
        raise UsageError(f"{folder}/config.json names {said}, which is not known here: {', '.join(known)} are")
    return known[found[0]]


def family_for(model: nn.Module) -> Family:
    """By our model."""
    for family in families():
        if type(model) is family.kind:
            return family
    kinds = ", ".join(sorted({family.kind.__name__ for family in families()}))
    raise UsageError(f"a {type(model).__name__} has no form that others read: only {kinds} can be saved for them")


def only(config: Config, name: str, *values: Any) -> Any:
    """config[name], which must be one of `values`, as it is where nothing is said."""
    value = config.get(name, values[0])
    if value not in values:
        raise UsageError(
            f"config.json says {name} = {value!r}, which is not known here: only {', '.join(map(repr, values))}"
        )
    return value
