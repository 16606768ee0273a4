"""A Linen module as JSON, and back."""

import ast
import dataclasses
import importlib
import importlib.util
import math
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
    if value is None or isinstance(value, bool | int | str) or (isinstance(value, float) and math.isfinite(value)):
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
    """The class that config.json names.

    Nothing is imported for it but the module, or the definitions of the script, whose source says that it is a Linen
    module; and nothing is called. Raises UsageError for anything else.
    """
    where, _, name = str(spec["class"]).rpartition(".")
    main = sys.modules["__main__"]
    if "<locals>" in where:
        raise UsageError(f"{spec['class']} was defined inside a function: {REMEDY}")
    if "file" in spec and str(Path(getattr(main, "__file__", None) or "/").resolve()) != spec["file"]:
        found = getattr(definitions(Path(spec["file"]), name), name, None)
    else:  # the script itself asks, which must not run once more; or a module
        if where not in sys.modules and not defines(where, name):
            raise UsageError(f"{where} defines no Linen module {name} here: import what does, or {REMEDY}")
        found = getattr(importlib.import_module(where), name, None)
    if not (isinstance(found, type) and issubclass(found, nn.Module) and found is not nn.Module):
        raise UsageError(f"{spec['class']} is no flax.linen.Module: config.json is damaged, or {REMEDY}")
    return found


def defines(module: str, name: str) -> bool:
    """Whether a module's source has a Linen module of this name at its top; neither it nor its parents are imported."""
    top, *below = module.split(".")
    try:
        found = importlib.util.find_spec(top)
        folders = list(found.submodule_search_locations or ()) if found else []
        path = Path(*folders[:1], *below) if below else Path(found.origin)
        path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        return is_linen(ast.parse(path.read_text()), name)
    except (AttributeError, TypeError, ValueError, OSError, SyntaxError):
        return False


def is_linen(tree: ast.Module, name: str) -> bool:
    """Whether source says that a class at its top is a Linen module: a base is called Module, or is such a class, or
    comes from bigjax.
    """
    ours = {a.asname or a.name for n in tree.body if isinstance(n, ast.ImportFrom) for a in n.names
            if (n.module or "").partition(".")[0] in ("bigjax", "flax")}  # fmt: skip
    classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
    bases = [ast.unparse(base) for base in classes[name].bases] if name in classes else []
    return any(b.rpartition(".")[2] == "Module" or b in ours or (b != name and is_linen(tree, b)) for b in bases)


def definitions(path: Path, name: str) -> types.ModuleType:
    """A script's imports, classes, functions and constants, without whatever else it does: it must not train."""
    if not path.exists():
        raise UsageError(f"the script {path} that defines {name} is gone: put it back, or {REMEDY}")
    tree = ast.parse(path.read_text())
    if not is_linen(tree, name):
        raise UsageError(f"{path} defines no Linen module {name}: put it back, or {REMEDY}")
    assigned = ast.Assign | ast.AnnAssign
    made = [n for n in tree.body if isinstance(n, assigned) and any(isinstance(p, ast.Call) for p in ast.walk(n))]
    lost = {p.id for n in made for p in ast.walk(n) if isinstance(p, ast.Name) and isinstance(p.ctx, ast.Store)}
    kept = [n for n in tree.body if isinstance(n, (*DEFINING, ast.Assign, ast.AnnAssign)) and n not in made]
    used = {p.id for n in kept for p in ast.walk(n) if isinstance(p, ast.Name)}
    if needed := sorted(lost & used):
        raise UsageError(f"{path} makes {needed[0]} by a call, which loading must not run: {REMEDY}")
    tree.body = kept
    module = sys.modules["bigjax_run_script"] = types.ModuleType("bigjax_run_script")  # dataclasses look it up
    module.__file__ = str(path)
    try:
        exec(compile(tree, path, "exec"), module.__dict__)
    except Exception as e:
        raise UsageError(f"what {path} defines can't be read without running it ({e!r}): {REMEDY}") from e
    return module
