"""A Linen module as JSON, and back."""

import ast
import dataclasses
import importlib
import importlib.util
import sys
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn

from bigjax import UsageError

REMEDY = "give it: bigjax.load(..., model=...)"
DEFINING = (ast.Import, ast.ImportFrom, ast.ClassDef, ast.FunctionDef)  # what a script may do while it is loaded


def module_spec(module: nn.Module) -> dict[str, Any]:
    """A Linen module as JSON: its class and its fields.

    A field that JSON can't hold is left out where it has its default, and else named under `not_recorded`:
    `module_from` then asks for the module.
    """
    cls, fields, missing = type(module), {}, []
    for f in dataclasses.fields(module):
        if not f.init or f.name in ("parent", "name"):
            continue
        try:
            fields[f.name] = recorded(value := getattr(module, f.name))
        except TypeError:
            if value is not f.default:
                missing.append(f"{f.name} ({type(value).__name__})")
    spec = {"class": f"{cls.__module__}.{cls.__qualname__}", "fields": fields}
    if cls.__module__ == "__main__" and hasattr(sys.modules["__main__"], "__file__"):
        spec["file"] = str(Path(sys.modules["__main__"].__file__).resolve())
    return spec | ({"not_recorded": missing} if missing else {})


def recorded(value: Any) -> Any:
    """A field's value as JSON; TypeError if JSON can't hold it."""
    if isinstance(value, nn.Module):
        spec = module_spec(value)
        if "not_recorded" in spec:
            raise TypeError
        return spec
    if isinstance(value, tuple | list):
        return [recorded(part) for part in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError


def module_from(spec: Mapping[str, Any]) -> nn.Module:
    """The module that `module_spec` described. Raises UsageError where only its maker can say what it was."""
    if missing := spec.get("not_recorded"):
        raise UsageError(f"{spec['class']} has fields that a run cannot record ({', '.join(missing)}): {REMEDY}")

    def value(v: Any) -> Any:
        if isinstance(v, dict) and "class" in v:
            return module_from(v)
        return tuple(map(value, v)) if isinstance(v, list) else v

    return class_of(spec)(**{k: value(v) for k, v in spec["fields"].items()})


def class_of(spec: Mapping[str, Any]) -> type[nn.Module]:
    """The class that config.json names. Only the file that defines a class is read for it, and nothing is called.

    Raises UsageError for what is no class of Linen's, or isn't found.
    """
    where, _, name = spec["class"].rpartition(".")
    main = getattr(sys.modules["__main__"], "__file__", None)
    if "file" in spec and not (main and str(Path(main).resolve()) == spec["file"]):
        found = getattr(definitions(Path(spec["file"]), name), name, None)
    else:  # the script itself asks, which must not run once more; or a module
        if where not in sys.modules and not defines(where, name):
            raise UsageError(f"{where} defines no class {name} here: import what does, or {REMEDY}")
        found = getattr(importlib.import_module(where), name, None)
    if not (isinstance(found, type) and issubclass(found, nn.Module)):
        raise UsageError(f"{spec['class']} is no flax.linen.Module: config.json is damaged, or {REMEDY}")
    return found


def defines(module: str, name: str) -> bool:
    """Whether a module's source has a class of this name at its top; it is not imported for that."""
    try:
        found = importlib.util.find_spec(module)
        tree = ast.parse(Path(found.origin).read_text())
    except (ImportError, AttributeError, TypeError, ValueError, OSError, SyntaxError):
        return False
    return any(isinstance(node, ast.ClassDef) and node.name == name for node in tree.body)


def definitions(path: Path, name: str) -> types.ModuleType:
    """A script's imports, classes, functions and constants, without whatever else it does: it must not train."""
    if not path.exists():
        raise UsageError(f"the script {path} that defines {name} is gone: put it back, or {REMEDY}")
    tree = ast.parse(path.read_text())
    calls = lambda node: any(isinstance(part, ast.Call) for part in ast.walk(node))  # noqa: E731
    constant = lambda node: isinstance(node, ast.Assign | ast.AnnAssign) and not calls(node)  # noqa: E731
    tree.body = [node for node in tree.body if isinstance(node, DEFINING) or constant(node)]
    module = sys.modules["bigjax_run_script"] = types.ModuleType("bigjax_run_script")  # dataclasses look it up
    module.__file__ = str(path)
    try:
        exec(compile(tree, path, "exec"), module.__dict__)
    except Exception as e:
        raise UsageError(f"what {path} defines can't be read without running it ({e!r}): {REMEDY}") from e
    return module
