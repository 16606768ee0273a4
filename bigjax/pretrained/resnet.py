"""ResNet, as `bigjax.models.ResNet`: by the names of transformers, and of torchvision and timm."""

import jax

from bigjax import UsageError
from bigjax.models.resnet import DEPTHS, ResNet
from bigjax.pretrained.families import Config, Family, arguments, labels, labels_of, only
from bigjax.pretrained.names import Row


def table(model: ResNet, names: set[str]) -> list[Row]:
    """torchvision's where the tensors are named so."""
    other = "conv1.weight" in names
    stem = (
        ("conv1", "bn1") if other else tuple(f"resnet.embedder.embedder.{k}" for k in ("convolution", "normalization"))
    )
    rows = [(stem[0], "conv_stem", "conv"), (stem[1], "norm_stem", "batch_norm")]
    convolutions = 3 if model.block == "bottleneck" else 2
    for i, count in enumerate(model.stages):
        for j in range(count):
            ours, theirs = f"stage_{i}_{j}", f"resnet.encoder.stages.{i}.layers.{j}"
            pairs = {
                k: (f"{theirs}.layer.{k}.convolution", f"{theirs}.layer.{k}.normalization") for k in range(convolutions)
            }
            pairs["shortcut"] = (f"{theirs}.shortcut.convolution", f"{theirs}.shortcut.normalization")
            if other:
                theirs = f"layer{i + 1}.{j}"
                pairs = {k: (f"{theirs}.conv{k + 1}", f"{theirs}.bn{k + 1}") for k in range(convolutions)}
                pairs["shortcut"] = (f"{theirs}.downsample.0", f"{theirs}.downsample.1")
            for k, (convolution, norm) in pairs.items():
                rows += [(convolution, f"{ours}/conv_{k}", "conv"), (norm, f"{ours}/norm_{k}", "batch_norm")]
    return [*rows, ("fc" if other else "classifier.1", "logits", "linear")]


def read(c: Config, names: set[str]) -> Config:
    """The fields of a ResNet; of torchvision's and timm's names, from the architecture's own name."""
    if "architectures" not in c:
        depth = DEPTHS[int(c["architecture"].removeprefix("resnet"))]
        return depth | {"outputs": c.get("num_classes", 1000)} | arguments(c, {})
    only(c, "hidden_act", "relu")
    only(c, "downsample_in_first_stage", False)
    only(c, "downsample_in_bottleneck", False)
    return {
        "stages": tuple(c.get("depths", (3, 4, 6, 3))),
        "block": only(c, "layer_type", "bottleneck", "basic"),
        "width": c.get("embedding_size", 64),
        "widths": tuple(c.get("hidden_sizes", (256, 512, 1024, 2048))),
        "outputs": labels(c),
    }


def write(model: ResNet) -> Config:
    """config.json of a ResNet."""
    if model.stem != "imagenet":
        raise UsageError("a ResNet with another stem has no form that transformers reads: only stem='imagenet' has")
    return {
        "architectures": ["ResNetForImageClassification"],
        "model_type": "resnet",
        "depths": list(model.stages),
        "layer_type": model.block,
        "embedding_size": model.width,
        "hidden_sizes": list(model.widths_of_stages()),
        **labels_of(model.outputs),
    }


FAMILY = Family(
    architectures=("ResNetForImageClassification", *(f"resnet{depth}" for depth in DEPTHS)),
    kind=ResNet,
    read=read,
    write=write,
    table=table,
    inputs=lambda model: (jax.ShapeDtypeStruct((1, 32, 32, 3), "float32"),),
    ignored=(r"\.num_batches_tracked$",),
)
