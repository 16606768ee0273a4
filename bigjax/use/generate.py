"""Sampling from autoregressive models with a key/value cache, compiled once for a model and its sizes.

B batch, L length of the prompt, V vocabulary. A model serves if it has `decode(tokens, cache, position) -> (logits,
cache)`, `empty_cache(batch, size)` and `context`, as `GPT` does.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import Array

from bigjax import UsageError


def sample(
    logits_BV: Array,
    key: Array,
    *,
    temperature: Array | float = 1.0,
    top_k: int | None = None,
    top_p: Array | float | None = None,
) -> Array:
    """One token a row, (B,) int32. temperature 0 (a number, not an array) takes the likeliest.

    top_k: among the k likeliest (Fan et al. 2018). top_p: among the fewest whose probabilities, after temperature and
    top_k, sum to at least p (Holtzman et al. 2020).
    """
    if isinstance(temperature, (int, float)) and temperature == 0:
        return logits_BV.argmax(-1).astype(jnp.int32)
    logits_BV = logits_BV / temperature
    if top_k is not None:
        least_B1 = jax.lax.top_k(logits_BV, min(top_k, logits_BV.shape[-1]))[0][:, -1:]
        logits_BV = jnp.where(logits_BV < least_B1, -jnp.inf, logits_BV)
    if top_p is not None:
        falling_BV = jnp.sort(logits_BV, axis=-1, descending=True)
        p_BV = jax.nn.softmax(falling_BV)
        needed_BV = jnp.cumsum(p_BV, axis=-1) - p_BV < top_p  # what comes before doesn't reach p
        least_B1 = jnp.where(needed_BV, falling_BV, jnp.inf).min(-1, keepdims=True)
        logits_BV = jnp.where(logits_BV < least_B1, -jnp.inf, logits_BV)
    return jax.random.categorical(key, logits_BV).astype(jnp.int32)


def generate(
    model: nn.Module,
    variables: Any,
    prompt_BL: Array,
    *,
    length: int,
    key: Array,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    stop: int | None = None,
) -> Array:
    """The prompt followed by `length` sampled tokens, (B, L + length) int32.

    Token t after the prompt is drawn by `sample` with fold_in(key, t): decoding without a cache gives the same tokens.
    A row that has drawn `stop` holds `stop` from there on. Raises `UsageError` if all that exceeds the context.
    """
    if not hasattr(model, "decode"):
        raise UsageError(f"{type(model).__name__} has no decode method: generate needs a model such as GPT")
    if prompt_BL.ndim != 2 or not prompt_BL.shape[1]:
        raise UsageError(f"prompts are rows of at least one token, not of shape {list(prompt_BL.shape)}")
    if length < 1:
        raise UsageError(f"length is {length}: ask for at least 1 token")
    if prompt_BL.shape[1] + length > model.context:
        sizes = f"prompt ({prompt_BL.shape[1]}) and length ({length})"
        raise UsageError(f"{sizes} exceed the model's context ({model.context}): shorten one")
    if temperature < 0 or (top_k is not None and top_k < 1) or (top_p is not None and not 0 < top_p <= 1):
        raise UsageError("temperature must be 0 or more, top_k at least 1 and top_p in (0, 1]")
    prompt_BL = jax.device_put(prompt_BL).astype(jnp.int32)
    # Traced unless they change the program, so that trying another temperature, p or stop token compiles nothing.
    heat = None if temperature == 0 else np.float32(temperature)
    nucleus = None if top_p is None else np.float32(top_p)
    heat, nucleus, stop = jax.device_put((heat, nucleus, np.int32(-1 if stop is None else stop)))
    return _generate(model, variables, prompt_BL, key, heat, nucleus, stop, length=length, top_k=top_k)


@functools.partial(jax.jit, static_argnames=("model", "length", "top_k"))
def _generate(
    model: nn.Module,
    variables: Any,
    prompt_BL: Array,
    key: Array,
    temperature: Array | None,
    top_p: Array | None,
    stop: Array,
    *,
    length: int,
    top_k: int | None,
) -> Array:
    B, L = prompt_BL.shape

    def draw(logits_BV: Array, t: Array | int, done_B: Array) -> tuple[Array, Array]:
        heat = 0 if temperature is None else temperature
        token_B = sample(logits_BV, jax.random.fold_in(key, t), temperature=heat, top_k=top_k, top_p=top_p)
        token_B = jnp.where(done_B, stop, token_B)
        return token_B, done_B | (token_B == stop)

    def step(carry: tuple, t: Array) -> tuple:
        token_B, done_B, cache = carry
        logits, cache = model.apply(variables, token_B[:, None], cache, L + t - 1, method="decode")
        token_B, done_B = draw(logits[:, -1], t, done_B)
        return (token_B, done_B, cache), token_B

    logits, cache = model.apply(variables, prompt_BL, model.empty_cache(B, L + length), 0, method="decode")
    first_B, done_B = draw(logits[:, -1], 0, jnp.zeros((B,), bool))
    rest = jax.lax.scan(step, (first_B, done_B, cache), jnp.arange(1, length))[1]
    return jnp.concatenate([prompt_BL, first_B[:, None], rest.T], axis=1)
