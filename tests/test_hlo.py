"""Compiled programs are read rightly: groups of every form, loops counted, bytes as worked out here from shapes."""

import math
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import run_with_devices

from bigjax import sharding
from bigjax.experiment import Experiment, RunConfig
from bigjax.models import GPT
from bigjax.ops.counted import flops
from bigjax.program import Program
from bigjax.run.flops import lower
from bigjax.sharding import MeshConfig
from bigjax.tasks import next_token
from bigjax.tools import hlo

MESH = SimpleNamespace(shape={"data": 2, "fsdp": 2, "tensor": 2})


@pytest.mark.parametrize(
    ("text", "group", "axis"),
    [
        ("replica_groups={{0,1},{2,3},{4,5},{6,7}}, dimensions={0}", [0, 1], "tensor"),
        ("replica_groups={{0,2,4,6},{1,3,5,7}}", [0, 2, 4, 6], "data × fsdp"),
        ("replica_groups=[2,4]<=[8], use_global_device_ids=true", [0, 1, 2, 3], "fsdp × tensor"),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", [0, 4], "data"),
        ("replica_groups=[4,2]<=[2,2,2]T(2,0,1), dimensions={1}", [0, 2], "fsdp"),
        ("replica_groups=mesh['axis_0'=4,'axis_1'=2] {'axis_1'}, dimensions={0}", [0, 1], "tensor"),
        ("replica_groups=mesh['a'=2,'b'=4], device_ids=([2,2,2]T(1,0,2)) {'b'}", [0, 1, 4, 5], "data × tensor"),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_1':(1)2}, dimensions={0}", [0, 2], "fsdp"),
        ("channel_id=1, source_target_pairs={{0,0},{4,2},{2,4}}, metadata={}", [4, 2], "data × fsdp"),
        ("replica_groups={}, to_apply=%add", list(range(8)), "data × fsdp × tensor"),
    ],
)  # fmt: skip
def test_groups_of_every_form(text: str, group: list[int], axis: str) -> None:
    assert hlo.group_of(text, 8) == group
    assert hlo.axis_of(group, MESH) == axis


def test_sizes_of_shapes() -> None:
    assert hlo.size("f32[4,8]{1,0}") == 128
    assert hlo.size("(bf16[10]{0:T(256)}, pred[3], s4[6])") == 20 + 3 + 3
    assert hlo.size("f32[4]{0:T(128)S(1)}", fast=False) == 0  # in the chip's fast memory


def compiled(function, *args) -> hlo.Module:
    return hlo.parse(jax.jit(function).lower(*args).compile().as_text())


def test_a_loop_counts_as_often_as_it_runs() -> None:
    x_NN = jnp.ones((64, 64))
    once = hlo.traffic(compiled(lambda x: jnp.tanh(x @ x), x_NN))
    looped = compiled(lambda x: jax.lax.fori_loop(0, 7, lambda i, y: jnp.tanh(y @ y), x), x_NN)
    assert 7 in looped.times.values()
    assert 7 * once <= hlo.traffic(looped) <= 11 * once  # the loop's own copies and counter besides


def test_a_slice_of_a_large_array_moves_the_slice() -> None:
    """A scan over stacked weights reads each layer's once, not the stack in every turn."""
    stack, x = jnp.ones((50, 64, 64)), jnp.ones((8, 64))
    moved = hlo.traffic(compiled(lambda w, x: jax.lax.scan(lambda y, w: (jnp.tanh(y @ w), None), x, w)[0], stack, x))
    assert stack.nbytes <= moved <= 4 * stack.nbytes


def test_flops_are_those_of_the_shapes() -> None:
    def f(a, b, kernel, image):
        y = jax.lax.scan(lambda c, _: (c @ b, None), a, length=5)[0]
        return y.sum() + jax.lax.conv_general_dilated(image, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")).sum()  # fmt: skip  # noqa: E501

    a, b, kernel, image = (jnp.ones(s) for s in ((3, 4), (4, 4), (3, 3, 2, 5), (7, 8, 8, 2)))
    jaxpr = jax.make_jaxpr(f)(a, b, kernel, image).jaxpr
    assert flops(jaxpr) == 5 * 2 * 3 * 4 * 4 + 2 * (7 * 8 * 8 * 5) * (3 * 3 * 2)


def test_flops_of_a_gpt_are_six_a_parameter_and_token_and_remat_adds_the_forward_pass() -> None:
    L, V, D, B = 64, 64, 64, 4
    tokens = {"tokens": np.zeros((8, L + 1), np.int32)}

    def count(**fields: str) -> float:
        model = GPT(vocabulary=V, layers=3, width=D, heads=2, context=L, bias=False, scan=True, **fields)
        e = Experiment(next_token(model), optax.sgd(0.1), tokens, tokens)
        program = Program(e, RunConfig(batch_size=B), e.train, steps=1)
        return flops(lower(program).jaxpr.jaxpr)

    matrices = 3 * 12 * D * D + V * D
    attention = 3 * 2 * 2 * L * D  # of one token, forward: scores and mixture, over all positions
    assert count() == 3 * B * L * (2 * matrices + attention)
    again = 2 * 3 * (12 - 4) * D * D + attention  # all but each layer's last product, which no gradient needs
    assert count(remat="full") == count() + B * L * again


# ---- what the strategies need: the compiled step for 8 devices, in another process


def gpt_step(mesh: MeshConfig, *, rows: int = 8, length: int = 16) -> tuple[hlo.Module, Program]:
    model = GPT(vocabulary=64, layers=2, width=32, heads=4, mlp=64, context=length, bias=False, norm="rms", tied=False)
    tokens = {"tokens": np.zeros((rows, length + 1), np.int32)}
    e = Experiment(next_token(model), optax.sgd(0.1), tokens, tokens)
    program = Program(e, RunConfig(batch_size=rows, mesh=mesh), e.train, steps=1)
    with jax.set_mesh(program.mesh):
        return hlo.parse(lower(program).lower().compile().as_text()), program


def in_eight() -> None:
    """Runs in the other process: 8 virtual devices."""
    B, L, D = 8, 16, 32
    module, program = gpt_step(MeshConfig(data=8))
    sizes = {k: math.prod(s.shape) * 4 for k, s in flat(program.state_shapes.params).items()}
    found = hlo.collectives(module, program.mesh)
    assert {c.kind for c in found} == {"all-reduce"} and {c.axis for c in found} == {"data"}
    gradients = sum(c.bytes * c.count for c in found)
    assert sum(sizes.values()) <= gradients <= sum(sizes.values()) + 4096, (gradients, sizes)  # and metrics

    module, program = gpt_step(MeshConfig(data=1, fsdp=8))
    found = hlo.collectives(module, program.mesh)
    gathered = sum(c.bytes * c.count for c in found if c.kind == "all-gather")
    split = sum(n for k, n in sizes.items() if "kernel" in k or "embedding" in k)
    assert split * 0.9 <= gathered <= 2.5 * split, (gathered, split)  # forward, and again backward where kept split
    reduced = sum(c.bytes * c.count for c in found if c.kind in ("reduce-scatter", "all-reduce"))
    assert reduced >= split * 0.9
    share = max(x.sharding.shard_shape(x.shape)[0] for x in flat(program.state_shapes.params).values())
    assert share < 64

    module, program = gpt_step(MeshConfig(data=4, tensor=2))
    found = [c for c in hlo.collectives(module, program.mesh) if c.axis == "tensor" and c.kind == "all-reduce"]
    rows = (B // 4) * L * D * 4  # one activation of a device
    per_layer = sum(c.count for c in found if c.bytes == rows)
    assert 2 * 4 <= per_layer <= 2 * 4 + 3, found  # attention and MLP, forward and backward; embedding and logits

    # no collective carries the activations of the whole batch, which here are larger than all parameters
    for sizes in ({"data": 8}, {"data": 1, "fsdp": 8}, {"data": 2, "fsdp": 4}, {"data": 4, "tensor": 2}):
        module, program = gpt_step(MeshConfig(**sizes), rows=128, length=64)
        large = [c for c in hlo.collectives(module, program.mesh) if c.bytes >= 128 * 64 * D * 2 and c.axis != "tensor"]
        assert not large, (sizes, large)


def flat(tree) -> dict:
    return {sharding_path(p): x for p, x in jax.tree_util.tree_leaves_with_path(tree)}


def sharding_path(path) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def test_each_strategy_needs_its_collectives_and_no_more(tmp_path: Path) -> None:
    run_with_devices("import conftest, test_hlo; test_hlo.in_eight()", folder=tmp_path)


def test_one_device_needs_none() -> None:
    module, program = gpt_step(MeshConfig())
    assert hlo.collectives(module, program.mesh) == []
    assert sharding.make_mesh(MeshConfig(), batch_size=8).size == 1
