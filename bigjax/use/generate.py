"""What a model writes: greedy, drawn, or by beams, with a cache of keys and values.

B prompts, L tokens of a prompt, R rows that are written, N new tokens, V vocabulary, S stop tokens. A model serves if
it has `empty_cache(batch, size)`, `pick(cache, rows)` and `decode(tokens, cache, position) -> (logits, cache)`, as
`GPT` does; and `encode(tokens, mask, cache) -> cache`, as `T5`, where the prompt is read by an encoder.

Compiled are the prompt's pass, for each power of two that prompts are padded to, and the loop over all tokens.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import Array

from bigjax.use.asked import Job, asked, put
from bigjax.use.draws import penalized, sample, stops


class Generated(NamedTuple):
    """tokens_RN int32: new tokens alone; behind a row's end the first stop token, or 0. length_R: how many are real, a
    stop token counted. score_R: the sum of the model's log-probabilities of these; of beams / length ** length_penalty.
    """

    tokens_RN: Array
    length_R: Array
    score_R: Array


class State(NamedTuple):
    """Of rows that are being written. t: tokens so far; token_R: the last; seen_RV: what the penalty is on, if any."""

    t: Array
    token_R: Array
    done_R: Array
    tokens_RN: Array
    length_R: Array
    score_R: Array
    seen_RV: Array | None
    cache: Any


def generate(
    model: nn.Module,
    variables: Any,
    prompt_BL: Array,
    *,
    length: int,
    key: Array | None = None,
    length_B: Array | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float = 1.0,
    stop: int | Sequence[int] | None = None,
    beams: int = 1,
    length_penalty: float = 1.0,
    returned: int = 1,
    start: int = 0,
) -> Generated:
    """What a model writes after each prompt, up to `length` tokens or the first of the `stop` tokens.

    length_B: how many tokens of each prompt are real; padding comes after them, and changes nothing.
    key: of what is drawn: token t of row r by fold_in(fold_in(key, t), r), whatever the other rows are.
    temperature: logits are divided by it; 0 takes the likeliest token.
    top_k, top_p, min_p: as `sample` says.
    repetition_penalty: logits of tokens that a row has had, those of its prompt too, are divided by it where positive,
        else multiplied (Keskar et al. 2019). T5: of tokens that are written.
    beams: how many are kept of each prompt (Sutskever et al. 2014), until none can be better than those that ended; it
        takes no draws. length_penalty: scores are divided by the length to this power. All as in transformers.
    returned: rows of each prompt, one after the other: that many draws, or the best beams, best first.
    start: T5's first token.

    UsageError: a prompt that is empty, has tokens that the model has not, or leaves no room in its context; a model
    that writes nothing; options that don't fit.
    """
    job = asked(
        model, variables, prompt_BL, length=length, key=key, length_B=length_B, temperature=temperature, top_k=top_k,
        top_p=top_p, min_p=min_p, repetition_penalty=repetition_penalty, stop=stop, beams=beams,
        length_penalty=length_penalty, returned=returned, start=start,
    )  # fmt: skip
    if not len(job.prompt_BL):
        none = np.zeros((0, length), np.int32)
        return Generated(*jax.device_put((none, none[:, 0], none[:, 0].astype(np.float32))))
    if beams > 1:
        from bigjax.use.beams import search

        return search(job)
    state = go_on(job, begin(job), length)
    return Generated(state.tokens_RN, state.length_R, state.score_R)


def begin(job: Job) -> State:
    """Reads the prompts, and writes the first token of each row."""
    logits_BV, cache = read(job)
    return _first(
        job.model, logits_BV, cache, job.prompt_BL, job.length_B, job.key, job.options, length=job.length,
        top_k=job.top_k, returned=job.returned,
    )  # fmt: skip


def read(job: Job) -> tuple[Array, Any]:
    """(logits_BV of the first new token, the cache)."""
    where = (job.prompt_BL, job.length_B, job.options["start"])
    return _read(job.model, job.variables, *where, size=job.size)


def go_on(job: Job, state: State, until: int) -> State:
    """Writes on, up to that many tokens of each row, or until all have ended. The state given is used up."""
    until = put(np.int32(until))
    return _loop(job.model, job.variables, state, job.position, until, job.key, job.options, top_k=job.top_k)


@functools.partial(jax.jit, static_argnames=("model", "size"))
def _read(
    model: nn.Module, variables: Any, prompt_BL: Array, length_B: Array, start: Array, *, size: int
) -> tuple[Array, Any]:
    B, L = prompt_BL.shape
    real_BL, cache = jnp.arange(L)[None] < length_B[:, None], model.empty_cache(B, size)
    prompt_BL = jnp.where(real_BL, prompt_BL, 0)  # whatever the padding holds, all results are the same
    if hasattr(model, "encode"):
        cache = model.apply(variables, prompt_BL, real_BL, cache, method="encode")
        first_B1 = jnp.broadcast_to(start, (B, 1))
        logits_B1V, cache = model.apply(variables, first_B1, cache, 0, method="decode")
    else:
        logits_B1V, cache = model.apply(variables, prompt_BL, cache, 0, length_B - 1, method="decode")
    return logits_B1V[:, 0], cache


def had(model: nn.Module, prompt_BL: Array, length_B: Array, start: Array) -> Array:
    """(B, V) bool: the tokens of each prompt; where an encoder reads that, what the decoder begins with."""
    B, L = prompt_BL.shape
    none_BV = jnp.zeros((B, model.vocabulary), bool)
    if hasattr(model, "encode"):
        return none_BV.at[:, start].set(True)
    real_BL = jnp.arange(L)[None] < length_B[:, None]
    prompt_BL = jnp.where(real_BL, prompt_BL, prompt_BL[:, :1])
    return none_BV.at[jnp.arange(B)[:, None], prompt_BL].set(True)


@functools.partial(jax.jit, static_argnames=("model", "length", "top_k", "returned"))
def _first(
    model: nn.Module,
    logits_BV: Array,
    cache: Any,
    prompt_BL: Array,
    length_B: Array,
    key: Array | None,
    options: dict[str, Array],
    *,
    length: int,
    top_k: int | None,
    returned: int,
) -> State:
    R = len(prompt_BL) * returned
    seen_RV = had(model, prompt_BL, length_B, options["start"]) if "penalty" in options else None
    if returned > 1:
        rows_R = jnp.arange(R) // returned
        logits_BV, cache = logits_BV[rows_R], model.pick(cache, rows_R)
        seen_RV = None if seen_RV is None else seen_RV[rows_R]
    zero_R = jnp.zeros((R,), jnp.int32)
    tokens_RN = jnp.broadcast_to(options["pad"], (R, length))
    state = State(jnp.int32(0), zero_R, zero_R > 0, tokens_RN, zero_R, zero_R.astype(jnp.float32), seen_RV, cache)
    return _written(state, logits_BV, key, options, top_k=top_k)


@functools.partial(jax.jit, static_argnames=("model", "top_k"), donate_argnames="state")
def _loop(
    model: nn.Module,
    variables: Any,
    state: State,
    position: Array,
    until: Array,
    key: Array | None,
    options: dict[str, Array],
    *,
    top_k: int | None,
) -> State:
    def unfinished(state: State) -> Array:
        return (state.t < until) & ~state.done_R.all()

    def step(state: State) -> State:
        place = position + state.t - 1
        logits_R1V, cache = model.apply(variables, state.token_R[:, None], state.cache, place, method="decode")
        return _written(state._replace(cache=cache), logits_R1V[:, 0], key, options, top_k=top_k)

    return jax.lax.while_loop(unfinished, step, state)


def _written(
    state: State, logits_RV: Array, key: Array | None, options: dict[str, Array], *, top_k: int | None
) -> State:
    """The state with one token more."""
    shaped_RV = logits_RV
    if "penalty" in options:
        shaped_RV = penalized(logits_RV, state.seen_RV, options["penalty"])
    if "temperature" in options:
        how = {k: options[k] for k in ("temperature", "top_p", "min_p") if k in options}
        token_R = sample(shaped_RV, jax.random.fold_in(key, state.t), top_k=top_k, **how)
    else:
        token_R = shaped_RV.argmax(-1).astype(jnp.int32)
    each_R = jnp.arange(len(token_R))
    gain_R = logits_RV[each_R, token_R] - jax.nn.logsumexp(logits_RV, axis=-1)
    token_R = jnp.where(state.done_R, options["pad"], token_R)
    seen_RV = None if state.seen_RV is None else state.seen_RV.at[each_R, token_R].set(True)
    return State(
        t=state.t + 1,
        token_R=token_R,
        done_R=state.done_R | stops(token_R, options["stop_S"]),
        tokens_RN=jax.lax.dynamic_update_slice(state.tokens_RN, token_R[:, None], (0, state.t)),
        length_R=state.length_R + (~state.done_R).astype(jnp.int32),
        score_R=state.score_R + jnp.where(state.done_R, 0.0, gain_R),
        seen_RV=seen_RV,
        cache=state.cache,
    )
