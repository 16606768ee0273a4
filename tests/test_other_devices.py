"""A run that goes on with other devices: what is restored equals what was saved, and the batches go on."""

from pathlib import Path

import jax
import numpy as np
import pytest
from conftest import run_with_devices
from test_meshes import SIZES, experiment_of

from bigjax import sharding
from bigjax.experiment import RunConfig
from bigjax.program import Program
from bigjax.run.checkpoint import Checkpoints
from bigjax.sharding import MeshConfig

CHAIN = {  # number of devices, mesh: each restores what the one before saved
    "8 data": (8, MeshConfig(data=8)),
    "1": (1, MeshConfig(data=1)),
    "4 fsdp": (4, MeshConfig(data=1, fsdp=4)),
    "8 fsdp x tensor": (8, MeshConfig(data=2, fsdp=2, tensor=2)),
    "2 tensor": (2, MeshConfig(data=1, tensor=2)),
    "8 fsdp": (8, MeshConfig(data=1, fsdp=8)),
    "4 data": (4, MeshConfig(data=4)),
}


def follow(name: str, folder: str) -> None:
    """One update on each mesh of the chain, between a restoration and a save."""
    _, experiment = experiment_of(name, sgd=False)
    meshes = {k: v for k, v in CHAIN.items() if v[1].tensor == 1 or "tensor" in SIZES[name][1]}
    checkpoints, saved, orders = Checkpoints(folder, keep=1), None, {}
    for step, (devices, config) in enumerate(meshes.values()):
        mesh = sharding.make_mesh(config, batch_size=8, devices=jax.devices()[:devices])
        program = Program(experiment, RunConfig(batch_size=8, ema=0.9), experiment.train, steps=9, mesh=mesh)
        with jax.set_mesh(mesh):
            if saved is None:
                state = program.initialize(program.key)
            else:
                state = checkpoints.restore(step, {"state": program.state_shapes})["state"]
                for a, b in zip(*map(jax.tree.leaves, (saved, state)), strict=True):
                    np.testing.assert_array_equal(a, np.asarray(b))
                for shape, x in zip(*map(jax.tree.leaves, (program.state_shapes, state)), strict=True):
                    assert x.sharding.is_equivalent_to(shape.sharding, x.ndim)
            batches = program.batches(step)
            batch = next(batches)
            batches.close()
            orders[step] = np.asarray(batch["index"])
            state, _, _ = program.update(state, program.fresh_window(), batch, program.key, program.controls())
            saved = jax.tree.map(np.asarray, state)
            checkpoints.save(step + 1, {"state": state})
            checkpoints.wait()
    checkpoints.close()
    alone = Program(experiment, RunConfig(batch_size=8), experiment.train, steps=9, mesh=mesh).batches(0)
    for n, order in orders.items():
        np.testing.assert_array_equal(next(alone)["index"], order, err_msg=f"batch {n}")
    alone.close()
    print("followed", len(meshes))


@pytest.mark.parametrize("name", ["cnn", *(pytest.param(n, marks=pytest.mark.slow) for n in ("gpt", "gan"))])
def test_restored_on_other_devices_it_is_what_was_saved(name: str, tmp_path: Path) -> None:
    call = f"from test_other_devices import follow; follow({name!r}, {str(tmp_path / 'saved')!r})"
    run_with_devices(call, folder=tmp_path)
