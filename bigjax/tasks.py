"""What is learned: a task names one loss a player, and how the players are judged.

B batch, C classes.  `Params` and `ModelState` are dicts keyed by player; a loss is differentiated in its own player's
subtree only and returns only its own player's part of the model state.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax import Array

from bigjax import metrics as measure
from bigjax.metrics import Metrics

Tree = Any
Key = Array
Params = dict[str, Tree]
ModelState = dict[str, Tree]
Batch = dict[str, Array]
LossFn = Callable[[Params, ModelState, Batch, Key], tuple[tuple[Array, Array], tuple[Tree, Metrics]]]


@dataclass(frozen=True)
class Task:
    """Players, their losses, their metrics.

    init: (key, batch) -> (params, model_state), both keyed by player.
    losses: player -> loss, applied in this order. A loss returns ((sum, count), (its own model state, metrics)); the step
        differentiates the sum and divides by the count of the whole batch, so masks, microbatches and devices cannot change
        what is minimised; a penalty enters as count × penalty.
    evaluate: (params, model_state, batch, key) -> metrics; rows with mask 0 count for nothing; noise is keyed by `index`.
    summarize: merged metrics -> the numbers people read.
    """

    init: Callable[[Key, Batch], tuple[Params, ModelState]]
    losses: Mapping[str, LossFn]
    evaluate: Callable[[Params, ModelState, Batch, Key], Metrics]
    summarize: Callable[[Metrics], dict[str, float]] = measure.means


def row_keys(key: Key, index_B: Array) -> Array:
    """One key an example, from its place in the data: the same whatever the microbatch or the device it falls to."""
    return jax.vmap(jax.random.fold_in, (None, 0))(key, index_B)


def dropout_by_row(index_B: Array) -> Any:
    """While it is entered, every nn.Dropout draws each example's mask from that example's own key."""

    def intercept(call: Callable, args: tuple, kwargs: dict, context: nn.module.InterceptorContext) -> Any:
        drop, x = context.module, args[0] if args else None
        if not (isinstance(drop, nn.Dropout) and context.method_name == "__call__"):
            return call(*args, **kwargs)
        off = nn.merge_param("deterministic", drop.deterministic, kwargs.get("deterministic"))
        if off or drop.rate == 0.0 or drop.broadcast_dims or x.shape[0] != index_B.shape[0]:
            return call(*args, **kwargs)
        keys_B = row_keys(drop.make_rng(drop.rng_collection), index_B)
        keep = jax.vmap(lambda key: jax.random.bernoulli(key, 1.0 - drop.rate, x.shape[1:]))(keys_B)
        return jnp.where(keep, x / (1.0 - drop.rate), jnp.zeros_like(x))

    return nn.intercept_methods(intercept)


def initialize(model: nn.Module, key: Key, *inputs: Array) -> tuple[Tree, Tree]:
    """(params, model state) of one player; what is only sown while initializing is left out."""
    variables = dict(model.init(key, *inputs))
    variables.pop("intermediates", None)
    return variables.pop("params"), variables


def forward(
    model: nn.Module, params: Tree, model_state: Tree, inputs: tuple[Array, ...], *, key: Key, index_B: Array
) -> tuple[Any, Tree]:
    """A training pass: (outputs, new model state), with dropout and other noise keyed by example."""
    with dropout_by_row(index_B):
        return model.apply(
            {"params": params, **model_state}, *inputs, train=True, rngs={"dropout": key}, mutable=list(model_state)
        )


def weight_penalty(params: Tree, *, l1: float, l2: float) -> Array | float:
    """l1 Σ|w| + l2 Σw² over kernels and embeddings (biases and scales are left alone)."""
    if not (l1 or l2):
        return 0.0
    total = jnp.zeros(())
    for w in (w for w in jax.tree.leaves(params) if w.ndim > 1):
        total += l1 * jnp.abs(w).sum() + l2 * jnp.square(w).sum()
    return total


Judge = Callable[[Any, Batch], tuple[Array, Metrics]]


def one_player(
    model: nn.Module,
    judge: Judge,
    *,
    inputs: tuple[str, ...],
    evaluate: Judge | None = None,
    summarize: Callable[[Metrics], dict[str, float]] = measure.means,
    l1: float = 0.0,
    l2: float = 0.0,
) -> Task:
    """A task with the one player "model", from a judge: (outputs, batch) -> (loss of each row (B,), other metrics)."""

    def init(key: Key, batch: Batch) -> tuple[Params, ModelState]:
        params, state = initialize(model, key, *(batch[k] for k in inputs))
        return {"model": params}, {"model": state}

    def loss(params: Params, model_state: ModelState, batch: Batch, key: Key) -> Any:
        args = tuple(batch[k] for k in inputs)
        out, state = forward(model, params["model"], model_state["model"], args, key=key, index_B=batch["index"])
        loss_B, metrics = judge(out, batch)
        total, count = (loss_B * batch["mask"]).sum(), batch["mask"].sum()
        metrics = {"loss": (total, count), **metrics}
        total = total + count * weight_penalty(params["model"], l1=l1, l2=l2)
        return (total, count), (state, metrics)

    def evaluation(params: Params, model_state: ModelState, batch: Batch, key: Key) -> Metrics:
        out = model.apply({"params": params["model"], **model_state["model"]}, *(batch[k] for k in inputs), train=False)
        loss_B, metrics = (evaluate or judge)(out, batch)
        return {"loss": ((loss_B * batch["mask"]).sum(), batch["mask"].sum()), **metrics}

    return Task(init=init, losses={"model": loss}, evaluate=evaluation, summarize=summarize)


def classify(
    model: nn.Module,
    *,
    classes: int,
    inputs: tuple[str, ...] = ("image",),
    label_smoothing: float = 0.0,
    top_k: int = 5,
    l1: float = 0.0,
    l2: float = 0.0,
) -> Task:
    """Cross-entropy of `label` (B,) under the model's logits (B, C), in nats; one logit means two classes and a sigmoid.

    label_smoothing: the share of the target spread evenly over the classes (Szegedy et al. 2016, section 7), in training only.
    l1, l2: terms l1 Σ|w| + l2 Σw² of the training loss. A batch mixed by `augment_images(mixup=…)` is trained towards both labels.
    Evaluation: loss, accuracy, top-k accuracy where there are more than k classes, confusion, calibration.
    """

    def class_logits(logits: Array) -> Array:
        if logits.shape[-1] == 1:  # sigmoid(z) is the softmax of (0, z)
            return jnp.concatenate([jnp.zeros_like(logits), logits], axis=-1)
        return logits

    def accuracy(logits_BC: Array, batch: Batch) -> Metrics:
        correct_B = (logits_BC.argmax(-1) == batch["label"]) * batch["mask"]
        return {"accuracy": (correct_B.sum(), batch["mask"].sum())}

    def judge(logits: Array, batch: Batch) -> tuple[Array, Metrics]:
        logits_BC = class_logits(logits)
        target_BC = jax.nn.one_hot(batch["label"], classes)
        if "mix" in batch:
            share_B1 = batch["mix"][:, None]
            target_BC = share_B1 * target_BC + (1 - share_B1) * jax.nn.one_hot(batch["label_mix"], classes)
        target_BC = optax.smooth_labels(target_BC, label_smoothing)
        return optax.softmax_cross_entropy(logits_BC, target_BC), accuracy(logits_BC, batch)

    def evaluate(logits: Array, batch: Batch) -> tuple[Array, Metrics]:
        logits_BC, mask_B, label_B = class_logits(logits), batch["mask"], batch["label"]
        out = accuracy(logits_BC, batch)
        if classes > top_k:
            _, best_BK = jax.lax.top_k(logits_BC, top_k)
            out[f"top{top_k}_accuracy"] = (((best_BK == label_B[:, None]).any(-1) * mask_B).sum(), mask_B.sum())
        prediction_B = logits_BC.argmax(-1)
        confidence_B = jax.nn.softmax(logits_BC).max(-1)
        out["confusion"] = measure.confusion(prediction_B, label_B, mask_B, classes=classes)
        out["calibration"] = measure.calibration(confidence_B, 1.0 * (prediction_B == label_B), mask_B)
        return optax.softmax_cross_entropy_with_integer_labels(logits_BC, label_B), out

    return one_player(
        model, judge, inputs=inputs, evaluate=evaluate, summarize=measure.summarize_classes, l1=l1, l2=l2
    )


def regress(model: nn.Module, *, inputs: tuple[str, ...] = ("x",), l1: float = 0.0, l2: float = 0.0) -> Task:
    """Mean squared error of `target` (B,) or (B, D) under the model's output of the same number of values a row."""

    def judge(out: Array, batch: Batch) -> tuple[Array, Metrics]:
        rows = batch["target"].shape[0]
        return jnp.square(out.reshape(rows, -1) - batch["target"].reshape(rows, -1)).mean(-1), {}

    return one_player(model, judge, inputs=inputs, l1=l1, l2=l2)
