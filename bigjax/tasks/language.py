"""Tokens, each from those before it.

B batch, L positions, V vocabulary, N layers, E experts.
"""

import math
from functools import partial

import flax.linen as nn
import jax.numpy as jnp
import optax
from jax import Array

from bigjax import UsageError
from bigjax import metrics as measure
from bigjax.metrics import Metrics
from bigjax.ops.vocabulary import Factors, in_parts
from bigjax.task import Batch, Task, one_player
from bigjax.tasks.routing import factored, imbalance, routed


def token_losses(
    logits: Array | Factors, target_BL: Array, weight_BL: Array, *, smoothing: float = 0.0
) -> tuple[Array, Array, dict]:
    """A `PerExample`'s rows: the cross-entropy in nats of the targets with weight 1, and how many of them are right.

    logits: (B, L, V) float32, or their factors, of which they are made in parts.
    smoothing: share of each target that is spread over the whole vocabulary.
    """
    if isinstance(logits, Factors):
        return in_parts(partial(token_losses, smoothing=smoothing), logits, target_BL, weight_BL)
    loss_BL = optax.softmax_cross_entropy_with_integer_labels(logits, target_BL)
    if smoothing:
        own_BL = jnp.take_along_axis(logits, target_BL[..., None], axis=-1)[..., 0]
        loss_BL = loss_BL + smoothing * (own_BL - logits.mean(-1))
    right_BL = (logits.argmax(-1) == target_BL).astype(jnp.float32) * weight_BL
    count_B = weight_BL.sum(-1)
    return (loss_BL * weight_BL).sum(-1), count_B, {"accuracy": (right_BL.sum(-1), count_B)}


def next_token(model: nn.Module, *, bytes_a_token: float | None = None, balance: float = 0.0) -> Task:
    """Cross-entropy of each token of `tokens` (B, L + 1) given those before it, in nats a token.

    The targets t that count are start <= t < length, from the batch's `length` (B,) and `start` (B,) where it has them.
    Rows of several texts (`data.packing`) have `segments` (B, L + 1), and `weight` (B, L + 1) says which targets count.
    With bytes_a_token (1 for byte models) the evaluation gives bits_per_byte too.
    balance: of a model whose routers choose experts (`Mixtral`), how much of their `imbalance` is added to the loss
    that trains it; the evaluation's loss is without.
    """

    def per_example(out: Array | tuple[Array, Array], batch: Batch) -> tuple[Array, Array, dict]:
        logits_BLV, p_NBLE = out if type(out) is tuple else (out, None)
        target_BL = batch["tokens"][:, 1:]
        place_1L = jnp.arange(1, target_BL.shape[1] + 1)[None]
        length_B1 = batch.get("length", jnp.full(len(target_BL), target_BL.shape[1] + 1))[:, None]
        start_B1 = batch.get("start", jnp.ones(len(target_BL), jnp.int32))[:, None]
        weight_BL = ((place_1L >= start_B1) & (place_1L < length_B1)).astype(jnp.float32)
        if "weight" in batch:
            weight_BL *= batch["weight"][:, 1:].astype(jnp.float32)
        loss_B, count_B, metrics = token_losses(logits_BLV, target_BL, weight_BL)
        if p_NBLE is not None:
            uneven_B = count_B * imbalance(p_NBLE, weight_BL, chosen=model.chosen)
            loss_B, metrics["imbalance"] = loss_B + balance * uneven_B, (uneven_B, count_B)
        return loss_B, count_B, metrics

    def inputs(batch: Batch) -> tuple[Array | None, ...]:
        tokens_BL = batch["tokens"][:, :-1]
        return (tokens_BL, None, batch["segments"][:, :-1]) if "segments" in batch else (tokens_BL,)

    def summarize(metrics: Metrics) -> dict[str, float]:
        out = measure.means(metrics)
        if bytes_a_token:
            out["bits_per_byte"] = out["loss"] / math.log(2) / bytes_a_token
        return out

    if balance and not hasattr(model, "chosen"):
        raise UsageError(f"a {type(model).__name__} has no experts to keep in balance: leave balance at 0")
    how = {"inputs": inputs, "summarize": summarize}
    return one_player(model, per_example, apply=routed if balance else factored, **how)
