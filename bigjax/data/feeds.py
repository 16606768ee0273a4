"""How a run is fed: several updates in one dispatch, and data in memory that live on the devices.

At a millisecond an update, what surrounds it costs more than the update. K updates at most in one dispatch, N rows of
the split, B rows of a batch.
"""

import time
from collections.abc import Iterator, Mapping
from contextlib import closing
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from bigjax import UsageError, sharding
from bigjax.data import order, pipeline
from bigjax.data.lengths import ByLength
from bigjax.data.prefetch import Prefetcher, Shapes
from bigjax.metrics import Metrics
from bigjax.ops.counted import convolves, flops
from bigjax.program import Controls, Program
from bigjax.step import TrainState
from bigjax.task import Batch, Key

MOST = 32  # updates in one dispatch where that is left to us: a signal waits for its end
SHORT = {"cpu": 2e8}  # floating-point operations of an update that is short: about 2 ms
SHORT_ELSEWHERE = 5e10  # about 1 ms at a tenth of what an accelerator can do
SMALL = 2**28  # bytes of a split that every device may hold


class Feed(NamedTuple):
    """What one dispatch works on.

    count: how many updates. batches: (K, B, …), of which the first `count` are used. resident: (N, …), the fields of
    which a batch has the rows `index`.
    """

    count: Array
    batches: dict[str, Array]
    resident: dict[str, Array]


class Feeding:
    """The update of a program, as often as one dispatch does it, and what it is fed.

    Which updates share a dispatch changes no bit: each is an iteration of one loop, as often as `count` says. The first
    update, behind step `start`, is alone, as it compiles.
    """

    def __init__(self, program: Program, start: int) -> None:
        config, split, self.program, self.start = program.config, program.train, program, start
        apart = "its batches have several lengths" if isinstance(split, ByLength) else None
        if config.fuse and config.fuse > 1 and apart:
            raise UsageError(f"--fuse {config.fuse}: {apart}: leave it out, or use --no-by-length")
        here = isinstance(split, Mapping) and not apart
        small = here and sum(np.asarray(v).nbytes for v in split.values()) <= SMALL
        self.resident = config.resident and small and not program.experiment.transform
        self.most = config.fuse or (updates_at_once(program) if here else 1)
        self.update = self._update() if self.resident or self.most > 1 else program.update

    def _update(self) -> Any:
        program, where = self.program, sharding.batch_sharding(self.program.mesh)

        def one(
            feed: Feed, key: Key, controls: Controls, i: Array | int, carry: tuple[TrainState, Metrics]
        ) -> tuple[TrainState, Metrics]:
            batch: Batch = {name: x[i] for name, x in feed.batches.items()}
            if feed.resident:
                take = partial(jnp.take, indices=batch["index"], axis=0, mode="clip")
                rows = {name: take(x) for name, x in feed.resident.items()}
                batch |= lax.with_sharding_constraint(rows, where) | {"mask": jnp.ones(batch["index"].shape)}
            return program.one(*carry, batch, key, controls)[:2]

        def update(
            state: TrainState, window: Metrics, feed: Feed, key: Key, controls: Controls
        ) -> tuple[TrainState, Metrics, Array]:
            step, carry = partial(one, feed, key, controls), (state, window)
            state, window = step(0, carry) if self.most == 1 else lax.fori_loop(0, feed.count, step, carry)
            return state, window, state.step + 0

        placed = jax.tree.map(lambda s: s.sharding, (program.state_shapes, program.window_shapes))
        return jax.jit(update, donate_argnums=(0, 1), out_shardings=(*placed, None))

    def stop(self, step: int) -> int:
        """The update after which the dispatch that begins behind `step` ends: none goes past what is due."""
        config, steps = self.program.config, self.program.steps
        ends = [step - step % n + n for n in (config.log_every, config.eval_every, config.save_every)]
        return min(step + (1 if step == self.start else self.most), *ends, *([steps] if step < steps else ()))

    def batches(self) -> Prefetcher:
        """What `update` takes, dispatch by dispatch; close it at the end."""
        if self.update is self.program.update:
            return self.program.batches(self.start)
        mesh = self.program.mesh
        resident = {name: put_whole(x, mesh) for name, x in self.program.train.items()} if self.resident else {}

        def placed(group: list[Batch]) -> Feed:
            more = [group[-1]] * (self.most - len(group))
            stacked = {k: np.stack([b[k] for b in group + more]) for k in group[0]}
            fields = sharding.put_batch(stacked, mesh, self.program.config.batch_size, stacked=True)
            return Feed(put_whole(np.array(len(group), np.int32), mesh), fields, resident)

        return Prefetcher(self._groups(self.start), placed)

    def _groups(self, start: int) -> Iterator[list[Batch]]:
        program = self.program
        if self.resident:
            seeded = {k: program.rows[k] for k in ("seed", "batch_size")}
            rows, mine = order.rows_of(program.train, **seeded), program.rows["rows"]
            while True:
                numbers = range(start, self.stop(start))
                yield [{"index": rows(n)[mine].astype(np.int32)} for n in numbers]
                start = numbers.stop
        with closing(pipeline.batches(program.train, start=start, **program.rows)) as each:
            while True:
                group, stop = [], self.stop(start)
                for batch in each:
                    program.experiment.task.check(batch)
                    group.append(batch)
                    if start + len(group) == stop:
                        break
                yield group
                start = stop


def put_whole(x: np.ndarray, mesh: jax.sharding.Mesh) -> Array:
    """An array that every device has whole."""
    x = np.asarray(x, jax.dtypes.canonicalize_dtype(x.dtype))
    with jax.transfer_guard("allow"):
        return jax.make_array_from_callback(x.shape, sharding.everywhere(mesh), lambda where: np.asarray(x[where]))


def updates_at_once(program: Program) -> int:
    """1 for an update that is long enough by what it computes; the same for the same program wherever it runs."""
    mesh = program.mesh
    with jax.set_mesh(mesh):
        shapes = (program.state_shapes, program.window_shapes, program.batch_shapes, program.key)
        found = jax.make_jaxpr(program.one)(*shapes, program.control_shapes)
    platform, operations = mesh.devices.flat[0].platform, flops(found.jaxpr, kernels=False)
    if platform == "cpu" and convolves(found.jaxpr):  # whose gradients are ten times slower there in a loop
        return 1
    short = SHORT.get(platform, SHORT_ELSEWHERE) * mesh.size
    return int(min(MOST, max(1, short // max(operations, 1))))


def seconds_an_update(program: Program) -> float:
    """Measured over three seconds after compilation, on a state that is thrown away."""
    from bigjax.run import processes

    feeding = Feeding(program, start=0)
    state, window, controls = program.initialize(program.key), program.fresh_window(), program.controls()
    batches = feeding.batches()
    for _ in range(Shapes(program).all()):
        state, window, done = feeding.update(state, window, next(batches), program.key, controls)
    before, begin, seconds = int(done), time.perf_counter(), 0.0
    while seconds < 3:  # by the clock of process 0, so that all make the same number of updates
        for _ in range(5):
            state, window, done = feeding.update(state, window, next(batches), program.key, controls)
        done.block_until_ready()
        seconds = processes.from_first(lambda: time.perf_counter() - begin)
    batches.close()
    return seconds / (int(done) - before)
