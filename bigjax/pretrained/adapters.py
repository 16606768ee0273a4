"""Adapters apart from the model that they were trained on: a small file, and the hash of what it belongs to.

model, variables = bigjax.load("runs/gpt_finetune")         # an Adapted model
adapters.save("shakespeare", model, variables)
model, variables = adapters.load("shakespeare", "folder")   # onto its base, and no other
plain, merged = model.merged(variables)
pretrained.save("merged", plain, merged)                    # a folder that transformers reads
"""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import flax
import flax.linen as nn
import jax
import numpy as np

from bigjax import UsageError, place
from bigjax.experiment import NonNegative, Positive
from bigjax.models.adapt import Adapted
from bigjax.pretrained.names import flat
from bigjax.pretrained.reading import load as load_folder
from bigjax.pretrained.store import Tensors, read_json, write_folder
from bigjax.sharding import to_host

ABOUT, ARRAYS = "adapter.json", "adapter.safetensors"
MATRICES = r"\b(q|k|v|o|up|gate|down)/kernel$"  # of our Transformers all that their layers have


@dataclass(frozen=True)
class Adapt:
    """What is trained, of a model that is there already: a group of flags. Called with the model, it is what trains."""

    lora_rank: Annotated[int, NonNegative] = 0  # train adapters of this rank beside matrices, all else frozen; 0: none
    lora_alpha: Annotated[float, Positive] = 16.0  # an adapter's product is scaled by alpha / rank
    lora_on: str | None = None  # regex of the matrices (attention/(q|v)/kernel); else all of a Transformer's layers
    train: str | None = None  # regex of parameters that are trained themselves, all others frozen

    def __call__(self, model: nn.Module) -> nn.Module:
        if self.lora_on is not None and not self.lora_rank:
            raise UsageError("--lora-on is where adapters go, and there are none without a rank: add --lora-rank 8")
        if self.train is None and not self.lora_rank:
            return model
        on = (MATRICES if self.lora_on is None else self.lora_on) if self.lora_rank else None
        return Adapted(model, train=self.train, on=on, rank=self.lora_rank or 8, alpha=self.lora_alpha)


def save(folder: Any, model: nn.Module, variables: Mapping[str, Any]) -> None:
    """Writes what was trained: adapter.safetensors, and adapter.json with what it is and the hash of what was frozen.

    Of several processes all must call it, and the first writes. UsageError: the model is no `Adapted`.
    """
    if not isinstance(model, Adapted):
        raise UsageError(f"a {type(model).__name__} has no adapters: give what was trained, an Adapted model")
    learnt = flat(variables["params"])
    about = {k: getattr(model, k) for k in ("train", "on", "rank", "alpha")}
    about |= {"base": base_hash(variables["frozen"]), "model": type(model.model).__name__}
    about |= {"scan": any("layers" in where.split("/") for where in learnt)}
    rows = [(k, x.shape, x.dtype, lambda x=x: to_host(x)) for k, x in learnt.items()]
    write_folder(folder, ARRAYS, rows, ABOUT, about)


def load(folder: Any, base: Any, **fields: Any) -> tuple[Adapted, dict[str, Any]]:
    """(model, variables) of adapters on their base: a folder or hub id (`pretrained.load`, which takes the fields), or
    (model, variables).

    UsageError: no adapters there, or those of another base.
    """
    path = Path(place(folder))
    if not (path / ABOUT).is_file() or not (path / ARRAYS).is_file():
        raise UsageError(f"{path} holds no {ABOUT} and {ARRAYS}: give a folder that adapters.save wrote")
    about, tensors = read_json(path / ABOUT), Tensors(path)
    if lost := [k for k in ("train", "on", "rank", "alpha", "base", "model", "scan") if k not in about]:
        raise UsageError(f"{path / ABOUT} does not say {', '.join(lost)}: save the adapters again")
    if isinstance(base, tuple):
        model, variables = base
    else:
        model, variables = load_folder(base, **({"scan": True} if about["scan"] else {}), **fields)
    learnt = {name: np.array(tensors.read(name)) for name in tensors.places}
    frozen = {where: x for where, x in flat(variables["params"]).items() if where not in learnt}
    name = base if not isinstance(base, tuple) else f"the {type(model).__name__} that is given"
    if (here := base_hash(frozen)) != about["base"]:
        raise UsageError(
            f"the adapters in {path} belong to a {about['model']} with the hash {about['base'][:12]}, and {name} has "
            f"{here[:12]}: give the base that they were trained on"
        )
    rest = {k: v for k, v in variables.items() if k != "params"}
    nested = lambda tree: flax.traverse_util.unflatten_dict(tree, sep="/")  # noqa: E731
    model = Adapted(model, **{k: about[k] for k in ("train", "on", "rank", "alpha")})
    return model, {"params": nested(jax.device_put(learnt)), "frozen": nested(frozen), **rest}


def base_hash(frozen: Mapping[str, Any]) -> str:
    """SHA-256 of parameters by their paths, the same whether layers are stacked or not."""
    sums = {}
    for where, leaf in flat(frozen).items():
        x, parts = np.asarray(to_host(leaf)), where.split("/")
        layers = {re.sub(r"(^|/)layers/", rf"\1layer_{n}/", where): part for n, part in enumerate(x)}
        for name, part in (layers if "layers" in parts else {where: x}).items():
            sums[name] = hashlib.sha256(np.ascontiguousarray(part, np.float32)).hexdigest()
    return hashlib.sha256(json.dumps(sums, sort_keys=True).encode()).hexdigest()
