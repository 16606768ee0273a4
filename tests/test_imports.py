"""Imports run one way, and a model costs no more to import than flax."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from test_layout import imports

import bigjax

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
    code = "import bigjax, bigjax.models; assert 'load' in dir(bigjax) and 'CNN' in dir(bigjax.models)"
    assert not {m.partition(".")[0] for m in loaded(code)} & {"jax", "flax", "numpy", "etils", *HEAVY}


def test_what_bigjax_shows_is_there():
    assert {"load", "UsageError", "__version__"} < set(dir(bigjax)) and "nope" not in dir(bigjax)
    assert all(callable(getattr(bigjax, name)) for name in bigjax.__all__ if name != "pretrained")
    assert dir(bigjax.pretrained) == ["features", "load", "save", "tokenizer"]
    assert all(callable(getattr(bigjax.pretrained, name)) for name in dir(bigjax.pretrained))


def test_models_know_no_loss_no_optimizer_no_data():
    for path in (LIBRARY / "models").glob("*.py"):
        assert {m.partition(".")[0] for m in imports(path, lazy=True)} <= {"models", "ops", "sharding", "__init__"}
        assert "optax" not in path.read_text(), path.name


def test_only_sharding_knows_partition_specs():
    users = {p.name for p in LIBRARY.rglob("*.py") if "PartitionSpec" in p.read_text()}
    assert users == {"sharding.py"}
