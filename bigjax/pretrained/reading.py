"""Loading: a folder's tensors become a model's variables, a tensor at a time, each straight to where it lives."""

import re
from collections.abc import Mapping
from typing import Any

import flax
import flax.linen as nn
import jax
import numpy as np
from jax.sharding import Mesh

from bigjax import UsageError, sharding
from bigjax.pretrained import copying
from bigjax.pretrained.families import Config, Family, family_of
from bigjax.pretrained.names import Index, Source, flat, shapes_of, sources
from bigjax.pretrained.store import INTEGERS, Tensors, config_of, folder_of

KINDS = ("float32", "bfloat16", "float16")


def load(
    source: Any,
    *,
    dtype: str = "float32",
    param_dtype: str = "float32",
    mesh: Mesh | None = None,
    rules: sharding.Rules = sharding.RULES,
    **fields: Any,
) -> tuple[nn.Module, dict[str, Any]]:
    """(model, variables) of a folder with config.json and safetensors, or of a hub id (owner/name, extra `hub`).

    The head is that of config.json's `architectures`. dtype: what is computed in; param_dtype: what parameters are kept
    in. fields: of the model, as scan=True. With a mesh each device gets its own part, by `rules`, and no host or device
    ever holds all; without, all goes to the first device.

        model, variables = bigjax.pretrained.load("gpt2")
        logits_BLV = model.apply(variables, tokens_BL)

    UsageError where config.json or the tensors are not those of a model that is known here; all that don't fit are
    listed.
    """
    for name in (dtype, param_dtype):
        if name not in KINDS:
            raise UsageError(
                f"dtype {name!r} is none that models are computed or kept in: use one of {', '.join(KINDS)}"
            )
    folder = folder_of(source)
    config = config_of(folder)
    family = family_of(config, folder)
    tensors = Tensors(folder)
    model = model_of(family, config, tensors, dtype=dtype, **fields)
    shapes = shapes_of(model, family.inputs(model))
    shapes = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, param_dtype), shapes)
    found, real = matched(family, model, tensors, shapes)
    placed = flat(shapes if mesh is None else sharding.place(shapes, mesh, rules=rules))
    arrays = {where: array(leaf, found[where], tensors, real) for where, leaf in placed.items()}
    return model, flax.traverse_util.unflatten_dict(arrays, sep="/")


def array(leaf: Any, source: Source, tensors: Tensors, real: Mapping[str, str]) -> jax.Array:
    """An array of the shape, dtype and sharding of `leaf`, each device given its part; without one on the first.

    real: names in the table -> those in the files. One shard at a time is in this memory, and it is no page of a file:
    that may change, and a step may write over what it is given.
    """

    def part(index: Index) -> np.ndarray:
        stack, views = source.read(index, lambda name, at: tensors.read(real[name], at))
        out = copying.empty((*stack, *views[0].shape), leaf.dtype)
        copying.fill((out[*at, ...], view) for at, view in zip(np.ndindex(stack), views))
        return out

    if leaf.sharding is None:
        return jax.block_until_ready(jax.device_put(part((slice(None),) * len(leaf.shape))))
    shards: dict[str, tuple[Index, list[jax.Device]]] = {}
    for device, index in leaf.sharding.addressable_devices_indices_map(leaf.shape).items():
        shards.setdefault(str(index), (index, []))[1].append(device)
    held = []
    for index, (first, *others) in shards.values():
        shard = jax.block_until_ready(jax.device_put(part(index), first))
        held += [shard, *(jax.device_put(shard, device, may_alias=False) for device in others)]
    return jax.make_array_from_single_device_arrays(leaf.shape, leaf.sharding, held)


def model_of(family: Family, config: Config, tensors: Tensors, **fields: Any) -> nn.Module:
    """The module that config.json describes."""
    try:
        return family.kind(**(family.read(config, set(tensors.places)) | fields))
    except (KeyError, TypeError, ValueError) as e:
        raise UsageError(f"config.json and these fields make no {family.kind.__name__} ({e}): correct them") from None


def matched(
    family: Family, model: nn.Module, tensors: Tensors, shapes: Any
) -> tuple[dict[str, Source], dict[str, str]]:
    """(our path -> source, name in the table -> name in the files); UsageError lists whatever doesn't fit."""
    real = {}
    for name in tensors.places:
        given = name
        for pattern, ours in family.ours:
            given = re.sub(pattern, ours, given)
        real[given] = name
    found = sources(family.table(model, set(real)), shapes)
    needed = {name: source.shape for source in found.values() for name in source.theirs}
    for name in {name for source in found.values() if source.merged for name in source.theirs} & real.keys():
        tensors.merge(real[name], needed[name])
    missing = sorted(needed.keys() - real.keys())
    twice = {copy: first for copy, first in family.same if copy in real.keys() - needed.keys() and first in real}
    for copy, first in twice.items():
        if not tensors.equal(real[copy], real[first]):
            raise UsageError(
                f"{real[copy]} in {tensors.folder} is not {real[first]}, which its config.json says it is: set "
                "tie_word_embeddings to false there, or get both from one place"
            )
    extra = real.keys() - needed.keys() - twice.keys()
    extra = sorted(n for n in extra if not any(re.search(p, n) for p in family.ignored))
    shapes_there = {name: tensors.shape(real[name]) for name in needed.keys() & real.keys()}
    misshapen = [
        f"{name} {list(shape)} for {list(needed[name])}"
        for name, shape in shapes_there.items()
        if shape != needed[name]
    ]
    whole = sorted(name for name in shapes_there if tensors.places[real[name]][2] in INTEGERS)
    wrong = {"missing": missing, "not of this model": extra, "of another shape": sorted(misshapen)}
    wrong |= {"of integers": whole}
    if said := "; ".join(f"{len(names)} {what}: {', '.join(names)}" for what, names in wrong.items() if names):
        raise UsageError(
            f"the tensors in {tensors.folder} are not those that its config.json describes ({said}): get both from one "
            "place"
        )
    return found, real


def described(source: Any) -> list[tuple[str, str]]:
    """What a folder holds, as (what, value), of headers alone; UsageError where it can't be loaded."""
    folder = folder_of(source)
    config = config_of(folder)
    family = family_of(config, folder)
    tensors = Tensors(folder)
    model = model_of(family, config, tensors)
    shapes = shapes_of(model, family.inputs(model))
    matched(family, model, tensors, shapes)
    count = sum(leaf.size for leaf in jax.tree.leaves(shapes))
    sizes = ", ".join(f"{_size(count * size)} as {name}" for name, size in (("float32", 4), ("bfloat16", 2)))
    head = {"head": f"{model.head}"} if isinstance(getattr(model, "head", None), str) else {}
    vocabulary = getattr(model, "vocabulary", None)
    return [
        ("architecture", f"{family.architecture(config)} -> bigjax.models.{type(model).__name__}"),
        *head.items(),
        ("parameters", f"{count:,}"),
        *([("vocabulary", f"{vocabulary:,}")] if vocabulary else []),
        ("kept as", ", ".join(tensors.dtypes())),
        ("memory", sizes),
        ("loads", "yes: all names and shapes are those of the model"),
    ]


def _size(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.2f} MiB"
