"""What a run compiles: the state's birth, the update, and the batches by number that it is fed."""

import itertools
import time
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
from jax import Array

from bigjax import UsageError, metrics, sharding
from bigjax.data import pipeline
from bigjax.data.prefetch import Prefetcher
from bigjax.experiment import Experiment, RunConfig
from bigjax.metrics import Metrics
from bigjax.run import processes
from bigjax.step import TrainState, init_state, train_step
from bigjax.task import Batch, Key


class Program:
    """The compiled parts of a run: `initialize`, `update` of (state, window of metrics), and batches by number."""

    def __init__(
        self,
        experiment: Experiment,
        config: RunConfig,
        train: pipeline.Split,
        *,
        steps: int,
        mesh: jax.sharding.Mesh | None = None,
    ):
        self.train, self.key = train, jax.random.key(config.seed)
        self.mesh = mesh or sharding.make_mesh(config.mesh, batch_size=config.batch_size)
        for model in experiment.models().values():
            sharding.check_heads(model, self.mesh)
        self.rows = {"seed": config.seed, "batch_size": config.batch_size, "transform": experiment.transform}
        self.rows["rows"] = sharding.rows_here(self.mesh, config.batch_size)
        tx = experiment.tx(steps)
        example = next(pipeline.batches(train, seed=0, batch_size=1, transform=experiment.transform))
        batch_shapes = sharding.batch_shapes(example, self.mesh, batch_size=config.batch_size)

        def initialize(key: Key) -> TrainState:
            two = jax.tree.map(lambda x: jnp.zeros((2, *x.shape[1:]), x.dtype), batch_shapes)  # only shapes matter here
            return init_state(key, two, task=experiment.task, tx=tx, ema=config.ema)

        def step(state: TrainState, batch: Batch, key: Key) -> tuple[TrainState, Metrics]:
            return train_step(
                state,
                batch,
                key,
                task=experiment.task,
                tx=tx,
                augment=experiment.augment,
                accumulate=config.accumulate,
                ema=config.ema,
                skip_nonfinite=config.nonfinite == "skip",
            )

        def update(state: TrainState, window: Metrics, batch: Batch, key: Key) -> tuple[TrainState, Metrics, Array]:
            state, out = step(state, batch, key)
            return state, metrics.merge(window, out), state.step + 0  # the last only tells that the step is done

        with jax.set_mesh(self.mesh):
            self.state_shapes = sharding.place(jax.eval_shape(initialize, self.key), self.mesh, rules=experiment.rules)
            window = jax.eval_shape(step, self.state_shapes, batch_shapes, self.key)[1]
        self.batch_shapes = batch_shapes
        self.window_shapes = sharding.replicated(window, self.mesh)
        where = jax.tree.map(lambda s: s.sharding, (self.state_shapes, self.window_shapes))
        self.begin = lambda: initialize(self.key)
        self.initialize = jax.jit(initialize, out_shardings=where[0])
        self.update = jax.jit(update, donate_argnums=(0, 1), out_shardings=(*where, None))
        zeros = lambda: jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), self.window_shapes)  # noqa: E731
        self.fresh_window = jax.jit(zeros, out_shardings=where[1])

    def batches(self, start: int) -> Prefetcher:
        """Batches from number `start` on, placed on the devices ahead of time."""
        host = pipeline.batches(self.train, start=start, **self.rows)
        return Prefetcher(host, lambda batch: sharding.put_batch(batch, self.mesh))

    def chunk(
        self,
        state: TrainState,
        window: Metrics,
        batches: Iterator[Batch],
        count: int,
        *,
        enough: Callable[[int], bool] = lambda done: False,
    ) -> tuple[TrainState, Metrics]:
        """`count` updates; the host runs two ahead, so that the device never waits and no batches pile up.

        `enough` is told after each how many are under way, and may say that it is enough.
        """
        flying: list[Array] = []
        for made, batch in enumerate(itertools.islice(batches, count), 1):
            state, window, done = self.update(state, window, batch, self.key)
            flying.append(done)
            if len(flying) > 2:
                flying.pop(0).block_until_ready()
            if enough(made):
                break
        return state, window

    def seconds_a_step(self) -> float:
        """Measured over three seconds after compilation, on a state that is thrown away."""
        state, window, batches = self.initialize(self.key), self.fresh_window(), self.batches(0)
        state, window = jax.block_until_ready(self.chunk(state, window, batches, 2))
        seconds, count = processes.from_first(lambda: 0.0), 0
        begin = time.perf_counter()
        while seconds < 3:  # by the clock of process 0, so that all make the same number of updates
            state, window = jax.block_until_ready(self.chunk(state, window, batches, 5))
            count, seconds = count + 5, processes.from_first(lambda: time.perf_counter() - begin)
        batches.close()
        return seconds / count


def planned_steps(config: RunConfig, size: int, seconds_a_step: Callable[[], float]) -> int:
    """How many updates the run has: by steps, epochs or minutes, whichever ends first."""
    limits = [config.steps] if config.steps else []
    if config.epochs:
        limits.append(max(round(config.epochs * size / config.batch_size), 1))
    if config.minutes:
        limits.append(max(int(config.minutes * 60 / seconds_a_step()), 1))
    if not limits:
        raise UsageError("how long to train is not said: give --steps, --epochs or --minutes")
    return min(limits)
