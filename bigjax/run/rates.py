"""The learning rate of an optax transformation, found in what it is made of: its state need not hold it."""

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

Factor = Callable[[Any], Any] | Any  # of the update: a function of the count of updates before, or a number
ONE_ALONE = ""  # the name of a rate that has no other beside it


def learning_rates(tx: Mapping[str, optax.GradientTransformation]) -> Callable[[int], dict[str, float]]:
    """Of transformations by player a function: updates that were applied before one -> the rates of that one.

    They are called `learning_rate`, or `learning_rate/NAME` where players, or groups of optax.partition, have different
    ones. Found is what optax's own scale, scale_by_schedule, chain and partition do; of a transformation with others
    around these (MultiSteps, inject_hyperparams, masked rates) nothing is said.
    """

    def rates(count: int) -> dict[str, float]:
        found = {
            " ".join(filter(None, (player if len(tx) > 1 else "", group))): factors
            for player, one in tx.items()
            for group, factors in factors_of(one.update).items()
            if any(callable(f) or f < 0 for f in factors)  # one of them turns the gradient round
        }
        # as the update computes them, whatever transfers and promotions are forbidden to it
        with jax.transfer_guard("allow"), jax.numpy_dtype_promotion("standard"):
            number = jnp.asarray(max(count, 0), jnp.int32)
            values = {
                name: abs(math.prod(float(f(number) if callable(f) else f) for f in factors))
                for name, factors in found.items()
            }
        if len(set(values.values())) == 1:
            return {"learning_rate": next(iter(values.values()))}
        return {f"learning_rate/{name}": value for name, value in values.items()}

    return rates


def factors_of(update: Callable[..., Any]) -> dict[str, Sequence[Factor]]:
    """{group: what the updates of its parameters are multiplied by}; without groups there is the one ''.

    {}: nothing is known.
    """
    if not inspect.isfunction(update) or not update.__module__.startswith("optax."):
        return {ONE_ALONE: ()}
    parts = inspect.getclosurevars(update).nonlocals
    match update.__qualname__.partition(".")[0]:
        case "scale":
            return {ONE_ALONE: (parts["step_size"],)}
        case "scale_by_schedule":
            return {ONE_ALONE: (parts["step_size_fn"],)}
        case "with_extra_args_support":
            return factors_of(parts["tx"].update)
        case "masked" if any(factors_of(parts["inner"].update).values()):
            return {}
        case "chain":
            out: dict[str, Sequence[Factor]] = {ONE_ALONE: ()}
            for inner in map(factors_of, parts["update_fns"]):
                out = {" ".join(filter(None, (a, b))): (*x, *y) for a, x in out.items() for b, y in inner.items()}
            return out
        case "partition":
            each = {str(group): factors_of(tx.update) for group, tx in parts["transforms"].items()}
            return {" ".join(filter(None, (a, b))): x for a, groups in each.items() for b, x in groups.items()}
    return {ONE_ALONE: ()}
