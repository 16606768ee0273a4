"""Classes: cross-entropy, and what is counted of it.

B batch, C classes, K of the likeliest.
"""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from bigjax import UsageError
from bigjax.task import Batch, Inputs, Task, fields, one_player
from bigjax.tasks import confusion


def classify(
    model: nn.Module,
    *,
    classes: int,
    inputs: Inputs = fields("image"),  # noqa: B008 (a pure function)
    label_smoothing: float = 0.0,
    top_k: int = 5,
    l1: float = 0.0,
    l2: float = 0.0,
) -> Task:
    """Cross-entropy of `label` (B,) under the model's logits (B, C), in nats; one logit (B, 1) is two classes.

    label_smoothing: the share of the target spread evenly over the classes (Szegedy et al. 2016, section 7), in
        training only.
    l1, l2: terms l1 Σ|w| + l2 Σw² of the training loss. A batch mixed by `augment_images(mixup=…)` is trained towards
    both labels. Evaluation: loss, accuracy, top-k accuracy where there are more than k classes, counts by class,
    calibration. Of tokens both tell the share of padding. UsageError: logits for another number of classes, a label
    that is none of them.
    """
    if classes == 1:
        raise UsageError(
            "the data have one class only, so that there is nothing to tell apart: give data of two or more"
        )

    def class_logits(logits: Array) -> Array:
        if logits.shape[-1] == 1:  # sigmoid(z) is the softmax of (0, z)
            logits = jnp.concatenate([jnp.zeros_like(logits), logits], axis=-1)
        if (given := logits.shape[-1]) != classes:
            raise UsageError(f"the model gives {given} logits for {classes} classes: give it {classes} outputs")
        return logits

    def accuracy(logits_BC: Array, label_B: Array) -> dict[str, tuple[Array, Array]]:
        return {"accuracy": (logits_BC.argmax(-1) == label_B, jnp.ones_like(label_B))}

    def per_example(logits: Array, batch: Batch) -> tuple[Array, Array, dict]:
        logits_BC = class_logits(logits)
        target_BC = jax.nn.one_hot(batch["label"], classes)
        if "mix" in batch:
            share_B1 = batch["mix"][:, None]
            target_BC = share_B1 * target_BC + (1 - share_B1) * jax.nn.one_hot(batch["label_mix"], classes)
        target_BC = optax.smooth_labels(target_BC, label_smoothing)
        loss_B = optax.softmax_cross_entropy(logits_BC, target_BC)
        return loss_B, jnp.ones_like(loss_B), accuracy(logits_BC, batch["label"]) | padding(batch)

    def evaluate(logits: Array, batch: Batch) -> tuple[Array, Array, dict]:
        logits_BC, label_B = class_logits(logits), batch["label"]
        prediction_B, confidence_B = logits_BC.argmax(-1), jax.nn.softmax(logits_BC).max(-1)
        out = accuracy(logits_BC, label_B) | padding(batch)
        out |= confusion.class_counts(prediction_B, label_B, classes=classes)
        out |= confusion.calibration(confidence_B, prediction_B == label_B)
        if classes > top_k:
            _, best_BK = jax.lax.top_k(logits_BC, top_k)
            out[f"top{top_k}_accuracy"] = ((best_BK == label_B[:, None]).any(-1), jnp.ones_like(label_B))
        loss_B = optax.softmax_cross_entropy_with_integer_labels(logits_BC, label_B)
        return loss_B, jnp.ones_like(loss_B), out

    def check(batch: Mapping[str, Any]) -> None:
        label_B = np.asarray(batch.get("label", ()))
        if label_B.size and not (np.issubdtype(label_B.dtype, np.integer) and label_B.ndim == 1):
            raise UsageError(
                f"label is {label_B.dtype}{list(label_B.shape[1:])} an example: classes are whole numbers, 0 to "
                f"{classes - 1}, one an example"
            )
        if (wrong := label_B[(label_B < 0) | (label_B >= classes)]).size:
            raise UsageError(
                f"label {wrong[0]} is none of the {classes} classes (0 to {classes - 1}): correct the data, or give "
                "classify their true number of classes"
            )

    options = {"summarize": confusion.summarize_classes, "details": confusion.class_details, "check": check}
    return one_player(model, per_example, inputs=inputs, evaluate=evaluate, l1=l1, l2=l2, **options)


def padding(batch: Batch) -> dict[str, tuple[Array, Array]]:
    """The share of `tokens` (B, L), and of `target` (B, M), behind the `length` and `target_length` (B,) of their rows,
    as a metric; nothing of other batches."""
    sides = [(a, b) for a, b in (("tokens", "length"), ("target", "target_length")) if {a, b} <= batch.keys()]
    if not sides:
        return {}
    real_B = sum(batch[length].astype(jnp.float32) for _, length in sides)
    places_B = jnp.full(real_B.shape, sum(batch[side].shape[1] for side, _ in sides), jnp.float32)
    return {"padding_share": (places_B - real_B, places_B)}
