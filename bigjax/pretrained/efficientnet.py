"""EfficientNet, as `bigjax.models.EfficientNet`: by the names of transformers, of timm and of torchvision."""

import jax

from bigjax import UsageError
from bigjax.models.efficientnet import B0, SIZES, EfficientNet
from bigjax.pretrained.families import Config, Family, arguments, labels, labels_of, only, timm
from bigjax.pretrained.names import Row

TIMM = {"drop_rate": "dropout", "drop_path_rate": "stochastic_depth", "bn_eps": "epsilon", "bn_momentum": "momentum"}
PARTS = {  # ours: theirs of transformers
    "expand": ("expansion.expand_conv", "expansion.expand_bn"),
    "depthwise": ("depthwise_conv.depthwise_conv", "depthwise_conv.depthwise_norm"),
    "project": ("projection.project_conv", "projection.project_bn"),
}
Names = dict[str, tuple[str, str]]


def table(model: EfficientNet, names: set[str]) -> list[Row]:
    """By the names of the tensors; of a model to be saved by its padding, which each of them has its own of."""
    if "features.0.0.weight" in names:
        return _torchvision(model)
    if "conv_stem.weight" in names or (not names and isinstance(model.padding, str)):
        return _timm(model)
    stem, body = "efficientnet.embeddings", "efficientnet.encoder"
    units = {
        "unit_stem": (f"{stem}.convolution", f"{stem}.batchnorm"),
        "unit_top": (f"{body}.top_conv", f"{body}.top_bn"),
    }
    squeezes: dict[str, str] = {}
    for n, (i, j, _) in enumerate(model.blocks()):
        ours, theirs = f"stage_{i}_{j}", f"{body}.blocks.{n}"
        units |= {f"{ours}/{part}": (f"{theirs}.{a}", f"{theirs}.{b}") for part, (a, b) in PARTS.items()}
        pairs = (("squeeze", "reduce"), ("excite", "expand"))
        squeezes |= {f"{ours}/{part}": f"{theirs}.squeeze_excite.{name}" for part, name in pairs}
    return _rows(units, squeezes, "classifier")


def _timm(model: EfficientNet) -> list[Row]:
    """Blocks that do not expand have other numbers."""
    units, squeezes = {"unit_stem": ("conv_stem", "bn1"), "unit_top": ("conv_head", "bn2")}, {}
    for i, j, stage in model.blocks():
        ours, theirs = f"stage_{i}_{j}", f"blocks.{i}.{j}"
        parts = {"expand": ("conv_pw", "bn1"), "depthwise": ("conv_dw", "bn2"), "project": ("conv_pwl", "bn3")}
        if stage[3] == 1:
            parts = {"depthwise": ("conv_dw", "bn1"), "project": ("conv_pw", "bn2")}
        units |= {f"{ours}/{part}": (f"{theirs}.{a}", f"{theirs}.{b}") for part, (a, b) in parts.items()}
        pairs = (("squeeze", "reduce"), ("excite", "expand"))
        squeezes |= {f"{ours}/{part}": f"{theirs}.se.conv_{name}" for part, name in pairs}
    return _rows(units, squeezes, "classifier")


def _torchvision(model: EfficientNet) -> list[Row]:
    top = f"features.{len(model.stages) + 1}"
    units, squeezes = {"unit_stem": ("features.0.0", "features.0.1"), "unit_top": (f"{top}.0", f"{top}.1")}, {}
    for i, j, stage in model.blocks():
        ours, theirs = f"stage_{i}_{j}", f"features.{i + 1}.{j}.block"
        parts = ["expand"] * (stage[3] != 1) + ["depthwise", "squeeze", "project"]
        units |= {f"{ours}/{part}": (f"{theirs}.{k}.0", f"{theirs}.{k}.1") for k, part in enumerate(parts)}
        squeeze, _ = units.pop(f"{ours}/squeeze")
        pairs = (("squeeze", "fc1"), ("excite", "fc2"))
        squeezes |= {f"{ours}/{part}": squeeze.removesuffix("0") + name for part, name in pairs}
    return _rows(units, squeezes, "classifier.1")


def _rows(units: Names, squeezes: dict[str, str], head: str) -> list[Row]:
    rows: list[Row] = [(head, "logits", "linear")]
    for ours, (convolution, norm) in units.items():
        rows += [(convolution, f"{ours}/conv", "conv"), (norm, f"{ours}/norm", "batch_norm")]
    return rows + [(theirs, ours, "conv") for ours, theirs in squeezes.items()]


def read(c: Config, names: set[str]) -> Config:
    """The fields of an EfficientNet; of others' names, from the architecture's own name."""
    if "architectures" not in c:
        name = c["architecture"].removeprefix("tf_").removeprefix("efficientnet_")
        tensorflow = c["architecture"].startswith("tf_")
        slow = tensorflow or ("features.0.0.weight" in names and name in ("b5", "b6", "b7"))
        norm = {"epsilon": 1e-3 if slow else 1e-5, "momentum": 0.99 if slow else 0.9}
        fields = SIZES[name] | {"padding": "same" if tensorflow else "symmetric", "outputs": c.get("num_classes", 1000)}
        given = arguments(c, TIMM)
        given |= {"momentum": round(1 - given["momentum"], 9)} if "momentum" in given else {}  # theirs says what is new
        return fields | norm | given
    only(c, "hidden_act", "swish", "silu")
    only(c, "pooling_type", "mean")
    keys = ("num_block_repeats", "kernel_sizes", "strides", "expand_ratios", "out_channels")
    stages = tuple(zip(*(c.get(key, part) for key, part in zip(keys, zip(*B0)))))
    fields = {
        "width": c.get("width_coefficient", 2.0),
        "depth": c.get("depth_coefficient", 3.1),
        "stages": stages,
        "divisor": c.get("depth_divisor", 8),
        "squeeze": c.get("squeeze_expansion_ratio", 0.25),
        "padding": tuple(c.get("depthwise_padding", ())),
        "outputs": labels(c),
        "dropout": c.get("dropout_rate", 0.5),
        "stochastic_depth": c.get("drop_connect_rate", 0.2),
        "momentum": c.get("batch_norm_momentum", 0.99),
        "epsilon": c.get("batch_norm_eps", 1e-3),
    }
    _check(EfficientNet(**fields), c)
    return fields


def _check(model: EfficientNet, c: Config) -> None:
    """What transformers says twice must be the same, and what it never adds to must not fit."""
    before = [32, *(stage[4] for stage in model.stages[:-1])]
    given = list(c.get("in_channels", before))
    if given != before or c.get("hidden_dim", model.rounded(1280)) != model.rounded(1280):
        raise UsageError(
            f"config.json says in_channels {given} and hidden_dim {c.get('hidden_dim')}, where its out_channels and "
            f"width_coefficient make them {before} and {model.rounded(1280)}: correct it"
        )
    same = [i for i, s in enumerate(model.stages) if s[2] == 1 and model.rounded(s[4]) == model.rounded(before[i])]
    if same:
        raise UsageError(
            f"config.json has a stage (number {same[0]}) that changes neither the image nor its channels; transformers "
            "does not add its first block to what it saw, as all others do: such a model is not known here"
        )


def write(model: EfficientNet) -> Config:
    """config.json of an EfficientNet: transformers', or timm's where it is padded as there."""
    if (model.stem, model.top) != (32, 1280):
        raise UsageError("an EfficientNet with another stem or top has no form that others read: only 32 and 1280 have")
    if isinstance(model.padding, str):
        return _written_for_timm(model)
    repeats, kernels, strides, expansions, features = (list(part) for part in zip(*model.stages))
    return {
        "architectures": ["EfficientNetForImageClassification"],
        "model_type": "efficientnet",
        "width_coefficient": model.width,
        "depth_coefficient": model.depth,
        "num_block_repeats": repeats,
        "kernel_sizes": kernels,
        "strides": strides,
        "expand_ratios": expansions,
        "in_channels": [32, *features[:-1]],
        "out_channels": features,
        "depth_divisor": model.divisor,
        "squeeze_expansion_ratio": model.squeeze,
        "depthwise_padding": list(model.padding),
        "hidden_dim": model.rounded(1280),
        "dropout_rate": model.dropout,
        "drop_connect_rate": model.stochastic_depth,
        "batch_norm_momentum": model.momentum,
        "batch_norm_eps": model.epsilon,
        **labels_of(model.outputs),
    }


def _written_for_timm(model: EfficientNet) -> Config:
    sizes = [k for k, v in SIZES.items() if (v["width"], v["depth"]) == (model.width, model.depth)]
    if not sizes or (model.stages, model.divisor, model.squeeze) != (B0, 8, 0.25):
        raise UsageError(
            f"an EfficientNet of other sizes with padding {model.padding!r} has no name that others know: use that of "
            "transformers, padding=(), or one of SIZES"
        )
    prefix = "tf_" if model.padding == "same" else ""
    given = {theirs: getattr(model, ours) for theirs, ours in TIMM.items()}
    given["bn_momentum"] = round(1 - model.momentum, 9)
    return timm(f"{prefix}efficientnet_{sizes[0]}", model.outputs, **given)


FAMILY = Family(
    architectures=(
        "EfficientNetForImageClassification",
        *(f"{prefix}efficientnet_{size}" for prefix in ("", "tf_") for size in SIZES),
    ),
    kind=EfficientNet,
    read=read,
    write=write,
    table=table,
    inputs=lambda model: (jax.ShapeDtypeStruct((1, 32, 32, 3), "float32"),),
    ignored=(r"\.num_batches_tracked$",),
)
