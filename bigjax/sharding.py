"""Where it lives: the mesh, and the placement of states and batches. The only file that knows PartitionSpec.

Mesh axes: `data` and `fsdp` split the batch; `tensor` is reserved for splitting layers.
"""

from dataclasses import dataclass
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from bigjax import UsageError

BATCH = PartitionSpec(("data", "fsdp"))


@dataclass(frozen=True)
class MeshConfig:
    """Devices along each axis; −1 means all that the others leave."""

    data: int = -1
    fsdp: int = 1
    tensor: int = 1


def make_mesh(config: MeshConfig, *, batch_size: int) -> Mesh:
    """A mesh over all devices.

    Raises UsageError where the axes do not multiply to the number of devices, or do not divide the batch.
    """
    sizes = {"data": config.data, "fsdp": config.fsdp, "tensor": config.tensor}
    devices = jax.devices()
    count, free = len(devices), [k for k, v in sizes.items() if v == -1]
    bad = [f"mesh.{k} {v}" for k, v in sizes.items() if v < 1 and v != -1]
    if bad:
        raise UsageError(f"{bad[0]}: an axis is a number of devices, or -1 for all that is left")
    if len(free) > 1:
        raise UsageError(f"mesh.{free[0]} and mesh.{free[1]} are both -1: give one of them a number")
    if sizes["fsdp"] != 1 or sizes["tensor"] != 1:
        raise UsageError("nothing is sharded over mesh.fsdp or mesh.tensor yet: use --mesh.data alone")
    fixed = int(np.prod([v for v in sizes.values() if v != -1]))
    if free:
        sizes[free[0]] = max(count // fixed, 1)
    total = int(np.prod(list(sizes.values())))
    if total != count:
        shape = " × ".join(f"{k} {v}" for k, v in sizes.items())
        raise UsageError(f"the mesh ({shape} = {total}) does not cover the {count} devices: use --mesh.data {count}")
    ways = sizes["data"] * sizes["fsdp"]
    if batch_size % ways:
        low = batch_size // ways * ways
        near = f"{low} or {low + ways}" if low else f"{ways}"
        raise UsageError(f"batch_size {batch_size} is not divisible by the data axis ({ways}): use {near}")
    return Mesh(np.asarray(devices).reshape(tuple(sizes.values())), tuple(sizes))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows of a batch split over data × fsdp."""
    return NamedSharding(mesh, BATCH)


def placed(shapes: Any, mesh: Mesh) -> Any:
    """A tree of shapes, each with its sharding: replicated."""
    everywhere = NamedSharding(mesh, PartitionSpec())
    return jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=everywhere), shapes)


def put_batch(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """This process's rows of a global batch, placed on its devices."""
    sharding = batch_sharding(mesh)
    return {k: jax.make_array_from_process_local_data(sharding, v) for k, v in batch.items()}


def constrain(x: jax.Array, axis: Literal["batch"]) -> jax.Array:
    """Keeps the leading axis of an activation split as the batch is; without a mesh it does nothing."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or axis != "batch":
        return x
    return jax.lax.with_sharding_constraint(x, BATCH)
