"""What survives: asynchronous, atomic checkpoints of any tree. The only file that imports orbax.

It knows no task and no model.
"""

import contextlib
import datetime
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint import checkpoint_managers as policies

from bigjax import SaveError, UsageError, place
from bigjax.optim import path_string
from bigjax.run import manifest, processes
from bigjax.run.barrier import Apart, Barrier, Part
from bigjax.run.watch import SAVE, watching

Tree = Any


def raw(x: jax.Array) -> jax.Array:
    """What is written for an array: for PRNG keys their numbers."""
    return jax.random.key_data(x) if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key) else x


def to_stderr(line: str) -> None:
    """Tells the user, beside what a command prints."""
    print(line, file=sys.stderr, flush=True)


class Handler(ocp.PyTreeCheckpointHandler):
    """As orbax's; calls `written(folder)` in the background when all that this process writes there is written."""

    def __init__(self, written: Callable[[epath.Path], None], failing: Callable[[BaseException], None]):
        super().__init__()
        self.written, self.failing = written, failing

    async def async_save(self, directory: epath.Path, *args: Any, **kwargs: Any) -> list[Any]:
        futures = await super().async_save(directory, *args, **kwargs)
        return [Part(ocp.future.ChainedFuture(futures or [], cb=lambda: self.written(directory)), self.failing)]


@ocp.args.register_with_handler(Handler, for_save=True)
class Save(ocp.args.PyTreeSave):
    """Orbax wants arguments of its own for each handler."""


@ocp.args.register_with_handler(Handler, for_restore=True)
class Restore(ocp.args.PyTreeRestore):
    """The same."""


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
        self.folder = place(directory) if "://" in str(directory) else place(directory).absolute()
        self.saving, barrier = None, Barrier()
        bucket = "://" in str(directory)
        if bucket and not read_only and processes.first():
            clean(self.folder)
        self.manager = ocp.CheckpointManager(
            self.folder,
            item_handlers={"state": Handler(self.written, barrier.failing)},
            options=ocp.CheckpointManagerOptions(
                preservation_policy=kept,
                # A reader must leave the save of a run under way alone; and in a bucket orbax takes every folder
                # without its mark for such a save, the manifests too.
                cleanup_tmp_directories=not read_only and not bucket,
                create=not read_only,
                best_fn=(lambda m: m[self.best]) if best else None,  # else orbax forgets the numbers at a resumption
                enable_async_checkpointing=True,
                async_options=ocp.AsyncOptions(post_finalization_callback=self.complete, barrier_sync_fn=barrier),
            ),
        )

    def save(self, step: int, tree: Tree, *, metrics: dict[str, float] | None = None) -> None:
        """Starts the save of `tree` as `step` and returns; an error of the save before is raised here."""
        if self.best and metrics and self.best not in metrics:
            raise UsageError(f"--best: the validation split has no {self.best!r}: use one of {', '.join(metrics)}")
        with watching(f"the save of step {step}", SAVE), self.failing_clearly():
            self.wait()
            self.saving = step
            args = ocp.args.Composite(state=Save(tree))
            self.manager.save(step, args=args, metrics=metrics, force=True)

    def unnamed(self) -> epath.Path:
        """The folder of the save under way: in a bucket it has its name from the beginning."""
        found = [p for p in self.folder.iterdir() if p.name.startswith(f"{self.saving}.")]
        return (found or [self.folder / str(self.saving)])[0]

    def written(self, state: epath.Path) -> None:
        """Called in the background when this process has written all of its part: takes its checksums."""
        if not processes.first():
            manifest.write_part(self.folder, self.saving, jax.process_index(), state=state)

    def complete(self) -> None:
        """Called in process 0's background when all have, before the save gets its name: takes all other checksums."""
        manifest.write(self.folder, self.saving, where=self.unnamed(), processes=jax.process_count())
        kept = [int(p.name) for p in self.folder.iterdir() if p.name.isdigit()]
        manifest.forget(self.folder, [self.saving, *kept])

    def newest(self, *, tell: Callable[[str], None]) -> int | None:
        """The newest step whose checkpoint is what was saved; None if nothing was saved.

        One without checksums counts if it can be read. `tell` hears of each damaged one. Raises UsageError if there is
        no other.
        """

        def find() -> tuple[int | None, list[str]]:
            said = []
            for step in reversed(self.steps() + lost(self.folder)):
                wrong = manifest.damage(self.folder, step)
                if not wrong and not self.readable(step):
                    wrong = "it cannot be read"
                if not wrong:
                    return step, said
                said.append(f"the checkpoint of step {step} in {self.folder} is damaged: {wrong}")
            if said:
                raise UsageError(
                    f"{said[0]}, and no other is whole: put its files back, or give --no-resume to start over"
                )
            return None, []

        step, said = processes.from_first(find)
        for line in said:
            tell(line)
        return step

    def readable(self, step: int) -> bool:
        """Whether a checkpoint says what it holds."""
        try:
            return bool(jax.tree.leaves(self.manager.item_metadata(step)["state"].tree))
        except Exception:  # whatever the damage does to orbax
            return False

    def set_aside(self, after: int) -> None:
        """Renames what is damaged, after the step that serves, so that those steps can be saved again."""
        if processes.first():
            for step in [n for n in self.steps() + lost(self.folder) if n > after]:
                aside = self.folder / f"damaged_{step}"
                if aside.exists():
                    aside.rmtree()
                if (self.folder / str(step)).exists():
                    (self.folder / str(step)).rename(aside)  # in a bucket file by file: after a kill, `lost` has it
            manifest.forget(self.folder, committed(self.folder))
        processes.from_first(lambda: None)
        self.manager.reload()

    def latest(self) -> int | None:
        """The newest committed step, damaged or not."""
        return self.manager.latest_step()

    def steps(self) -> list[int]:
        """All committed steps, in order."""
        return sorted(self.manager.all_steps())

    def restore(self, step: int, abstract: Tree) -> Tree:
        """The tree saved at `step`, placed as `abstract` (of jax.ShapeDtypeStruct, with shardings) says.

        `abstract` may be a part of what was saved; only that part is read. Raises UsageError for what was not
        saved, or in another shape.
        """
        if changes := self.changes(step, abstract):
            raise UsageError(
                f"the checkpoint of step {step} is of another model or optimizer: use the settings and code it was "
                "saved with, or another --workdir\n  " + "\n  ".join(changes)
            )
        arguments = Restore(
            item=abstract,
            restore_args=ocp.checkpoint_utils.construct_restore_args(abstract),
            partial_restore=True,
        )
        with watching(f"reading the checkpoint of step {step}"):
            return self.manager.restore(step, args=ocp.args.Composite(state=arguments))["state"]

    def changes(self, step: int, abstract: Tree) -> list[str]:
        """What `abstract` has in another shape than `step`, or is not there: `path: (8, 4) -> (8, 6)`, at most 12.

        What is named and shaped like one before, as an optimizer's moments are, is not told once more.
        """
        tree = self.manager.item_metadata(step)["state"].tree
        there = {path_string(path): m.shape for path, m in jax.tree.leaves_with_path(tree)}
        here = {path_string(path): jax.eval_shape(raw, s).shape for path, s in jax.tree.leaves_with_path(abstract)}
        changed = {k: f"{there.get(k, 'not saved')} -> {v}" for k, v in here.items() if there.get(k) != v}
        first: dict[tuple[str, ...], str] = {}
        for k, change in changed.items():
            first.setdefault((*k.split("/")[-2:], change), f"{k}: {change}")
        lines = list(first.values())
        return lines[:12] + ([f"... and {len(lines) - 12} more"] if len(lines) > 12 else [])

    def shapes(self, step: int) -> Tree:
        """What is there at `step`, unread: nested dicts of jax.ShapeDtypeStruct, placed on the first device here."""
        here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        tree = self.manager.item_metadata(step)["state"].tree
        return jax.tree.map(lambda m: jax.ShapeDtypeStruct(m.shape, m.dtype, sharding=here), tree)

    def check(self) -> None:
        """Raises what has failed of the save under way, if anything has so far."""
        with self.failing_clearly():
            self.manager.check_for_errors()

    def wait(self) -> int | None:
        """Until the save under way is committed; an error of it is raised here. The newest step that is saved."""
        with watching("the last save", SAVE), self.failing_clearly():
            self.manager.wait_until_finished()
            if processes.first() and self.saving is not None:
                manifest.write(self.folder, self.saving)
        return self.latest()

    @contextlib.contextmanager
    def failing_clearly(self) -> Iterator[None]:
        """What the file system refuses becomes one line."""
        try:
            yield
        except (OSError, ValueError, RuntimeError) as e:
            try:
                whole = committed(self.folder)
                kept = f"step {max(whole)} is intact" if whole else "there is none before it"
            except Exception:  # a bucket out of reach
                kept = "those before it cannot be seen now"
            while isinstance(e, Apart) and e.__context__:  # of what failed here, which the others are told
                e = e.__context__
            raise SaveError.by(e, f"a checkpoint could not be saved in {self.folder}; {kept}") from e

    def close(self) -> None:
        """After the save under way; an error of it is raised here."""
        with watching("the last save", SAVE), self.failing_clearly():
            self.manager.close()


def unchecked(folder: epath.Path) -> list[int]:
    """The steps in a folder of checkpoints, in order; in a bucket also those whose save was killed."""
    try:
        return sorted(int(p.name) for p in folder.iterdir() if p.name.isdigit())
    except (FileNotFoundError, NotADirectoryError):
        return []


def committed(folder: epath.Path) -> list[int]:
    """Those that were saved to their end: orbax then gives a folder its name, or in a bucket its mark."""
    return [n for n in unchecked(folder) if ocp.step.is_checkpoint_finalized(folder / str(n))]


def lost(folder: epath.Path) -> list[int]:
    """Those after the newest that were committed, as their manifests say, and are gone or without their mark."""
    return manifest.ended(folder, after=max(committed(folder), default=-1))


def clean(folder: epath.Path) -> None:
    """Deletes what killed saves left in a bucket."""
    for step in set(unchecked(folder)) - {*committed(folder), *lost(folder)}:
        (folder / str(step)).rmtree()


def listing(workdir: epath.PathLike, *, verify: bool = False) -> tuple[list[str], bool]:
    """A line for each checkpoint of a run (step, size, age, whether it is what was saved), and whether none is damaged.

    Without `verify` the files are not read again, and what has checksums is said to have them. Raises UsageError where
    there is no checkpoint.
    """
    folder = place(workdir) / "checkpoints"
    steps, gone = committed(folder), lost(folder)
    if not steps + gone:
        raise UsageError(f"{workdir} holds no checkpoint: give the working directory of a run that saved one")
    lines, whole, serves = [], True, None
    for step in reversed(steps):
        has = (folder / "manifests" / f"{step}.json").exists()
        wrong = manifest.damage(folder, step) if verify and has else None
        status = ("verified" if verify else "has checksums") if has else "unverified"
        if wrong:
            status, whole = f"damaged: {wrong}", False
        elif serves is None:
            serves, status = step, f"{status}; the next run resumes here"
        size, newest = manifest.extent(folder / str(step))
        age = datetime.timedelta(seconds=max(int(time.time() - newest), 0))
        lines.insert(0, f"step {step:>8}  {size / 1e6:10.2f} MB  {age} ago  {status}")
    lines += [f"step {step:>8}  damaged: {manifest.damage(folder, step)}" for step in gone]
    return lines, whole and not gone
