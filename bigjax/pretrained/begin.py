"""What a run begins with: the weights of a folder, under a head of its own. It is what scripts give for --pretrained.

    begun = begin.weights("folder", ViT)
    model = begun.model.clone(outputs=data.classes)
    Experiment(task=classify(model, ...), initial=begun, ...)

A new run takes each array straight to where the state has it; one that is resumed has its own. The checksum of the
tensors is part of the run's identity.
"""

import dataclasses
import math
import re
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import flax.traverse_util
import jax
import numpy as np

from bigjax import UsageError
from bigjax.models.adapt import ADAPTER
from bigjax.pretrained.families import Config, Family, family_of
from bigjax.pretrained.names import flat, shapes_of
from bigjax.pretrained.reading import array, matched, model_of
from bigjax.pretrained.store import CONFIG, Tensors, config_of, folder_of, read_json
from bigjax.step import TrainState, averages_of

HEADS = {"logits", "teacher_logits", "pooler"}  # modules that a run may begin afresh, for other classes or another task
PIXELS = "preprocessor_config.json"
FIRST = 2**16  # bytes of each tensor that a fingerprint sums up


@dataclasses.dataclass(frozen=True)
class Weights:
    """`Experiment.initial` of a folder.

    model: the folder's own, with its head; clone it with another number of outputs, dropout, scan, dtype, ...; of
        images with mean and std as the folder has them, three numbers each, so that grey images become coloured.
    side: pixels that its images had a side; None where the folder doesn't say.
    """

    folder: Path
    model: nn.Module
    side: int | None = None

    def __call__(self, state: TrainState, *, player: str = "model") -> tuple[TrainState, str]:
        """The state with the folder's parameters and statistics, and a line that says so.

        A head is left as initialized where the folder has none, or one of another shape: for as many classes it is
        kept, also if they are others. What is frozen is the folder's too, and adapters begin as initialized
        (`models.adapt`). UsageError: anything else doesn't fit, or a frozen head would be new.
        """
        collections = {"params": state.params[player], **state.model_state.get(player, {})}
        every = flat({k: v for k, v in collections.items() if k in ("params", "batch_stats", "frozen")})
        plain = {where: re.sub("^frozen/", "params/", where) for where in every if not ADAPTER.search(where)}
        ours = {where: every[where] for where in plain}
        stacked = any("layers" in where.split("/") for where in ours)
        model = self.model.clone(scan=stacked) if hasattr(self.model, "scan") else self.model
        tensors, family = Tensors(self.folder), family_of(config_of(self.folder), self.folder)
        shapes = shapes_of(model, family.inputs(model))
        found, real = matched(family, model, tensors, shapes)
        there = {where: leaf.shape for where, leaf in flat(shapes).items()}
        lacking = [where for where, leaf in ours.items() if there.get(plain[where]) != leaf.shape]
        if odd := [where for where in lacking if not HEADS & {*where.split("/")}]:
            told = ", ".join(
                f"{where} {list(ours[where].shape)} ({there.get(plain[where], 'none')} there)" for where in odd
            )
            raise UsageError(f"the weights in {self.folder} are not those of this model: {told}; give others")
        if new := [where.removeprefix("frozen/") for where in lacking if where.startswith("frozen/")]:
            told, ask = ", ".join(new), "|".join(sorted(HEADS & {*"/".join(new).split("/")}))
            raise UsageError(f"{told} would be new, and frozen as it is: train it too, --train '{ask}'")
        taken = {
            where: array(leaf, found[plain[where]], tensors, real)
            for where, leaf in ours.items()
            if where not in lacking
        }
        trees = flax.traverse_util.unflatten_dict({**every, **taken}, sep="/")
        params = {**state.params, player: trees.pop("params")}
        model_state = {**state.model_state, player: {**state.model_state.get(player, {}), **trees}}
        ema = jax.tree.map(jax.numpy.copy, averages_of(params, model_state)) if state.ema else state.ema
        said = f"took {len(taken)} of {len(ours)} arrays from {self.folder}"
        if lacking:
            said += f"; as initialized: {', '.join(f'{where} {ours[where].shape}' for where in lacking)}"
        return state.replace(params=params, model_state=model_state, ema=ema), said

    def fingerprint(self) -> dict[str, Any]:
        """Of the tensors, in the form of a split's: how many, and a checksum of their names and first bytes."""
        tensors, crc = Tensors(self.folder), 0
        for name in sorted(tensors.places):
            part = np.ascontiguousarray(tensors.read(name).reshape(-1)[:FIRST]).view(np.uint8)[:FIRST]
            crc = zlib.crc32(part, zlib.crc32(name.encode(), crc))
        return {"rows": len(tensors.places), "checksums": {"all": crc}}


def weights(source: Any, *kinds: type[nn.Module], like: Mapping[str, Any] | None = None) -> Weights | None:
    """The weights of a folder, or a hub id, to begin with, None of None; only headers of its tensors are read yet.

    kinds: classes of ours that will do; all that there are if none is given. like: fields that the model must have.
    Size, mean and deviation of images are those of preprocessor_config.json, or of timm's config.json; where neither
    says, mean and deviation are ImageNet's. UsageError: another kind of model, or what `load` refuses.
    """
    if source is None:
        return None
    folder = folder_of(source)
    config = config_of(folder)
    family = family_of(config, folder)
    if kinds and family.kind not in kinds:
        names = " or ".join(kind.__name__ for kind in kinds)
        raise UsageError(
            f"{folder} holds {family.kind.__name__} ({family.architecture(config)}), where {names} is wanted: give a "
            "folder with that"
        )
    tensors = Tensors(folder)
    model = model_of(family, config, tensors)
    if odd := [f"{k} {getattr(model, k)}, not {v}" for k, v in (like or {}).items() if getattr(model, k) != v]:
        raise UsageError(
            f"{folder} holds a {family.kind.__name__} with {'; '.join(odd)}: leave out what asks for that, or give "
            "another folder"
        )
    matched(family, model, tensors, shapes_of(model, family.inputs(model)))
    if not hasattr(model, "mean"):
        return Weights(folder, model)
    side, mean, std = pixels(folder, config, family)
    return Weights(folder, model.clone(mean=mean, std=std), side or getattr(model, "image", None))


def pixels(folder: Path, config: Config, family: Family) -> tuple[int | None, tuple[float, ...], tuple[float, ...]]:
    """(side, mean, std) of the images that a folder's model saw, side None where nothing is said of it."""
    where, said = CONFIG, config.get("pretrained_cfg") or config
    side = said.get("input_size")
    if (folder / PIXELS).is_file():
        where, given = PIXELS, read_json(folder / PIXELS)
        said = {k: given[f"image_{k}"] for k in ("mean", "std") if given.get(f"image_{k}") is not None}
        if not given.get("do_normalize", True):
            said = {"mean": (0.0,) * 3, "std": (1.0,) * 3}
        side = (given.get("do_center_crop") and given.get("crop_size")) or given.get("size")
    if isinstance(side, dict):
        side = side.get("height", side.get("shortest_edge"))
    side = side[-1] if isinstance(side, list) and side else side
    if not (side is None or (isinstance(side, int) and side > 0)):
        raise UsageError(f"{folder}/{where} says that images have size {side!r}, which is none: correct it")
    found = []
    for name, usual in zip(("mean", "std"), family.pixels):
        value = said.get(name, usual)
        numbers = isinstance(value, list | tuple) and all(isinstance(v, int | float) for v in value)
        if not numbers or len(value) != 3 or not all(map(math.isfinite, value)) or (name == "std" and min(value) <= 0):
            raise UsageError(f"{folder}/{where} says that the {name} is {value!r}, not three numbers: correct it")
        found.append(tuple(map(float, value)))
    return side, *found
