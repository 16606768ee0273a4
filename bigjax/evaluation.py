"""The evaluation that counts each example once, for any batch size and number of devices."""

import contextlib
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from functools import partial, reduce

import jax
import numpy as np

from bigjax import UsageError, sharding
from bigjax.experiment import Experiment, RunConfig, Split, check, home_of, key_of
from bigjax.metrics import Metrics
from bigjax.program import AHEAD, Program
from bigjax.step import TrainState, check_metrics, to_float
from bigjax.task import Batch, Fields, ModelState, Params, Task


def evaluator(
    task: Task, *, batch_size: int, seed: int, mesh: jax.sharding.Mesh
) -> Callable[[Params, ModelState, Split], Metrics]:
    """A function (params, model_state, split) -> merged metrics, on the host, exact: whole numbers, and float64.

    Each example of the split counts exactly once.
    """
    from bigjax.data import pipeline
    from bigjax.run import watch

    key, rows = key_of(seed), {"batch_size": batch_size, "rows": sharding.rows_here(mesh, batch_size)}

    @partial(jax.jit, out_shardings=sharding.everywhere(mesh))
    def one(params: Params, model_state: ModelState, batch: Batch) -> Metrics:
        metrics = task.evaluate(params, model_state, Fields(to_float(batch)), key)
        check_metrics("task.evaluate", metrics)
        return metrics

    def parts(params: Params, model_state: ModelState, split: Split) -> Iterator[Metrics]:
        flying: deque[Metrics] = deque()
        for batch in pipeline.eval_batches(split, **rows):
            watch.dog().beat()
            task.check(batch)
            flying.append(one(params, model_state, sharding.put_batch(batch, mesh, batch_size)))
            if len(flying) > AHEAD:
                yield flying.popleft()
        yield from flying

    def widened(part: Metrics) -> Metrics:
        exact = lambda x: x.astype(np.float64 if np.issubdtype(x.dtype, np.floating) else np.int64)  # noqa: E731
        return jax.tree.map(exact, jax.device_get(part))

    return lambda *given: reduce(partial(jax.tree.map, np.add), map(widened, parts(*given)))


def evaluation(
    program: Program,
    measure: Callable[..., Metrics],
    state: TrainState,
    splits: Mapping[str, Split | None],
) -> tuple[dict[str, dict[str, float]], Metrics]:
    """({split: numbers}, the counts of the split `eval`, the evaluators' numbers among its own)."""
    from bigjax.run.watch import watching

    experiment, out, counts = program.experiment, {}, {}
    params, model_state = state.evaluated()
    for name, split in splits.items():
        if split is not None:
            with watching(f"the evaluation of the split {name!r}", "evaluation"):
                counts = measure(params, model_state, split)
            out[name] = experiment.task.summarize(counts)
    for name, ask in experiment.evaluators.items():
        with watching(f"the evaluator {name!r}", f"evaluator {name}"):
            out["eval"] = out.get("eval", {}) | ask(params, model_state, program.key)
    return out, counts if splits["eval"] is not None else {}


def evaluate(experiment: Experiment, config: RunConfig) -> dict[str, float]:
    """The test split's numbers under the newest checkpoint of the run's working directory.

    Raises UsageError where `config` contradicts the run's own, or no checkpoint is there.
    """
    from bigjax.run import alike, watch
    from bigjax.run import workdir as folder
    from bigjax.run.checkpoint import Checkpoints, to_stderr
    from bigjax.run.identity import identify

    check(config)
    home = home_of(config, experiment.name)
    record = folder.read_config(home)
    with alike.ready(experiment.name, "evaluate", config, **{"the run in --workdir": record}):
        if changes := folder.agree(record, experiment, config):
            raise UsageError(f"{home} was trained with other settings: leave them out\n  " + "\n  ".join(changes))
        if experiment.test is None:
            raise UsageError(f"{experiment.name} has no test split: give the data as --eval-data, or test=...")
    with contextlib.closing(Checkpoints(home / "checkpoints", read_only=True)) as checkpoints:
        if not record["steps"] or (step := checkpoints.newest(tell=to_stderr)) is None:
            raise UsageError(f"{home} holds no checkpoint yet: let it train until one is saved")
        mesh = sharding.make_mesh(config.mesh, batch_size=config.batch_size)
        with jax.set_mesh(mesh), watch.watched(config.hang_seconds, "the evaluation"):
            program = Program(experiment, config, experiment.train, steps=record["steps"], mesh=mesh)
            splits = {"eval": experiment.test} | ({} if config.validation else {"train": experiment.train})
            identify(home, program, splits, accept=config.accept_changes, tell=to_stderr)
            shapes = program.state_shapes
            needed = {"ema": shapes.ema} if config.ema else {"params": shapes.params}
            needed["model_state"] = shapes.model_state
            state = shapes.replace(**checkpoints.restore(step, {"state": needed})["state"])
            measure = evaluator(experiment.task, batch_size=config.batch_size, seed=config.seed, mesh=program.mesh)
            values, _ = evaluation(program, measure, state, {"eval": experiment.test})
    return {"step": step, **{f"eval/{k}": v for k, v in values["eval"].items()}}
