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
