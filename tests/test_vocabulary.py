"""Logits that are made a part at a time: the same loss, accuracy and gradients, in less memory.

B batch, L positions, D width, V vocabulary.
"""

from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import run_with_devices

from bigjax.models import BERT, GPT, T5, Gemma, Mixtral
from bigjax.models.adapt import Adapted
from bigjax.ops import vocabulary
from bigjax.ops.vocabulary import Factors, in_parts
from bigjax.tasks import language, masked_token, next_token, sequence_to_sequence
from bigjax.tasks.language import token_losses

B, L, D, V = 4, 10, 8, 50
random = np.random.default_rng(0)
x_BLD, kernel_VD, bias_V = (random.normal(size=shape).astype(np.float32) for shape in ((B, L, D), (V, D), (V,)))
target_BL, weight_BL = random.integers(0, V, (B, L)), random.integers(0, 2, (B, L)).astype(np.float32)
KEY = jax.random.key(0)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of three positions."""
    monkeypatch.setattr(vocabulary, "MOST", 4 * B * V * 3)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("bias", [None, bias_V])
def test_values_and_gradients_are_those_of_whole_logits(small: None, bias: np.ndarray | None, smoothing: float) -> None:
    own_B = random.normal(size=B).astype(np.float32)  # what each row's loss is weighed by

    def whole(factors: Factors) -> tuple:
        out = token_losses(factors.logits(), target_BL, weight_BL, smoothing=smoothing)
        return (out[0] * own_B).sum(), out

    def parted(factors: Factors) -> tuple:
        out = token_losses(factors, target_BL, weight_BL, smoothing=smoothing)
        return (out[0] * own_B).sum(), out

    factors = Factors(*(None if x is None else jnp.asarray(x) for x in (x_BLD, kernel_VD, bias)))
    both = [jax.jit(jax.value_and_grad(f, has_aux=True))(factors) for f in (whole, parted)]
    chex.assert_trees_all_close(*both, rtol=1e-5, atol=1e-5)


TOKENS = jnp.asarray(random.integers(1, 11, (B, 7)))
BATCH = {"tokens": TOKENS, "index": jnp.arange(B), "mask": jnp.ones(B)}
GPTS = {"vocabulary": 11, "layers": 2, "width": 8, "heads": 2, "context": 16}
TASKS = {
    "gpt": (next_token(GPT(**GPTS)), {}),
    "gpt_untied": (next_token(GPT(**GPTS, tied=False)), {}),
    "gpt_bfloat16": (next_token(GPT(**GPTS, dtype="bfloat16")), {}),
    "gpt_lora": (next_token(Adapted(GPT(**GPTS, tied=False), on="unembedding|attention")), {}),
    "gemma": (next_token(Gemma(vocabulary=11, layers=2, width=8, heads=2, head=4, mlp=12, context=16, window=4)), {}),
    "mixtral": (next_token(Mixtral(**GPTS, kv_heads=1, experts=2, mlp=8), balance=0.1), {}),
    "bert": (masked_token(BERT(**GPTS, mlp=8, head="masked"), mask=3, vocabulary=11), {}),
    "t5": (
        sequence_to_sequence(T5(vocabulary=11, layers=1, width=8, heads=2, head=4, mlp=8), label_smoothing=0.1),
        {"target": TOKENS},
    ),
}


@pytest.mark.parametrize("name", TASKS)
def test_models_whose_logits_are_many_train_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    task, more = TASKS[name]
    batch, found = BATCH | more, []
    params, state = jax.jit(task.init)(KEY, batch)

    def loss(params: dict) -> tuple:
        (value, count), (_, metrics) = task.losses["model"](params, state, batch, KEY)
        return value / count, (metrics, task.evaluate(params, state, batch, KEY))

    parted = []
    monkeypatch.setattr(language, "in_parts", lambda *given: parted.append(given) or in_parts(*given))
    for most in (vocabulary.MOST, 4 * B * 11 * 3):
        monkeypatch.setattr(vocabulary, "MOST", most)
        found.append(jax.jit(lambda p: jax.value_and_grad(loss, has_aux=True)(p))(params))
    assert len(parted) == (0 if name == "gpt_lora" else 2)  # in training, and in evaluation
    rtol = 2e-2 if "bfloat16" in name else 1e-5
    chex.assert_trees_all_close(*found, rtol=rtol, atol=rtol)


def test_no_logits_are_held(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the compiler's own figure of a step's memory, with logits that are most of it."""
    model = GPT(vocabulary=8192, layers=1, width=16, heads=2, context=256)
    task, tokens_BL = next_token(model), jnp.zeros((4, 257), jnp.int32)
    batch = {"tokens": tokens_BL, "index": jnp.arange(4), "mask": jnp.ones(4)}
    params, state = jax.eval_shape(task.init, KEY, batch)
    whole, size = 4 * 256 * 8192 * 4, []
    for most in (2**40, whole // 64):
        monkeypatch.setattr(vocabulary, "MOST", most)
        step = jax.jit(jax.grad(lambda p: task.losses["model"](p, state, batch, KEY)[0][0]))
        size.append(step.lower(params).compile().memory_analysis().temp_size_in_bytes)
    assert size[0] > whole and size[1] < whole / 4, size


def test_over_a_mesh_each_device_takes_its_own_rows(tmp_path: Path) -> None:
    """Eight devices give what one does; a vocabulary that is split stays split."""
    code = """
import jax, jax.numpy as jnp, numpy as np, chex
from functools import partial
from bigjax import sharding
from bigjax.ops import vocabulary
from bigjax.ops.vocabulary import Factors, unmultiplied
from bigjax.tasks.language import token_losses
random = np.random.default_rng(0)
B, L, D, V = 8, 10, 8, 48
vocabulary.MOST = 4 * V * 3
factors = Factors(*(jax.device_put(random.normal(size=s).astype("f")) for s in ((B, L, D), (V, D))))
target, weight = map(jax.device_put, (random.integers(0, V, (B, L)), random.integers(0, 2, (B, L)).astype("f")))
loss = lambda f, t, w: token_losses(f, t, w)[0].sum()
plain = jax.jit(jax.value_and_grad(lambda f, t, w: token_losses(f.logits(), t, w)[0].sum()))(factors, target, weight)
mesh = sharding.make_mesh(sharding.MeshConfig(data=2, fsdp=4), batch_size=B)
with jax.set_mesh(mesh):
    put = lambda x: jax.device_put(x, sharding.batch_sharding(mesh))
    whole = jax.device_put(factors.kernel_VD, jax.NamedSharding(mesh, jax.P("fsdp", None)))
    got = jax.jit(jax.value_and_grad(loss))(Factors(put(factors.x_BLD), whole), put(target), put(weight))
chex.assert_trees_all_close(jax.device_get(plain), jax.device_get(got), rtol=1e-5, atol=1e-5)
logits, sown = jax.ShapeDtypeStruct((8, 10, 48), "float32"), {"logits": ("them",)}
for shape, rows, taken in (((2, 4, 1), 8, True), ((2, 2, 2), 8, False), ((2, 4, 1), 4, False)):
    mesh = sharding.make_mesh(sharding.MeshConfig(*shape), batch_size=8)
    with jax.set_mesh(mesh):
        assert (unmultiplied(jax.ShapeDtypeStruct((rows, 10, 48), "float32"), sown) == "them") is taken, shape
"""
    run_with_devices(code, folder=tmp_path)
