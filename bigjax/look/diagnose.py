"""Looking inside a model as it runs: its layers and their shapes, and where a number stopped being finite."""

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from bigjax.step import TrainState, to_float
from bigjax.task import Batch, Key


def watch_modules(see: Callable[[str, Any], None]) -> Any:
    """While it is entered, calls see("conv_0", output) after every module's __call__, in the order of computation."""

    def intercept(call: Callable, args: tuple, kwargs: dict, context: nn.module.InterceptorContext) -> Any:
        out = call(*args, **kwargs)
        if context.method_name == "__call__":
            see("/".join(context.module.path), out)
        return out

    return nn.intercept_methods(intercept)


def layer_rows(init: Callable[[], Any], params: Mapping[str, Any]) -> list[tuple[str, str, int]]:
    """(layer, output shape of one example, parameters) of each module that owns parameters; and the form of attention.

    `init` is traced, not run.
    """
    from bigjax.ops.kernels import telling

    shapes: dict[str, str] = {}

    def see(path: str, out: Any) -> None:
        leaves = jax.tree.leaves(out)
        if path and leaves:
            shapes.setdefault(path, " × ".join(map(str, leaves[0].shape[1:])) or "1")

    with watch_modules(see), telling() as forms:
        jax.eval_shape(init)
    counts: dict[str, int] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        owner = jax.tree_util.keystr(path[:-1], simple=True, separator="/")
        counts[owner] = counts.get(owner, 0) + leaf.size
    rows = []
    for owner, count in counts.items():  # several players: their module paths carry no player's name
        inner = owner.partition("/")[2]
        rows.append((owner if len(params) > 1 else inner or owner, shapes.get(inner, ""), count))
    return rows + [("attention", ", ".join(sorted(forms)), 0)] * bool(forms)


def first_nonfinite(task: Any, augment: Any, state: TrainState, batch: Batch, key: Key) -> str:
    """Runs the losses once more, layer by layer, and names the first thing in them that is not finite.

    State and batch are computed with where they lie, under the mesh that is set; every process must call it.
    """

    def bad(tree: Any) -> bool:
        arrays = [x for x in jax.tree.leaves(tree) if not isinstance(x, jax.core.Tracer) and hasattr(x, "dtype")]
        return any(jnp.issubdtype(x.dtype, jnp.inexact) and not bool(jnp.isfinite(x).all()) for x in arrays)

    batch = to_float(jax.tree.map(jnp.asarray, batch))
    for name, value in batch.items():
        if bad(value):
            return f"the data's {name!r} is not"
    if augment:
        batch = augment(batch, jax.random.fold_in(key, 0))
        if bad(batch):
            return "the augmented batch is not"
    for i, (player, loss) in enumerate(task.losses.items(), 1):
        if bad(state.params[player]):
            return f"the parameters of {player!r} are not"
        found: list[str] = []

        def see(path: str, out: Any, found: list[str] = found) -> None:
            if bad(out):
                found.append(path)

        with watch_modules(see):
            (total, _), _ = loss(state.params, state.model_state, batch, jax.random.fold_in(key, i))
        if found:
            module = f"module {found[0]!r}" if found[0] else "the outermost module"
            return f"the output of {module} of {player!r} is the first that is not"
        if bad(total):
            return f"the loss of {player!r} is not, though every module's output is"
    return "a gradient or an update is not, though the losses are"


def blame(program: Any, state: TrainState, *, dropped: int) -> str:
    """Which update was the first that is not finite, and what in it: the state has stood still since.

    Its batch is given back by its number. dropped: updates that had been dropped before, and were accepted.
    """
    bad = int(state.step) - (int(state.skipped) - dropped)
    with contextlib.closing(program.batches(bad)) as batches:
        batch = next(batches)
    task, augment = program.experiment.task, program.experiment.augment
    with jax.transfer_guard("allow"):  # operation by operation, once
        where = first_nonfinite(task, augment, state, batch, jax.random.fold_in(program.key, bad))
    return f"update {bad + 1} (batch {bad}) is not finite: {where}"
