"""Imports run one way, and a model costs no more to import than flax."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

LIBRARY = Path(__file__).parents[1] / "bigjax"
HEAVY = {
    "tensorflow_datasets",
    "tensorflow",
    "grain",
    "orbax",
    "matplotlib",
    "tensorboardX",
    "tyro",
    "tokenizers",
    "PIL",
}
# A file imports from its own level and those below, as DESIGN has it: experiments -> cli -> train -> … -> metrics.
LEVELS = [
    {"__init__"},
    {"sharding", "processes", "metrics", "optim", "hlo"},
    {"models", "data", "tasks"},
    {"manifest", "checkpoint", "modules"},
    {"generative", "step", "experiment"},
    {"evaluators", "program", "guard"},
    {"diagnose", "display", "gallery", "generate", "workdir", "pretrained", "export", "explain", "report"},
    {"restore"},
    {"plan", "train", "results"},
    {"doctor"},
    {"cli"},
    {"__main__"},
]


def loaded(code: str) -> set[str]:
    """Modules in a fresh interpreter after `code`."""
    script = f"{code}\nimport sys, json; print(json.dumps(list(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=True)
    return set(json.loads(done.stdout))


@pytest.fixture(scope="module")
def flax() -> set[str]:
    return loaded("import flax.linen")


def test_models_import_nothing_that_flax_does_not(flax):
    names = [p.stem for p in (LIBRARY / "models").glob("*.py") if p.stem != "__init__"]
    mine = loaded("import bigjax.models\n" + "\n".join(f"import bigjax.models.{n}" for n in names))
    tops = {m.partition(".")[0] for m in mine - flax}
    assert {m.partition(".")[0] for m in mine} & HEAVY <= {m.partition(".")[0] for m in flax} & HEAVY
    assert {m for m in mine if m.startswith(("orbax", "grain", "matplotlib", "tensorflow_datasets"))} == set()
    assert {t for t in tops if t not in sys.stdlib_module_names} == {"bigjax"}
    assert len(mine - flax) < 40 + len(names)  # time goes with the modules that are read


def test_bigjax_itself_is_lazy():
    assert not {m.partition(".")[0] for m in loaded("import bigjax, bigjax.models")} & {"jax", "flax", "numpy", *HEAVY}


def imported(path: Path) -> set[str]:
    """The parts of bigjax that a file imports anywhere, also inside functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {a.name.split(".")[1] for a in node.names if a.name.startswith("bigjax.")}
        elif isinstance(node, ast.ImportFrom) and node.module == "bigjax":
            found |= {a.name for a in node.names if (LIBRARY / a.name).exists() or (LIBRARY / f"{a.name}.py").exists()}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("bigjax."):
            found.add(node.module.split(".")[1])
        assert not (isinstance(node, ast.ImportFrom) and node.level), f"{path} has a relative import"
    return found


@pytest.mark.parametrize("path", sorted(LIBRARY.rglob("*.py")), ids=lambda p: str(p.relative_to(LIBRARY)))
def test_imports_run_one_way(path):
    level = {part: n for n, parts in enumerate(LEVELS) for part in parts}
    mine = path.relative_to(LIBRARY).parts[0].removesuffix(".py")
    assert mine in level, f"{mine} has no place in LEVELS"
    if path == LIBRARY / "__init__.py":
        assert imported(path) == {"restore"}  # for load, inside __getattr__
        return
    above = {part for part in imported(path) if level[part] > level[mine]}
    assert not above, f"{mine} imports {above}"


def test_models_know_no_loss_no_optimizer_no_data():
    for path in (LIBRARY / "models").glob("*.py"):
        assert imported(path) <= {"models", "sharding"}, path.name
        assert "optax" not in path.read_text(), path.name


def test_only_sharding_knows_partition_specs():
    users = {p.name for p in LIBRARY.rglob("*.py") if "PartitionSpec" in p.read_text()}
    assert users == {"sharding.py"}
