"""What is saved comes back exactly, and what cannot be saved is heard of."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bigjax import SaveError, UsageError
from bigjax.run import manifest
from bigjax.run.checkpoint import Checkpoints


def tree() -> dict[str, Any]:
    """Every kind of leaf that a state has."""
    random = jax.random.key(3)
    return {
        "float32": jax.random.normal(random, (5, 3)) * 1e-30,
        "bfloat16": jax.random.normal(random, (4,), jnp.bfloat16),
        "int32": jnp.array([-(2**31), 2**31 - 1], jnp.int32),
        "scalar": jnp.float32(0.1),
        "special": jnp.array([jnp.inf, -jnp.inf, -0.0, 1e-45], jnp.float32),
        "empty": {},
        "nested": {"a": {"b": (jnp.arange(3), {"c": jnp.ones((2, 2), bool)})}},
        "key": jax.random.key(7),
    }


def abstract(values: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), values)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "checkpoints"
    checkpoints = Checkpoints(folder, keep=2)
    for step in (1, 2, 3):
        checkpoints.save(step, tree() | {"scalar": jnp.float32(step)})
    checkpoints.close()
    return folder


def test_restored_tree_is_the_saved_one_bit_for_bit(saved):
    checkpoints = Checkpoints(saved)
    back = checkpoints.restore(3, abstract(tree()))
    checkpoints.close()
    want = tree() | {"scalar": jnp.float32(3)}
    assert jax.tree.structure(back) == jax.tree.structure(want)
    chex.assert_trees_all_equal_shapes_and_dtypes(back, want)
    for a, b in zip(jax.tree.leaves(back), jax.tree.leaves(want), strict=True):
        if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()  # also -0.0, and a number below float32's normal ones


def test_a_part_is_restored_alone(saved):
    checkpoints = Checkpoints(saved)
    part = checkpoints.restore(2, abstract({"nested": {"a": tree()["nested"]["a"]}}))
    checkpoints.close()
    chex.assert_trees_all_equal(part, {"nested": tree()["nested"]})


def test_shapes_tell_what_is_there(saved):
    checkpoints = Checkpoints(saved)
    shapes = checkpoints.shapes(3)
    back = checkpoints.restore(3, {"bfloat16": shapes["bfloat16"], "float32": shapes["float32"]})
    checkpoints.close()
    assert shapes["float32"].shape == (5, 3) and shapes["bfloat16"].dtype == jnp.bfloat16
    assert shapes["nested"]["a"]["b"][0].dtype == jnp.int32
    chex.assert_trees_all_equal(back["bfloat16"], tree()["bfloat16"])


@pytest.mark.parametrize(
    "other, said",
    [
        ({"float32": jnp.zeros((5, 4))}, r"float32: \(5, 3\) -> \(5, 4\)"),
        ({"float64": jnp.zeros(3)}, r"float64: not saved -> \(3,\)"),
    ],
)
def test_what_was_not_saved_so_is_refused(saved, other, said):
    checkpoints = Checkpoints(saved)
    with pytest.raises(UsageError, match=f"(?s)checkpoint of step 3 is of another model.*{said}"):
        checkpoints.restore(3, abstract(other))
    checkpoints.close()


def test_the_last_k_are_kept(saved):
    checkpoints = Checkpoints(saved)
    assert checkpoints.steps() == [2, 3] and checkpoints.latest() == 3
    checkpoints.close()


def test_nothing_saved_yet(tmp_path):
    for read_only in (True, False):
        checkpoints = Checkpoints(tmp_path / "none", read_only=read_only)
        assert checkpoints.latest() is None and checkpoints.steps() == []
        checkpoints.close()
        assert (tmp_path / "none").exists() is not read_only


def test_a_reader_leaves_the_save_of_a_running_process_alone(saved, tmp_path):
    folder = tmp_path / "checkpoints"
    shutil.copytree(saved, folder)
    under_way = folder / "4.orbax-checkpoint-tmp-12"
    (under_way / "state").mkdir(parents=True)
    reader = Checkpoints(folder, read_only=True)
    reader.restore(reader.latest(), abstract({"scalar": jnp.zeros(())}))  # orbax cleans up no later than here
    reader.close()
    assert under_way.exists()
    writer = Checkpoints(folder)
    assert writer.latest() == 3
    writer.save(5, {"x": jnp.zeros(1)})
    writer.close()
    assert not under_way.exists()  # what a killed run left


@pytest.mark.parametrize("best, kept", [("max:accuracy", [2, 5]), ("min:accuracy", [3, 5])])
def test_best_is_kept_beside_the_last(tmp_path, best, kept):
    checkpoints = Checkpoints(tmp_path / "c", keep=1, best=best)
    for step, accuracy in {1: 0.5, 2: 0.9, 3: 0.1, 4: None, 5: 0.6}.items():
        checkpoints.save(step, {"x": jnp.zeros(1)}, metrics=accuracy and {"accuracy": accuracy, "loss": 1.0})
    checkpoints.wait()
    assert checkpoints.steps() == kept
    with pytest.raises(UsageError, match="no 'accuracy': use one of loss"):
        checkpoints.save(6, {"x": jnp.zeros(1)}, metrics={"loss": 1.0})
    checkpoints.close()
    again = Checkpoints(tmp_path / "c", keep=1, best=best)  # the numbers of a former session count too
    again.save(6, {"x": jnp.zeros(1)}, metrics={"accuracy": 0.3})
    again.wait()
    assert again.steps() == [kept[0], 6]
    again.close()


FAILING = """
import os, shutil, sys
import jax, numpy as np
from bigjax import SaveError, UsageError
from bigjax.run import manifest
from bigjax.run.checkpoint import Checkpoints
checkpoints = Checkpoints("c")
checkpoints.save(1, {"x": jax.device_put(np.zeros(1))})
checkpoints.wait()
shutil.rmtree("c")
open("c", "w").close()  # a file where the folder was
try:
    checkpoints.save(2, {"x": jax.device_put(np.zeros(1))})
    checkpoints.wait()
except UsageError as error:
    print("raised", error, flush=True)
os._exit(0)  # orbax leaves a thread that waits
"""


def test_a_failed_save_is_raised(tmp_path):
    done = subprocess.run([sys.executable, "-c", FAILING], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.stdout.startswith("raised a checkpoint could not be saved in "), done.stderr
    assert "Not a directory" in done.stdout and "choose another RunConfig(workdir=...), and run again\n" in done.stdout


def test_only_checkpoint_imports_orbax():
    library = Path(__file__).parents[1] / "bigjax"
    users = [p.name for p in library.rglob("*.py") if re.search(r"^\s*(import|from) orbax", p.read_text(), re.M)]
    assert users == ["checkpoint.py"]


def test_the_only_verified_one_outlives_a_save_without_checksums(tmp_path, monkeypatch):
    """With --keep 1; the next whole save then takes its place."""
    checkpoints = Checkpoints(tmp_path / "c", keep=1)
    checkpoints.save(1, {"x": jnp.zeros(3)})
    checkpoints.wait()

    write = manifest.write

    def fails(folder, step, **where):
        if step == 2:
            raise OSError("No space left on device")
        write(folder, step, **where)

    with monkeypatch.context() as patch:
        patch.setattr("bigjax.run.manifest.write", fails)
        checkpoints.save(2, {"x": jnp.ones(3)})
        with pytest.raises(SaveError, match="step 1 is intact"):
            checkpoints.wait()
    assert manifest.damage(tmp_path / "c", 1) == ""
    again = Checkpoints(tmp_path / "c", keep=1)
    said = []
    assert again.newest(tell=said.append) == 1 and not said
    again.save(3, {"x": jnp.ones(3)})
    again.wait()
    assert again.steps() == [3] and manifest.damage(tmp_path / "c", 3) == ""
    again.close()


def test_the_docs_say_what_saving_was_measured_to_cost():
    root = Path(__file__).parents[1]
    found = json.loads((root / "experiments" / "results" / "save_stall.json").read_text())
    loop, small, large = found["python_gpt"], *found["checksums"]
    assert f"stand still for {loop['stall_seconds_a_save']:.2f} s, {loop['stall_share']:.2%}".replace("%", " %") in (
        readme := " ".join((root / "docs" / "reliability.md").read_text().split())
    )
    assert (
        f"checksums add {small['added'] * 100:.0f} % to the background save of its {small['bytes'] / 1e6:.0f} MB and "
        f"{large['added'] * 100:.0f} % to one of {large['bytes'] / 1e6:.0f} MB (`bench/save_stall.py`, commit "
        f"{found['git_commit']})"
    ) in readme
