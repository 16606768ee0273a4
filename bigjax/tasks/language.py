"""Tokens, each from those before it.

B batch, L positions, V vocabulary.
"""

import math

import flax.linen as nn
import jax.numpy as jnp
import optax
from jax import Array

from bigjax import metrics as measure
from bigjax.metrics import Metrics
from bigjax.task import Batch, Task, one_player


def token_losses(logits_BLV: Array, target_BL: Array, weight_BL: Array) -> tuple[Array, Array, dict]:
    """A `PerExample`'s rows: the cross-entropy in nats of the targets with weight 1, and how many of them are right."""
    loss_BL = optax.softmax_cross_entropy_with_integer_labels(logits_BLV, target_BL)
    right_BL = (logits_BLV.argmax(-1) == target_BL).astype(jnp.float32) * weight_BL
    count_B = weight_BL.sum(-1)
    return (loss_BL * weight_BL).sum(-1), count_B, {"accuracy": (right_BL.sum(-1), count_B)}


def next_token(model: nn.Module, *, bytes_a_token: float | None = None) -> Task:
    """Cross-entropy of each token of `tokens` (B, L + 1) given those before it, in nats a token.

    The targets t that count are start <= t < length, from the batch's `length` (B,) and `start` (B,) where it has them.
    With bytes_a_token (1 for byte models) the evaluation gives bits_per_byte too.
    """

    def per_example(logits_BLV: Array, batch: Batch) -> tuple[Array, Array, dict]:
        target_BL = batch["tokens"][:, 1:]
        place_1L = jnp.arange(1, target_BL.shape[1] + 1)[None]
        length_B1 = batch.get("length", jnp.full(len(target_BL), target_BL.shape[1] + 1))[:, None]
        start_B1 = batch.get("start", jnp.ones(len(target_BL), jnp.int32))[:, None]
        weight_BL = ((place_1L >= start_B1) & (place_1L < length_B1)).astype(jnp.float32)
        return token_losses(logits_BLV, target_BL, weight_BL)

    def summarize(metrics: Metrics) -> dict[str, float]:
        out = measure.means(metrics)
        if bytes_a_token:
            out["bits_per_byte"] = out["loss"] / math.log(2) / bytes_a_token
        return out

    return one_player(model, per_example, inputs=lambda batch: (batch["tokens"][:, :-1],), summarize=summarize)
