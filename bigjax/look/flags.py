"""What the flags of a configuration are for, in groups: what --help and help(RunConfig) show.

A flag's text is the comment behind its field, or above it; `# ---- data` among the fields of RunConfig begins a group.
"""

import ast
import dataclasses
import difflib
import inspect
import math
import textwrap
from collections.abc import Collection
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import tyro

from bigjax import UsageError

Flat = tyro.conf.OmitArgPrefixes
MARK = "# ---- "
KINDS = {int | None: "INT", float | None: "FLOAT", str | None: "STR"}


def told(Config: type) -> dict[str, tuple[str, str]]:
    """Field -> (group, text), "" where there is none; a subclass that gives no text leaves that of its parent."""
    found: dict[str, tuple[str, str]] = {}
    for kind in reversed(Config.__mro__):
        try:
            lines = textwrap.dedent(inspect.getsource(kind)).splitlines()
        except (OSError, TypeError):  # the source was not kept: typed into an interpreter, made by make_dataclass
            continue
        group, last = "", 1
        for node in ast.parse("\n".join(lines)).body[0].body:
            between = [line.strip() for line in lines[last : node.lineno - 1]]
            group, last = next((b[len(MARK) :] for b in between if b.startswith(MARK)), group), node.end_lineno
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                behind = lines[last - 1].encode()[node.end_col_offset :].decode().partition("# ")[2]
                above = " ".join(b[2:] for b in between if b.startswith("# ") and not b.startswith(MARK))
                parents = found.get(node.target.id, (group, ""))
                found[node.target.id] = (parents[0], behind or above or parents[1])
    return found


def groups(Config: type) -> dict[str, list[tuple[dataclasses.Field, str]]]:
    """The fields of each group, with their texts; first, under "", what a script adds to RunConfig's."""
    texts, found = told(Config), {"": []}
    for f in dataclasses.fields(Config):
        group, text = texts.get(f.name, ("", ""))
        found.setdefault(group, []).append((f, text))
    return found


def described(Config: type) -> str:
    """A docstring: the one in the class's source, then each field with its default and its text, in groups."""
    lines = [ast.get_docstring(ast.parse(textwrap.dedent(inspect.getsource(Config))).body[0]) or ""]
    for group, members in groups(Config).items():
        lines += ["", f"{group}:"] if members else []
        for f, text in members:
            group_of_flags = dataclasses.is_dataclass(f.default)
            default = f"{type(f.default).__name__}()" if group_of_flags else repr(f.default)
            text = inspect.getdoc(f.default) if group_of_flags else text
            lines += textwrap.wrap(f"    {f.name} = {default}: {text}", 80, subsequent_indent=" " * 8)
    return "\n".join(lines)


@dataclasses.dataclass(frozen=True)
class Plan:
    """What the verb plan asks."""

    topology: str = "v5e:2x4"  # the slice: KIND:SHAPE, as v5p:8x8x8
    search: bool = False  # plan every mesh of the slice (minutes each for a large model) and rank those that fit


def take_verb(arguments: list[str], Config: type, verbs: Collection[str], *, script: str = "the script") -> str:
    """The first word, or a verb behind flags, where it is no flag's value: taken out of `arguments`. Else train.

    UsageError for a word that is neither.
    """
    kinds = kinds_of(Config) | kinds_of(Plan)
    room, numbers = 0.0, False  # how many values the flag before may still have, and whether these are numbers
    for i, word in enumerate(arguments):
        if word.startswith("--"):
            kind = kinds.get(word[2:].partition("=")[0].removeprefix("no-").replace("-", "_"), str)
            several = [k for k in (kind, *get_args(kind)) if get_origin(k) in (tuple, list)]
            room = 0 if "=" in word or kind is bool else math.inf if several else 1
            numbers = bool(several) and {*get_args(several[0])} <= {int, float, ...}
        elif room and not (room > 1 and (word in verbs or (numbers and word.isalpha()))):
            room -= 1
        elif word.isalpha() or (i == 0 and word[:1] != "-"):
            if word not in verbs:
                near = difflib.get_close_matches(word, verbs, n=1)
                hint = f"did you mean {near[0]}?" if near else f"use one of {', '.join(verbs)}"
                raise UsageError(f"{script} has no verb {word!r}: {hint}")
            return arguments.pop(i)
    return "train"


def kinds_of(Config: type, prefix: str = "") -> dict[str, Any]:
    """What each flag takes; of a group with its name before, and without."""
    found: dict[str, Any] = {}
    for name, hint in get_type_hints(Config).items():
        if dataclasses.is_dataclass(hint):
            found |= kinds_of(hint) | kinds_of(hint, f"{prefix}{name}.")
        else:
            found[prefix + name] = hint
    return found


def parse(Config: type, verb: str, *, default: Any = None, **options: Any) -> tuple[Any, Plan]:
    """A script's flags and, with the verb plan, those of plan: `tyro.cli`, with a title over each group of them.

    A titled group is a dataclass to tyro; here they are made for the command line only, so that `config.keep` stays
    flat.
    """
    hints = get_type_hints(Config, include_extras=True)
    parts: list[tuple[str, Any, Any]] = []
    for group, members in groups(Config).items():
        single, nested = [], []
        for f, text in members:
            value, hint = getattr(default or Config(), f.name), hints[f.name]
            if dataclasses.is_dataclass(value):
                nested.append(_part(f.name, hint, value))
                continue
            kind = get_args(hint)[0] if hasattr(hint, "__metadata__") else hint
            note = tyro.conf.arg(help=text or None, metavar=KINDS.get(kind))
            single.append(_part(f.name, Annotated[hint, note], value))
        if group and single:
            made = dataclasses.make_dataclass(group, single)
            single = [_part(f"group_{group}", Flat[Annotated[made, tyro.conf.arg(name=group)]], made())]
        parts += [*single, *nested]
    if verb == "plan":
        parts.append(_part("plan_flags", Flat[Annotated[Plan, tyro.conf.arg(name="plan")]], Plan()))
    got = vars(tyro.cli(dataclasses.make_dataclass("Flags", parts), **options))
    values = {k: v for name, value in got.items() if name.startswith("group_") for k, v in vars(value).items()}
    config = Config(**{f.name: (values if f.name in values else got)[f.name] for f in dataclasses.fields(Config)})
    return config, got.get("plan_flags", Plan())


def settle(config: Any, default: Any) -> Any:
    """--epochs or --minutes alone replaces the script's own number of steps."""
    asked = (config.epochs, config.minutes) != (default.epochs, default.minutes)
    return dataclasses.replace(config, steps=None) if asked and config.steps == default.steps else config


def _part(name: str, hint: Any, value: Any) -> tuple[str, Any, Any]:
    return name, hint, dataclasses.field(default_factory=lambda: value)
