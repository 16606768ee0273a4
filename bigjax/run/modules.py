"""A Linen module as JSON, and back."""

import ast
import dataclasses
import importlib
import importlib.util
import math
import symtable
import sys
import types
from collections.abc import Container, Mapping
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


def only_here(models: Mapping[str, nn.Module]) -> list[str]:
    """A line for each class that `load` can't bring back by itself."""
    found = dict.fromkeys(why for model in models.values() for why in reasons(module_spec(model)))
    return [f"{why} only bigjax.load(..., model=...) can bring the model back" for why in found]


def reasons(spec: Mapping[str, Any]) -> list[str]:
    """Why only its maker can say what a module, or one in its fields, was."""
    name, found = spec["class"].rpartition(".")[2], []
    if missing := spec.get("not_recorded"):
        found.append(f"{name} has fields that a run cannot record ({', '.join(missing)}):")
    if "<locals>" in spec["class"]:
        found.append(f"{name} is defined inside a function:")
    elif nowhere(spec):
        found.append(f"{name} is defined in a notebook: elsewhere")
    inner = [v for part in spec["fields"].values() for v in (part if isinstance(part, list) else [part])]
    return found + [why for v in inner if isinstance(v, dict) for why in reasons(v)]


def nowhere(spec: Mapping[str, Any]) -> bool:
    """Whether a class was typed in: in a notebook, at a prompt."""
    return spec["class"].startswith("__main__.") and "file" not in spec


def call(spec: Mapping[str, Any]) -> str:
    """The Python that makes a module, as far as it is recorded."""

    def shown(v: Any) -> str:
        if isinstance(v, dict) and "class" in v:
            return call(v)
        return f"({', '.join(map(shown, v))}{',' * (len(v) == 1)})" if isinstance(v, list) else repr(v)

    return f"{spec['class'].rpartition('.')[2]}({', '.join(f'{k}={shown(v)}' for k, v in spec['fields'].items())})"


def module_from(spec: Mapping[str, Any]) -> nn.Module:
    """The module that `module_spec` described. Raises UsageError where only its maker can say what it was."""
    if missing := spec.get("not_recorded"):
        raise UsageError(f"{spec['class']} has fields that a run cannot record ({', '.join(missing)}): {REMEDY}")

    def value(v: Any) -> Any:
        if isinstance(v, dict) and "class" in v:
            return module_from(v)
        return tuple(map(value, v)) if isinstance(v, list) else v

    return class_of(spec)(**{k: value(v) for k, v in spec["fields"].items()})


def given(spec: Mapping[str, Any]) -> str:
    return REMEDY.replace("model=...", f"model={call(spec)}")


def class_of(spec: Mapping[str, Any]) -> type[nn.Module]:
    """The class that config.json names.

    Nothing is imported for it but the module, or the definitions of the script, whose source says that it is a Linen
    module; and nothing is called. Raises UsageError for anything else, and where importing it would train.
    """
    where, _, name = str(spec["class"]).rpartition(".")
    main = sys.modules["__main__"]
    if "<locals>" in where:
        raise UsageError(f"{spec['class']} was defined inside a function: make it, and {given(spec)}")
    if nowhere(spec) and not hasattr(main, name):
        raise UsageError(f"{name} was defined in a notebook: define it here as its cell does, and {given(spec)}")
    if "file" in spec and str(Path(getattr(main, "__file__", None) or "/").resolve()) != spec["file"]:
        found = getattr(definitions(Path(spec["file"]), name), name, None)
    else:  # the script itself asks, which must not run once more; or a module
        if where not in sys.modules:
            path, tree = source_of(where) or (None, ast.Module([], []))
            if not is_linen(tree, name):
                raise UsageError(f"{where} defines no Linen module {name} here: import what does, or {REMEDY}")
            if call := trains(tree):
                raise UsageError(
                    f"{path}, line {call.lineno} calls {ast.unparse(call.func)} whenever it is imported: put that "
                    f'under if __name__ == "__main__", or {REMEDY}'
                )
        found = getattr(importlib.import_module(where), name, None)
    if not (isinstance(found, type) and issubclass(found, nn.Module) and found is not nn.Module):
        raise UsageError(f"{spec['class']} is no flax.linen.Module: config.json is damaged, or {REMEDY}")
    return found


def source_of(module: str) -> tuple[Path, ast.Module] | None:
    """The file of a module and what it says; neither the module nor its parents are imported. None: it has none."""
    top, *below = module.split(".")
    try:
        found = importlib.util.find_spec(top)
        folders = list(found.submodule_search_locations or ()) if found else []
        path = Path(*folders[:1], *below) if below else Path(found.origin)
        path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        return path, ast.parse(path.read_bytes())
    except (AttributeError, TypeError, ValueError, OSError, SyntaxError):
        return None


def trains(tree: ast.Module) -> ast.Call | None:
    """Where importing a module would train: the call at its top, of a name as training has it."""
    for node in tree.body:
        if isinstance(node, DEFINING) or (isinstance(node, ast.If) and "__name__" in ast.unparse(node.test)):
            continue
        for call in (p for p in ast.walk(node) if isinstance(p, ast.Call)):
            if ast.unparse(call.func).rpartition(".")[2] in ("fit", "main", "run", "train", "train_step"):
                return call
    return None


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
    """Of a script the class `name`, with the imports, classes, functions and constants that it needs: nothing else of
    it is run, so it cannot train.
    """
    if not path.exists():
        raise UsageError(f"the script {path} that defines {name} is gone: put it back, or {REMEDY}")
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError, OSError) as e:
        raise UsageError(f"the script {path} that defines {name} cannot be read ({e}): repair it, or {REMEDY}") from e
    if not is_linen(tree, name):
        raise UsageError(f"{path} defines no Linen module {name}: put it back, or {REMEDY}")
    constants = set().union(*(made(n) for n in tree.body if not isinstance(n, DEFINING)))
    needed, taken = {name}, set()
    gives = {node: made(node) | changed(node, constants) for node in tree.body}
    while more := [node for node in tree.body if node not in taken and (always(node) or needed & gives[node])]:
        for node in more:
            if not defining(node):
                which = min(needed & gives[node])
                raise UsageError(
                    f"{path}, line {node.lineno} makes {which} by more than a definition, which loading must not run: "
                    f"{REMEDY}"
                )
            needed |= used(node)
        taken |= set(more)
    tree.body = [node for node in tree.body if node in taken]
    module = sys.modules["bigjax_run_script"] = types.ModuleType("bigjax_run_script")  # dataclasses look it up
    module.__file__ = str(path)
    try:
        exec(compile(tree, path, "exec"), module.__dict__)
    except Exception as e:
        raise UsageError(f"what {path} defines can't be read without running it ({e!r}): {REMEDY}") from e
    return module


def always(node: ast.stmt) -> bool:
    """Whether it may be needed though no name says so: from __future__ import annotations, from somewhere import *."""
    return isinstance(node, ast.ImportFrom) and (node.module == "__future__" or node.names[0].name == "*")


def defining(node: ast.stmt) -> bool:
    """Whether a statement at the top only defines: it calls nothing, and isn't what a script does as __main__."""
    if isinstance(node, ast.If | ast.Try):
        inner = [p for p in ast.iter_child_nodes(node) if isinstance(p, ast.stmt)]
        inner += [p for handler in getattr(node, "handlers", ()) for p in handler.body]
        return all(defining(part) for part in inner) and not (isinstance(node, ast.If) and acting(node.test))
    assigned = isinstance(node, ast.Assign | ast.AnnAssign | ast.AugAssign) and not acting(node)
    return assigned or isinstance(node, (*DEFINING, ast.Pass))


def acting(node: ast.AST) -> bool:
    return any(isinstance(p, ast.Call) or (isinstance(p, ast.Name) and p.id == "__name__") for p in ast.walk(node))


def used(node: ast.stmt) -> set[str]:
    """The names that a statement takes from the script, in what it defines too."""

    def of(table: symtable.SymbolTable) -> set[str]:
        top = table.get_type() == "module"
        mine = {s.get_name() for s in table.get_symbols() if s.is_referenced() and (top or s.is_global())}
        return mine.union(*map(of, table.get_children()))

    return of(symtable.symtable(ast.unparse(node), "script", "exec"))


def made(node: ast.stmt) -> set[str]:
    """The names that a statement at the top gives a value."""
    if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        return {node.name}
    parts = list(ast.walk(node))
    names = {p.id for p in parts if isinstance(p, ast.Name) and isinstance(p.ctx, ast.Store)}
    names |= {p.asname or p.name.partition(".")[0] for p in parts if isinstance(p, ast.alias)}
    return names | {p.name for p in parts if isinstance(p, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)}


def changed(node: ast.stmt, constants: Container[str]) -> set[str]:
    """The constants that a statement at the top changes: x[0] = 1, x.a = 1, x.append(1)."""
    if isinstance(node, DEFINING):
        return set()
    put = [p for p in ast.walk(node) if isinstance(p, ast.Attribute | ast.Subscript) and isinstance(p.ctx, ast.Store)]
    asked = [p.func for p in ast.walk(node) if isinstance(p, ast.Call) and isinstance(p.func, ast.Attribute)]
    return {p.value.id for p in put + asked if isinstance(p.value, ast.Name) and p.value.id in constants}
