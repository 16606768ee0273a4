"""Gemma and Mixtral: what sets them apart from a GPT. Their weights are compared in test_pretrained and test_parity.

B batch, L positions, V vocabulary, D width, E experts, F hidden units.
"""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bigjax import UsageError
from bigjax.models import GPT, Gemma, Mixtral
from bigjax.models.mixtral import Experts
from bigjax.task import Fields
from bigjax.tasks import next_token
from bigjax.tasks.routing import imbalance
from bigjax.use.generate import generate

V, B, L = 11, 2, 6
SHAPE = {"vocabulary": V, "width": 8, "heads": 2, "kv_heads": 1, "mlp": 12, "context": 9}
GEMMA = Gemma(**SHAPE, layers=3, head=6, window=2, period=3, rope_factor=2.0)
MIXTRAL = Mixtral(**SHAPE, layers=2, experts=3, window=3)
tokens_BL = jax.random.randint(jax.random.key(0), (B, L), 0, V)
both = pytest.mark.parametrize("model", [GEMMA, MIXTRAL], ids=["gemma", "mixtral"])


def random(model, scale=0.3):
    """Parameters far from zero, so that every part counts."""
    shapes, generator = jax.eval_shape(model.init, jax.random.key(1), tokens_BL), np.random.default_rng(2)
    return jax.tree.map(lambda x: jnp.asarray(scale * generator.normal(size=x.shape), jnp.float32), shapes)


def test_the_defaults_are_the_published_sizes():
    for model, count in ((Gemma(), 999_885_952), (Mixtral(), 46_702_792_704)):
        shapes = jax.eval_shape(model.init, jax.random.key(0), tokens_BL)["params"]
        assert sum(x.size for x in jax.tree.leaves(shapes)) == count


@both
def test_decoding_with_a_cache_gives_the_tokens_of_decoding_without(model):
    variables = random(model)
    apply, expected = jax.jit(model.apply), np.asarray(tokens_BL[:, :3])
    for _ in range(5):
        padded = np.pad(expected, ((0, 0), (0, model.context - expected.shape[1])))
        logits = apply(variables, padded)[:, expected.shape[1] - 1]
        expected = np.concatenate([expected, np.asarray(logits.argmax(-1))[:, None]], axis=1)
    prompt = tokens_BL[:, :3]
    got = generate(model, variables, prompt, length=5, temperature=0)
    np.testing.assert_array_equal(got.tokens_RN, expected[:, 3:])
    stacked = {k: v for k, v in variables["params"].items() if not k.startswith("layer_")}
    layers = [variables["params"][f"layer_{n}"] for n in range(model.layers)]
    stacked = {"params": stacked | {"layers": jax.tree.map(lambda *x: jnp.stack(x), *layers)}}
    scanned = model.clone(scan=True, remat="full")
    got = generate(scanned, stacked, prompt, length=5, temperature=0)
    np.testing.assert_array_equal(got.tokens_RN, expected[:, 3:])


def test_of_a_gemmas_layers_most_look_at_what_is_near():
    """The earlier tokens that move the last logits: through two local layers 2 × (window − 1), else all."""
    for layers, period, reach in ((2, 3, 2), (2, 2, L - 1)):
        model = GEMMA.clone(layers=layers, period=period)
        variables, apply = random(model), jax.jit(model.apply)
        logits = apply(variables, tokens_BL)
        others = [apply(variables, tokens_BL.at[:, n].add(1) % V) for n in range(L)]
        moved = [bool(jnp.abs(other - logits)[:, -1].max() > 1e-6) for other in others]
        assert moved == [L - 1 - n <= reach for n in range(L)]


def test_experts_are_gated_units_and_the_router_chooses_two():
    x_BLD, E, F = jax.random.normal(jax.random.key(0), (B, L, 8)), 3, 5
    weight_BLE = jax.random.uniform(jax.random.key(1), (B, L, E))
    module = Experts(E, F)
    params = module.init(jax.random.key(2), x_BLD, weight_BLE)["params"]
    w = {k: np.asarray(v["kernel"], np.float64) for k, v in params.items()}
    x, expected = np.asarray(x_BLD, np.float64), 0
    for e in range(E):
        gate = x @ w["gate"][e]
        expected = expected + weight_BLE[..., e, None] * (gate / (1 + np.exp(-gate)) * (x @ w["up"][e])) @ w["down"][e]
    np.testing.assert_allclose(module.apply({"params": params}, x_BLD, weight_BLE), expected, atol=1e-5)
    variables = random(MIXTRAL)
    variables["params"]["layer_1"]["router"]["kernel"] = jnp.zeros((8, 3))  # all alike: the first two, and no third

    def logits(params):
        return MIXTRAL.apply({"params": params}, tokens_BL).sum()

    slopes = jax.jit(jax.grad(logits))(variables["params"])["layer_1"]["experts"]
    for k in ("gate", "up", "down"):
        assert [bool(jnp.abs(x).max() > 0) for x in slopes[k]["kernel"]] == [True, True, False]


def test_routers_used_alike_are_in_balance_and_padding_does_not_count():
    alike = jnp.tile(jnp.eye(3)[None, None], (2, 1, 2, 1))  # two layers, one row, tokens to each expert in turn
    np.testing.assert_allclose(imbalance(alike, jnp.ones((1, 6)), chosen=1), [1.0], rtol=1e-6)
    one = jnp.zeros((1, 1, 6, 3)).at[..., 0].set(1.0)
    np.testing.assert_allclose(imbalance(one, jnp.ones((1, 6)), chosen=1), [3.0], rtol=1e-6)
    weight_BL = jnp.array([[1.0, 1.0, 0.0, 0.0, 0.0, 0.0]])
    np.testing.assert_allclose(imbalance(alike, weight_BL, chosen=1), [1.5], rtol=1e-6)
    np.testing.assert_allclose(imbalance(alike, 0 * weight_BL, chosen=1), [0.0])


@pytest.mark.parametrize("scan", [False, True])
def test_the_loss_that_trains_routers_is_in_the_task_row_by_row(scan):
    model = MIXTRAL.clone(scan=scan)
    task, plain = next_token(model, balance=0.5), next_token(model)
    tokens = jnp.concatenate([tokens_BL, tokens_BL[:, :1]], axis=1)
    batch = {"tokens": tokens, "length": jnp.array([7, 4]), "index": jnp.arange(B), "mask": jnp.ones(B, bool)}
    params, state = jax.jit(task.init)(jax.random.key(0), Fields(batch))
    assert state == {"model": {}}

    def loss(task):
        def function(params, batch):
            (total, count), (new, metrics) = task.losses["model"](params, state, Fields(batch), jax.random.key(0))
            assert new == {}
            return total, (count, metrics)

        return jax.jit(jax.value_and_grad(function, has_aux=True))

    (whole, (count, metrics)), slope = loss(task)(params, batch)
    (without, _), plain_slope = loss(plain)(params, batch)
    rows = [jax.tree.map(lambda x: x[n : n + 1], batch) for n in range(B)]  # noqa: B023
    np.testing.assert_allclose(sum(loss(task)(params, row)[0][0] for row in rows), whole, rtol=1e-5)
    uneven, counted = metrics["imbalance"]
    assert counted == count == 9 and uneven / count > model.chosen - 1e-3
    np.testing.assert_allclose(whole, without + 0.5 * uneven, rtol=1e-5)
    judged, expected = (t.evaluate(params, state, Fields(batch), jax.random.key(0)) for t in (task, plain))
    chex.assert_trees_all_close(judged, expected)
    name = "layers" if scan else "layer_1"
    a, b = (x["model"][name]["router"]["kernel"] for x in (slope, plain_slope))
    assert jnp.abs(a - b).max() > 1e-4


def test_mistakes_are_named():
    with pytest.raises(UsageError, match="a GPT has no experts to keep in balance: leave balance at 0"):
        next_token(GPT(), balance=0.1)
    for model, said in (
        (MIXTRAL.clone(chosen=4), "chosen 4 of 3 experts: choose at least 1, and no more than all"),
        (MIXTRAL.clone(window=0), "window 0: a position looks at least at itself"),
        (MIXTRAL.clone(head=5), "rotary positions need heads of even size, not 5"),
        (GEMMA.clone(period=0), "period 0: every so-manieth layer looks at everything, so give at least 1"),
        (GEMMA.clone(kv_heads=3), r"heads of kv_heads \(3\)"),
        (GEMMA.clone(context=5), r"6 tokens are more than the context \(5\)"),
        (
            GPT(layers=2, windowed=(True,), window=3),
            r"windowed says of 1 layers .*\(3\): give a window, and one entry for",
        ),
        (GPT(layers=1, windowed=(True,)), r"whether they have the window \(None\): give a window"),
    ):
        with pytest.raises(UsageError, match=said):
            jax.eval_shape(model.init, jax.random.key(0), tokens_BL)
