"""Saving: a model's variables as the folder that others read."""

from typing import Any

import flax.linen as nn
import jax
import numpy as np

from bigjax import UsageError, __version__
from bigjax.pretrained.families import family_for
from bigjax.pretrained.names import Source, flat, shapes_of, sources
from bigjax.pretrained.store import CONFIG, WHOLE, write_folder
from bigjax.sharding import to_host

SAVED = ("params", "batch_stats")


def save(folder: Any, model: nn.Module, variables: Any) -> None:
    """Writes config.json and model.safetensors, which transformers reads: the same model, the same logits.

    Arrays keep their dtype. Of several processes all must call it, and the first writes. UsageError for a model that
    others have no form of, and where nothing can be written.
    """
    family = family_for(model)
    config = family.write(model)
    variables = {k: variables[k] for k in SAVED if k in variables}
    leaves, needed = flat(variables), flat(shapes_of(model, family.inputs(model)))
    wrong = leaves.keys() ^ needed.keys()
    wrong |= {k for k in leaves.keys() & needed.keys() if leaves[k].shape != needed[k].shape}
    if wrong:
        raise UsageError(
            f"these variables are not those of the {type(model).__name__} ({', '.join(sorted(wrong))} differ): give "
            "the model that they were made with"
        )
    pieces: dict[str, list[tuple[str, Source, int]]] = {}  # name -> of our arrays: path, source, which layer
    for where, source in sources(family.table(model, set()), variables).items():
        for n, name in enumerate(source.theirs):
            pieces.setdefault(name, []).append((where, source, n))

    def tensor(name: str) -> np.ndarray:
        parts = sorted(pieces[name], key=lambda p: p[1].part)
        with jax.transfer_guard("allow"):
            arrays = [
                to_host(leaves[where][np.unravel_index(n, source.stack)] if source.stack else leaves[where])
                for where, source, n in parts
            ]
        return parts[0][1].row(np.concatenate(arrays, axis=-1) if len(arrays) > 1 else arrays[0])

    rows = [(k, p[0][1].shape, leaves[p[0][0]].dtype, lambda name=k: tensor(name)) for k, p in pieces.items()]
    counts = [k.removesuffix("running_var") + "num_batches_tracked" for k in pieces if k.endswith(".running_var")]
    config |= {"dtype": str(rows[0][2]), "bigjax_version": __version__}
    rows += [(k, (), np.dtype(np.int64), lambda: np.zeros((), np.int64)) for k in counts]  # which PyTorch asks for
    write_folder(folder, WHOLE, rows, CONFIG, config)
