"""Inception v3, as `bigjax.models.Inception`: by the names of torchvision, which timm has too."""

import jax

from bigjax import UsageError
from bigjax.models.inception import BLOCKS, STEM, V3, Inception, steps
from bigjax.pretrained.families import Config, Family, arguments
from bigjax.pretrained.names import Row


def table(model: Inception, names: set[str]) -> list[Row]:
    """Each unit has a convolution and its norm."""
    units = [(f"Conv2d_{part[0]}", f"conv_{part[0]}") for part in STEM if part != "max"]
    for name, kind, *_ in map(str.split, model.blocks):
        for branch, forms in BLOCKS[kind].items():
            found = (unit for step, _ in steps(branch, forms) for unit in step)
            units += [(f"Mixed_{name}.{unit}", f"mixed_{name}/{unit}") for unit in found]
    units += [(f"AuxLogits.conv{n}", f"aux_conv_{n}") for n in range(2)]
    rows: list[Row] = [("fc", "logits", "linear"), ("AuxLogits.fc", "aux_head", "linear")]
    for theirs, ours in units:
        rows += [(f"{theirs}.conv", f"{ours}/conv", "conv"), (f"{theirs}.bn", f"{ours}/norm", "batch_norm")]
    return rows


def read(c: Config, names: set[str]) -> Config:
    """The fields of an Inception: whether it has the second head, its tensors say."""
    return {"outputs": c.get("num_classes", 1000), "aux": "AuxLogits.fc.weight" in names} | arguments(c, {})


def write(model: Inception) -> Config:
    """config.json as timm has it; torchvision has none."""
    if model.blocks != V3 or model.shrink != 1:
        raise UsageError("an Inception with other blocks or widths has no name that others know: only v3 itself has")
    return {"architecture": "inception_v3", "num_classes": model.outputs}


FAMILY = Family(
    architectures=("inception_v3",),
    kind=Inception,
    read=read,
    write=write,
    table=table,
    inputs=lambda model: (jax.ShapeDtypeStruct((1, 299, 299, 3), "float32"),),
    ignored=(r"\.num_batches_tracked$",),
    pixels=((0.5,) * 3, (0.5,) * 3),  # which torchvision's makes of ImageNet's before all else
)
