"""Where it lives: the mesh, and the placement of states and batches. The only file that knows PartitionSpec.

Mesh axes: `data` and `fsdp` split the batch; `fsdp` splits parameters, moments and averages too, each gathered where
it is used (ZeRO stage 3, Rajbhandari et al. 2020); `tensor` splits layers (Megatron-LM, Shoeybi et al. 2019).
"""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from bigjax import UsageError

BATCH = PartitionSpec(("data", "fsdp"))
WHOLE = PartitionSpec()
SMALL = 2**16  # numbers of an array that every device may hold whole where fsdp divides none of its dimensions

# A rule says of the leaves whose path matches a regex which mesh axis splits which dimension. It is aligned to the
# trailing dimensions, so that it serves single and stacked layers, and a leaf with fewer is left to the next rule.
# Where the spec doesn't name it, fsdp splits the largest dimension that is still whole and that it divides; "fsdp"
# alone is just that; None keeps the leaf whole. Optimizer moments and averages follow their parameters, since their
# paths end in the same words.
Spec = tuple[str | None, ...] | Literal["fsdp"] | None
Rules = Sequence[tuple[str, Spec]]

RULES: Rules = (
    # Transformers: q, k, v, up, gate by their outputs, o and down by their inputs, the vocabulary by its tokens
    (r"\b(q|k|v|up|gate)/(kernel|lora_b)$", (None, "tensor")),
    (r"\b(q|k|v|up|gate)/bias$", ("tensor",)),
    (r"\b(o|down)/(kernel|lora_a)$", ("tensor", None)),
    (r"\bunembedding/kernel$", (None, "tensor")),
    (r"\bembedding/embedding$", ("tensor", None)),
    # recurrent layers by their units; gates have an axis of their own
    (r"\b(input|recurrent)_kernel$", (None, None, "tensor")),
    (r"\blayer_\d+(_reverse)?/(recurrent_)?bias$", (None, "tensor")),
    # dense layers in turn by their outputs and by their inputs
    (r"\bdense_\d*[02468]/kernel$", (None, "tensor")),
    (r"\bdense_\d*[02468]/bias$", ("tensor",)),
    (r"\bdense_\d*[13579]/kernel$", ("tensor", None)),
    (r"", "fsdp"),
)


@dataclass(frozen=True)
class MeshConfig:
    """Devices along each axis; −1 means all that the others leave."""

    data: int = -1  # splits the batch
    fsdp: int = 1  # splits the batch, and parameters, moments and averages
    tensor: int = 1  # splits layers: heads, hidden units, the vocabulary


@dataclass(frozen=True)
class DistributedConfig:
    """This process among those that train together; unset where the launcher (Cloud TPU, SLURM, ...) says it."""

    coordinator: str | None = None  # HOST:PORT of process 0
    processes: int | None = None  # how many; 1: alone, whatever the launcher says
    index: int | None = None  # of this one, from 0
    timeout: int = 120  # seconds to wait at the start for the others


def make_mesh(config: MeshConfig, *, batch_size: int, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh over all devices (or those given), neighbours on the machine's network being neighbours on its axes.

    Raises UsageError where the axes do not multiply to the number of devices, or do not divide the batch.
    """
    sizes = {"data": config.data, "fsdp": config.fsdp, "tensor": config.tensor}
    devices = jax.devices() if devices is None else devices
    count, free = len(devices), [k for k, v in sizes.items() if v == -1]
    bad = [f"mesh.{k} {v}" for k, v in sizes.items() if v < 1 and v != -1]
    if bad:
        raise UsageError(f"{bad[0]}: an axis is a number of devices, or -1 for all that is left")
    if len(free) > 1:
        raise UsageError(f"mesh.{free[0]} and mesh.{free[1]} are both -1: give one of them a number")
    fixed = math.prod(v for v in sizes.values() if v != -1)
    if free:
        sizes[free[0]] = max(count // fixed, 1)
    if math.prod(sizes.values()) != count:
        shape = " × ".join(f"{k} {v}" for k, v in sizes.items())
        split = sizes["fsdp"] * sizes["tensor"]
        use = f"--mesh.data {count // split}" if count % split == 0 else "fsdp and tensor whose product divides that"
        raise UsageError(
            f"the mesh ({shape} = {math.prod(sizes.values())}) does not cover the {count} devices: use {use}"
        )
    ways = sizes["data"] * sizes["fsdp"]
    if batch_size % ways:
        low = batch_size // ways * ways
        near = f"{low} or {low + ways}" if low else f"{ways}"
        axes = "data axis" if sizes["fsdp"] == 1 else "data × fsdp axes"
        raise UsageError(f"batch_size {batch_size} is not divisible by the {axes} ({ways}): use {near}")
    from jax.experimental import mesh_utils  # here, since models import this file

    return Mesh(mesh_utils.create_device_mesh(tuple(sizes.values()), devices=devices), tuple(sizes))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows of a batch split over data × fsdp."""
    return NamedSharding(mesh, BATCH)


def everywhere(mesh: Mesh) -> NamedSharding:
    """Whole on every device."""
    return NamedSharding(mesh, WHOLE)


def replicated(shapes: Any, mesh: Mesh) -> Any:
    """A tree of shapes, each with its sharding: whole on every device."""
    return jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=everywhere(mesh)), shapes)


def place(shapes: Any, mesh: Mesh, *, rules: Rules = RULES) -> Any:
    """A tree of shapes, each with its sharding by the first rule that matches its path.

    Raises UsageError, with the path, for a leaf that no rule matches, a dimension that its axis doesn't divide, an axis
    named twice; and for an axis of the mesh along which nothing is split.
    """
    compiled = [(re.compile(pattern), spec) for pattern, spec in rules]
    used = {"data"}

    def one(path: tuple[Any, ...], leaf: Any) -> jax.ShapeDtypeStruct:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        spec = spec_of(name, leaf.shape, mesh, compiled)
        used.update(axis for axis in spec if axis)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))

    placed = jax.tree_util.tree_map_with_path(one, shapes)
    if idle := [axis for axis, size in mesh.shape.items() if size > 1 and axis not in used]:
        more = " and ".join(f"--mesh.{axis} 1" for axis in idle)
        raise UsageError(f"nothing in this model is split over mesh.{idle[0]}: use {more}, and --mesh.data -1")
    return placed


def spec_of(name: str, shape: tuple[int, ...], mesh: Mesh, rules: Sequence[tuple[re.Pattern, Spec]]) -> PartitionSpec:
    """How one leaf is split; axes of size 1 are left out."""
    if not shape:
        return WHOLE
    fits = (s for pattern, s in rules if pattern.search(name) and (not isinstance(s, tuple) or len(s) <= len(shape)))
    spec = next(fits, "unmatched")
    if spec == "unmatched":
        raise UsageError(f'no sharding rule matches {name} {shape}: add one, or ("", "fsdp") at the end')
    if spec is None:
        return WHOLE
    named = () if spec == "fsdp" else spec
    axes = [None] * (len(shape) - len(named)) + [axis if mesh.shape.get(axis, 1) > 1 else None for axis in named]
    for axis, size in mesh.shape.items():
        if axes.count(axis) > 1:
            raise UsageError(f"the sharding rule of {name} {shape} uses mesh.{axis} twice: split one dimension by it")
        dim = axes.index(axis) if axis in axes else None
        if dim is not None and shape[dim] % size:
            raise UsageError(
                f"dimension {dim} of {name} {shape} is not divisible by mesh.{axis} ({size}): use --mesh.{axis} "
                f"{math.gcd(shape[dim], size)}"
            )
    fsdp = mesh.shape["fsdp"]
    if fsdp == 1 or "fsdp" in named:
        return PartitionSpec(*axes)
    first = int("layers" in name.split("/"))  # a scanned stack is sliced along its leading axis: it stays whole
    free = [d for d in range(first, len(shape)) if axes[d] is None]
    if able := [d for d in free if shape[d] % fsdp == 0]:
        axes[max(able, key=lambda d: shape[d])] = "fsdp"
    elif free and math.prod(shape[first:]) > SMALL:
        best = max(math.gcd(shape[d], fsdp) for d in free)
        raise UsageError(f"no dimension of {name} {shape} is divisible by mesh.fsdp ({fsdp}): use --mesh.fsdp {best}")
    return PartitionSpec(*axes)


def check_heads(model: Any, mesh: Mesh) -> None:
    """Raises UsageError where the tensor axis would split an attention head."""
    tensor = mesh.shape["tensor"]
    for field in ("heads", "kv_heads"):
        heads = getattr(model, field, None)
        if heads and heads % tensor:
            raise UsageError(
                f"{field} {heads} of {type(model).__name__} is not divisible by mesh.tensor ({tensor}): use "
                f"--mesh.tensor {math.gcd(heads, tensor)}"
            )


def rows_here(mesh: Mesh, batch_size: int) -> np.ndarray:
    """Which rows of a global batch the devices of this process hold, in rising order."""
    places = batch_sharding(mesh).addressable_devices_indices_map((batch_size,))
    return np.unique(np.concatenate([np.arange(batch_size)[i] for i in places.values()]))


def batch_shapes(batch: dict[str, np.ndarray], mesh: Mesh, *, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes and placement of a global batch with the fields of `batch`."""
    where = batch_sharding(mesh)
    return {
        k: jax.ShapeDtypeStruct((batch_size, *v.shape[1:]), jax.dtypes.canonicalize_dtype(v.dtype), sharding=where)
        for k, v in batch.items()
    }


def put_batch(
    batch: dict[str, np.ndarray], mesh: Mesh, batch_size: int, *, stacked: bool = False
) -> dict[str, jax.Array]:
    """A global batch, of which `batch` has the rows of `rows_here`, placed on the devices; or several, `stacked`."""
    axis, where = int(stacked), NamedSharding(mesh, PartitionSpec(None, *BATCH) if stacked else BATCH)
    full = lambda x: (*x.shape[:axis], batch_size, *x.shape[axis + 1 :])  # noqa: E731
    with jax.transfer_guard("allow"):  # among processes JAX itself does not say that it means to
        return {k: jax.make_array_from_process_local_data(where, x, full(x)) for k, x in batch.items()}


def to_host(tree: Any) -> Any:
    """The same as NumPy arrays. What lies on several processes all must ask for, an array after the other."""

    def one(x: Any) -> np.ndarray:
        if not isinstance(x, jax.Array) or x.is_fully_addressable or x.is_fully_replicated:
            return np.asarray(x)
        from jax.experimental import multihost_utils  # here, since models import this file

        return multihost_utils.process_allgather(x, tiled=True)

    with jax.transfer_guard("allow"):
        return jax.tree.map(one, tree)


def our_mesh() -> Any:
    """The mesh that is set, if it has our axes: a model in a foreign one (or under pmap) is left alone."""
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty or "data" not in mesh.shape else mesh


def constrain(x: jax.Array, axis: Literal["batch", "residual", "heads"]) -> jax.Array:
    """Keeps an activation split as the batch is; without a mesh it does nothing.

    batch: its leading axis. residual: the stream between a Transformer's blocks, whose width is split over `tensor`
    too, so that what the backward pass needs of it is not kept whole on every device of that axis (as Megatron-LM's
    sequence parallelism does along the length; Korthikanti et al. 2022). heads: a cache's, (batch, heads, …), too.
    """
    mesh = our_mesh()
    if mesh is None:
        return x
    split = {"residual": (None, "tensor"), "heads": ("tensor",)}.get(axis, ())
    whole = mesh.shape["tensor"] == 1 or x.shape[len(split)] % mesh.shape["tensor"]
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*BATCH, *(() if whole else split)))


def splits_rows_and_heads(batch: int, heads: int) -> bool:
    """Whether the mesh that is set, if any, divides so many rows and attention heads."""
    mesh = our_mesh()
    return mesh is None or (
        batch % (mesh.shape["data"] * mesh.shape["fsdp"]) == 0 and heads % mesh.shape["tensor"] == 0
    )


Axes = tuple[Literal["rows", "heads"] | None, ...]


def locally(function: Callable[..., Any], inputs: Sequence[Axes], output: Axes) -> Callable[..., Any]:
    """A function that every device runs on its own rows and heads, of inputs and an output whose axes are these.

    For kernels, which the compiler cannot split by itself. Without a mesh it is the function itself.
    """
    if our_mesh() is None:
        return function
    axes = {"rows": ("data", "fsdp"), "heads": "tensor", None: None}
    specs = [PartitionSpec(*(axes[kind] for kind in kinds)) for kinds in (*inputs, output)]
    return jax.shard_map(function, in_specs=tuple(specs[:-1]), out_specs=specs[-1], check_vma=False)
