"""The one step: a pure update of every player."""

from collections.abc import Callable, Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax import Array

from bigjax import UsageError
from bigjax.metrics import Metrics
from bigjax.task import Batch, Fields, Key, LossFn, ModelState, Params, Task, Tree


@flax.struct.dataclass
class TrainState:
    """All that a run carries from one update to the next; after step n, n batches are behind it.

    params, opt_state, model_state, ema: by player; ema, empty when off, holds each player's averaged `params` and
    `batch_stats`. skipped: updates dropped as non-finite. There is no PRNG key: that of a step is
    fold_in(key(seed), step).
    """

    step: Array
    skipped: Array
    params: Params
    opt_state: dict[str, Tree]
    model_state: ModelState
    ema: dict[str, Tree]

    def evaluated(self) -> tuple[Params, ModelState]:
        """The parameters and model state that evaluation uses: the averages where they are kept."""
        if not self.ema:
            return self.params, self.model_state
        rest = {
            k: {**v, **{c: x for c, x in self.ema[k].items() if c != "params"}} for k, v in self.model_state.items()
        }
        return {k: v["params"] for k, v in self.ema.items()}, rest


def init_state(
    key: Key, batch: Batch, *, task: Task, tx: Mapping[str, optax.GradientTransformation], ema: float
) -> TrainState:
    """The state before the first update; pure, so that it can be born sharded under jit."""
    params, model_state = task.init(key, Fields(to_float(batch)))
    for player in task.losses:
        if player not in params:
            there = ", ".join(map(repr, params)) or "none"
            raise UsageError(f"there is a loss for {player!r}, but task.init gives it no parameters: it has {there}")
    model_state = dict.fromkeys(task.losses, {}) | dict(model_state)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        skipped=jnp.zeros((), jnp.int32),
        params=params,
        opt_state={player: tx[player].init(params[player]) for player in task.losses},
        model_state=model_state,
        ema=jax.tree.map(jnp.copy, averages_of(params, model_state)) if ema else {},
    )


def averages_of(params: Params, model_state: ModelState) -> dict[str, Tree]:
    """What is averaged, by player: parameters, and with them the statistics of BatchNorm that belong to them."""
    return {
        player: {"params": own, **{k: v for k, v in model_state.get(player, {}).items() if k == "batch_stats"}}
        for player, own in params.items()
    }


def to_float(batch: Batch) -> Batch:
    """Pixels travel as uint8; here they become float32 in [0, 1]."""
    image = batch.get("image")
    return batch if image is None or image.dtype != jnp.uint8 else {**batch, "image": image.astype(jnp.float32) / 255}


def squares(trees: Mapping[str, Tree]) -> dict[str, Array]:
    """The squared L2 norm of each player's layers, the first level of its tree."""
    return {
        f"{player}/{layer}": sum(jnp.square(leaf.astype(jnp.float32)).sum() for leaf in jax.tree.leaves(sub))
        for player, tree in trees.items()
        for layer, sub in (tree.items() if isinstance(tree, Mapping) else [("all", tree)])
        if jax.tree.leaves(sub)
    }


def norms(trees: Mapping[str, Mapping[str, Tree]], by_layer: Array | bool) -> Metrics:
    """Of {name: {player: tree}} the L2 norms, each layer's and of all; where not by_layer they are not computed."""

    def measured() -> dict[str, Array]:
        out = {}
        for name, tree in trees.items():
            parts = squares(tree)
            out |= {f"{name}/{k}": jnp.sqrt(v) for k, v in parts.items()}
            out[name] = jnp.sqrt(sum(parts.values(), jnp.zeros(())))
        return out

    def left_out() -> dict[str, Array]:
        return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(measured))

    count = jnp.asarray(by_layer, jnp.float32)
    return {k: (v, count) for k, v in jax.lax.cond(by_layer, measured, left_out).items()}


def is_pair(value: Any) -> bool:
    """Whether a value is (sum, count)."""
    return isinstance(value, tuple) and len(value) == 2 and all(hasattr(v, "dtype") for v in value)


def checked(player: str, given: Any) -> Any:
    """What a loss gave, if it has the form that `Task` asks for."""
    form = f"the loss of {player!r} must give ((sum, count), (its own model state, metrics))"
    if not (isinstance(given, tuple) and len(given) == 2):
        raise UsageError(f"{form}, not a {type(given).__name__}: see bigjax.task.Task")
    pair, rest = given
    if not is_pair(pair) or any(v.ndim for v in pair):
        said = getattr(pair, "shape", type(pair).__name__)
        raise UsageError(f"{form}: its first part is no (sum, count) of two numbers, but {said}")
    if not (isinstance(rest, tuple) and len(rest) == 2 and isinstance(rest[1], Mapping)):
        raise UsageError(f"{form}: its second part is no pair of a model state and a dict of metrics")
    check_metrics(f"the loss of {player!r}", rest[1])
    return given


RESERVED = set("step split skipped grad_norm param_norm update_norm examples_per_second mfu learning_rate".split())


def check_metrics(who: str, metrics: Mapping[str, Any]) -> None:
    """Raises UsageError for a metric that is no (sum, count), or has the name of another number of the log."""
    for name, value in metrics.items():
        if name.partition("/")[0] in RESERVED:
            raise UsageError(f"{who} gives a metric called {name!r}, as the log's own: give it another name")
        if not is_pair(value):
            raise UsageError(f"{who} gives the metric {name!r} as something else than arrays (sum, count): give both")


def gradients(
    loss: LossFn, player: str, params: Params, model_state: ModelState, batch: Batch, key: Key, *, accumulate: int
) -> tuple[Tree, Tree, Metrics, Array]:
    """(gradient of the mean loss in the player's own parameters, its model state, metrics, mean loss).

    With `accumulate` > 1 the batch is computed in as many parts; sums and counts add up to the same update. The parts
    take every M-th row: a batch split over devices stays split.
    """

    def total(own: Tree, state: Tree, part: Batch) -> tuple[Array, tuple[Array, Tree, Metrics]]:
        given = loss({**params, player: own}, {**model_state, player: state}, Fields(part), key)
        (value, count), (new, out) = checked(player, given)
        return value, (count, new, out)

    differentiate = jax.value_and_grad(total, has_aux=True)
    if accumulate == 1:
        (value, (count, state, out)), grads = differentiate(params[player], model_state[player], batch)
    else:

        def body(carry: tuple[Tree, Any], part: Batch) -> tuple[tuple[Tree, Any], None]:
            state, sums = carry
            (value, (count, state, out)), grads = differentiate(params[player], state, part)
            return (state, jax.tree.map(jnp.add, sums, (value, count, out, grads))), None

        parts = jax.tree.map(lambda x: x.reshape(-1, accumulate, *x.shape[1:]).swapaxes(0, 1), batch)
        shapes = jax.eval_shape(differentiate, params[player], model_state[player], jax.tree.map(lambda x: x[0], parts))
        (value, (count, _, out)), grads = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
        (state, sums), _ = jax.lax.scan(body, (model_state[player], (value, count, out, grads)), parts)
        value, count, out, grads = sums
    return jax.tree.map(lambda g: g / count.astype(value.dtype), grads), state, out, value / count.astype(value.dtype)


def train_step(
    state: TrainState,
    batch: Batch,
    key: Key,
    *,
    task: Task,
    tx: Mapping[str, optax.GradientTransformation],
    augment: Callable[[Batch, Key], Batch] | None = None,
    accumulate: int = 1,
    ema: float = 0.0,
    dropped: Array | int = 0,
    by_layer: Array | bool = True,
) -> tuple[TrainState, Metrics]:
    """One update of every player, in the order of `task.losses`. Pure; it needs no mesh.

    key: key(seed), the same for every step; the step folds in its own number. A loss, gradient or update that is not
    finite drops the whole update, and `state.skipped` counts it. Where more than `dropped` were, all later updates are
    dropped too, so that the state stays as it was before the batch number step − (skipped − dropped).
    ema: decay of the averages, which begin as running means: min(ema, n / (n + 1)) after n updates.
    by_layer: whether the norms of each layer are among the metrics of this update.
    """
    key = jax.random.fold_in(key, state.step)
    batch = to_float(batch)
    if augment:
        batch = augment(Fields(batch), jax.random.fold_in(key, 0))
    params, opt_state, model_state = dict(state.params), dict(state.opt_state), dict(state.model_state)
    out, grads, updates, fine = {}, {}, {}, state.skipped <= dropped
    for i, (player, loss) in enumerate(task.losses.items(), 1):
        grads[player], model_state[player], mine, value = gradients(
            loss, player, params, model_state, batch, jax.random.fold_in(key, i), accumulate=accumulate
        )
        rule, own = optax.with_extra_args_support(tx[player]), params[player]
        with jax.numpy_dtype_promotion("standard"):  # optax raises its decays to counts
            updates[player], opt_state[player] = rule.update(grads[player], opt_state[player], own, value=value)
        params[player] = optax.apply_updates(own, updates[player])
        if twice := out.keys() & mine.keys():
            raise UsageError(f"two players give a metric called {min(twice)!r}: name each after its player")
        out |= mine
        fine &= jnp.isfinite(value)
    one = jnp.ones(())
    out = norms({"grad_norm": grads, "param_norm": params, "update_norm": updates}, by_layer) | out
    for name, tree in (("grad_norm", grads), ("update_norm", updates)):
        out[name] = (optax.tree.norm(tree), one)
        fine &= jnp.isfinite(out[name][0])
    new_ema = state.ema
    if state.ema:
        seen = (state.step - state.skipped).astype(jnp.float32)
        decay = jnp.minimum(ema, seen / (seen + 1))
        now = averages_of(params, model_state)
        new_ema = jax.tree.map(lambda a, p: (decay * a + (1 - decay) * p).astype(a.dtype), state.ema, now)
    new = state.replace(params=params, opt_state=opt_state, model_state=model_state, ema=new_ema)
    new = jax.tree.map(lambda a, b: jnp.where(fine, a, b), new, state)
    out = jax.tree.map(lambda v: jnp.where(fine, v, jnp.zeros_like(v)), out)
    out["skipped"] = (1 - fine.astype(jnp.float32), one)
    return new.replace(step=state.step + 1, skipped=state.skipped + 1 - fine.astype(jnp.int32)), out
