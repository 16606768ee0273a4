"""DenseNet, as `bigjax.models.DenseNet`: by the names of torchvision, which timm has too."""

import jax

from bigjax import UsageError
from bigjax.models.densenet import DEPTHS, DenseNet
from bigjax.pretrained.families import Config, Family, arguments, timm
from bigjax.pretrained.names import Row

TIMM = {"growth_rate": "growth", "block_config": "blocks", "bn_size": "bottleneck", "proj_drop_rate": "dropout"}


def table(model: DenseNet, names: set[str]) -> list[Row]:
    """Their blocks and layers are counted from 1."""
    rows: list[Row] = [("features.conv0", "conv_stem", "conv"), ("features.norm0", "norm_stem", "batch_norm")]
    rows += [("features.norm5", "norm", "batch_norm"), ("classifier", "logits", "linear")]
    for i, count in enumerate(model.blocks):
        between = f"features.transition{i}"
        rows += [(f"{between}.norm", f"norm_{i}", "batch_norm"), (f"{between}.conv", f"conv_{i}", "conv")]
        for j in range(count):
            theirs, ours = f"features.denseblock{i + 1}.denselayer{j + 1}", f"block_{i}_{j}"
            for n in range(2):
                rows += [(f"{theirs}.norm{n + 1}", f"{ours}/norm_{n}", "batch_norm")]
                rows += [(f"{theirs}.conv{n + 1}", f"{ours}/conv_{n}", "conv")]
    return rows


def read(c: Config, names: set[str]) -> Config:
    """The fields of a DenseNet, from the architecture's own name and timm's arguments; its stem has two growths."""
    fields = DEPTHS[int(c["architecture"].removeprefix("densenet"))] | arguments(c, TIMM)
    return fields | {"width": 2 * fields["growth"], "outputs": c.get("num_classes", 1000)}


def write(model: DenseNet) -> Config:
    """config.json as timm has it; torchvision has none."""
    if model.stem != "imagenet" or model.width != 2 * model.growth:
        raise UsageError(
            "a DenseNet with another stem has no form that others read: only stem='imagenet' of width 2 × growth has"
        )
    given = {theirs: getattr(model, ours) for theirs, ours in TIMM.items()}
    depths = [k for k, v in DEPTHS.items() if (v["blocks"], v["growth"]) == (model.blocks, model.growth)]
    return timm(f"densenet{[*depths, 121][0]}", model.outputs, **given)


FAMILY = Family(
    architectures=tuple(f"densenet{depth}" for depth in DEPTHS),
    kind=DenseNet,
    read=read,
    write=write,
    table=table,
    inputs=lambda model: (jax.ShapeDtypeStruct((1, 32, 32, 3), "float32"),),
    ours=((r"\b(denselayer\d+\.(?:norm|relu|conv))\.(\d)", r"\1\2"),),  # of its first release
    ignored=(r"\.num_batches_tracked$",),
)
