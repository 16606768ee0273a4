"""The work of an update, and what share of what the devices can do that is."""

from typing import Any, Literal

import jax
from jax.interpreters.partial_eval import dce_jaxpr

from bigjax.ops.counted import counting, flops
from bigjax.program import Program

# Of one device, bfloat16, dense. TPUs: cloud.google.com/tpu/docs, pages v4, v5e, v5p, v6e; H100 (SXM), which has the
# H200's chip, and H200: itkb.uw.cz/2026/06/nvidia-h200-vs-b300-precisions-cores.html.
PEAKS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
}


def lower(program: Program) -> Any:
    """The traced step of a program: the same function, placed the same way, as training runs."""
    shapes = (program.state_shapes, program.window_shapes, program.batch_shapes, program.key, program.control_shapes)
    with jax.set_mesh(program.mesh):
        return program.update.trace(*shapes)


def work(program: Program, what: Literal["hardware", "model"]) -> float:
    """`flops` of an update: as it is done, or the model's own, without what is computed again to save memory."""
    with counting(what):
        again = Program(program.experiment, program.config, program.train, steps=program.steps, mesh=program.mesh)
        return flops_of(lower(again))


def flops_of(traced: Any) -> float:
    """`flops` of a traced update, without what nothing comes of."""
    jaxpr = traced.jaxpr.jaxpr
    return flops(dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))[0])


def examples_at_peak(program: Program) -> float | None:
    """Examples a second of devices that do nothing but the model's own work at their peak; None where it isn't known.

    What a run's own speed is of it, is its model FLOPs utilization (Chowdhery et al. 2022, appendix B), for which they
    count 6N + 12·L·H·Q·T a token; `work` counts the matrix products and convolutions that the model has.
    """
    config, kind = program.config, program.mesh.devices.flat[0].device_kind
    peak = PEAKS.get(kind) if config.peak_tflops is None else config.peak_tflops * 1e12
    return None if peak is None else config.batch_size * peak * program.mesh.size / work(program, "model")
