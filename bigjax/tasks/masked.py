"""Tokens that were hidden, from those around them: BERT's task, and what it shares with `spans`.

B batch, L positions, V vocabulary. Sources: Devlin et al. 2019; their release of May 2019 for whole words.
"""

import dataclasses
from collections.abc import Callable, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from bigjax import UsageError
from bigjax.metrics import Metrics
from bigjax.task import Batch, Fields, Inputs, Key, ModelState, Params, Task, one_player, row_keys
from bigjax.tasks.language import token_losses
from bigjax.tasks.routing import factored

Corrupt = Callable[[Batch, Key], Batch]
MASKED, RANDOM = 0.8, 0.1  # of the tokens that are chosen; the others stay


def masked_token(
    model: nn.Module,
    *,
    mask: int,
    vocabulary: int,
    special: Sequence[int] = (),
    share: float = 0.15,
    starts: np.ndarray | None = None,
) -> Task:
    """Cross-entropy of the chosen ones of `tokens` (B, L), in nats a chosen token (Devlin et al. 2019, section 3.1).

    model: (tokens_BL, mask_BL) -> logits_BLV. Chosen and hidden are `mask_tokens`, which says what the others mean.
    """
    corrupt = mask_tokens(mask=mask, vocabulary=vocabulary, special=special, share=share, starts=starts)
    return restored(model, corrupt, inputs=fields_there("tokens", "real"))


def mask_tokens(
    *, mask: int, vocabulary: int, special: Sequence[int] = (), share: float = 0.15, starts: np.ndarray | None = None
) -> Corrupt:
    """A function (batch, key) -> batch that chooses tokens of each row and hides them.

    Chosen is this share of what is real (the batch's `length` (B,), all without it) and not `special`: as many as come
    nearest to it, at least one. Of those 80 % become `mask`, 10 % a token below `vocabulary` at random, 10 % stay.
    starts: whole words are chosen together; which tokens (V,) begin one.
    The result has `tokens` as they are to be seen, `target` as they were, `weight` (B, L), 1 where one is chosen, and
    with a `length` also `real` (B, L). Each row's draws are keyed by its `index`.
    """
    if not 0 < share < 1:
        raise UsageError(f"share {share} of the tokens cannot be chosen: give a number between 0 and 1")
    if not all(0 <= token < vocabulary for token in (mask, *special)):
        raise UsageError(f"mask {mask}, special {list(special)}: give tokens of the vocabulary, below {vocabulary}")
    if starts is not None and starts.shape != (vocabulary,):
        raise UsageError(f"starts has the shape {starts.shape}: give a truth value for each of {vocabulary} tokens")
    apart = np.zeros(vocabulary, bool)
    apart[list(special)] = True

    def one(tokens_L: Array, real_L: Array, key: Key) -> tuple[Array, Array]:
        order, act, other = jax.random.split(key, 3)
        place_L, may_L = jnp.arange(tokens_L.size), real_L & ~jnp.asarray(apart)[tokens_L]
        drawn_L = jax.random.permutation(order, tokens_L.size)
        if starts is not None:  # a word is drawn where its first token is
            drawn_L = drawn_L[jax.lax.cummax(jnp.where(jnp.asarray(starts)[tokens_L] | ~may_L, place_L, 0))]
        drawn_L = jnp.where(may_L, drawn_L, tokens_L.size)
        sorted_L = jnp.sort(drawn_L)
        before_L, upto_L = (jnp.searchsorted(sorted_L, drawn_L, side=side) for side in ("left", "right"))
        wanted = jnp.maximum(jnp.round(share * may_L.sum(dtype=jnp.float32)).astype(jnp.int32), 1)
        chosen_L = may_L & ((before_L + upto_L < 2 * wanted) | (before_L == 0))  # words whose middle is still wanted
        act_L = jax.random.uniform(act, tokens_L.shape)
        random_L = jax.random.randint(other, tokens_L.shape, 0, vocabulary, tokens_L.dtype)
        hidden_L = jnp.where(act_L < MASKED, mask, jnp.where(act_L < MASKED + RANDOM, random_L, tokens_L))
        return jnp.where(chosen_L, hidden_L, tokens_L), chosen_L

    def corrupt(batch: Batch, key: Key) -> Batch:
        tokens_BL, real_BL = batch["tokens"], real_tokens(batch)
        seen_BL, chosen_BL = jax.vmap(one)(tokens_BL, real_BL, row_keys(key, batch["index"]))
        out = {**batch, "tokens": seen_BL, "target": tokens_BL, "weight": chosen_BL.astype(jnp.float32)}
        return out | {"real": real_BL} if "length" in batch else out

    return corrupt


def real_tokens(batch: Batch) -> Array:
    """(B, L): which of the `tokens` are no padding, by `length` (B,) where there is one."""
    rows, length = batch["tokens"].shape
    return jnp.arange(length)[None] < batch.get("length", jnp.full(rows, length))[:, None]


def fields_there(*names: str) -> Inputs:
    """A model's inputs: those of these fields that the batch has."""
    return lambda batch: tuple(batch[name] for name in names if name in batch)


def restored(model: nn.Module, corrupt: Corrupt, *, inputs: Inputs) -> Task:
    """Cross-entropy of `target` where `weight` is 1, of batches that `corrupt` gives.

    In training a row is corrupted anew at every update; in evaluation always in the same way, whatever the seed.
    """

    def per_example(logits_BLV: Array, batch: Batch) -> tuple[Array, Array, dict]:
        return token_losses(logits_BLV, batch["target"], batch["weight"])

    plain = one_player(model, per_example, inputs=inputs, apply=factored)

    def init(key: Key, batch: Batch) -> tuple[Params, ModelState]:
        return plain.init(key, Fields(corrupt(batch, key)))

    def loss(params: Params, state: ModelState, batch: Batch, key: Key) -> tuple:
        return plain.losses["model"](params, state, Fields(corrupt(batch, jax.random.fold_in(key, 1))), key)

    def evaluate(params: Params, state: ModelState, batch: Batch, key: Key) -> Metrics:
        return plain.evaluate(params, state, Fields(corrupt(batch, jax.random.key(0))), key)

    return dataclasses.replace(plain, init=init, losses={"model": loss}, evaluate=evaluate)
