"""The work of a program; and which forms it is traced in to be counted: kernels don't tell theirs, plain twins do."""

import contextlib
import math
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any, Literal

from jax.extend.core import jaxprs_in_params

_what: ContextVar[tuple[str, set[str]]] = ContextVar("counted", default=("run", set()))


@contextlib.contextmanager
def counting(what: Literal["run", "hardware", "model"]) -> Iterator[set[str]]:
    """While it is entered programs are traced as they run, or with plain attention, or with nothing done again.

    Gives the parts for which that makes a difference, as they are met: none, and the three are the same.
    """
    token = _what.set((what, parts := set()))
    try:
        yield parts
    finally:
        _what.reset(token)


def plainly(part: Literal["attention", "vocabulary", "remat"]) -> bool:
    """Whether that part, which has another form, is to be traced in its plain one."""
    what, parts = _what.get()
    parts.add(part)
    return what == "model" or (part == "attention" and what == "hardware")


def flops(jaxpr: Any, *, kernels: bool = True) -> float:
    """Multiplications and additions in the matrix products and convolutions of a jaxpr, over all devices.

    Loops count as often as they run; of a branch the larger side; elementwise work, a few per cent, is left out. Of a
    causal attention the plain form counts, which leaves out 3/8 of the masked half. NotImplementedError: a kernel,
    whose work nobody knows; where not `kernels`, it counts as none.
    """
    total = 0.0
    for eqn in jaxpr.eqns:
        name, p = eqn.primitive.name, eqn.params
        if name == "dot_general":
            (contract, _), _ = p["dimension_numbers"]
            shape = eqn.invars[0].aval.shape
            total += 2 * math.prod(eqn.outvars[0].aval.shape) * math.prod(shape[d] for d in contract)
        elif name == "conv_general_dilated":
            kernel, spec = eqn.invars[1].aval.shape, p["dimension_numbers"].rhs_spec
            work = math.prod(kernel) / kernel[spec[0]]  # for each output: inputs of its group × window
            total += 2 * math.prod(eqn.outvars[0].aval.shape) * work / math.prod(p["lhs_dilation"])
        elif name == "pallas_call" and kernels:
            raise NotImplementedError(f"the work of the kernel {p.get('name')} is not known: count its plain twin")
        elif name == "cond":
            total += max(flops(b.jaxpr, kernels=kernels) for b in p["branches"])
        elif name != "pallas_call":
            times = p["length"] if name == "scan" else p["mesh"].size if name == "shard_map" else 1
            total += times * sum(flops(j, kernels=kernels) for j in jaxprs_in_params(p))
    return total


def convolves(jaxpr: Any) -> bool:
    """Whether there are convolutions in it."""
    return any(
        eqn.primitive.name == "conv_general_dilated" or any(map(convolves, jaxprs_in_params(eqn.params)))
        for eqn in jaxpr.eqns
    )
