"""Beam search, as transformers 5 does it with early_stopping=False: token for token the same.

B prompts, K beams, T candidates, N new tokens, V vocabulary.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from bigjax.use.asked import Job
from bigjax.use.draws import penalized, stops
from bigjax.use.generate import Generated, had, read

NEVER = -1e9  # the score of what is out of question


class Beams(NamedTuple):
    """t: tokens so far. Beams go on, with a score that is a sum; the best that ended are kept, with their own.

    open_B1: whether one that goes on may still be better than one that ended. more: whether any may.
    """

    t: Array
    tokens_BKN: Array
    score_BK: Array
    ended_BKN: Array
    ended_score_BK: Array
    ended_length_BK: Array
    is_ended_BK: Array
    open_B1: Array
    more: Array
    seen_BKV: Array | None
    cache: Any


def search(job: Job) -> Generated:
    """The best rows of each prompt, best first."""
    logits_BV, cache = read(job)
    return _search(
        job.model, job.variables, logits_BV, cache, job.prompt_BL, job.length_B, job.position, job.options,
        length=job.length, beams=job.beams, returned=job.returned,
    )  # fmt: skip


@functools.partial(jax.jit, static_argnames=("model", "length", "beams", "returned"))
def _search(
    model: nn.Module,
    variables: Any,
    logits_BV: Array,
    cache: Any,
    prompt_BL: Array,
    length_B: Array,
    position: Array,
    options: dict[str, Array],
    *,
    length: int,
    beams: int,
    returned: int,
) -> Generated:
    (B, V), K = logits_BV.shape, beams
    rows_R = jnp.arange(B * K) // K
    position = position if position.ndim == 0 else position[:: len(position) // B][rows_R]
    seen_BKV = None
    if "penalty" in options:
        seen_BKV = jnp.repeat(had(model, prompt_BL, length_B, options["start"])[:, None], K, axis=1)
    tokens_BKN = jnp.broadcast_to(options["pad"], (B, K, length))
    zero_BK = jnp.zeros((B, K))
    state = Beams(
        t=jnp.int32(0),
        tokens_BKN=tokens_BKN,
        score_BK=zero_BK.at[:, 1:].set(NEVER),  # at first all are the same: one is enough
        ended_BKN=tokens_BKN,
        ended_score_BK=zero_BK + NEVER,
        ended_length_BK=zero_BK.astype(jnp.int32),
        is_ended_BK=zero_BK > 0,
        open_B1=jnp.ones((B, 1), bool),
        more=jnp.bool_(True),
        seen_BKV=seen_BKV,
        cache=model.pick(cache, rows_R),
    )

    def step(state: Beams) -> Beams:
        last_R1 = jax.lax.dynamic_slice_in_dim(state.tokens_BKN, state.t - 1, 1, axis=2).reshape(B * K, 1)
        place = position + state.t - 1
        logits_R1V, cache = model.apply(variables, last_R1, state.cache, place, method="decode")
        return advance(model, state._replace(cache=cache), logits_R1V.reshape(B, K, V), options)

    state = advance(model, state, jnp.repeat(logits_BV[:, None], K, axis=1), options)
    state = jax.lax.while_loop(lambda state: state.more, step, state)
    best = (state.ended_BKN, state.ended_length_BK, state.ended_score_BK)
    return Generated(*(x[:, :returned].reshape(B * returned, *x.shape[2:]) for x in best))


def advance(model: nn.Module, state: Beams, logits_BKV: Array, options: dict[str, Array]) -> Beams:
    """The beams with one token more."""
    (B, K, V), t, N = logits_BKV.shape, state.t, state.tokens_BKN.shape[2]
    gain_BKV = jax.nn.log_softmax(logits_BKV)
    if "penalty" in options:
        gain_BKV = penalized(gain_BKV, state.seen_BKV, options["penalty"])
    total_BKV = gain_BKV + state.score_BK[..., None]
    T = min(max(2, 1 + len(options["stop_S"])) * K, K * V)  # so many that K of them go on
    score_BT, flat_BT = jax.lax.top_k(total_BKV.reshape(B, K * V), T)
    beam_BT, token_BT = flat_BT // V, flat_BT % V
    tokens_BTN = picked(state.tokens_BKN, beam_BT)
    tokens_BTN = jax.lax.dynamic_update_slice(tokens_BTN, token_BT[..., None], (0, 0, t))
    end_BT = stops(token_BT, options["stop_S"]) | (t + 1 == N)

    going_BT = score_BT + jnp.where(end_BT, NEVER, 0.0)
    score_BK, on_BK = jax.lax.top_k(going_BT, K)
    beam_BK = picked(beam_BT, on_BK)

    power = (t + 1).astype(jnp.float32) ** options["length_penalty"]
    new_BT = end_BT & (jnp.arange(T) < K)[None]
    own_BT = score_BT / power + jnp.where(state.open_B1, 0.0, NEVER) + jnp.where(new_BT, 0.0, NEVER)
    lengths_BT = jnp.broadcast_to(t + 1, (B, T))
    ended_score_BK, best_BK = jax.lax.top_k(jnp.concatenate([state.ended_score_BK, own_BT], axis=1), K)
    merged = (
        (state.ended_BKN, tokens_BTN), (state.ended_length_BK, lengths_BT), (state.is_ended_BK, new_BT),
    )  # fmt: skip
    ended_BKN, ended_length_BK, is_ended_BK = (picked(jnp.concatenate(two, axis=1), best_BK) for two in merged)

    worst_BK = jnp.where(is_ended_BK, ended_score_BK.min(1, keepdims=True), NEVER)
    open_B1 = state.open_B1 & (score_BK[:, :1] / power > worst_BK).any(1, keepdims=True)
    seen_BKV = state.seen_BKV
    if seen_BKV is not None:
        each = (jnp.arange(B)[:, None], jnp.arange(K)[None], picked(token_BT, on_BK))
        seen_BKV = picked(seen_BKV, beam_BK).at[each].set(True)
    return Beams(
        t=t + 1,
        tokens_BKN=picked(tokens_BTN, on_BK),
        score_BK=score_BK,
        ended_BKN=ended_BKN,
        ended_score_BK=ended_score_BK,
        ended_length_BK=ended_length_BK,
        is_ended_BK=is_ended_BK,
        open_B1=open_B1,
        more=open_B1.any() & ~end_BT.all(),
        seen_BKV=seen_BKV,
        cache=model.pick(state.cache, (jnp.arange(B)[:, None] * K + beam_BK).reshape(-1)),
    )


def picked(x: Array, index: Array) -> Array:
    """Along the second axis, of each row its own."""
    return jnp.take_along_axis(x, index.reshape(index.shape + (1,) * (x.ndim - 2)), axis=1)
