"""ConvNeXt, as `bigjax.models.ConvNeXt`: by the names of transformers, of timm and of torchvision."""

import jax

from bigjax.models.convnext import SIZES, ConvNeXt
from bigjax.pretrained.families import Config, Family, arguments, labels, labels_of, side, unit_from, unit_to
from bigjax.pretrained.names import Row

TIMM = {"depths": "stages", "dims": "widths", "patch_size": "patch", "ls_init_value": "layer_scale"}
TIMM |= {"drop_path_rate": "stochastic_depth"}


def table(model: ConvNeXt, names: set[str]) -> list[Row]:
    """timm's or torchvision's where the tensors are named so."""
    if "features.0.0.weight" in names:
        return _torchvision(model)
    theirs = "convnext.encoder.stages.{}.layers.{}"
    parts = {"depthwise": "dwconv", "norm": "layernorm", "mlp/up": "pwconv1", "mlp/down": "pwconv2"}
    stem, between, scale = (
        "convnext.embeddings",
        "convnext.encoder.stages.{}.downsampling_layer",
        "layer_scale_parameter",
    )
    rows: list[Row] = [(f"{stem}.patch_embeddings", "conv_stem", "conv"), (f"{stem}.layernorm", "norm_stem", "norm")]
    rows += [("convnext.layernorm", "norm", "norm"), ("classifier", "logits", "linear")]
    if "stem.0.weight" in names:
        theirs, between, scale = "stages.{}.blocks.{}", "stages.{}.downsample", "gamma"
        parts = {"depthwise": "conv_dw", "norm": "norm", "mlp/up": "mlp.fc1", "mlp/down": "mlp.fc2"}
        rows = [("stem.0", "conv_stem", "conv"), ("stem.1", "norm_stem", "norm")]
        rows += [("head.norm", "norm", "norm"), ("head.fc", "logits", "linear")]
    for i, count in enumerate(model.stages):
        rows += [(f"{between.format(i)}.0", f"norm_{i}", "norm"), (f"{between.format(i)}.1", f"conv_{i}", "conv")]
        for j in range(count):
            rows += _block(f"stage_{i}_{j}", theirs.format(i, j), parts, scale)
    return rows


def _block(ours: str, theirs: str, parts: dict[str, str], scale: str) -> list[Row]:
    kinds = {"depthwise": "conv", "norm": "norm", "mlp/up": "point", "mlp/down": "point"}
    rows: list[Row] = [(f"{theirs}.{part}", f"{ours}/{name}", kinds[name]) for name, part in parts.items()]
    return [*rows, (f"{theirs}.{scale}", f"{ours}/layer_scale", "channels")]


def _torchvision(model: ConvNeXt) -> list[Row]:
    """Stages and what is between them are counted in one row."""
    rows: list[Row] = [("features.0.0", "conv_stem", "conv"), ("features.0.1", "norm_stem", "norm")]
    rows += [("classifier.0", "norm", "norm"), ("classifier.2", "logits", "linear")]
    parts = {"depthwise": "block.0", "norm": "block.2", "mlp/up": "block.3", "mlp/down": "block.5"}
    for i, count in enumerate(model.stages):
        rows += [(f"features.{2 * i}.0", f"norm_{i}", "norm"), (f"features.{2 * i}.1", f"conv_{i}", "conv")]
        for j in range(count):
            rows += _block(f"stage_{i}_{j}", f"features.{2 * i + 1}.{j}", parts, "layer_scale")
    return rows


def read(c: Config, names: set[str]) -> Config:
    """The fields of a ConvNeXt; of others' names, from the architecture's own name."""
    if "architectures" not in c:
        size = SIZES[c["architecture"].removeprefix("convnext_")]
        return size | {"outputs": c.get("num_classes", 1000)} | arguments(c, TIMM)
    scale = c.get("layer_scale_init_value", 1e-6)
    return {
        "stages": tuple(c.get("depths", (3, 3, 9, 3))),
        "widths": tuple(c.get("hidden_sizes", (96, 192, 384, 768))),
        "patch": side(c, "patch_size", 4),
        "outputs": labels(c),
        "activation": unit_from(c, "hidden_act", "gelu"),
        "layer_scale": max(scale, 0.0),
        "stochastic_depth": c.get("drop_path_rate", 0.0),
        "epsilon": c.get("layer_norm_eps", 1e-12),
    }


def write(model: ConvNeXt) -> Config:
    """config.json of a ConvNeXt."""
    return {
        "architectures": ["ConvNextForImageClassification"],
        "model_type": "convnext",
        "num_stages": len(model.stages),
        "depths": list(model.stages),
        "hidden_sizes": list(model.widths),
        "patch_size": model.patch,
        "hidden_act": unit_to(model.activation),
        "layer_scale_init_value": model.layer_scale,
        "drop_path_rate": model.stochastic_depth,
        "layer_norm_eps": model.epsilon,
        **labels_of(model.outputs),
    }


FAMILY = Family(
    architectures=("ConvNextForImageClassification", *(f"convnext_{size}" for size in SIZES)),
    kind=ConvNeXt,
    read=read,
    write=write,
    table=table,
    inputs=lambda model: (jax.ShapeDtypeStruct((1, *2 * (model.patch * 2 ** len(model.stages),), 3), "float32"),),
)
