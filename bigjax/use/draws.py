"""How a token is chosen, of logits. R rows, V vocabulary, S stop tokens."""

import jax
import jax.numpy as jnp
from jax import Array


def stops(token: Array, stop_S: Array) -> Array:
    """Which tokens are among those."""
    return (token[..., None] == stop_S.reshape((1,) * token.ndim + (-1,))).any(-1)


def penalized(logits: Array, seen: Array, penalty: Array) -> Array:
    """Logits, those of tokens that were seen lowered."""
    return jnp.where(seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)


def sample(
    logits_RV: Array,
    key: Array,
    *,
    temperature: Array | float = 1.0,
    top_k: int | None = None,
    top_p: Array | float | None = None,
    min_p: Array | float | None = None,
) -> Array:
    """One token a row, (R,) int32, row r by fold_in(key, r). temperature 0 (a number, no array) takes the likeliest.

    top_k: among the k likeliest (Fan et al. 2018). top_p: among the fewest whose probabilities, after temperature and
    top_k, sum to at least p (Holtzman et al. 2020). min_p: among those at least p times as likely as the likeliest
    (Nguyen et al. 2024).
    """
    if isinstance(temperature, (int, float)) and temperature == 0:
        return logits_RV.argmax(-1).astype(jnp.int32)
    logits_RV = logits_RV / temperature
    falling_RV, V = None, logits_RV.shape[-1]
    if top_k is not None:
        falling_RV = jax.lax.top_k(logits_RV, min(top_k, V))[0]
        logits_RV = jnp.where(logits_RV < falling_RV[:, -1:], -jnp.inf, logits_RV)
    if top_p is not None:
        falling_RV = jnp.sort(logits_RV, axis=-1, descending=True) if falling_RV is None else falling_RV
        p_RV = jax.nn.softmax(falling_RV)
        needed_RV = jnp.cumsum(p_RV, axis=-1) - p_RV < top_p  # what comes before doesn't reach p
        least_R1 = jnp.where(needed_RV, falling_RV, jnp.inf).min(-1, keepdims=True)
        logits_RV = jnp.where(logits_RV < least_R1, -jnp.inf, logits_RV)
    if min_p is not None:
        logits_RV = jnp.where(logits_RV < logits_RV.max(-1, keepdims=True) + jnp.log(min_p), -jnp.inf, logits_RV)
    keys_R = jax.vmap(lambda row: jax.random.fold_in(key, row))(jnp.arange(len(logits_RV)))
    return jax.vmap(jax.random.categorical)(keys_R, logits_RV).astype(jnp.int32)
