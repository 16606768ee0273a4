"""The TPU slices that can be compiled for, without having one."""

import os
import re
from dataclasses import dataclass
from typing import Any

import jax

from bigjax import UsageError
from bigjax.run.flops import PEAKS


@dataclass(frozen=True)
class Chip:
    """flops: bfloat16 a second; hbm: bytes; bandwidth: of the HBM, bytes a second; link: of one interconnect link in
    both directions, bytes a second; dims: of the torus that the links make; shapes: of slices.

    Sources: flops, hbm and bandwidth from Google Cloud's TPU documentation (cloud.google.com/tpu/docs, pages v4, v5e,
    v5p, v6e); links from "How to Scale Your Model" (jax-ml.github.io/scaling-book/tpus), there one way.
    """

    flops: float
    hbm: float
    bandwidth: float
    link: float
    dims: int
    shapes: str


GIB = 2**30
CHIPS = {
    "v4": Chip(PEAKS["TPU v4"], 32 * GIB, 1228e9, 9.0e10, 3, "2x2x1 2x2x2 2x2x4 2x4x4 4x4x4 4x4x8 4x8x8 8x8x8 8x8x16"),
    "v5e": Chip(PEAKS["TPU v5 lite"], 16 * GIB, 819e9, 9.0e10, 2, "2x2 2x4 4x4 4x8 8x8 8x16 16x16"),
    "v5p": Chip(
        PEAKS["TPU v5"], 95 * GIB, 2765e9, 1.8e11, 3, "2x2x1 2x2x2 2x2x4 2x4x4 4x4x4 4x4x8 4x8x8 8x8x8 8x8x16 8x16x16"
    ),
    "v6e": Chip(PEAKS["TPU v6 lite"], 32 * GIB, 1640e9, 1.8e11, 2, "2x2 2x4 4x4 4x8 8x8 8x16 16x16"),
}

# Only the compiler is wanted: it shall not ask the network which TPU this is, nor lock it, nor say what it misses.
LIBTPU = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TF_CPP_MIN_LOG_LEVEL": "3",
}


def slice_of(topology: str) -> tuple[Chip, list[Any]]:
    """The chip and the devices of a slice such as v5p:8x8x8; UsageError where there is no such slice, or no libtpu."""
    kind, _, shape = topology.partition(":")
    known = "; ".join(f"{k}: {c.shapes}" for k, c in CHIPS.items())
    if kind not in CHIPS or not re.fullmatch(r"\d+(x\d+)+", shape):
        raise UsageError(f"--topology {topology!r} is no TPU slice: write KIND:SHAPE, of these\n  {known}")
    os.environ |= LIBTPU
    try:
        import libtpu  # noqa: F401
    except ImportError:
        raise UsageError('planning needs the TPU compiler: pip install -e ".[tpu]"') from None
    from jax.experimental import topologies

    try:
        one = {"chip_config_name": "megacore"} if kind == "v4" else {}  # its two cores as one device, as v5p has it
        devices = topologies.get_topology_desc(topology_name=topology, platform="tpu", **one).devices
    except jax.errors.JaxRuntimeError as e:
        reason = str(e).splitlines()[0][:200]
        raise UsageError(f"--topology {topology} is refused ({reason}): use one of these\n  {known}") from None
    return CHIPS[kind], list(devices)
