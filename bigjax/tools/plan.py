"""What it would cost: the real train step, compiled for a TPU slice that you don't have, and what bounds it there."""

import dataclasses
import json
import math
import time
from collections.abc import Callable
from typing import Any

import jax
from etils import epath
from rich.console import Console
from rich.table import Table

from bigjax import UsageError, sharding
from bigjax.data import pipeline
from bigjax.experiment import Experiment, RunConfig, check
from bigjax.ops.counted import counting
from bigjax.program import Program, planned_steps
from bigjax.run.flops import flops_of, lower, work
from bigjax.run.frozen import frozen_of
from bigjax.run.memory import REMATS
from bigjax.tools import hlo
from bigjax.tools.slices import GIB, Chip, slice_of

Build = Callable[[Any], Experiment]


def links(mesh: jax.sharding.Mesh, axis: str) -> int:
    """Along how many dimensions of the torus the devices of a mesh axis (or several, as "data × fsdp") lie."""
    names = axis.split(" × ")
    index = tuple(slice(None) if name in names else 0 for name in mesh.shape)
    coords = [d.coords for d in mesh.devices[index].ravel()]
    return max(sum(len(set(c)) > 1 for c in zip(*coords, strict=True)), 1)


def interconnect_seconds(c: hlo.Collective, mesh: jax.sharding.Mesh, chip: Chip) -> float:
    """The least time of all runs of a collective: rings over all links of its axis, in both directions at once."""
    share = {"all-reduce": 2 * (c.group - 1) / c.group, "collective-permute": 1.0}.get(c.kind, (c.group - 1) / c.group)
    return c.count * c.bytes * share / (chip.link * links(mesh, c.axis))


def plan(build: Build, config: RunConfig, *, topology: str) -> dict[str, Any]:
    """What `plan.json` holds. Raises UsageError for a slice or a mesh that cannot be.

    A program that doesn't fit is an answer, not an error: `fits` is false, and what the compiler said stands in for the
    rest. seconds.bound is the largest of compute, hbm and interconnect, as if they overlapped wholly; `exposed` is that
    part of the interconnect's that the compiler let nothing overlap with.
    """
    chip, devices = slice_of(topology)
    if getattr(config, "attention", None) == "auto":
        config = dataclasses.replace(config, attention="splash")
    experiment = build(config)
    mesh = sharding.make_mesh(config.mesh, batch_size=config.batch_size, devices=devices)
    begin = time.perf_counter()
    with counting("run") as other_forms:
        program = Program(experiment, config, experiment.train, steps=config.steps or 1000, mesh=mesh)
        traced = lower(program)
    hardware_flops, model_flops = (
        work(program, what) if other_forms else flops_of(traced) for what in ("hardware", "model")
    )
    state, frozen = jax.tree.leaves(program.state_shapes), frozen_of(program.state_shapes.model_state)
    out: dict[str, Any] = {
        "topology": topology,
        "chips": len(devices),
        "mesh": dict(mesh.shape),
        "batch_size": config.batch_size,
        "parameters": sum(math.prod(x.shape) for x in jax.tree.leaves((program.state_shapes.params, frozen))),
        "state_bytes": sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in state),
        "model_flops_per_step": model_flops,
        "hardware_flops_per_step": hardware_flops,
    }
    try:
        with jax.set_mesh(mesh):
            compiled = traced.lower().compile()
    except jax.errors.JaxRuntimeError as e:
        if "RESOURCE_EXHAUSTED" not in str(e):
            raise
        out["compile_seconds"] = round(time.perf_counter() - begin, 1)
        return out | {"fits": False, "limited_by": "memory", "why": str(e).splitlines()[0]}
    out["compile_seconds"] = round(time.perf_counter() - begin, 1)
    m = compiled.memory_analysis()
    need = {"arguments": m.argument_size_in_bytes, "output": m.output_size_in_bytes - m.alias_size_in_bytes}
    # at the peak; the compiler's temp_size adds up what never lives at the same time, and what lies in fast memory
    need["total"] = m.peak_memory_in_bytes + m.generated_code_size_in_bytes
    need["temporaries"] = need["total"] - need["arguments"] - need["output"]
    module = hlo.parse(compiled.as_text())
    moved = hlo.traffic(module)
    times = [(c, interconnect_seconds(c, mesh, chip)) for c in hlo.collectives(module, mesh)]
    seconds = {
        "compute": hardware_flops / len(devices) / chip.flops,
        "hbm": moved / chip.bandwidth,
        "interconnect": sum(t for _, t in times),
    }
    limited_by = max(seconds, key=seconds.get)
    bound = seconds[limited_by]
    told = ("kind", "axis", "bytes", "count", "dtype")
    steps = planned_steps(config, pipeline.size_of(experiment.train), lambda: bound)
    return out | {
        "hbm_bytes": need | {"capacity": chip.hbm},
        "fits": need["total"] <= chip.hbm,
        "hbm_traffic_bytes": moved,
        "collectives": [{k: getattr(c, k) for k in told} | {"seconds": t} for c, t in times],
        "seconds": seconds | {"exposed": sum(t for c, t in times if c.waits), "bound": bound},
        "limited_by": limited_by,
        "mfu_bound": model_flops / len(devices) / chip.flops / bound,
        "examples_per_second_bound": config.batch_size / bound,
        "steps": steps,
        "chip_hours": steps * bound * len(devices) / 3600,
    }


def show(p: dict[str, Any], console: Console) -> None:
    """The plan as a table."""

    def number(value: float, unit: str = "") -> str:
        for factor, letter in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
            if abs(value) >= factor:
                return f"{value / factor:.3g} {letter}{unit}"
        return f"{value:.3g} {unit}".strip()

    def gib(value: float) -> str:
        return f"{value / GIB:.2f} GiB" if value >= 0.1 * GIB else f"{value / 2**20:.3g} MiB"

    mesh = " × ".join(f"{k} {v}" for k, v in p["mesh"].items())
    rows = [
        ("slice", f"{p['topology']}, {p['chips']} chips as {mesh}, batch {p['batch_size']}"),
        ("parameters", f"{p['parameters']:,}"),
        ("state a chip", gib(p["state_bytes"])),
        ("FLOPs a step", f"{number(p['model_flops_per_step'])} model, {number(p['hardware_flops_per_step'])} computed"),
    ]
    rows += [("remat", p["remat"])] if "remat" in p else []  # where it was chosen here
    if "hbm_bytes" not in p:
        rows += [("fits", f"no: {p['why']}"), ("compiled in", f"{p['compile_seconds']} s")]
    else:
        need, s = p["hbm_bytes"], p["seconds"]
        rows += [
            ("HBM a chip", f"{gib(need['arguments'])} arguments + {gib(need['temporaries'])} temporaries + "
             f"{gib(need['output'])} output = {gib(need['total'])} of {gib(need['capacity'])}"),
            ("fits", "yes" if p["fits"] else "no"),
            ("compute", f"{s['compute'] * 1e3:.3g} ms a step"),
            ("HBM traffic", f"{s['hbm'] * 1e3:.3g} ms: {number(p['hbm_traffic_bytes'], 'B')}"),
            ("interconnect", f"{s['interconnect'] * 1e3:.3g} ms, {s['exposed'] * 1e3:.3g} overlap with nothing"),
            ("bound", f"{s['bound'] * 1e3:.3g} ms a step at least, limited by {p['limited_by']}"),
            ("MFU", f"{p['mfu_bound']:.1%} at most"),
            ("speed", f"{number(p['examples_per_second_bound'])} examples/s at most"),
            ("whole run", f"{p['steps']:,} steps, {p['chip_hours']:,.3g} chip-hours at least"),
            ("compiled in", f"{p['compile_seconds']} s"),
        ]  # fmt: skip
    table = Table.grid(padding=(0, 2))
    for name, text in rows:
        table.add_row(name, text)
    console.print(table)
    if not p.get("collectives"):
        return
    table = Table("collective", "along", "bytes each", "times a step", "ms a step", box=None)
    for c in p["collectives"][:12]:
        table.add_row(c["kind"], c["axis"], number(c["bytes"], "B"), str(c["count"]), f"{c['seconds'] * 1e3:.3g}")
    console.print(table)
    if more := p["collectives"][12:]:
        console.print(f"and {len(more)} smaller, {sum(c['seconds'] for c in more) * 1e3:.3g} ms")


def settings(config: RunConfig) -> list[dict[str, Any]]:
    """From the fastest to the one that needs the least memory: rematerialization, then parts of the batch."""
    remats = [{"remat": name} for name in REMATS] if hasattr(config, "remat") else [{}]
    return remats + [{**remats[-1], "accumulate": n} for n in (2, 4) if config.batch_size % n == 0]


def search(build: Build, config: RunConfig, *, topology: str, tell: Callable[[str], None]) -> list[dict[str, Any]]:
    """Plans of all meshes of a slice, each at the fastest setting that fits; the fastest first, then what can't be."""
    count = len(slice_of(topology)[1])
    ways = [n for n in range(1, count + 1) if count % n == 0]
    meshes = [sharding.MeshConfig(count // f // t, f, t) for f in ways for t in ways if count % (f * t) == 0]
    found = []
    for mesh in meshes:
        for setting in settings(config):
            name = {"mesh": dataclasses.asdict(mesh), **setting}
            try:
                one = plan(build, dataclasses.replace(config, mesh=mesh, **setting), topology=topology)
            except UsageError as e:
                one = {"fits": False, "why": str(e)}
            said = f"{one['seconds']['bound'] * 1e3:.3g} ms" if one["fits"] else one.get("why", "too large")
            parts = [f"{k} {v}" for k, v in {**name["mesh"], **setting}.items()]
            tell(f"{' · '.join(parts)}: {said}")
            if one["fits"] or "limited_by" not in one:  # it fits, or no setting would help
                break
        found.append(one | name)
    return sorted(found, key=lambda p: (not p["fits"], p["seconds"]["bound"] if p["fits"] else 0))


def write_plan(build: Build, config: RunConfig, *, topology: str, home: epath.Path, everywhere: bool = False) -> None:
    """Prints the table and writes plan.json into the working directory; `everywhere`: of the best mesh, with all."""
    check(config)
    jax.config.update("jax_platforms", "cpu")  # the slice is only compiled for; accelerators here are left to others
    console = Console(width=110)
    if everywhere:
        tried = search(build, config, topology=topology, tell=print)
        keys = ("mesh", "remat", "accumulate", "fits", "why", "seconds", "mfu_bound", "hbm_bytes")
        result = tried[0] | {"search": [{k: p[k] for k in keys if k in p} for p in tried]}
        if not result["fits"]:
            raise UsageError(f"no mesh of {topology} fits: take a larger slice, or a smaller batch or model")
    elif getattr(config, "remat", None) == "auto":
        plans = (
            plan(build, dataclasses.replace(config, remat=name), topology=topology) | {"remat": name} for name in REMATS
        )
        result = next(p for p in plans if p["fits"] or p["remat"] == REMATS[-1])
    else:
        result = plan(build, config, topology=topology)
    show(result, console)
    home.mkdir(parents=True, exist_ok=True)
    (home / "plan.json").write_text(json.dumps(result, indent=1) + "\n")
    print(f"written to {home / 'plan.json'}")
