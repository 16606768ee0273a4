"""Every family on every mesh that suits it gives one device's numbers: 8 virtual devices, in another process.

The same process also reads the compiled programs: which collectives a strategy needs, and how many bytes they carry.
"""

from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import blobs, run_with_devices, tiny_experiment, updated
from families import FAMILIES, Family

from bigjax import optim, sharding
from bigjax.data import pipeline
from bigjax.experiment import Experiment, RunConfig
from bigjax.models import (
    BERT,
    CNN,
    GPT,
    LSTM,
    MLP,
    T5,
    VAE,
    Autoencoder,
    Discriminator,
    Generator,
    Inception,
    Mixtral,
    ResNet,
    ViT,
)
from bigjax.models.convnext import ConvNeXt
from bigjax.models.efficientnet import EfficientNet
from bigjax.ops import optimizers
from bigjax.program import Program
from bigjax.sharding import MeshConfig

MESHES = {
    "one": MeshConfig(data=1),
    "data": MeshConfig(data=8),
    "fsdp": MeshConfig(data=1, fsdp=8),
    "tensor": MeshConfig(data=4, tensor=2),
    "fsdp_tensor": MeshConfig(data=2, fsdp=2, tensor=2),
}
ALL, NO_TENSOR = tuple(MESHES), ("one", "data", "fsdp")
AUTO = {"image": (4, 4, 1), "code": 8, "encoder_features": (16,), "decoder_features": (16,)}
# those of families.py, wide enough to be split by 8
SIZES: dict[str, tuple[Any, tuple[str, ...]]] = {
    "cnn": (
        CNN(features=(8,), dense=(), pools=1, padding="SAME", outputs=3, batch_norm=True, dropout=0.1),
        NO_TENSOR,
    ),
    "lstm_images": (LSTM(hidden=(8,), outputs=3, dropout=0.1), ALL),
    "lstm_tokens": (LSTM(vocabulary=16, embedding=8, hidden=(8, 8), bidirectional=True, pool="mean", outputs=1), ALL),
    "gpt": (
        GPT(
            vocabulary=16,
            layers=2,
            width=16,
            heads=4,
            kv_heads=2,
            mlp=32,
            context=8,
            scan=True,
            position="rotary",
            split_residual=True,
        ),
        ALL,
    ),
    "mixtral": (
        Mixtral(vocabulary=16, layers=2, width=16, heads=4, kv_heads=2, experts=4, mlp=32, context=8, scan=True),
        ("one", "fsdp_tensor"),
    ),
    "bert": (
        BERT(vocabulary=16, layers=1, width=16, heads=4, context=8, head="masked"),
        ("one", "fsdp_tensor"),
    ),
    "t5": (
        T5(vocabulary=16, layers=1, width=16, heads=4, head=4, mlp=32, buckets=8, distance=6, scan=True),
        ("one", "fsdp_tensor"),
    ),
    "vit": (ViT(image=4, patch=2, layers=1, width=16, heads=4, outputs=3, dropout=0.1), ("one", "tensor")),
    "resnet": (ResNet(stages=(1,), block="basic", width=8, stem="cifar", outputs=3), NO_TENSOR),
    "inception": (Inception(outputs=3, blocks=("5b A 32",), shrink=8, dropout=0.1), ("one", "fsdp")),
    "gan": (
        {
            "generator": Generator((4, 4, 1), latent=3, features=(8,), batch_norm=True, classes=3),
            "discriminator": Discriminator(features=(8,), pool="flatten", spectral_norm=True, classes=3),
        },
        ALL,
    ),
    "autoencoder": (Autoencoder(**AUTO, dropout=0.1), ALL),
    "vae": (VAE(**AUTO), ALL),
    "convnext": (ConvNeXt(stages=(1,), widths=(8,), patch=2, layer_scale=0.5, outputs=3), ("one", "fsdp_tensor")),
    "efficientnet": (
        EfficientNet(stages=((1, 3, 1, 2, 8),), stem=8, top=8, momentum=0.9, dropout=0.1, outputs=3),
        ("one", "fsdp"),
    ),
}
UPDATES = {"inception": 1}  # else 5: twelve normalisations over few numbers blow rounding up
TX = {"gpt": lambda steps: {"model": optimizers.muon(0.01, adam_rate=0.01)}}


def experiment_of(name: str, *, sgd: bool) -> tuple[Family, Experiment]:
    family, models = FAMILIES[name], SIZES[name][0]
    players = models if isinstance(models, dict) else {"model": models}
    tx = (lambda steps: dict.fromkeys(players, optax.sgd(0.1))) if sgd else TX.get(name, family.tx)
    train, test = family.data(16, seed=0), family.data(8, seed=1)
    return family, Experiment(family.task(models), tx, train, test, name=name)


def flat(name: str, tree: Any) -> dict[str, np.ndarray]:
    return {name + optim.path_string(p): np.asarray(x) for p, x in jax.tree_util.tree_leaves_with_path(tree)}


def numbers(name: str, mesh_name: str) -> dict[str, np.ndarray]:
    """Parameters after 5 updates with SGD; losses of 5 with the family's own optimizer; what share a device holds."""
    out, updates = {}, UPDATES.get(name, 5)
    for sgd in (True, False):
        family, experiment = experiment_of(name, sgd=sgd)
        fed = {"fuse": 1, "resident": False} if mesh_name == "one" else {"fuse": 3, "resident": True}
        config = RunConfig(batch_size=8, steps=updates, ema=family.ema, mesh=MESHES[mesh_name], **fed)
        devices = jax.devices()[:1] if mesh_name == "one" else None
        mesh = sharding.make_mesh(config.mesh, batch_size=8, devices=devices)
        program = Program(experiment, config, experiment.train, steps=updates, mesh=mesh)
        with jax.set_mesh(mesh):
            state = program.initialize(program.key)
            held = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves((state.params, state.opt_state)))
            whole = sum(x.nbytes for x in jax.tree.leaves((state.params, state.opt_state)))
            state, window = updated(program, updates)
        places = jax.tree.map(lambda s: s.sharding, program.state_shapes)
        chex.assert_trees_all_equal(places, jax.tree.map(lambda x: x.sharding, state))  # and it stays where it was born
        if sgd:
            out |= flat("params/", state.params) | flat("model_state/", state.model_state)
        else:
            out["loss"] = np.asarray(window[family.falls][0])
            out["share"] = np.array(held / whole)
    return out


def in_eight(file: str, name: str, meshes: tuple[str, ...]) -> None:
    """Runs in the other process."""
    assert jax.device_count() == 8
    out = {f"{m}:{k}": v for m in meshes for k, v in numbers(name, m).items()}
    np.savez(file, **out)


def values_of(name: str, meshes: tuple[str, ...], folder: Path) -> dict[str, np.ndarray]:
    """The numbers of all meshes, each those of one device."""
    call = f"import conftest, test_meshes; test_meshes.in_eight('n.npz', {name!r}, {meshes!r})"
    run_with_devices(call, folder=folder)
    with np.load(folder / "n.npz") as loaded:
        values = dict(loaded)
    one = {k.removeprefix("one:"): v for k, v in values.items() if k.startswith("one:")}
    assert len(one) > 5 and one["share"] == 1
    for mesh in meshes[1:]:
        here = {k.removeprefix(f"{mesh}:"): v for k, v in values.items() if k.startswith(f"{mesh}:")}
        assert here.keys() == one.keys()
        for k, v in one.items():
            if k not in ("share", "loss"):
                np.testing.assert_allclose(here[k], v, rtol=1e-4, atol=1e-6, err_msg=f"{mesh} {k}")
        np.testing.assert_allclose(here["loss"], one["loss"], rtol=1e-3, err_msg=mesh)
        if "fsdp" in mesh or mesh == "tensor":
            assert here["share"] < 0.95, mesh
    return values


@pytest.mark.slow
@pytest.mark.parametrize("name", SIZES)
def test_every_mesh_gives_the_numbers_of_one_device(name: str, tmp_path: Path, monkeypatch: Any) -> None:
    """The GPT with all of XLA's optimizations, as users run it; they take twice as long to compile."""
    monkeypatch.setenv("BIGJAX_OPTIMIZED", "1" if name == "gpt" else "0")
    values = values_of(name, SIZES[name][1], tmp_path)
    if name == "gpt":
        assert values["fsdp:share"] <= 1 / 7


def test_a_mesh_of_all_three_axes_gives_the_numbers_of_one_device(tmp_path: Path) -> None:
    values_of("gpt", ("one", "fsdp_tensor"), tmp_path)


# ---- what pmap did


def pmap_in_eight() -> None:
    """Runs in the other process: the step as it was written for pmap, against ours over `data`."""
    data = blobs(32, seed=0)
    model = MLP(features=(8,), outputs=3)
    experiment = tiny_experiment(model=model, tx=lambda steps: {"model": optax.sgd(0.1)}, train=data)
    config = RunConfig(batch_size=16, steps=3, mesh=MeshConfig(data=8))
    program = Program(experiment, config, data, steps=3)
    with jax.set_mesh(program.mesh):
        first = jax.device_get(program.initialize(program.key).params["model"])
        ours, _ = updated(program, 3)

    def step(params: Any, image: jax.Array, label: jax.Array) -> Any:
        def loss(params: Any) -> jax.Array:
            logits = model.apply({"params": params}, image.astype(jnp.float32) / 255, train=False)
            return optax.softmax_cross_entropy_with_integer_labels(logits, label).mean()

        gradient = jax.lax.pmean(jax.grad(loss)(params), "devices")
        return jax.tree.map(lambda p, g: p - 0.1 * g, params, gradient)

    step = jax.pmap(step, axis_name="devices")
    params = jax.tree.map(lambda x: np.stack([x] * 8), first)
    for n in range(3):
        rows = pipeline.batch_rows(n, seed=0, batch_size=16, size=32)
        image, label = (data[k][rows].reshape(8, 2, *data[k].shape[1:]) for k in ("image", "label"))
        params = step(params, image, label)
    theirs = jax.tree.map(lambda x: np.asarray(x[0]), params)
    chex.assert_trees_all_close(jax.device_get(ours.params["model"]), theirs, rtol=1e-5, atol=1e-6)
    assert not np.allclose(theirs["dense_0"]["kernel"], first["dense_0"]["kernel"], atol=1e-3)


def test_the_data_parallel_step_is_the_pmap_step(tmp_path: Path) -> None:
    run_with_devices("import conftest, test_meshes; test_meshes.pmap_in_eight()", folder=tmp_path)
