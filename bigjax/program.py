"""What a run compiles: the state's birth, the update, and the batches by number that it is fed."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from bigjax import UsageError, metrics, sharding
from bigjax.experiment import Count, Experiment, RunConfig, Split, key_of
from bigjax.metrics import Metrics
from bigjax.step import TrainState, init_state, train_step
from bigjax.task import Batch, Key

AHEAD = 2  # batches under way on the devices: they never wait, and no batches pile up


class Controls(NamedTuple):
    """What may change between two sessions of a run without another program.

    dropped: updates dropped before that are accepted; more stop the state. log_every, steps: where log windows end.
    """

    dropped: Array | int
    log_every: Array | int
    steps: Array | int


class Program:
    """The compiled parts of a run: `initialize`, `update` of (state, window of metrics), and batches by number."""

    def __init__(
        self,
        experiment: Experiment,
        config: RunConfig,
        train: Split,
        *,
        steps: int,
        mesh: jax.sharding.Mesh | None = None,
    ):
        from bigjax.data import pipeline

        task, self.train, self.key = experiment.task, train, key_of(config.seed)
        self.experiment, self.config, self.steps = experiment, config, steps
        self.mesh = mesh or sharding.make_mesh(config.mesh, batch_size=config.batch_size)
        for model in task.models.values():
            sharding.check_heads(model, self.mesh)
        self.rows = {"seed": config.seed, "batch_size": config.batch_size, "transform": experiment.transform}
        self.rows["rows"] = sharding.rows_here(self.mesh, config.batch_size)
        tx = experiment.transformations(steps)
        example = next(pipeline.batches(pipeline.whole(train), seed=0, batch_size=1, transform=experiment.transform))
        self.batch_shapes = sharding.batch_shapes(example, self.mesh, batch_size=config.batch_size)

        def initialize(key: Key) -> TrainState:
            two = {k: jnp.zeros((2, *x.shape[1:]), x.dtype) for k, x in self.batch_shapes.items()}  # only shapes matter
            return init_state(key, two, task=task, tx=tx, ema=config.ema)

        @partial(jax.jit, inline=True)  # so that it is traced once, for the shapes of its metrics and for `update`
        def step(state: TrainState, batch: Batch, key: Key, controls: Controls) -> tuple[TrainState, Metrics]:
            done = state.step + 1
            return train_step(
                state,
                batch,
                key,
                task=task,
                tx=tx,
                augment=experiment.augment,
                accumulate=config.accumulate,
                ema=config.ema,
                dropped=controls.dropped,
                by_layer=(done % controls.log_every == 0) | (done == controls.steps),
            )

        def update(
            state: TrainState, window: Metrics, batch: Batch, key: Key, controls: Controls
        ) -> tuple[TrainState, Metrics, Array]:
            state, out = step(state, batch, key, controls)
            return state, metrics.merge(window, out), state.step + 0  # the last only tells that the step is done

        numbers = Controls(*(jax.ShapeDtypeStruct((), jnp.int32) for _ in Controls._fields))
        self.control_shapes = sharding.replicated(numbers, self.mesh)
        with jax.set_mesh(self.mesh):
            self.state_shapes = sharding.place(jax.eval_shape(initialize, self.key), self.mesh, rules=experiment.rules)
            window = jax.eval_shape(step, self.state_shapes, self.batch_shapes, self.key, self.control_shapes)[1]
        self.window_shapes = sharding.replicated(window, self.mesh)
        where = jax.tree.map(lambda s: s.sharding, (self.state_shapes, self.window_shapes))
        self.begin, self.one = lambda: initialize(self.key), update
        self.initialize = jax.jit(initialize, out_shardings=where[0])
        self.update = jax.jit(update, donate_argnums=(0, 1), out_shardings=(*where, None))
        zeros = lambda: jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), self.window_shapes)  # noqa: E731
        self.fresh_window = jax.jit(zeros, out_shardings=where[1])

    def controls(self, *, dropped: int = 0) -> Controls:
        """On the devices; with --nonfinite skip any number of dropped updates is accepted."""
        accepted = 2**31 - 1 if self.config.nonfinite == "skip" else dropped
        made = lambda: jax.tree.map(jnp.int32, Controls(accepted, self.config.log_every, self.steps))  # noqa: E731
        return jax.jit(made, out_shardings=sharding.everywhere(self.mesh))()

    def lowered(self) -> Any:
        """The update, lowered for the mesh."""
        shapes = (self.state_shapes, self.window_shapes, self.batch_shapes, self.key, self.control_shapes)
        with jax.set_mesh(self.mesh):
            return self.update.lower(*shapes)

    def batches(self, start: int) -> Any:
        """Batches from number `start` on, checked, and placed on the devices ahead of time; close it at the end."""
        from bigjax.data import pipeline
        from bigjax.data.prefetch import Prefetcher

        def placed(batch: Batch) -> Batch:
            self.experiment.task.check(batch)
            return sharding.put_batch(batch, self.mesh, self.config.batch_size)

        return Prefetcher(pipeline.batches(self.train, start=start, **self.rows), placed)


def planned_steps(config: RunConfig, size: int, seconds_a_step: Callable[[], float]) -> int:
    """How many updates the run has: by steps, epochs or minutes, whichever ends first."""
    limits = [config.steps] if config.steps else []
    if config.epochs:
        limits.append(max(round(min(config.epochs * size / config.batch_size, Count.most)), 1))
    if config.minutes:
        limits.append(max(int(min(config.minutes * 60 / seconds_a_step(), Count.most)), 1))
    if not limits:
        raise UsageError("how long to train is not said: give --steps, --epochs or --minutes")
    if min(limits) == Count.most:
        raise UsageError(f"--epochs or --minutes make {Count.most:,} updates or more: give less, or --steps")
    return min(limits)
