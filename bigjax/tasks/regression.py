"""Numbers: mean squared error, and in the evaluation the mean absolute error and R².

B batch, D numbers a row.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from bigjax import UsageError
from bigjax import metrics as measure
from bigjax.metrics import Metrics
from bigjax.task import Batch, Inputs, Task, fields, one_player

SMALLEST = 1e-5  # of a variance beside the mean square that it is computed from: float32 has 1e-7


def regress(
    model: nn.Module,
    *,
    inputs: Inputs = fields("x"),  # noqa: B008 (a pure function)
    centre: float = 0.0,
    l1: float = 0.0,
    l2: float = 0.0,
) -> Task:
    """Mean squared error of `target` (B,) or (B, D) under the model's output of the same number of values a row.

    Evaluation: `mean_absolute_error` too, and `r2`, the share of the targets' variance that is explained (over D the
    mean, without columns that do not vary). centre: a number near the targets, about which their squares are summed:
    R² is nan where it is so far away, beside their deviation, that float32 could not tell.
    """

    def errors(out: Array, batch: Batch) -> tuple[Array, Array]:
        target_BD, out_BD = jax.lax.collapse(batch["target"], 1), jax.lax.collapse(out, 1)
        if (given := out_BD.shape[1]) != (wanted := target_BD.shape[1]):  # one of them could be broadcast
            raise UsageError(f"the model gives {given} values a row, `target` has {wanted}: give it {wanted} outputs")
        return out_BD - target_BD, target_BD - centre

    def per_example(out: Array, batch: Batch) -> tuple[Array, Array, dict]:
        loss_B = jnp.square(errors(out, batch)[0]).mean(-1)
        return loss_B, jnp.ones_like(loss_B), {}

    def evaluate(out: Array, batch: Batch) -> tuple[Array, Array, dict]:
        loss_B, one_B, _ = per_example(out, batch)
        error_BD, target_BD = errors(out, batch)
        sums = {"error_squares": jnp.square(error_BD), "targets": target_BD, "target_squares": jnp.square(target_BD)}
        return (
            loss_B,
            one_B,
            {"mean_absolute_error": (jnp.abs(error_BD).mean(-1), one_B)}
            | {name: (value_BD, one_B) for name, value_BD in sums.items()},
        )

    def summarize(metrics: Metrics) -> dict[str, float]:
        error_D, mean_D, square_D = (
            np.asarray(metrics[name][0], np.float64) / (float(metrics[name][1]) or np.nan)
            for name in ("error_squares", "targets", "target_squares")
        )
        variance_D = square_D - mean_D**2
        known_D = variance_D > SMALLEST * square_D
        share_D = 1 - error_D[known_D] / variance_D[known_D]
        return measure.means(metrics) | {"r2": float(share_D.mean()) if known_D.any() else float("nan")}

    return one_player(model, per_example, inputs=inputs, evaluate=evaluate, summarize=summarize, l1=l1, l2=l2)
