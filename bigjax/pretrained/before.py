"""What a folder's weights give before anything is learnt from them, beside what they give after."""

from collections.abc import Callable
from typing import Any

import jax

from bigjax import evaluation
from bigjax.experiment import Split
from bigjax.pretrained.begin import Weights
from bigjax.pretrained.reading import load
from bigjax.task import Task


def before(
    begun: Weights, task: Callable[[Any], Task], split: Split, *, batch_size: int, **fields: Any
) -> Callable[..., dict[str, float]]:
    """An evaluator: the numbers of the folder's own weights on a split, each called NAME_before.

    task: of a model. They are computed once, at the first evaluation, in the mesh and the batches of the run. fields:
    of the model.
    """
    found: dict[str, float] = {}

    def measured(params: Any, model_state: Any, key: Any) -> dict[str, float]:
        if not found:
            mesh = jax.sharding.get_mesh()
            with jax.transfer_guard("allow"):
                model, variables = load(begun.folder, mesh=mesh, **fields)
            asked, rest = task(model), {k: v for k, v in variables.items() if k != "params"}
            measure = evaluation.evaluator(asked, batch_size=batch_size, seed=0, mesh=mesh)
            counts = measure({"model": variables["params"]}, {"model": rest}, split)
            found.update({f"{k}_before": v for k, v in asked.summarize(counts).items()})
        return dict(found)

    return measured
