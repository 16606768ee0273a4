"""B batch, L queries, M keys, D width, H heads, G key/value heads, K head size."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bigjax import UsageError
from bigjax.models.cache import empty_cache
from bigjax.models.layers import OffsetRMSNorm
from bigjax.models.transformer import Attention, FeedForward, rotary
from bigjax.ops.attention import attention

B, L, M, H, G, K = 2, 3, 5, 4, 2, 6


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def attention_numpy(q, k, v, mask=None):
    """softmax(QKᵀ/√K)V, head by head."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    out = np.zeros(q.shape)
    mask = np.ones((1, 1, 1, 1), bool) if mask is None else mask
    mask = np.broadcast_to(mask, (q.shape[0], q.shape[2], q.shape[1], k.shape[1]))
    for b in range(q.shape[0]):
        for h in range(q.shape[2]):
            g = h // (q.shape[2] // k.shape[2])
            score_LM = q[b, :, h] @ k[b, :, g].T / np.sqrt(q.shape[3])
            score_LM = np.where(mask[b, h], score_LM, -np.inf)
            weight_LM = np.exp(score_LM - score_LM.max(1, keepdims=True))
            out[b, :, h] = weight_LM / weight_LM.sum(1, keepdims=True) @ v[b, :, g]
    return out


@pytest.mark.parametrize("kv_heads", [H, G, 1])
def test_attention_is_softmax_of_qk_over_root_d_times_v(kv_heads):
    q, k, v = normal(0, B, L, H, K), normal(1, B, M, kv_heads, K), normal(2, B, M, kv_heads, K)
    np.testing.assert_allclose(attention(q, k, v), attention_numpy(q, k, v), atol=1e-5)
    mask = jax.random.bernoulli(jax.random.key(3), 0.5, (B, 1, L, M)).at[..., 0].set(True)
    np.testing.assert_allclose(attention(q, k, v, mask=mask), attention_numpy(q, k, v, mask), atol=1e-5)


def test_causal_attention_masks_what_comes_later():
    q, k, v = normal(0, B, L, H, K), normal(1, B, L, H, K), normal(2, B, L, H, K)
    lower = np.tril(np.ones((L, L), bool))[None, None]
    np.testing.assert_allclose(attention(q, k, v, causal=True), attention_numpy(q, k, v, lower), atol=1e-5)


@pytest.mark.parametrize("kv_heads", [2, 1])
def test_long_causal_attention_in_quarters_equals_the_formula_and_jax(kv_heads):
    q, k, v = normal(0, B, 128, 2, K), normal(1, B, 128, kv_heads, K), normal(2, B, 128, kv_heads, K)
    lower = np.tril(np.ones((128, 128), bool))[None, None]
    mask = jax.random.bernoulli(jax.random.key(3), 0.5, (B, 2, 128, 128)) | np.eye(128, dtype=bool)[None, None]
    np.testing.assert_allclose(attention(q, k, v, causal=True), attention_numpy(q, k, v, lower), atol=1e-5)
    np.testing.assert_allclose(
        attention(q, k, v, mask=mask, causal=True), attention_numpy(q, k, v, np.asarray(mask) & lower), atol=1e-5
    )

    def gradient(f):
        return jax.jit(jax.grad(lambda *x: (f(*x) ** 2).sum(), argnums=(0, 1, 2)))(q, k, v)

    theirs = gradient(lambda *x: jax.nn.dot_product_attention(*x, is_causal=True))
    chex.assert_trees_all_close(gradient(lambda *x: attention(*x, causal=True)), theirs, rtol=1e-4, atol=1e-5)


def test_rotary_depends_on_relative_position_only_and_keeps_lengths():
    q, k = normal(0, 1, 1, 1, K), normal(1, 1, 1, 1, K)

    def dot(at_q, at_k):
        turned_q, turned_k = rotary(q, jnp.array([at_q])), rotary(k, jnp.array([at_k]))
        return (turned_q * turned_k).sum()

    np.testing.assert_allclose(dot(7, 3), dot(104, 100), rtol=1e-4)
    assert abs(dot(7, 3) - dot(7, 4)) > 1e-3
    np.testing.assert_allclose(jnp.linalg.norm(rotary(q, jnp.array([9]))), jnp.linalg.norm(q), rtol=1e-5)
    np.testing.assert_array_equal(rotary(q, jnp.array([0])), q)


def test_rotary_turns_each_pair_by_its_angle():
    x, position = normal(0, 1, 1, 1, K), 5
    pairs = np.asarray(x[0, 0, 0, : K // 2]) + 1j * np.asarray(x[0, 0, 0, K // 2 :])
    turned = pairs * np.exp(1j * position * 10_000.0 ** (-2 * np.arange(K // 2) / K))
    expected = np.concatenate([turned.real, turned.imag])
    np.testing.assert_allclose(rotary(x, jnp.array([position]))[0, 0, 0], expected, atol=1e-5)


def test_rotary_by_a_factor_is_at_nearer_positions():
    x, base = normal(0, 1, 1, 1, K), jnp.float32(50.0)
    slower = rotary(x, jnp.array([8]), base=base, scaling=(4.0,))
    np.testing.assert_allclose(slower, rotary(x, jnp.array([2]), base=50.0), atol=1e-5)
    np.testing.assert_allclose(rotary(x, jnp.array([8]), scaling=(jnp.ones(()),)), rotary(x, jnp.array([8])), atol=1e-6)


def test_an_offset_rms_norm_is_its_formula():
    x, scale_K = normal(0, B, L, K), normal(1, K)
    got = OffsetRMSNorm(epsilon=0.1).apply({"params": {"scale": scale_K}}, x)
    size = np.sqrt(np.square(x).mean(-1, keepdims=True) + 0.1)
    np.testing.assert_allclose(got, np.asarray(x / size) * (1 + np.asarray(scale_K)), rtol=1e-5)


@pytest.mark.parametrize("fields", [{}, {"rotary": True}, {"window": 2, "qk_norm": True}])
def test_attention_with_a_cache_in_pieces_is_attention_at_once(fields):
    x_BLD = normal(0, B, M, H * K)
    module = Attention(H, G, **fields)
    variables = module.init(jax.random.key(1), x_BLD)
    chex.assert_shape(variables["params"]["k"]["kernel"], (H * K, G * K))
    at_once, none = module.apply(variables, x_BLD)
    assert none is None
    cache, pieces = empty_cache(B, M + 2, G, K, "float32"), []
    for start, stop in ((0, 3), (3, 4), (4, 5)):
        piece, cache = module.apply(variables, x_BLD[:, start:stop], cache, position=start)
        pieces.append(piece)
    np.testing.assert_allclose(jnp.concatenate(pieces, 1), at_once, atol=1e-6)


def test_a_window_hides_what_is_further_back():
    x_BLD = normal(0, 1, M, H * K)
    module = Attention(H, G, window=2)
    variables = module.init(jax.random.key(1), x_BLD)
    influence_LMD = jax.jacobian(lambda x: module.apply(variables, x[None])[0][0].sum(-1))(x_BLD[0])
    seen_LM = np.abs(influence_LMD).max(-1) > 0
    np.testing.assert_array_equal(seen_LM, np.tril(np.ones((M, M), bool)) & ~np.tril(np.ones((M, M), bool), -2))


def test_encoder_attention_sees_everything_that_the_mask_allows():
    x_BLD = normal(0, B, M, H * K)
    module = Attention(H, H, causal=False)
    variables = module.init(jax.random.key(1), x_BLD)
    mask = (jnp.arange(M) < 4)[None, None, None]
    changed = x_BLD.at[:, 4].set(9.0)
    chex.assert_trees_all_equal(
        module.apply(variables, x_BLD, mask=mask)[0][:, :4], module.apply(variables, changed, mask=mask)[0][:, :4]
    )
    influence = jax.jacobian(lambda x: module.apply(variables, x[None], mask=mask)[0][0, 0].sum())(x_BLD[0])
    assert jnp.abs(influence[3]).max() > 0


@pytest.mark.parametrize("activation", ["gelu", "swiglu", jnp.square])
def test_feed_forward_is_its_formula(activation):
    x_BLD = normal(0, B, L, K)
    module = FeedForward(8, activation)
    params = module.init(jax.random.key(1), x_BLD)["params"]
    params = jax.tree.map(lambda p: p + 0.5 * normal(2, *p.shape), params)
    w = jax.tree.map(lambda p: np.asarray(p, np.float64), params)
    x = np.asarray(x_BLD, np.float64)
    up = x @ w["up"]["kernel"] + w["up"]["bias"]
    if activation == "gelu":
        h = 0.5 * up * (1 + np.tanh(np.sqrt(2 / np.pi) * (up + 0.044715 * up**3)))
    elif activation is jnp.square:
        h = up**2
    else:
        gate = x @ w["gate"]["kernel"] + w["gate"]["bias"]
        h = gate / (1 + np.exp(-gate)) * up
    expected = h @ w["down"]["kernel"] + w["down"]["bias"]
    np.testing.assert_allclose(module.apply({"params": params}, x_BLD), expected, rtol=1e-4, atol=1e-5)


def test_an_unknown_activation_is_named():
    with pytest.raises(UsageError, match="activation 'relu6' is unknown: use one of gelu, .*, geglu, or a function"):
        FeedForward(8, "relu6").init(jax.random.key(0), jnp.zeros((1, 1, 4)))
