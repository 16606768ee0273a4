"""VGG, as `bigjax.models.VGG`: by the names of torchvision, and of timm."""

import jax

from bigjax import UsageError
from bigjax.models.vgg import DEPTHS, VGG
from bigjax.pretrained.families import Config, Family, arguments, timm
from bigjax.pretrained.names import Row

TIMM = {"drop_rate": "dropout"}


def table(model: VGG, names: set[str]) -> list[Row]:
    """What is in between counts too: activations, poolings, dropouts. timm has convolutions for dense layers."""
    rows: list[Row] = []
    n = 0
    for i, count in enumerate(model.stages):
        for j in range(count):
            rows += [(f"features.{n}", f"block_{i}/conv_{j}", "conv")]
            rows += [(f"features.{n + 1}", f"block_{i}/norm_{j}", "batch_norm")] * model.batch_norm
            n += 2 + model.batch_norm
        n += 1
    timm = "head.fc.weight" in names
    for i in range(len(model.dense)):
        rows += [(f"pre_logits.fc{i + 1}" if timm else f"classifier.{3 * i}", f"dense_{i}", "point")]
    return [*rows, ("head.fc" if timm else f"classifier.{3 * len(model.dense)}", "logits", "linear")]


def read(c: Config, names: set[str]) -> Config:
    """The fields of a VGG, from the architecture's own name: vgg16, vgg16_bn."""
    depth, _, norm = c["architecture"].removeprefix("vgg").partition("_")
    fields = DEPTHS[int(depth)] | {"batch_norm": norm == "bn", "outputs": c.get("num_classes", 1000)}
    return fields | arguments(c, TIMM)


def write(model: VGG) -> Config:
    """config.json as timm has it; torchvision has none."""
    standard = VGG(stages=model.stages)
    depths = [k for k, v in DEPTHS.items() if v["stages"] == model.stages]
    if not depths or any(getattr(model, k) != getattr(standard, k) for k in ("widths", "grid", "dense")):
        raise UsageError(
            "a VGG of other stages, widths or dense layers has no name that others know: only those of DEPTHS have"
        )
    name = f"vgg{depths[0]}" + "_bn" * model.batch_norm
    return timm(name, model.outputs, drop_rate=model.dropout)


FAMILY = Family(
    architectures=tuple(f"vgg{depth}{norm}" for depth in DEPTHS for norm in ("", "_bn")),
    kind=VGG,
    read=read,
    write=write,
    table=table,
    inputs=lambda model: (jax.ShapeDtypeStruct((1, *2 * (2 ** len(model.stages),), 3), "float32"),),
    ignored=(r"\.num_batches_tracked$",),
)
