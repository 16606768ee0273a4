"""What survives: asynchronous, atomic checkpoints of any tree. The only file that imports orbax.

It knows no task and no model.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint import checkpoint_managers as policies

from bigjax import SaveError, UsageError
from bigjax.optim import path_string

Tree = Any


def raw(x: jax.Array) -> jax.Array:
    """What is written for an array: for PRNG keys their numbers."""
    return jax.random.key_data(x) if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key) else x


class Checkpoints:
    """The checkpoints of one run, by step: the last `keep`.

    With `best` = "max:accuracy" or "min:loss" the best `keep` too.
    """

    def __init__(self, directory: epath.PathLike, *, keep: int = 3, best: str | None = None, read_only: bool = False):
        self.best = best.partition(":")[2] if best else None
        kept: policies.PreservationPolicy = policies.LatestN(keep)
        if best:
            mode, _, name = best.partition(":")
            ranked = policies.BestN(
                get_metric_fn=lambda m: m[name], reverse=mode == "min", n=keep, keep_checkpoints_without_metrics=False
            )
            kept = policies.AnyPreservationPolicy([kept, ranked])
        self.manager = ocp.CheckpointManager(
            epath.Path(directory).absolute() if "://" not in str(directory) else directory,
            item_handlers={"state": ocp.PyTreeCheckpointHandler()},
            options=ocp.CheckpointManagerOptions(
                preservation_policy=kept,
                cleanup_tmp_directories=not read_only,  # a reader must leave the save of a run under way alone
                create=not read_only,
                best_fn=(lambda m: m[self.best]) if best else None,  # else orbax forgets the numbers at a resumption
                enable_async_checkpointing=True,
            ),
        )

    def save(self, step: int, tree: Tree, *, metrics: dict[str, float] | None = None) -> None:
        """Starts the save of `tree` as `step` and returns; an error of the save before is raised here."""
        if self.best and metrics and self.best not in metrics:
            raise UsageError(f"--best: the validation split has no {self.best!r}: use one of {', '.join(metrics)}")
        with self.failing_clearly():
            args = ocp.args.Composite(state=ocp.args.PyTreeSave(tree))
            self.manager.save(step, args=args, metrics=metrics, force=True)

    def latest(self) -> int | None:
        """The newest committed step."""
        return self.manager.latest_step()

    def steps(self) -> list[int]:
        """All committed steps, in order."""
        return sorted(self.manager.all_steps())

    def restore(self, step: int, abstract: Tree) -> Tree:
        """The tree saved at `step`, placed as `abstract` (of jax.ShapeDtypeStruct, with shardings) says.

        `abstract` may be a part of what was saved; only that part is read. Raises UsageError for what was not
        saved, or in another shape.
        """
        tree = self.manager.item_metadata(step)["state"].tree
        there = {path_string(path): m.shape for path, m in jax.tree.leaves_with_path(tree)}
        here = {path_string(path): jax.eval_shape(raw, s).shape for path, s in jax.tree.leaves_with_path(abstract)}
        if other := [f"{k} is {v}, saved {there.get(k, 'not at all')}" for k, v in here.items() if there.get(k) != v]:
            raise UsageError(
                f"the checkpoint of step {step} is of another model or optimizer ({'; '.join(other[:3])}"
                f"{'; ...' if other[3:] else ''}): use the settings and code it was saved with, or another --workdir"
            )
        arguments = ocp.args.PyTreeRestore(
            item=abstract,
            restore_args=ocp.checkpoint_utils.construct_restore_args(abstract),
            partial_restore=True,
        )
        return self.manager.restore(step, args=ocp.args.Composite(state=arguments))["state"]

    def shapes(self, step: int) -> Tree:
        """What is there at `step`, unread: nested dicts of jax.ShapeDtypeStruct, placed on the first device here."""
        here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        tree = self.manager.item_metadata(step)["state"].tree
        return jax.tree.map(lambda m: jax.ShapeDtypeStruct(m.shape, m.dtype, sharding=here), tree)

    def wait(self) -> None:
        """Until the save under way is committed; an error of it is raised here."""
        with self.failing_clearly():
            self.manager.wait_until_finished()

    @contextlib.contextmanager
    def failing_clearly(self) -> Iterator[None]:
        """What the file system refuses becomes one line."""
        try:
            yield
        except (OSError, ValueError, RuntimeError) as e:
            whole = [p.name for p in epath.Path(self.manager.directory).glob("[0-9]*")] if self.exists() else []
            kept = f"step {max(map(int, whole))} is intact" if whole else "there is none before it"
            reason = str(e).strip().splitlines()[0][:300] if str(e).strip() else type(e).__name__
            raise SaveError(
                f"a checkpoint could not be saved in {self.manager.directory} ({reason}); {kept}: make room there, or "
                "choose another --workdir, and run again"
            ) from e

    def exists(self) -> bool:
        """Whether the folder of checkpoints is (still) there."""
        return epath.Path(self.manager.directory).is_dir()

    def close(self) -> None:
        self.manager.close()
