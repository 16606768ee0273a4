"""The house: a core that stays small, leaves that can be taken away, files that one can read in one go."""

import ast
import json
import os
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
from conftest import REPOSITORY

LIBRARY = REPOSITORY / "bigjax"
CORE = {  # in the order in which they may import one another: each only those before it
    "__init__": "errors, and what finds things",
    "metrics": "what is measured",
    "sharding": "where it lives",
    "task": "what is learned",
    "step": "the update",
    "experiment": "what one run is",
    "optim": "how it is updated",
    "program": "what is compiled",
    "evaluation": "each example counts once",
    "train": "the loop",
    "cli": "the verbs of a script",
    "__main__": "the verbs of no script",
}
CORE_LINES = 1800
# leaf -> the leaves that it may import when it is imported
LEAVES = {
    "ops": set(),
    "models": {"ops"},
    "tasks": {"ops"},
    "data": {"ops"},
    "run": {"ops"},
    "pretrained": {"ops", "models"},
    "use": {"models", "run"},
    "look": {"data", "run"},
    "tools": {"ops", "models", "tasks", "data", "run", "pretrained", "use", "look"},
}
# what a verb or a loop may ask for at the point of use: never a model, a concrete task or a reader
CORE_USES = ("run", "look", "data.feeds", "data.pipeline", "data.prefetch")
BUDGETS = {"bigjax/models": 200, "bigjax/tasks": 120, "experiments": 100, "bigjax": 300}


def lines(path: Path) -> int:
    return path.read_text().count("\n")


def python(folder: str) -> list[Path]:
    return sorted((REPOSITORY / folder).rglob("*.py"))


def name_of(path: Path) -> str:
    """`run.workdir` of bigjax/run/workdir.py, `run` of bigjax/run/__init__.py."""
    return ".".join(path.relative_to(LIBRARY).with_suffix("").parts).removesuffix(".__init__")


def imports(path: Path, *, lazy: bool) -> set[str]:
    """The parts of bigjax that a file imports: when it is imported itself, or (lazy) inside functions too."""
    tree = ast.parse(path.read_text())
    nodes = [n for n in (ast.walk(tree) if lazy else tree.body) if isinstance(n, ast.Import | ast.ImportFrom)]
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
            continue
        assert not node.level, f"{path} has a relative import"
        for alias in node.names:
            full = f"{node.module}.{alias.name}"
            below = REPOSITORY.joinpath(*full.split("."))
            found.add(full if below.is_dir() or below.with_suffix(".py").exists() else node.module)
    return {f.partition(".")[2] or "__init__" for f in found if f.partition(".")[0] == "bigjax"}


def test_the_core_is_the_named_files_and_stays_small() -> None:
    files = {p.stem for p in LIBRARY.glob("*.py")}
    assert files == set(CORE)
    assert {p.name for p in LIBRARY.iterdir() if p.is_dir() and p.name != "__pycache__"} == set(LEAVES)
    size = sum(lines(LIBRARY / f"{name}.py") for name in CORE)
    assert size <= CORE_LINES, f"the core has {size} lines: what of it is a leaf?"


@pytest.mark.parametrize("name", CORE)
def test_the_core_imports_one_way_and_no_leaf(name: str) -> None:
    path, before = LIBRARY / f"{name}.py", list(CORE)[: list(CORE).index(name)]
    assert imports(path, lazy=False) <= set(before)
    if name in ("__init__", "__main__"):  # which are asked for one thing by its name
        return
    used = {m for m in imports(path, lazy=True) - set(CORE) if m not in LEAVES}
    if name == "cli":
        used -= {"tools.plan", "tools.sample"}  # its verbs
    assert all(m.startswith(CORE_USES) for m in used), used


def test_every_file_keeps_its_budget() -> None:
    over = []
    for path in python("bigjax") + python("experiments"):
        where = str(path.relative_to(REPOSITORY))
        budget = next(n for folder, n in BUDGETS.items() if where.startswith(folder + "/"))
        over += [f"{where}: {lines(path)} lines, not {budget}"] if lines(path) > budget else []
    assert not over, over


@pytest.mark.parametrize("leaf", LEAVES)
def test_leaves_import_the_core_and_what_lies_below_them(leaf: str) -> None:
    for path in (LIBRARY / leaf).rglob("*.py"):
        others = {m.partition(".")[0] for m in imports(path, lazy=False)} & LEAVES.keys() - {leaf}
        assert others <= LEAVES[leaf], f"{path} imports {others}"


def test_no_file_is_called_by_what_it_is_not() -> None:
    assert not {p.stem for p in LIBRARY.rglob("*.py")} & {"utils", "util", "base", "common", "manager", "helpers"}


@cache
def direct() -> dict[str, set[str]]:
    """What each file imports when it is imported."""
    return {name_of(p): imports(p, lazy=False) for p in python("bigjax")}


def needed(name: str) -> set[str]:
    """All files that must be there when one is imported: itself, what it imports, and the packages around them."""
    found, new = set(), {name, "__init__"}
    while new:
        found |= new
        new = set().union(*(direct()[n] | {n.rpartition(".")[0] or "__init__"} for n in new)) - found
    return found


ALONE = """
import importlib, json, sys
from pathlib import Path
library, failed = Path("bigjax"), []
files = {".".join(p.relative_to(library).with_suffix("").parts).removesuffix(".__init__"): p
         for p in library.rglob("*.py")}
for name, kept in json.load(sys.stdin).items():
    gone = [p for n, p in files.items() if n not in kept]
    for path in gone:
        path.rename(path.with_suffix(".gone"))
    for module in [n for n in sys.modules if n.partition(".")[0] == "bigjax"]:
        del sys.modules[module]
    importlib.invalidate_caches()
    try:
        importlib.import_module(f"bigjax.{name}" if name != "__init__" else "bigjax")
    except Exception as e:
        failed.append(f"{name} with nothing but {kept}: {e!r}")
    for path in gone:
        path.with_suffix(".gone").rename(path)
assert importlib.import_module("bigjax").__file__.startswith(str(Path.cwd()))
print(json.dumps(failed))
"""


def test_each_leaf_can_be_taken_away(tmp_path: Path) -> None:
    """In a copy: each file is imported where all are deleted but those that it needs.

    So it needs no other file of a leaf, and no leaf but those that its own may import (LEAVES); the core none.
    """
    shutil.copytree(LIBRARY, tmp_path / "bigjax", ignore=shutil.ignore_patterns("__pycache__"))
    everything = {name_of(p) for p in python("bigjax")} - {"__main__"}
    rest = {name: sorted(needed(name)) for name in sorted(everything)}
    for name, kept in rest.items():
        leaf, others = name.partition(".")[0], {n.partition(".")[0] for n in kept} & LEAVES.keys()
        assert others <= LEAVES.get(leaf, set()) | {leaf}, f"{name} can't be imported without {others}"
    env = os.environ | {"PYTHONPATH": str(tmp_path)}
    command, given = [sys.executable, "-c", ALONE], json.dumps(rest)
    done = subprocess.run(command, input=given, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == []
