"""Attention: plain, and as a kernel for TPU that stores nothing of size L × L.

B batch, L positions that ask, M positions that are looked at, H query heads, G key/value heads, K head size.
"""

import jax
import jax.numpy as jnp
from jax import Array

from bigjax.sharding import locally


def attention(
    q_BLHK: Array,
    k_BMGK: Array,
    v_BMGK: Array,
    *,
    mask: Array | None = None,
    causal: bool = False,
    bias: Array | None = None,
) -> Array:
    """softmax(Q Kᵀ / √K) V for each head (Vaswani et al. 2017, section 3.2) -> (B, L, H, K).

    Grouped queries (Ainslie et al. 2023): with G < H each key/value head serves H / G query heads, in order. `mask`,
    (B or 1, H or 1, L, M), is True where a position may be looked at; `causal` masks what comes later; `bias`,
    (B or 1, H, L, M), is added to the scores. The softmax is in float32. Causal attention over many positions goes in
    quarters of the queries, each against only the keys up to its end: 5/8 of the work. Values equal those of
    `jax.nn.dot_product_attention`, which is slower on CPU.
    """
    B, L, H, K = q_BLHK.shape
    M, G = k_BMGK.shape[1:3]
    q_BGRLK = jnp.swapaxes(q_BLHK * K**-0.5, 1, 2).reshape(B, G, H // G, L, K)  # R query heads a key/value head
    k_BGMK, v_BGMK = jnp.swapaxes(k_BMGK, 1, 2), jnp.swapaxes(v_BMGK, 1, 2)
    if mask is not None:  # (B, H, L, M) -> (B, G, R, L, M), where 1 stays 1
        mask = mask[:, :, None] if mask.shape[1] == 1 else mask.reshape(mask.shape[0], G, H // G, L, M)
    if bias is not None:
        bias = bias.reshape(bias.shape[0], G, H // G, L, M)
    if causal:
        seen = (jnp.arange(M)[None] <= jnp.arange(L)[:, None])[None, None, None]
        mask = seen if mask is None else mask & seen
    if not causal or L != M or L % 4 or L < 128:
        y_BGRLK = _attend(q_BGRLK, k_BGMK, v_BGMK, mask, bias)
    else:
        ends = [(end - L // 4, end) for end in range(L // 4, L + 1, L // 4)]
        parts = []
        for a, b in ends:
            rest = (mask[..., a:b, :b], None if bias is None else bias[..., a:b, :b])
            parts.append(_attend(q_BGRLK[..., a:b, :], k_BGMK[:, :, :b], v_BGMK[:, :, :b], *rest))
        y_BGRLK = jnp.concatenate(parts, axis=3)
    return jnp.swapaxes(y_BGRLK.reshape(B, H, L, K), 1, 2)


def cached_attention(
    q_BLHK: Array, k_BGMK: Array, v_BGMK: Array, *, mask: Array | None = None, bias: Array | None = None
) -> Array:
    """As `attention`, of keys and values as a cache has them, each head's in one piece: a step moves none of them.

    mask: (B or 1, 1, L, M); bias: (B or 1, H, L, M).
    """
    B, L, H, K = q_BLHK.shape
    G, M = k_BGMK.shape[1:3]
    q_BGQK = jnp.swapaxes(q_BLHK * K**-0.5, 1, 2).reshape(B, G, H // G * L, K)
    # keys are the left factor: as the right one XLA would turn them around, a copy of the cache in every step on CPU
    score_BGMQ = jnp.matmul(k_BGMK, jnp.swapaxes(q_BGQK, 2, 3), preferred_element_type=jnp.float32)
    score_BGRLM = jnp.swapaxes(score_BGMQ, 2, 3).reshape(B, G, H // G, L, M)
    if bias is not None:
        score_BGRLM = score_BGRLM + bias.reshape(bias.shape[0], G, H // G, L, M).astype(jnp.float32)
    if mask is not None:
        score_BGRLM = jnp.where(mask[:, :, None], score_BGRLM, jnp.finfo(jnp.float32).min)
    weight_BGQM = jax.nn.softmax(score_BGRLM, axis=-1).astype(v_BGMK.dtype).reshape(B, G, H // G * L, M)
    return jnp.swapaxes((weight_BGQM @ v_BGMK).reshape(B, H, L, K), 1, 2)


def together(position_BL: Array, mask: Array | None = None) -> Array:
    """(B, 1, L, L): of positions that begin again at 0 with each text of a row, those of the same text; and `mask`."""
    begin_BL = jnp.arange(position_BL.shape[1])[None] - position_BL
    same = (begin_BL[:, :, None] == begin_BL[:, None])[:, None]
    return same if mask is None else mask & same


def _attend(q_BGRLK: Array, k_BGMK: Array, v_BGMK: Array, mask: Array | None, bias: Array | None) -> Array:
    B, G, R, L, K = q_BGRLK.shape
    M = k_BGMK.shape[2]
    q_BGQK = q_BGRLK.reshape(B, G, R * L, K)  # one matrix product serves all R
    score = jnp.matmul(q_BGQK, jnp.swapaxes(k_BGMK, 2, 3), preferred_element_type=jnp.float32)
    score_BGRLM = score.reshape(B, G, R, L, M)
    if bias is not None:
        score_BGRLM = score_BGRLM + bias.astype(jnp.float32)
    if mask is not None:
        score_BGRLM = jnp.where(mask, score_BGRLM, jnp.finfo(jnp.float32).min)
    weight_BGRLM = jax.nn.softmax(score_BGRLM, axis=-1).astype(v_BGMK.dtype)
    return (weight_BGRLM.reshape(B, G, R * L, M) @ v_BGMK).reshape(q_BGRLK.shape)


def splash_attention(
    q_BLHK: Array, k_BMGK: Array, v_BMGK: Array, *, causal: bool = True, interpret: bool = False
) -> Array:
    """`attention` on TPU as a Pallas kernel that works block by block, so that nothing of size L × L is stored.

    FlashAttention (Dao et al. 2022) as in JAX's splash attention. L must be a multiple of 128. `interpret` runs the
    kernel on any device, slowly. Over a mesh each device works on its own rows and heads.
    """
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    L, K = q_BLHK.shape[1], q_BLHK.shape[3]
    block = next(n for n in (512, 256, 128) if L % n == 0)
    places = ("q", "kv", "q_dkv", "kv_dkv", "kv_dkv_compute", "q_dq", "kv_dq")
    sizes = kernels.BlockSizes(**{f"block_{place}": block for place in places})

    def local(q_BLHK: Array, k_BMGK: Array, v_BMGK: Array) -> Array:
        mask = masks.MultiHeadMask([(masks.CausalMask if causal else masks.FullMask)((L, L))] * q_BLHK.shape[2])
        attend = kernels.make_splash_mha(mask, block_sizes=sizes, head_shards=1, q_seq_shards=1, interpret=interpret)
        q_BHLK, k_BGMK, v_BGMK = (jnp.swapaxes(x, 1, 2) for x in (q_BLHK * K**-0.5, k_BMGK, v_BMGK))
        return jnp.swapaxes(jax.vmap(attend)(q_BHLK, k_BGMK, v_BGMK), 1, 2)

    split = ("rows", None, "heads", None)
    return locally(local, (split,) * 3, split)(q_BLHK, k_BMGK, v_BMGK)
