"""What is learned: a task names one loss a player, and how the players are judged.

B batch, C classes.  `Params` and `ModelState` are dicts keyed by player; a loss is differentiated in its own player's
subtree only and returns only its own player's part of the model state.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax import Array

from bigjax import UsageError
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
    losses: player -> loss, applied in this order. A loss returns ((sum, count), (its own model state, metrics)); the
        step differentiates the sum and divides by the count of the whole batch, so masks, microbatches and devices
        cannot change what is minimised; a penalty enters as count × penalty.
    evaluate: (params, model_state, batch, key) -> metrics; rows with mask 0 count for nothing; noise is keyed by
        `index`.
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
    """While it is entered, every nn.Dropout draws each example's mask from that example's own key.

    Not where x's leading axis is not the batch's, or where the mask is shared along it (broadcast_dims).
    """

    def arguments(inputs: Array, deterministic: bool | None = None, rng: Key | None = None) -> tuple:
        return inputs, deterministic, rng  # the signature of nn.Dropout

    def intercept(call: Callable, args: tuple, kwargs: dict, context: nn.module.InterceptorContext) -> Any:
        drop = context.module
        if not (isinstance(drop, nn.Dropout) and context.method_name == "__call__"):
            return call(*args, **kwargs)
        x, off, key = arguments(*args, **kwargs)
        shared = [d % x.ndim for d in drop.broadcast_dims]
        off = nn.merge_param("deterministic", drop.deterministic, off)
        if off or drop.rate in (0.0, 1.0) or 0 in shared or x.shape[:1] != index_B.shape:
            return call(*args, **kwargs)
        keys_B = row_keys(drop.make_rng(drop.rng_collection) if key is None else key, index_B)
        shape = [1 if d in shared else n for d, n in enumerate(x.shape)][1:]
        keep = jax.vmap(lambda key: jax.random.bernoulli(key, 1.0 - drop.rate, shape))(keys_B)
        return jnp.where(keep, x / (1.0 - drop.rate), jnp.zeros_like(x))

    return nn.intercept_methods(intercept)


def initialize(model: nn.Module, key: Key, *inputs: Array) -> tuple[Tree, Tree]:
    """(params, model state) of one player; what is only sown while initializing is left out."""
    variables = dict(model.init(key, *inputs))
    variables.pop("intermediates", None)
    return variables.pop("params"), variables


def forward(
    model: nn.Module,
    params: Tree,
    model_state: Tree,
    inputs: tuple[Any, ...],
    *,
    key: Key,
    index_B: Array,
    train: bool,
    method: Callable[..., Any] | None = None,
) -> tuple[Any, Tree]:
    """(outputs, model state after the pass), with dropout keyed by example."""
    with dropout_by_row(index_B):
        return model.apply(
            {"params": params, **model_state},
            *inputs,
            train=train,
            rngs={"dropout": key} if train else {},
            mutable=list(model_state) if train else [],
            method=method,
        )


def weight_penalty(params: Tree, *, l1: float, l2: float) -> Array | float:
    """l1 Σ|w| + l2 Σw² over kernels and embeddings (biases and scales are left alone)."""
    if not (l1 or l2):
        return 0.0
    total = jnp.zeros(())
    for w in (w for w in jax.tree.leaves(params) if w.ndim > 1):
        total += l1 * jnp.abs(w).sum() + l2 * jnp.square(w).sum()
    return total


Judge = Callable[[Any, Batch], tuple[Array, Array, Metrics]]
Inputs = Callable[[Batch], tuple[Array, ...]]


def fields(*names: str) -> Inputs:
    """A model's inputs: these fields of the batch."""
    return lambda batch: tuple(batch[name] for name in names)


def one_player(
    model: nn.Module,
    judge: Judge,
    *,
    inputs: Inputs,
    apply: Callable[..., tuple[Any, Tree]] = forward,
    evaluate: Judge | None = None,
    summarize: Callable[[Metrics], dict[str, float]] = measure.means,
    l1: float = 0.0,
    l2: float = 0.0,
) -> Task:
    """A task with the one player "model".

    judge: (outputs, batch) -> (loss of each row (B,), its count (B,), other metrics): the loss is Σ losses / Σ counts.
    apply: as `forward`, which it is unless the pass needs other noise than dropout.
    """

    def init(key: Key, batch: Batch) -> tuple[Params, ModelState]:
        params, state = initialize(model, key, *inputs(batch))
        return {"model": params}, {"model": state}

    def judged(judge: Judge, out: Any, batch: Batch) -> Metrics:
        loss_B, count_B, out = judge(out, batch)
        return {"loss": ((loss_B * batch["mask"]).sum(), (count_B * batch["mask"]).sum()), **out}

    def loss(params: Params, model_state: ModelState, batch: Batch, key: Key) -> Any:
        mine, index_B = (params["model"], model_state["model"]), batch["index"]
        out, state = apply(model, *mine, inputs(batch), key=key, index_B=index_B, train=True)
        metrics = judged(judge, out, batch)
        total, count = metrics["loss"]
        return (total + count * weight_penalty(params["model"], l1=l1, l2=l2), count), (state, metrics)

    def evaluation(params: Params, model_state: ModelState, batch: Batch, key: Key) -> Metrics:
        mine, index_B = (params["model"], model_state["model"]), batch["index"]
        out, _ = apply(model, *mine, inputs(batch), key=key, index_B=index_B, train=False)
        return judged(evaluate or judge, out, batch)

    return Task(init=init, losses={"model": loss}, evaluate=evaluation, summarize=summarize)


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
    both labels. Evaluation: loss, accuracy, top-k accuracy where there are more than k classes, confusion, calibration.
    """

    def class_logits(logits: Array) -> Array:
        if logits.shape[-1] == 1:  # sigmoid(z) is the softmax of (0, z)
            logits = jnp.concatenate([jnp.zeros_like(logits), logits], axis=-1)
        if (given := logits.shape[-1]) != classes:
            raise UsageError(f"the model gives {given} logits for {classes} classes: give it {classes} outputs")
        return logits

    def accuracy(logits_BC: Array, batch: Batch) -> Metrics:
        correct_B = (logits_BC.argmax(-1) == batch["label"]) * batch["mask"]
        return {"accuracy": (correct_B.sum(), batch["mask"].sum())}

    def judge(logits: Array, batch: Batch) -> tuple[Array, Array, Metrics]:
        logits_BC = class_logits(logits)
        target_BC = jax.nn.one_hot(batch["label"], classes)
        if "mix" in batch:
            share_B1 = batch["mix"][:, None]
            target_BC = share_B1 * target_BC + (1 - share_B1) * jax.nn.one_hot(batch["label_mix"], classes)
        target_BC = optax.smooth_labels(target_BC, label_smoothing)
        loss_B = optax.softmax_cross_entropy(logits_BC, target_BC)
        return loss_B, jnp.ones_like(loss_B), accuracy(logits_BC, batch)

    def evaluate(logits: Array, batch: Batch) -> tuple[Array, Array, Metrics]:
        logits_BC, mask_B, label_B = class_logits(logits), batch["mask"], batch["label"]
        out = accuracy(logits_BC, batch)
        if classes > top_k:
            _, best_BK = jax.lax.top_k(logits_BC, top_k)
            out[f"top{top_k}_accuracy"] = (((best_BK == label_B[:, None]).any(-1) * mask_B).sum(), mask_B.sum())
        prediction_B = logits_BC.argmax(-1)
        confidence_B = jax.nn.softmax(logits_BC).max(-1)
        out["confusion"] = measure.confusion(prediction_B, label_B, mask_B, classes=classes)
        out["calibration"] = measure.calibration(confidence_B, 1.0 * (prediction_B == label_B), mask_B)
        loss_B = optax.softmax_cross_entropy_with_integer_labels(logits_BC, label_B)
        return loss_B, jnp.ones_like(loss_B), out

    return one_player(model, judge, inputs=inputs, evaluate=evaluate, summarize=measure.summarize_classes, l1=l1, l2=l2)


def regress(
    model: nn.Module,
    *,
    inputs: Inputs = fields("x"),  # noqa: B008 (a pure function)
    l1: float = 0.0,
    l2: float = 0.0,
) -> Task:
    """Mean squared error of `target` (B,) or (B, D) under the model's output of the same number of values a row."""

    def judge(out: Array, batch: Batch) -> tuple[Array, Array, Metrics]:
        target_BD = batch["target"].reshape(len(batch["target"]), -1)
        out_BD = out.reshape(len(target_BD), -1)
        if (given := out_BD.shape[1]) != (wanted := target_BD.shape[1]):  # one of them could be broadcast
            raise UsageError(f"the model gives {given} values a row, `target` has {wanted}: give it {wanted} outputs")
        loss_B = jnp.square(out_BD - target_BD).mean(-1)
        return loss_B, jnp.ones_like(loss_B), {}

    return one_player(model, judge, inputs=inputs, l1=l1, l2=l2)


def next_token(model: nn.Module, *, bytes_a_token: float | None = None) -> Task:
    """Cross-entropy of each token of `tokens` (B, L + 1) given those before it, in nats a token.

    The targets t that count are start <= t < length, from the batch's `length` (B,) and `start` (B,) where it has them.
    With bytes_a_token (1 for byte models) the evaluation gives bits_per_byte too.
    """

    def judge(logits_BLV: Array, batch: Batch) -> tuple[Array, Array, Metrics]:
        target_BL = batch["tokens"][:, 1:]
        place_1L = jnp.arange(1, target_BL.shape[1] + 1)[None]
        length_B1 = batch.get("length", jnp.full(len(target_BL), target_BL.shape[1] + 1))[:, None]
        start_B1 = batch.get("start", jnp.ones(len(target_BL), jnp.int32))[:, None]
        weight_BL = 1.0 * ((place_1L >= start_B1) & (place_1L < length_B1))
        loss_BL = optax.softmax_cross_entropy_with_integer_labels(logits_BLV, target_BL)
        right_BL = (logits_BLV.argmax(-1) == target_BL) * weight_BL * batch["mask"][:, None]
        count_B = weight_BL.sum(-1)
        accuracy = (right_BL.sum(), (count_B * batch["mask"]).sum())
        return (loss_BL * weight_BL).sum(-1), count_B, {"accuracy": accuracy}

    def summarize(metrics: Metrics) -> dict[str, float]:
        out = measure.means(metrics)
        if bytes_a_token:
            out["bits_per_byte"] = out["loss"] / math.log(2) / bytes_a_token
        return out

    return one_player(model, judge, inputs=lambda batch: (batch["tokens"][:, :-1],), summarize=summarize)
