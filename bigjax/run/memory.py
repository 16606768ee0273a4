"""--remat auto: as little is computed again in the backward pass as lets the update fit into the devices' memory."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from etils import epath

from bigjax import sharding
from bigjax.experiment import Experiment, RunConfig
from bigjax.program import Program
from bigjax.run import processes
from bigjax.run.workdir import read_config

REMATS = ("none", "dots", "full")  # from the fastest to the one that needs the least memory


def room() -> int | None:
    """Bytes of one device's memory; None where it isn't limited by itself, as on CPU."""
    return (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")


def needed(program: Program) -> float:
    """Bytes a device needs for an update, by the compiler's figure; inf where the compiler finds that it cannot fit."""
    try:
        m = program.lowered().compile().memory_analysis()
    except jax.errors.JaxRuntimeError as e:
        if "RESOURCE_EXHAUSTED" not in str(e):
            raise
        return float("inf")
    held = m.argument_size_in_bytes + m.output_size_in_bytes - m.alias_size_in_bytes + m.temp_size_in_bytes
    on_tpu = program.mesh.devices.flat[0].platform == "tpu"  # there temporaries are added up that never meet
    return (m.peak_memory_in_bytes if on_tpu else held) + m.generated_code_size_in_bytes


def settled(config: RunConfig, build: Callable[[Any], Experiment], home: epath.Path) -> RunConfig:
    """`config` with a remat of "auto" as one of REMATS: that of the run which is there, else the first that fits.

    It is the last where none does. Each is compiled to know; the compilation cache keeps the one that is taken.
    """
    if getattr(config, "remat", None) != "auto":
        return config
    began = read_config(home)["config"] if config.resume and (home / "config.json").exists() else {}
    if began.get("remat") in REMATS:  # a run of another script, which has none, is refused later
        return dataclasses.replace(config, remat=began["remat"])
    limit, mesh = room(), sharding.make_mesh(config.mesh, batch_size=config.batch_size)
    for name in REMATS:
        one = dataclasses.replace(config, remat=name)
        if limit is None or name == REMATS[-1]:
            break
        experiment = build(one)
        if needed(Program(experiment, one, experiment.train, steps=10**6, mesh=mesh)) <= limit:
            break
    if processes.first():
        print(f"what the backward pass computes again: {one.remat}")
    return one
