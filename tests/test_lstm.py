"""B batch, L steps, D features, H hidden, G gates, C classes."""

from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bigjax import UsageError
from bigjax.models.lstm import LSTM, Recurrence
from bigjax.ops.recurrence import _loop, recur

B, L, D, H = 3, 5, 4, 6


def count(params):
    return sum(x.size for x in jax.tree.leaves(params))


def tree_lines(params):
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return [f"{jax.tree_util.keystr(p, simple=True, separator='/')} {x.shape} {x.dtype}" for p, x in leaves]


def inputs(seed=0, shape=(B, L, D)):
    return jax.random.normal(jax.random.key(seed), shape)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def cell_numpy(cell, p, x_BLD):
    """The papers' formulas, one example, one step and one gate at a time, in float64."""
    w, u, b = (np.asarray(p[k], np.float64) for k in ("input_kernel", "recurrent_kernel", "bias"))
    out = np.zeros((*x_BLD.shape[:2], u.shape[0]))
    for row, x_LD in enumerate(np.asarray(x_BLD, np.float64)):
        h, c = np.zeros(u.shape[0]), np.zeros(u.shape[0])
        for t, x in enumerate(x_LD):
            if cell == "lstm":
                i, f, g, o = (x @ w[:, k] + h @ u[:, k] + b[k] for k in range(4))
                c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
                h = sigmoid(o) * np.tanh(c)
            elif cell == "gru":
                rb = np.asarray(p["recurrent_bias"], np.float64)
                r, z = (sigmoid(x @ w[:, k] + b[k] + h @ u[:, k] + rb[k]) for k in range(2))
                n = np.tanh(x @ w[:, 2] + b[2] + r * (h @ u[:, 2] + rb[2]))
                h = (1 - z) * n + z * h
            else:
                h = np.tanh(x @ w[:, 0] + h @ u[:, 0] + b[0])
            out[row, t] = h
    return out


def cell_jax(cell, p, x_BLD):
    """The same formulas with jnp and jax.nn.sigmoid in a Python loop: what the gradients are compared with."""
    w, u, b = p["input_kernel"], p["recurrent_kernel"], p["bias"][:, None]
    h = c = jnp.zeros((x_BLD.shape[0], u.shape[0]))
    hs = []
    for t in range(x_BLD.shape[1]):
        x = x_BLD[:, t]
        z = [x @ w[:, k] + b[k] for k in range(w.shape[1])]
        r = [h @ u[:, k] for k in range(w.shape[1])]
        if cell == "lstm":
            i, f, g, o = (a + q for a, q in zip(z, r, strict=True))
            c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
            h = jax.nn.sigmoid(o) * jnp.tanh(c)
        elif cell == "gru":
            r = [q + p["recurrent_bias"][k][None] for k, q in enumerate(r)]
            update = jax.nn.sigmoid(z[1] + r[1])
            h = (1 - update) * jnp.tanh(z[2] + jax.nn.sigmoid(z[0] + r[0]) * r[2]) + update * h
        else:
            h = jnp.tanh(z[0] + r[0])
        hs.append(h)
    return jnp.stack(hs, 1)


def layer(cell):
    module = Recurrence(H, cell)
    params = module.init(jax.random.key(1), inputs())["params"]
    noise = jax.random.split(jax.random.key(2), len(params))  # biases start at 0 or 1: make every number count
    return module, {k: v + 0.3 * jax.random.normal(n, v.shape) for n, (k, v) in zip(noise, params.items(), strict=True)}


@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn"])
def test_cells_equal_the_formulas_written_out_values_and_gradients(cell):
    module, params = layer(cell)
    x_BLD, weight_BLH = inputs(), inputs(3, (B, L, H))
    np.testing.assert_allclose(module.apply({"params": params}, x_BLD), cell_numpy(cell, params, x_BLD), atol=1e-5)

    def gradient(run):
        return jax.jit(jax.grad(lambda p, x: (run(p, x) * weight_BLH).sum(), argnums=(0, 1)))(params, x_BLD)

    ours = gradient(lambda p, x: module.apply({"params": p}, x))
    theirs = gradient(lambda p, x: cell_jax(cell, p, x))
    chex.assert_trees_all_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert all(jnp.abs(g).max() > 1e-2 for g in jax.tree.leaves(ours))


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_the_custom_gradient_is_that_of_the_plain_scan_also_under_vmap(cell):
    G = 4 if cell == "lstm" else 3
    z, kernel, weight = inputs(0, (2, L, B, G, H)), inputs(1, (H, G, H)), inputs(2, (2, L, B, H))
    bias = inputs(3, (G, H)) if cell == "gru" else None

    def both(run):
        gradient = jax.grad(lambda k, z, w: (run(cell, z, k, bias) * w).sum(), argnums=(0, 1))
        return jax.jit(jax.vmap(gradient, in_axes=(None, 0, 0)))(kernel, z, weight)

    chex.assert_trees_all_close(both(recur), both(lambda *a: _loop(*a, residuals=False)), rtol=1e-5, atol=1e-5)


def test_classic_counts_and_golden_tree():
    two_layers = jax.eval_shape(LSTM().init, jax.random.key(0), jnp.zeros((1, 100, 10)))["params"]
    assert count(two_layers) == 52_874
    tokens = LSTM(vocabulary=1000, embedding=100, hidden=(200,), outputs=1)
    sentiment = jax.eval_shape(tokens.init, jax.random.key(0), jnp.zeros((1, 7), jnp.int32))["params"]
    assert count(sentiment) == 1000 * 100 + 4 * (300 * 200 + 200) + 201
    gru = LSTM(hidden=(6,), cell="gru", bidirectional=True, pool="flatten")  # MNIST-1D's, as its authors count it
    mnist1d = jax.eval_shape(gru.init, jax.random.key(0), jnp.zeros((1, 40)))["params"]
    assert count(mnist1d) == 5_134
    lines = [line for p in (two_layers, sentiment, mnist1d) for line in [*tree_lines(p), ""]]
    assert "\n".join(lines) == (Path(__file__).parent / "golden" / "lstm.txt").read_text()


def test_initial_values():
    params = Recurrence(H).init(jax.random.key(0), inputs())["params"]
    np.testing.assert_array_equal(params["bias"], np.array([0.0, 1.0, 0.0, 0.0])[:, None].repeat(H, 1))
    u_GHH = np.swapaxes(params["recurrent_kernel"], 0, 1)
    np.testing.assert_allclose(u_GHH @ np.swapaxes(u_GHH, 1, 2), np.eye(H)[None].repeat(4, 0), atol=1e-5)
    assert np.abs(u_GHH[0] - u_GHH[1]).max() > 0.1


CASES = {
    "last": {},
    "gru": {"cell": "gru", "bidirectional": True},
    "both ways": {"bidirectional": True, "hidden": (H, H)},
    "sequence both ways": {"bidirectional": True, "sequence": True, "hidden": (H, H), "outputs": None},
    "mean": {"pool": "mean", "bidirectional": True},
    "max": {"pool": "max"},
    "flatten": {"pool": "flatten", "outputs": None},
}


@pytest.mark.parametrize("case", CASES)
def test_padding_changes_no_result_and_no_gradient(case):
    model = LSTM(**{"hidden": (H,), "outputs": 3, **CASES[case]})
    length_B = jnp.array([3, 5, 0])
    x_BLD = inputs()
    real_BL1 = (jnp.arange(L)[None] < length_B[:, None])[..., None]
    variables = jax.jit(model.init)(jax.random.key(1), x_BLD)

    @jax.jit
    def run(v, x):
        def loss(v, x):
            out = model.apply(v, x, length_B)
            return (out**2).sum(), out

        return jax.grad(loss, argnums=(0, 1), has_aux=True)(v, x)[::-1]

    runs = [run(variables, jnp.where(real_BL1, x_BLD, rubbish)) for rubbish in (7.0, jnp.nan)]
    chex.assert_trees_all_equal(*runs)
    chex.assert_tree_all_finite(runs[1])
    out = runs[0][0]
    if CASES[case].get("pool") == "flatten":
        out = out.reshape(B, L, H)
    for row, n in enumerate([3, 5]):  # a row alone, cut to its real steps
        alone = jax.jit(model.apply)(variables, x_BLD[row : row + 1, :n])
        if model.pool == "flatten":
            alone = alone.reshape(1, n, H)
        np.testing.assert_allclose(out[row, :n] if out.ndim == 3 else out[row], alone[0], atol=1e-6)
    if model.sequence:
        np.testing.assert_array_equal(out[0, 3:], 0)


def test_both_directions_see_the_whole_row():
    x_BLD = inputs()
    model = LSTM(hidden=(H,), bidirectional=True, outputs=None)
    variables = model.init(jax.random.key(0), x_BLD)
    out_BD = model.apply(variables, x_BLD)
    layers = variables["params"]
    forward = Recurrence(H).apply({"params": layers["layer_0"]}, x_BLD)[:, -1]
    backward = Recurrence(H).apply({"params": layers["layer_0_reverse"]}, x_BLD[:, ::-1])[:, -1]
    chex.assert_trees_all_close(out_BD, jnp.concatenate([forward, backward], -1), atol=1e-6)
    whole = LSTM(hidden=(H,), bidirectional=True, outputs=None, sequence=True).apply(variables, x_BLD)
    np.testing.assert_allclose(whole[:, 0, H:], backward, atol=1e-6)


def test_causal_by_gradient():
    model = LSTM(hidden=(H, H), outputs=2, sequence=True)
    x_1LD = inputs(0, (1, L, D))
    variables = model.init(jax.random.key(0), x_1LD)
    influence = jax.jit(jax.jacobian(lambda x: model.apply(variables, x).sum((0, 2))))(x_1LD)
    influence_LL = jnp.abs(influence).sum((1, 3))
    np.testing.assert_array_equal(jnp.triu(influence_LL, 1), 0)
    assert influence_LL[jnp.tril_indices(L)].min() > 0


def test_tokens_dropout_and_sown_features():
    model = LSTM(vocabulary=11, embedding=8, hidden=(H,), outputs=1, dropout=0.5)
    tokens_BL = jnp.arange(6).reshape(2, 3)
    variables = model.init(jax.random.key(0), tokens_BL)
    logits, sown = model.apply(variables, tokens_BL, jnp.array([3, 2]), mutable="intermediates")
    chex.assert_shape(logits, (2, 1))
    chex.assert_shape(sown["intermediates"]["features"][0], (2, H))
    dropped = [model.apply(variables, tokens_BL, train=True, rngs={"dropout": jax.random.key(k)}) for k in (0, 0, 1)]
    chex.assert_trees_all_equal(dropped[0], dropped[1])
    assert jnp.abs(dropped[0] - dropped[2]).max() > 1e-4
    assert jnp.abs(dropped[0] - model.apply(variables, tokens_BL)).max() > 1e-4


def test_bfloat16_is_near_float32_and_keeps_float32_parameters():
    x_BLD = inputs()
    model, half = LSTM(hidden=(H, H), outputs=3), LSTM(hidden=(H, H), outputs=3, dtype="bfloat16")
    variables = half.init(jax.random.key(0), x_BLD)
    assert {x.dtype for x in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    out = half.apply(variables, x_BLD)
    assert out.dtype == jnp.float32
    np.testing.assert_allclose(out, model.apply(variables, x_BLD), atol=0.03)
    assert jnp.abs(out - model.apply(variables, x_BLD)).max() > 0
    chex.assert_tree_all_finite(jax.grad(lambda v: (half.apply(v, x_BLD) ** 2).sum())(variables))


def test_images_are_read_by_rows_and_inputs_normalised():
    image_BHWC = jax.random.uniform(jax.random.key(0), (B, L, D, 1))
    plain = LSTM(hidden=(H,), outputs=2)
    variables = plain.init(jax.random.key(0), image_BHWC[..., 0])
    scaled = LSTM(hidden=(H,), outputs=2, mean=0.5, std=(2.0,) * D)
    chex.assert_trees_all_close(
        scaled.apply(variables, image_BHWC), plain.apply(variables, (image_BHWC[..., 0] - 0.5) / 2), atol=1e-6
    )


def test_images_are_normalised_by_channel():
    image_BHWC = jax.random.uniform(jax.random.key(0), (B, L, D, 3))
    mean, std = (0.1, 0.2, 0.3), (2.0, 3.0, 4.0)
    plain, scaled = LSTM(hidden=(H,), outputs=2), LSTM(hidden=(H,), outputs=2, mean=mean, std=std)
    variables = plain.init(jax.random.key(0), image_BHWC)
    by_hand_BHWC = (image_BHWC - jnp.array(mean).reshape(1, 1, 1, 3)) / jnp.array(std).reshape(1, 1, 1, 3)
    chex.assert_trees_all_close(scaled.apply(variables, image_BHWC), plain.apply(variables, by_hand_BHWC), atol=1e-6)
    with pytest.raises(UsageError, match="mean and std have 4 entries"):
        LSTM(hidden=(H,), mean=(0.0,) * 4).apply(variables, image_BHWC)


@pytest.mark.parametrize(
    ("fields", "x", "says"),
    [
        ({"cell": "lsmt"}, (2, 3, 4), "cell 'lsmt' is unknown: use one of lstm, gru, rnn"),
        ({"pool": "first"}, (2, 3, 4), "pool 'first' is unknown"),
        ({"hidden": ()}, (2, 3, 4), "at least one layer"),
        ({"vocabulary": 9}, (2, 3, 4), "takes integer tokens"),
        ({}, (2,), "takes x \\(batch, steps, features\\), not \\[2\\]"),
    ],
)
def test_mistakes_are_named(fields, x, says):
    with pytest.raises(UsageError, match=says):
        LSTM(**fields).init(jax.random.key(0), jnp.zeros(x))
