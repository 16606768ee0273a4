"""B batch, L positions, V vocabulary, D width."""

import re
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from bigjax import UsageError
from bigjax.models.gpt import GPT
from bigjax.models.layers import dot_float32

V, B, L = 11, 2, 6
TINY = {"vocabulary": V, "layers": 2, "width": 16, "heads": 4, "context": 8}
LLAMA = {"position": "rotary", "norm": "rms", "activation": "swiglu", "kv_heads": 2, "bias": False, "tied": False}
tokens_BL = jax.random.randint(jax.random.key(0), (B, L), 0, V)


def build(**fields):
    model = GPT(**(TINY | fields))
    shapes = jax.eval_shape(model.init, jax.random.key(1), tokens_BL)
    random = np.random.default_rng(2)  # far from zero, so that every part counts
    return model, jax.tree.map(lambda x: jnp.asarray(0.2 * random.normal(size=x.shape), jnp.float32), shapes)


def loss_and_gradient(model, variables):
    def loss(v):
        logits_BLV = model.apply(v, tokens_BL)
        return -jnp.take_along_axis(jax.nn.log_softmax(logits_BLV), tokens_BL[..., None], -1).mean()

    return jax.jit(jax.value_and_grad(loss))(variables)


def tree_lines(params):
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return [f"{jax.tree_util.keystr(p, simple=True, separator='/')} {x.shape} {x.dtype}" for p, x in leaves]


def test_gpt2_count_and_golden_trees():
    gpt2 = jax.eval_shape(GPT().init, jax.random.key(0), tokens_BL)["params"]
    assert sum(x.size for x in jax.tree.leaves(gpt2)) == 124_439_808
    stacked = jax.eval_shape(GPT(scan=True).init, jax.random.key(0), tokens_BL)["params"]
    assert sum(x.size for x in jax.tree.leaves(stacked)) == 124_439_808
    llama = jax.eval_shape(GPT(**(TINY | LLAMA), scan=True).init, jax.random.key(0), tokens_BL)["params"]
    lines = [line for p in (stacked, llama) for line in [*tree_lines(p), ""]]
    assert "\n".join(lines) == (Path(__file__).parent / "golden" / "gpt.txt").read_text()


def test_initial_sizes_are_gpt2s():
    model = GPT(**(TINY | {"width": 64, "scan": True}))
    params = jax.jit(model.init)(jax.random.key(0), tokens_BL)["params"]
    layers = params["layers"]
    for name, deviation in (("q", 0.02), ("o", 0.02 / 2)):  # 2 layers add 4 times to the residual stream: 1/√4
        np.testing.assert_allclose(layers["attention"][name]["kernel"].std(), deviation, rtol=0.05)
    np.testing.assert_allclose(layers["mlp"]["up"]["kernel"].std(), 0.02, rtol=0.05)
    np.testing.assert_allclose(layers["mlp"]["down"]["kernel"].std(), 0.01, rtol=0.05)
    np.testing.assert_allclose(params["embedding"]["embedding"].std(), 0.02, rtol=0.1)
    assert jnp.abs(layers["mlp"]["up"]["kernel"][0] - layers["mlp"]["up"]["kernel"][1]).max() > 0.01


@pytest.mark.parametrize("fields", [{}, LLAMA], ids=["gpt2", "llama"])
def test_causal_by_gradient(fields):
    model, variables = build(**fields)
    one_hot_LV = jax.nn.one_hot(tokens_BL[0], V)

    def run(weight_LV):  # tokens enter by embedding lookup: differentiate in a shift of the looked-up rows instead
        def shifted(next_function, args, kwargs, context):
            out = next_function(*args, **kwargs)
            if context.module.name == "embedding" and context.method_name == "__call__":
                out = out + (weight_LV @ variables["params"]["embedding"]["embedding"])[None]
            return out

        with nn.intercept_methods(shifted):
            return model.apply(variables, tokens_BL[:1])[0].sum(-1)

    influence_LL = jnp.abs(jax.jit(jax.jacobian(run))(one_hot_LV)).sum(-1)
    np.testing.assert_array_equal(jnp.triu(influence_LL, 1), 0)
    assert influence_LL[jnp.tril_indices(L)].min() > 0


@pytest.mark.parametrize("fields", [{}, LLAMA], ids=["gpt2", "llama"])
def test_scan_and_remat_change_neither_values_nor_gradients(fields):
    model, variables = build(**fields)
    expected = loss_and_gradient(model, variables)

    def stack(v):
        params = dict(v["params"])
        layers = [params.pop(f"layer_{n}") for n in range(model.layers)]
        return {"params": params | {"layers": jax.tree.map(lambda *x: jnp.stack(x), *layers)}}

    for remat in ("none", "full"):
        scanned = loss_and_gradient(GPT(**(TINY | fields), scan=True, remat=remat), stack(variables))
        chex.assert_trees_all_close(scanned, (expected[0], stack(expected[1])), rtol=1e-4, atol=1e-6)
    for remat in ("dots",) if model.tied else ():
        again = loss_and_gradient(GPT(**(TINY | fields), remat=remat), variables)
        chex.assert_trees_all_close(again, expected, rtol=1e-4, atol=1e-6)
    assert all(jnp.abs(g).max() > 1e-7 for g in jax.tree.leaves(expected[1]["params"]["layer_0"]["mlp"]))


def test_remat_recomputes():
    def products(remat):
        model = GPT(**TINY, remat=remat)
        variables = jax.eval_shape(model.init, jax.random.key(1), tokens_BL)
        text = str(jax.make_jaxpr(jax.grad(lambda v: model.apply(v, tokens_BL).sum()))(variables))
        return text.count("dot_general")

    assert products("none") <= products("dots") < products("full")


def test_padding_changes_no_real_logit_and_no_gradient():
    model, variables = build(**LLAMA)
    length_B = jnp.array([4, 2])
    real_BL = jnp.arange(L)[None] < length_B[:, None]
    other_BL = jnp.where(real_BL, tokens_BL, (tokens_BL + 1) % V)

    @jax.jit
    def run(v, tokens):
        logits_BLV = model.apply(v, tokens, length_B)
        return jnp.where(real_BL[..., None], logits_BLV**2, 0).sum()

    chex.assert_trees_all_equal(*(jax.value_and_grad(run)(variables, t) for t in (tokens_BL, other_BL)))
    apply = jax.jit(model.apply)
    chex.assert_trees_all_equal(*(apply(variables, t, length_B) for t in (tokens_BL, other_BL)))
    alone = model.apply(variables, tokens_BL[1:, :2])
    np.testing.assert_allclose(apply(variables, other_BL, length_B)[1:, :2], alone, atol=1e-5)


def test_order_matters_and_rotary_logits_ignore_where_a_text_starts():
    model, variables = build(**LLAMA)
    cache = model.empty_cache(B, 8)
    here, _ = model.apply(variables, tokens_BL[:, :1], cache, 0, method="decode")
    swapped = model.apply(variables, tokens_BL[:, ::-1])
    assert jnp.abs(swapped[:, -1] - model.apply(variables, tokens_BL)[:, -1]).max() > 1e-3
    np.testing.assert_allclose(here[:, 0], model.apply(variables, tokens_BL[:, :1])[:, 0], atol=1e-5)


def test_dropout_differs_by_key_and_layer_only_when_training():
    model, variables = build(dropout=0.3, scan=True)
    a, b, c = (model.apply(variables, tokens_BL, train=True, rngs={"dropout": jax.random.key(k)}) for k in (0, 0, 1))
    chex.assert_trees_all_equal(a, b)
    assert jnp.abs(a - c).max() > 1e-3
    chex.assert_trees_all_equal(model.apply(variables, tokens_BL), GPT(**TINY, scan=True).apply(variables, tokens_BL))


@pytest.mark.parametrize("scan", [False, True])
def test_each_layer_draws_its_own_dropout_mask(scan):
    """Two layers add dropped ones to a stream of zeros: with one mask for both nothing lies between none and all."""
    model, variables = build(dropout=0.5, scan=scan)

    def simple(path, x):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return jnp.full_like(x, name.endswith(("attention/o/bias", "params/norm/scale")))

    variables = jax.tree_util.tree_map_with_path(simple, variables)
    options = {"train": True, "rngs": {"dropout": jax.random.key(0)}, "mutable": "intermediates"}
    _, state = jax.jit(lambda v: model.apply(v, tokens_BL, **options))(variables)
    (features_BLD,) = state["intermediates"]["features"]
    sums = [len(np.unique(np.round(x_D, 3))) for x_D in features_BLD.reshape(B * L, -1)]
    assert max(sums) == 3, sums


def test_bfloat16_runs_near_float32_and_keeps_float32_parameters():
    model, variables = build()
    half = GPT(**TINY, dtype="bfloat16")
    shapes = jax.eval_shape(half.init, jax.random.key(0), tokens_BL)
    assert {x.dtype for x in jax.tree.leaves(shapes)} == {jnp.dtype("float32")}
    logits = jax.jit(half.apply)(variables, tokens_BL)
    assert logits.dtype == jnp.float32
    exact = jax.jit(model.apply)(variables, tokens_BL)
    assert 0 < jnp.abs(logits - exact).max() < 0.1 * jnp.abs(exact).max()
    chex.assert_tree_all_finite(loss_and_gradient(half, variables))


@pytest.mark.parametrize("tied", [True, False])
def test_bfloat16_logits_are_summed_in_float32(tied):
    """What the bfloat16 features and kernel give in float32: their rounding is all that the logits lose."""
    model, variables = build(dtype="bfloat16", tied=tied, width=64)
    logits, sown = jax.jit(lambda v: model.apply(v, tokens_BL, mutable="intermediates"))(variables)
    (features_BLD,) = sown["intermediates"]["features"]
    params = variables["params"]
    kernel = params["embedding"]["embedding"].T if tied else params["unembedding"]["kernel"]
    assert features_BLD.dtype == jnp.bfloat16
    exact = np.asarray(features_BLD, np.float64) @ np.asarray(kernel.astype(jnp.bfloat16), np.float64)
    np.testing.assert_allclose(logits, exact, rtol=0, atol=1e-6 * np.abs(exact).max())


@pytest.mark.parametrize("tied", [True, False])
def test_the_output_layers_gradients_multiply_in_bfloat16(tied):
    model, variables = build(dtype="bfloat16", tied=tied)
    text = jax.jit(jax.grad(lambda v: (model.apply(v, tokens_BL) ** 2).sum())).lower(variables).as_text()
    products = re.findall(r"dot_general .* : \((.*)\) -> (.*)", text)
    mine = [(types, result) for types, result in products if f"{V}x" in f"{types}{result}".replace("<", "x")]
    assert len(mine) == 3 and all("f32" not in types for types, _ in mine), products
    assert sum("xf32" in result for _, result in mine) == 1


def test_the_output_layer_has_derivatives_in_both_modes():
    x, w = jax.random.normal(jax.random.key(0), (2, 3, 4)), jax.random.normal(jax.random.key(1), (5, 4))
    ours, theirs = (
        jax.jacfwd(jax.jacrev(lambda x, w, f=f: jnp.tanh(f(x, w)).sum(), (0, 1)), (0, 1))(x, w)
        for f in (lambda x, w: dot_float32(x, w, (((2,), (1,)), ((), ()))), lambda x, w: x @ w.T)
    )
    chex.assert_trees_all_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_a_function_is_an_activation():
    (named, variables), (given, _) = build(), build(activation=nn.gelu)
    chex.assert_trees_all_equal(given.apply(variables, tokens_BL), named.apply(variables, tokens_BL))
    other, _ = build(activation=jnp.square)
    assert jnp.abs(other.apply(variables, tokens_BL) - named.apply(variables, tokens_BL)).max() > 1e-3


def test_features_are_sown_and_make_the_logits():
    model, variables = build()
    logits, sown = model.apply(variables, tokens_BL, mutable="intermediates")
    (features,) = sown["intermediates"]["features"]
    chex.assert_shape(features, (B, L, 16))
    np.testing.assert_allclose(features @ variables["params"]["embedding"]["embedding"].T, logits, atol=1e-4)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"heads": 3}, "width 16 is to be a multiple of heads \\(3\\)"),
        ({"kv_heads": 3}, "heads of kv_heads \\(3\\)"),
        ({"position": "sine"}, "position 'sine' is unknown: use learned or rotary"),
        ({"position": "rotary", "heads": 16}, "heads of even size"),
        ({"norm": "batch"}, "norm 'batch' is unknown"),
        ({"remat": "some"}, "remat 'some' is unknown: use one of none, full, dots"),
        ({"context": 5}, "6 tokens are more than the context \\(5\\)"),
    ],
)
def test_mistakes_are_named(fields, says):
    with pytest.raises(UsageError, match=says):
        jax.eval_shape(GPT(**(TINY | fields)).init, jax.random.key(0), tokens_BL)


def test_tokens_must_be_integers():
    with pytest.raises(UsageError, match="takes integer tokens"):
        jax.eval_shape(GPT(**TINY).init, jax.random.key(0), jnp.zeros((B, L)))
