"""A sequence from another: translation, summaries (Sutskever et al. 2014).

B batch, L positions of what is read, M of what is written, V vocabulary.
"""

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jax import Array

from bigjax import UsageError
from bigjax.task import Batch, Task, one_player
from bigjax.tasks.classification import padding
from bigjax.tasks.language import token_losses
from bigjax.tasks.masked import real_tokens
from bigjax.tasks.routing import factored


def sequence_to_sequence(model: nn.Module, *, start: int = 0, label_smoothing: float = 0.0) -> Task:
    """Cross-entropy of each token of `target` (B, M) given `tokens` (B, L) and the target before it, in nats a token.

    Of both only as many count as `length` (B,) and `target_length` (B,) say, where the batch has them; the last of a
    target should be the token that ends texts.
    model: (tokens_BL, decoder_tokens_BM, mask_BL) -> logits_BMV, as `T5`. start: what its decoder is given before the
    first token of the target. label_smoothing: share of each target that is spread over the vocabulary in training
    (Szegedy et al. 2016); the evaluation's loss is without.
    """
    size = getattr(model, "vocabulary", math.inf)
    if start >= size:
        raise UsageError(f"start {start} is not in the model's vocabulary of {size}: give a token below it")

    def inputs(batch: Batch) -> tuple[Array, Array, Array]:
        return batch["tokens"], shifted(batch["target"], start), real_tokens(batch)

    def per_example(logits_BMV: Array, batch: Batch, *, smoothing: float) -> tuple[Array, Array, dict]:
        said = {"length": batch["target_length"]} if "target_length" in batch else {}
        weight_BM = real_tokens({"tokens": batch["target"]} | said).astype(jnp.float32)
        loss_B, count_B, metrics = token_losses(logits_BMV, batch["target"], weight_BM, smoothing=smoothing)
        return loss_B, count_B, metrics | padding(batch)

    def check(batch: Mapping[str, Any]) -> None:
        for field in ("tokens", "target"):
            if field in batch and (largest := int(np.max(batch[field], initial=0))) >= size:
                raise UsageError(
                    f"{field} has the token {largest}, and the model's vocabulary is {size}: give the tokenizer that "
                    "the model was made for"
                )

    plain = partial(per_example, smoothing=0.0)
    smooth = partial(per_example, smoothing=label_smoothing)
    return one_player(model, smooth, inputs=inputs, apply=factored, evaluate=plain, check=check)


def shifted(target_BM: Array, start: int = 0) -> Array:
    """What a decoder is given to write the target: the target one later, behind `start`."""
    return jnp.pad(target_BM, ((0, 0), (1, 0)), constant_values=start)[:, :-1]
