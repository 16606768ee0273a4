"""Meshes, their error messages, and one process with 8 virtual devices against this one with 1."""

import re
from functools import partial
from types import SimpleNamespace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import blobs, run_with_devices, tiny_experiment, updated
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec

from bigjax import UsageError, sharding
from bigjax.evaluation import evaluator
from bigjax.experiment import RunConfig
from bigjax.models import GPT
from bigjax.sharding import MeshConfig, make_mesh
from bigjax.train import Program


def numbers(sizes: tuple[int, ...]) -> dict[str, np.ndarray]:
    """What must not depend on the devices: parameters and metrics of a tiny run, and its evaluation by batch size."""
    experiment = tiny_experiment(tx=lambda steps: {"model": optax.sgd(0.1)})
    program = Program(experiment, RunConfig(batch_size=16, steps=3, ema=0.9), experiment.train, steps=3)
    out = {}
    with jax.set_mesh(program.mesh):
        state = program.initialize(program.key)
        out["born"] = np.array([len(x.sharding.device_set) for x in jax.tree.leaves(state)])
        with program.batches(0) as batches:
            batch = next(batches)
            out["rows"] = np.array([s.data.shape[0] for s in batch["image"].addressable_shards])
            out["order"] = np.asarray(batch["index"])
        state, window = updated(program, 3)
        for path, value in jax.tree_util.tree_leaves_with_path(
            {"params": state.params, "ema": state.ema, "out": window}
        ):
            out["run" + jax.tree_util.keystr(path)] = np.asarray(value)
        for size in sizes:
            evaluate = evaluator(experiment.task, batch_size=size, seed=0, mesh=program.mesh)
            counted = evaluate(state.params, state.model_state, experiment.test)
            for name, (total, count) in counted.items():
                out[f"eval/{size}/{name}"], out[f"count/{size}/{name}"] = np.asarray(total), np.asarray(count)
    return out


def eight_devices(file: str) -> None:
    """Runs in the other process."""
    assert jax.device_count() == 8
    out = numbers((8, 16, 24, 40))
    for size in (100, 3, 9, 1001):  # what a message suggests does work
        with pytest.raises(UsageError) as e:
            make_mesh(MeshConfig(), batch_size=size)
        for better in map(int, re.findall(r"\d+", str(e.value).split("use")[1])):
            assert dict(make_mesh(MeshConfig(), batch_size=better).shape) == {"data": 8, "fsdp": 1, "tensor": 1}
    mesh = make_mesh(MeshConfig(), batch_size=8)
    with jax.set_mesh(mesh):
        x_BD = jax.device_put(jnp.arange(16.0).reshape(8, 2), jax.sharding.NamedSharding(mesh, PartitionSpec()))
        y_BD = jax.jit(lambda x: sharding.constrain(x * 2, "batch"))(x_BD)
    np.testing.assert_array_equal(y_BD, 2 * np.asarray(x_BD))
    out["constrained"] = np.array([s.data.shape for s in y_BD.addressable_shards])
    np.savez(file, **out)


@pytest.fixture(scope="module")
def eight(tmp_path_factory: pytest.TempPathFactory) -> dict[str, np.ndarray]:
    file = tmp_path_factory.mktemp("eight") / "numbers.npz"
    call = f"import conftest, test_sharding; test_sharding.eight_devices({str(file)!r})"
    run_with_devices(call, folder=file.parent)
    with np.load(file) as loaded:
        return dict(loaded)


@pytest.fixture(scope="module")
def one() -> dict[str, np.ndarray]:
    return numbers((7, 20, 33))


def test_the_state_is_born_on_all_devices_and_batches_are_split(eight: dict, one: dict) -> None:
    assert set(eight["born"]) == {8} and set(one["born"]) == {1}
    assert list(eight["rows"]) == [2] * 8 and list(one["rows"]) == [16]
    np.testing.assert_array_equal(eight["order"], one["order"])  # the same global batch
    np.testing.assert_array_equal(eight["constrained"], [[1, 2]] * 8)


def test_eight_devices_train_as_one(eight: dict, one: dict) -> None:
    """Parameters after 3 SGD updates with dropout, their average, and the summed metrics."""
    runs = [{k: v for k, v in x.items() if k.startswith("run")} for x in (eight, one)]
    assert len(runs[0]) > 10
    chex.assert_trees_all_close(*runs, rtol=1e-4, atol=1e-6)


def test_every_batch_size_on_1_and_8_devices_evaluates_to_the_same(eight: dict, one: dict) -> None:
    results = [(x, n) for x, sizes in ((one, (7, 20, 33)), (eight, (8, 16, 24, 40))) for n in sizes]
    assert one["count/7/accuracy"] == 20 and one["eval/7/confusion"].sum() == 20
    for x, n in results:
        for kind in ("eval", "count"):
            for name in ("loss", "accuracy", "confusion", "calibration_correct", "top2_accuracy"):
                np.testing.assert_allclose(x[f"{kind}/{n}/{name}"], one[f"{kind}/7/{name}"], rtol=1e-4, atol=1e-5)


def test_the_sharded_split_of_labels_is_the_tests(one: dict) -> None:
    np.testing.assert_array_equal(one["eval/20/confusion"].sum(1), np.bincount(blobs(20, seed=1)["label"], minlength=3))


# --- messages


def devices(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.setattr(jax, "devices", lambda: jax.local_devices() * count)


@pytest.mark.parametrize(
    ("config", "batch_size", "message"),
    [
        (MeshConfig(data=0), 8, "mesh.data 0: an axis is a number of devices, or -1 for all that is left"),
        (MeshConfig(fsdp=-2), 8, "mesh.fsdp -2: an axis is a number of devices, or -1 for all that is left"),
        (MeshConfig(tensor=0), 8, "mesh.tensor 0: an axis is a number of devices, or -1 for all that is left"),
        (MeshConfig(data=-1, fsdp=-1), 8, "mesh.data and mesh.fsdp are both -1: give one of them a number"),
        (MeshConfig(data=4, fsdp=-1, tensor=-1), 8, "mesh.fsdp and mesh.tensor are both -1: give one of them a number"),
        (MeshConfig(fsdp=2), 6, "batch_size 6 is not divisible by the data × fsdp axes (8): use 8"),
        (
            MeshConfig(data=2, fsdp=3),
            6,
            "the mesh (data 2 × fsdp 3 × tensor 1 = 6) does not cover the 8 devices: use fsdp and tensor whose product "
            "divides that",
        ),
        (
            MeshConfig(data=2, tensor=2),
            6,
            "the mesh (data 2 × fsdp 1 × tensor 2 = 4) does not cover the 8 devices: use --mesh.data 4",
        ),
        (
            MeshConfig(data=3),
            9,
            "the mesh (data 3 × fsdp 1 × tensor 1 = 3) does not cover the 8 devices: use --mesh.data 8",
        ),
        (MeshConfig(), 100, "batch_size 100 is not divisible by the data axis (8): use 96 or 104"),
        (MeshConfig(data=8), 5, "batch_size 5 is not divisible by the data axis (8): use 8"),
    ],
)
def test_every_mistake_has_its_message(
    monkeypatch: pytest.MonkeyPatch, config: MeshConfig, batch_size: int, message: str
) -> None:
    devices(monkeypatch, 8)
    with pytest.raises(UsageError) as e:
        make_mesh(config, batch_size=batch_size)
    assert str(e.value) == message


@settings(max_examples=50, deadline=None)
@given(st.integers(2, 64), st.integers(1, 500))
def test_the_suggested_batch_sizes_are_the_nearest_that_work(count: int, batch_size: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        devices(patch, count)
        patch.setattr(sharding, "Mesh", lambda devices, axes: devices.shape)
        if batch_size % count == 0:
            assert make_mesh(MeshConfig(), batch_size=batch_size) == (count, 1, 1)
            return
        with pytest.raises(UsageError) as e:
            make_mesh(MeshConfig(), batch_size=batch_size)
        suggested = [int(n) for n in re.findall(r"\d+", str(e.value).split("use")[1])]
        works = [n for n in range(1, 600) if n % count == 0]
        below, above = [n for n in works if n < batch_size], [n for n in works if n > batch_size]
        assert suggested == below[-1:] + above[:1]


def test_one_device_makes_a_mesh_of_one() -> None:
    for config in (MeshConfig(), MeshConfig(data=1), MeshConfig(data=1, fsdp=1, tensor=1)):
        assert dict(make_mesh(config, batch_size=7).shape) == {"data": 1, "fsdp": 1, "tensor": 1}


def test_constrain_does_nothing_without_a_mesh_and_keeps_values_with_one() -> None:
    x_BD = jnp.arange(6.0).reshape(3, 2)
    assert sharding.constrain(x_BD, "batch") is x_BD
    constrain = partial(sharding.constrain, axis="batch")
    assert "sharding_constraint" not in str(jax.make_jaxpr(constrain)(x_BD))
    with jax.set_mesh(make_mesh(MeshConfig(), batch_size=3)):
        assert "sharding_constraint" in str(jax.make_jaxpr(constrain)(x_BD))
        y_BD = jax.jit(constrain)(x_BD)
    chex.assert_equal_shape([x_BD, y_BD])
    np.testing.assert_array_equal(x_BD, y_BD)


def test_put_batch_keeps_rows_and_types() -> None:
    mesh, batch = make_mesh(MeshConfig(), batch_size=20), blobs(20, seed=0)
    placed = sharding.put_batch(batch, mesh, 20)
    for name, value in batch.items():
        assert placed[name].dtype == value.dtype and placed[name].sharding.spec == sharding.BATCH
        np.testing.assert_array_equal(placed[name], value)


# --- rules


def spec(name: str, shape: tuple[int, ...], *, rules: sharding.Rules = sharding.RULES, **axes: int) -> tuple:
    mesh = SimpleNamespace(shape={"data": 1, "fsdp": 1, "tensor": 1} | axes)
    return tuple(sharding.spec_of(name, shape, mesh, [(re.compile(p), s) for p, s in rules]))


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("params/model/layers/attention/q/kernel", (12, 64, 32), (None, "fsdp", "tensor")),  # stacked, or
        ("params/model/layer_3/attention/q/kernel", (64, 32), ("fsdp", "tensor")),  # single: one rule
        ("opt_state/model/0/mu/layers/mlp/down/kernel", (12, 32, 64), (None, "tensor", "fsdp")),  # moments follow
        ("params/model/layers/mlp/up/bias", (12, 32), (None, "tensor")),
        ("params/model/embedding/embedding", (64, 16), ("tensor", "fsdp")),
        ("params/model/layer_0/input_kernel", (16, 4, 8), ("fsdp", None, "tensor")),
        ("params/model/layer_0_reverse/bias", (4, 8), ("fsdp", "tensor")),
        ("params/model/conv_0/kernel", (3, 3, 8, 16), (None, None, None, "fsdp")),
        ("params/model/norm/scale", (7,), (None,)),  # small, and nothing divides it: whole
        ("step", (), ()),
    ],
)
def test_where_each_leaf_lies(name: str, shape: tuple[int, ...], expected: tuple) -> None:
    assert spec(name, shape, fsdp=4, tensor=2) == expected


@pytest.mark.parametrize(
    ("rules", "axes", "message"),
    [
        (
            sharding.RULES,
            {"tensor": 8},
            "dimension 1 of a/q/kernel (1024, 36) is not divisible by mesh.tensor (8): use --mesh.tensor 4",
        ),
        (
            [("kernel", ("tensor", "tensor"))],
            {"tensor": 2},
            "the sharding rule of a/q/kernel (1024, 36) uses mesh.tensor twice: split one dimension by it",
        ),
        (
            [("bias", "fsdp")],
            {"fsdp": 2},
            'no sharding rule matches a/q/kernel (1024, 36): add one, or ("", "fsdp") at the end',
        ),
        (
            [("kernel", ("fsdp", None))],
            {"fsdp": 3},
            "dimension 0 of a/q/kernel (1024, 36) is not divisible by mesh.fsdp (3): use --mesh.fsdp 1",
        ),
    ],
)
def test_rules_that_cannot_be_followed(rules: sharding.Rules, axes: dict[str, int], message: str) -> None:
    with pytest.raises(UsageError) as e:
        spec("a/q/kernel", (1024, 36), rules=rules, **axes)
    assert str(e.value) == message


def test_a_large_leaf_that_fsdp_cannot_split_is_refused() -> None:
    with pytest.raises(UsageError, match=r"no dimension of a/conv/kernel \(1022, 70\) is divisible by mesh.fsdp \(4\)"):
        spec("a/conv/kernel", (1022, 70), fsdp=4)
    assert spec("a/conv/kernel", (1022, 70), fsdp=4, rules=[("", None)]) == ()


def test_the_first_rule_wins_and_too_long_ones_are_passed_over() -> None:
    rules = [("kernel", (None, None, "tensor")), ("kernel", ("tensor", None)), ("", "fsdp")]
    assert spec("a/kernel", (8, 8), rules=rules, tensor=2) == ("tensor", None)
    assert spec("a/kernel", (4, 8, 8), rules=rules, tensor=2) == (None, None, "tensor")


def test_an_axis_along_which_nothing_is_split_is_an_error() -> None:
    mesh = jax.sharding.AbstractMesh((1, 1, 2), ("data", "fsdp", "tensor"))
    shapes = {"conv_0": {"kernel": jax.ShapeDtypeStruct((3, 3, 8, 8), jnp.float32)}}
    with pytest.raises(UsageError, match="nothing in this model is split over mesh.tensor: use --mesh.tensor 1"):
        sharding.place(shapes, mesh)
    shapes["dense_0"] = {"kernel": jax.ShapeDtypeStruct((8, 8), jnp.float32)}
    placed = sharding.place(shapes, mesh)
    assert placed["dense_0"]["kernel"].sharding.shard_shape((8, 8)) == (8, 4)


def test_heads_are_not_split() -> None:
    mesh = SimpleNamespace(shape={"tensor": 4})
    with pytest.raises(
        UsageError, match=r"kv_heads 2 of GPT is not divisible by mesh.tensor \(4\): use --mesh.tensor 2"
    ):
        sharding.check_heads(GPT(heads=8, kv_heads=2), mesh)
    sharding.check_heads(GPT(heads=8, kv_heads=4), mesh)
