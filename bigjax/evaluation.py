"""The evaluation that counts each example once, for any batch size and number of devices."""

import functools
from collections.abc import Callable

import jax

from bigjax import sharding
from bigjax.data import pipeline
from bigjax.metrics import Metrics, merge
from bigjax.step import to_float
from bigjax.task import Batch, ModelState, Params, Task


def make_evaluate(
    task: Task, *, batch_size: int, seed: int, mesh: jax.sharding.Mesh
) -> Callable[[Params, ModelState, pipeline.Split], Metrics]:
    """A function (params, model_state, split) -> merged metrics, on the host.

    Each example of the split counts exactly once.
    """
    key = jax.random.key(seed)
    rows = {"batch_size": batch_size, "rows": sharding.rows_here(mesh, batch_size)}

    @functools.partial(jax.jit, out_shardings=sharding.everywhere(mesh))
    def one(params: Params, model_state: ModelState, batch: Batch) -> Metrics:
        return task.evaluate(params, model_state, to_float(batch), key)

    add = jax.jit(merge)

    def evaluate(params: Params, model_state: ModelState, split: pipeline.Split) -> Metrics:
        total = None
        for batch in pipeline.eval_batches(split, **rows):
            out = one(params, model_state, sharding.put_batch(batch, mesh))
            total = out if total is None else add(total, out)
        return jax.device_get(total)

    return evaluate
