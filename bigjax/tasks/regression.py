"""Numbers: mean squared error.

B batch, D numbers a row.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from bigjax import UsageError
from bigjax.task import Batch, Inputs, Task, fields, one_player


def regress(
    model: nn.Module,
    *,
    inputs: Inputs = fields("x"),  # noqa: B008 (a pure function)
    l1: float = 0.0,
    l2: float = 0.0,
) -> Task:
    """Mean squared error of `target` (B,) or (B, D) under the model's output of the same number of values a row."""

    def per_example(out: Array, batch: Batch) -> tuple[Array, Array, dict]:
        target_BD, out_BD = jax.lax.collapse(batch["target"], 1), jax.lax.collapse(out, 1)
        if (given := out_BD.shape[1]) != (wanted := target_BD.shape[1]):  # one of them could be broadcast
            raise UsageError(f"the model gives {given} values a row, `target` has {wanted}: give it {wanted} outputs")
        loss_B = jnp.square(out_BD - target_BD).mean(-1)
        return loss_B, jnp.ones_like(loss_B), {}

    return one_player(model, per_example, inputs=inputs, l1=l1, l2=l2)
