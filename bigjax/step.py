"""The one step: a pure update of every player, and the evaluation that counts each example once."""

from collections.abc import Callable, Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax import Array

from bigjax.metrics import Metrics
from bigjax.task import Batch, Key, LossFn, ModelState, Params, Task, Tree


@flax.struct.dataclass
class TrainState:
    """All that a run carries from one update to the next; after step n, n batches are behind it.

    params, opt_state, model_state, ema: by player; ema is empty when off. skipped: updates dropped as non-finite.
    There is no PRNG key: the key of a step is fold_in(key(seed), step).
    """

    step: Array
    skipped: Array
    params: Params
    opt_state: dict[str, Tree]
    model_state: ModelState
    ema: Params


def init_state(
    key: Key, batch: Batch, *, task: Task, tx: Mapping[str, optax.GradientTransformation], ema: float
) -> TrainState:
    """The state before the first update; pure, so that it can be born sharded under jit."""
    params, model_state = task.init(key, to_float(batch))
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        skipped=jnp.zeros((), jnp.int32),
        params=params,
        opt_state={player: tx[player].init(params[player]) for player in task.losses},
        model_state=model_state,
        ema=jax.tree.map(jnp.copy, params) if ema else {},
    )


def to_float(batch: Batch) -> Batch:
    """Pixels travel as uint8; here they become float32 in [0, 1]."""
    image = batch.get("image")
    return batch if image is None or image.dtype != jnp.uint8 else {**batch, "image": image.astype(jnp.float32) / 255}


def norms(name: str, trees: Mapping[str, Tree]) -> Metrics:
    """The global L2 norm of {player: tree}, and of each player's layers (the first level of its tree)."""
    squares = {
        f"{player}/{layer}": sum(jnp.square(leaf.astype(jnp.float32)).sum() for leaf in jax.tree.leaves(sub))
        for player, tree in trees.items()
        for layer, sub in (tree.items() if isinstance(tree, Mapping) else [("all", tree)])
        if jax.tree.leaves(sub)
    }
    one = jnp.ones(())
    total = {name: (jnp.sqrt(sum(squares.values(), jnp.zeros(()))), one)}
    return total | {f"{name}/{k}": (jnp.sqrt(v), one) for k, v in squares.items()}


def gradients(
    loss: LossFn, player: str, params: Params, model_state: ModelState, batch: Batch, key: Key, *, accumulate: int
) -> tuple[Tree, Tree, Metrics, Array]:
    """(gradient of the mean loss in the player's own parameters, its model state, metrics, mean loss).

    With `accumulate` > 1 the batch is computed in as many parts; sums and counts add up to the same update. The parts
    take every M-th row: a batch split over devices stays split.
    """

    def total(own: Tree, state: Tree, part: Batch) -> tuple[Array, tuple[Array, Tree, Metrics]]:
        (value, count), (new, out) = loss({**params, player: own}, {**model_state, player: state}, part, key)
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
    return jax.tree.map(lambda g: g / count, grads), state, out, value / count


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
    skip_nonfinite: bool = False,
) -> tuple[TrainState, Metrics]:
    """One update of every player, in the order of `task.losses`. Pure; it needs no mesh.

    key: key(seed), the same for every step; the step folds in its own number. A loss, gradient or update that is not
    finite drops the whole update, and `state.skipped` counts it; unless skip_nonfinite, all later updates are dropped
    too, so that the state stays as it was before the batch number step − skipped.
    """
    key = jax.random.fold_in(key, state.step)
    batch = to_float(batch)
    if augment:
        batch = augment(batch, jax.random.fold_in(key, 0))
    params, opt_state, model_state = dict(state.params), dict(state.opt_state), dict(state.model_state)
    out, grads, updates, fine = {}, {}, {}, jnp.array(True)
    for i, (player, loss) in enumerate(task.losses.items(), 1):
        grads[player], model_state[player], mine, value = gradients(
            loss, player, params, model_state, batch, jax.random.fold_in(key, i), accumulate=accumulate
        )
        updates[player], opt_state[player] = tx[player].update(grads[player], opt_state[player], params[player])
        params[player] = optax.apply_updates(params[player], updates[player])
        out |= mine
        fine &= jnp.isfinite(value)
    out |= norms("grad_norm", grads) | norms("param_norm", params) | norms("update_norm", updates)
    fine &= jnp.isfinite(out["grad_norm"][0]) & jnp.isfinite(out["update_norm"][0])
    if not skip_nonfinite:
        fine &= state.skipped == 0
    average = state.ema and jax.tree.map(lambda a, p: ema * a + (1 - ema) * p, state.ema, params)
    new = state.replace(params=params, opt_state=opt_state, model_state=model_state, ema=average)
    new = jax.tree.map(lambda a, b: jnp.where(fine, a, b), new, state)
    out = jax.tree.map(lambda v: jnp.where(fine, v, jnp.zeros_like(v)), out)
    out["skipped"] = (1 - fine.astype(jnp.float32), jnp.ones(()))
    return new.replace(step=state.step + 1, skipped=state.skipped + 1 - fine.astype(jnp.int32)), out
