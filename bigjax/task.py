"""What is learned: a task names one loss a player, and how the players are judged.

B batch, C classes.  `Params` and `ModelState` are dicts keyed by player; a loss is differentiated in its own player's
subtree only and returns only its own player's part of the model state.
"""

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from bigjax import UsageError
from bigjax import metrics as measure
from bigjax.metrics import Bins, Metrics, rows_of

Tree = Any
Key = Array
Params = dict[str, Tree]
ModelState = dict[str, Tree]
Batch = dict[str, Array]
LossFn = Callable[[Params, ModelState, Batch, Key], tuple[tuple[Array, Array], tuple[Tree, Metrics]]]


@dataclass(frozen=True)
class Task:
    """Players, their losses, their metrics.

    models: player -> module; what the tables show and `bigjax.load` gives back.
    init: (key, batch) -> (params, model_state), both keyed by player.
    losses: player -> loss, applied in this order; a player without one is frozen. A loss returns ((sum, count), (its
        own model state, metrics)); the step differentiates the sum and divides by the count of the whole batch, so
        masks, microbatches and devices cannot change what is minimised; a penalty enters as count × penalty.
    evaluate: (params, model_state, batch, key) -> metrics; rows with mask 0 count for nothing; noise is keyed by
        `index`.
    summarize: merged metrics -> the numbers people read.
    details: the test split's merged metrics -> what else result.json holds, a confusion matrix say.
    check: told of a split in memory, and of every batch that comes from the host; raises UsageError for what cannot be
        learned from.
    """

    models: Mapping[str, nn.Module]
    init: Callable[[Key, Batch], tuple[Params, ModelState]]
    losses: Mapping[str, LossFn]
    evaluate: Callable[[Params, ModelState, Batch, Key], Metrics]
    summarize: Callable[[Metrics], dict[str, float]] = measure.means
    details: Callable[[Metrics], dict[str, Any]] = lambda metrics: {}
    check: Callable[[Mapping[str, Any]], None] = lambda batch: None


@jax.tree_util.register_pytree_with_keys_class
class Fields(dict):
    """A batch as losses see it: a field that it has not is one line for the user."""

    def __missing__(self, name: str) -> NoReturn:
        there = ", ".join(self.keys() - {"index", "mask"})
        raise UsageError(f"the data have no field {name!r}, which the task reads: there are {there or 'none'}")

    def tree_flatten_with_keys(self) -> tuple[Any, Any]:
        return [(jax.tree_util.DictKey(k), self[k]) for k in sorted(self)], tuple(sorted(self))

    @classmethod
    def tree_unflatten(cls, names: tuple[str, ...], values: Iterable[Any]) -> "Fields":
        return cls(zip(names, values))


def variables(params: Params, model_state: ModelState, player: str = "model") -> dict[str, Tree]:
    """What a player's module is applied to: {"params": ..., and the rest of its variables}."""
    return {"params": params[player], **model_state.get(player, {})}


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


def mode(function: Callable[..., Any], train: bool) -> dict[str, bool]:
    """{"train": train} for a module's method that takes it, {} for one that does not."""
    return {"train": train} if "train" in inspect.signature(function).parameters else {}


def initialize(model: nn.Module, key: Key, *inputs: Array) -> tuple[Tree, Tree]:
    """(params, model state) of one player; what is only sown while initializing is left out."""
    state = dict(model.init(key, *inputs, **mode(type(model).__call__, False)))
    state.pop("intermediates", None)
    return state.pop("params", {}), state


def forward(
    model: nn.Module,
    state: Mapping[str, Tree],
    inputs: tuple[Any, ...],
    *,
    key: Key,
    index_B: Array,
    train: bool,
    method: Callable[..., Any] | None = None,
) -> tuple[Any, Tree]:
    """(outputs, model state after the pass), with dropout keyed by example; state: the player's `variables`.

    With {"intermediates": {}} or {"factors": {}} among these what the model sows comes back, in evaluation too.
    """
    changes = [k for k in state if k in ("intermediates", "factors") or (train and k != "params")]
    with dropout_by_row(index_B):
        return model.apply(
            state,
            *inputs,
            **mode(method or type(model).__call__, train),
            rngs={"dropout": key} if train else {},
            mutable=changes,
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


# of each row: its loss (B,), its count (B,), and for each metric (value (B, ...) or Bins, count (B,))
PerExample = Callable[[Any, Batch], tuple[Array, Array, Mapping[str, tuple[Array | Bins, Array]]]]
Inputs = Callable[[Batch], tuple[Array, ...]]


def fields(*names: str) -> Inputs:
    """A model's inputs: these fields of the batch."""
    return lambda batch: tuple(batch[name] for name in names)


def counted(rows: tuple[Any, Any, Mapping[str, Any]], batch: Batch) -> Metrics:
    """The rows that a task's `per_example` gives, summed without the padding; the loss is among them as `loss`."""
    if not (isinstance(rows, tuple) and len(rows) == 3 and isinstance(rows[2], Mapping)):
        raise UsageError("per_example gives no (loss of each row, count of each row, metrics): return these three")
    if "loss" in rows[2]:
        raise UsageError("per_example gives a metric called 'loss', which is the loss itself: give it another name")
    mask_B, out = batch["mask"], {}
    for name, pair in {"loss": rows[:2], **rows[2]}.items():
        if not (isinstance(pair, tuple) and len(pair) == 2 and all(rows_of(v) == len(mask_B) for v in pair)):
            shapes = [getattr(v, "shape", v) for v in pair] if isinstance(pair, tuple) else type(pair).__name__
            raise UsageError(
                f"per_example's {name!r} is not (value of each row, count of each row), {len(mask_B)} rows both, but "
                f"{shapes}: leave the sum over the batch to bigjax, which knows the rows of padding"
            )
        out[name] = (measure.total(pair[0], mask_B), measure.total(pair[1], mask_B))
    return out


def one_player(
    model: nn.Module,
    per_example: PerExample,
    *,
    inputs: Inputs,
    apply: Callable[..., tuple[Any, Tree]] = forward,
    evaluate: PerExample | None = None,
    l1: float = 0.0,
    l2: float = 0.0,
    **options: Any,
) -> Task:
    """A task with the one player "model"; options: further fields of `Task`.

    per_example: (outputs, batch) -> (loss of each row (B,), its count (B,), {metric: (value of each row, count of each
        row)}). Rows of padding are left out here, once: the loss is Σ losses / Σ counts, and so is each metric.
    evaluate: the same for the evaluation, where it differs.
    apply: as `forward`, which it is unless the pass needs other noise than dropout.
    """

    def init(key: Key, batch: Batch) -> tuple[Params, ModelState]:
        params, state = initialize(model, key, *inputs(batch))
        return {"model": params}, {"model": state}

    def loss(params: Params, model_state: ModelState, batch: Batch, key: Key) -> Any:
        own = variables(params, model_state)
        out, state = apply(model, own, inputs(batch), key=key, index_B=batch["index"], train=True)
        sums = counted(per_example(out, batch), batch)
        total, count = sums["loss"]
        return (total + count.astype(total.dtype) * weight_penalty(params["model"], l1=l1, l2=l2), count), (state, sums)

    def evaluation(params: Params, model_state: ModelState, batch: Batch, key: Key) -> Metrics:
        own = variables(params, model_state)
        out, _ = apply(model, own, inputs(batch), key=key, index_B=batch["index"], train=False)
        return counted((evaluate or per_example)(out, batch), batch)

    return Task({"model": model}, init, {"model": loss}, evaluation, **options)
