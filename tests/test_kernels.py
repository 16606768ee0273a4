"""Which form attention takes, by stand-ins for where it runs; what is counted where a kernel works."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bigjax import sharding
from bigjax.look.diagnose import layer_rows
from bigjax.models import BERT, GPT, T5, Gemma, ViT
from bigjax.ops import kernels
from bigjax.ops.attention import attention
from bigjax.ops.counted import counting, flops

LONG = {"q": (8, 1024, 12, 64), "kv": (8, 1024, 12, 64), "dtype": "bfloat16", "causal": True}


@pytest.mark.parametrize(
    ("place", "other", "form"),
    [
        ("tpu", {}, "splash"),
        ("cuda", {}, "cudnn"),
        ("cpu", {}, "plain"),
        ("gpu", {}, "plain"),  # none of NVIDIA's, or too old
        ("several", {}, "plain"),
        ("tpu", {"dtype": "float32"}, "splash"),
        ("cuda", {"dtype": "float32"}, "plain"),
        ("cuda", {"dtype": "float16", "kv": (8, 1024, 4, 64)}, "cudnn"),
        ("tpu", {"causal": False}, "splash"),
        ("tpu", {"q": (8, 1000, 12, 64), "kv": (8, 1000, 12, 64)}, "plain"),
        ("cuda", {"q": (8, 197, 12, 64), "kv": (8, 197, 12, 64), "causal": False}, "cudnn"),  # ViT
        ("cuda", {"mask": (8, 1, 1, 1024), "causal": False}, "cudnn"),  # BERT
        ("tpu", {"mask": (8, 1, 1, 1024), "causal": False}, "plain"),
        ("cuda", {"bias": (1, 12, 1024, 1024), "mask": (8, 1, 1, 1024), "causal": False}, "cudnn"),  # T5
        ("cuda", {"bias": (1, 12, 7, 7), "q": (8, 7, 12, 64), "kv": (8, 7, 12, 64)}, "plain"),
        ("tpu", {"bias": (1, 12, 1024, 1024)}, "plain"),
        ("cuda", {"q": (8, 1, 12, 64)}, "plain"),  # a token that is written
        ("cuda", {"q": (8, 1024, 12, 256), "kv": (8, 1024, 4, 256)}, "plain"),  # Gemma
    ],
)
def test_one_function_decides(place: str, other: dict, form: str) -> None:
    assert kernels.chosen(place, **LONG | other) == form


def test_the_platform_is_that_of_the_mesh_that_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    assert kernels.platform() == "cpu"
    with jax.set_mesh(sharding.make_mesh(sharding.MeshConfig(), batch_size=8)):
        assert kernels.platform() == "cpu"
    with jax.set_mesh(jax.sharding.Mesh(np.array(jax.devices()[:1]), ("mine",))):
        assert kernels.platform() == "several"
    monkeypatch.setattr(jax, "device_count", lambda: 8)
    assert kernels.platform() == "several"


MODELS = {
    "gpt": (GPT(vocabulary=11, layers=1, width=16, heads=2, context=128), 1, {"causal": True}),
    "gemma": (Gemma(vocabulary=11, layers=1, width=16, heads=2, head=8, mlp=12, context=128, period=1), 1, {}),
    "bert": (BERT(vocabulary=11, layers=1, width=16, heads=2, mlp=12, context=128), 1, {"causal": False}),
    "vit": (ViT(image=32, patch=4, layers=1, width=16, heads=2), 0, {"causal": False}),
    "t5": (T5(vocabulary=11, layers=1, width=16, heads=2, head=8, mlp=12), 2, {}),
}


@pytest.mark.parametrize("name", MODELS)
def test_all_models_ask_it_and_are_counted_plainly(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for the kernel is called with what a kernel takes, and gives what the plain form gives."""
    model, count, _ = MODELS[name]
    tokens_BL = jnp.zeros((2, 128), jnp.int32)
    inputs = (tokens_BL,) * count or (jnp.zeros((2, 32, 32, 3)),)
    variables = jax.jit(model.init)(jax.random.key(0), *inputs)
    with counting("run") as other_forms:
        plain, asked = jax.jit(model.apply)(variables, *inputs), []
    assert not other_forms  # so that a plan needs no second trace

    def kernel(q: jax.Array, k: jax.Array, v: jax.Array, **how: object) -> jax.Array:
        asked.append(how)
        return attention(q, k, v, **how)

    monkeypatch.setattr(kernels, "platform", lambda: "cuda")
    monkeypatch.setattr(kernels, "cudnn_attention", kernel)
    monkeypatch.setattr(kernels, "suits", lambda *_, **__: True)
    with counting("run") as other_forms:
        np.testing.assert_array_equal(jax.jit(lambda *x: model.apply(*x))(variables, *inputs), plain)
    assert other_forms == {"attention"} and len(asked) == (3 if name == "t5" else 1)
    told = layer_rows(lambda: model.init(jax.random.key(0), *inputs), {"model": variables["params"]})
    assert told[-1] == ("attention", "cudnn", 0)  # as the table at the start of a run says
    asked.clear()
    with counting("hardware"):
        jaxpr = jax.make_jaxpr(lambda *x: model.apply(*x))(variables, *inputs)
    assert not asked and flops(jaxpr.jaxpr) > 0


def test_work_that_nobody_knows_is_an_error() -> None:
    """A kernel's own, which is why its plain twin is counted."""
    x_BLHK = jnp.zeros((1, 128, 1, 128), jnp.bfloat16)
    traced = jax.make_jaxpr(lambda x: kernels.attend(x, x, x, causal=True, form="splash"))(x_BLHK)
    with pytest.raises(NotImplementedError, match="is not known: count its plain twin"):
        flops(traced.jaxpr)
    with counting("hardware"):
        traced = jax.make_jaxpr(lambda x: kernels.attend(x, x, x, causal=True, form="splash"))(x_BLHK)
    assert flops(traced.jaxpr) == 4 * 128 * 128 * 128 * 5 / 8
