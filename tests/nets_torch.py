"""Small networks in torchvision's and timm's own code: what tests/test_parity.py compares with beside transformers'.

`FAMILIES` are compared as thoroughly as those of transformers; `NAMES` are models that have other names there.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch

NEEDED = 'the agreement needs the extra: pip install -e ".[parity]"'
OPERATORS = torch.library.Library("torchvision", "FRAGMENT")

try:  # before transformers, which asks for it too
    import torchvision
except ImportError:
    pass
except RuntimeError:  # its operators, which nothing here uses, are built for another torch (CUDA's)
    for name in ("nms", "qnms"):  # their declarations are all that the import asks for
        OPERATORS.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    import torchvision  # noqa: F401


def vision() -> Any:
    return pytest.importorskip("torchvision", reason=NEEDED)


def timm() -> Any:
    return pytest.importorskip("timm", reason=NEEDED)


class Net(NamedTuple):
    """build: theirs. config: its config.json. fields: of ours, which that has no words for. side: of the images."""

    build: Callable[[], torch.nn.Module]
    config: dict[str, Any]
    fields: dict[str, Any] = {}
    side: int = 33


def named(architecture: str, **arguments: Any) -> dict[str, Any]:
    return {"architecture": architecture, "num_classes": 3} | ({"model_args": arguments} if arguments else {})


def vgg(batch_norm: bool) -> torch.nn.Module:
    """Of two stages; its dense layers are of one size in torchvision, and a hundred million numbers."""
    nets = vision().models.vgg
    with torch.device("meta"):
        model = nets.VGG(torch.nn.Identity(), init_weights=False)
    model.features = nets.make_layers([6, "M", 7, 7, "M"], batch_norm)
    dense = [torch.nn.Linear(7 * 49, 12), torch.nn.ReLU(), torch.nn.Dropout(0.0)]
    dense += [torch.nn.Linear(12, 60), torch.nn.ReLU(), torch.nn.Dropout(0.0), torch.nn.Linear(60, 3)]
    model.classifier = torch.nn.Sequential(*dense)
    return model


def vgg_of_timm() -> torch.nn.Module:
    return timm().models.VGG([6, "M", 7, 7, "M"], num_classes=3, mlp_ratio=0.002)


def densenet() -> torch.nn.Module:
    return vision().models.DenseNet(3, (1, 2), 6, 2, num_classes=3)


def convnext() -> torch.nn.Module:
    nets = vision().models.convnext
    stages = [nets.CNBlockConfig(6, 8, 1), nets.CNBlockConfig(8, None, 2)]
    return nets.ConvNeXt(stages, num_classes=3)


def efficientnet() -> torch.nn.Module:
    nets = vision().models.efficientnet
    stages = [nets.MBConvConfig(1, 3, 1, 8, 16, 1), nets.MBConvConfig(3, 5, 2, 16, 24, 2)]
    return nets.EfficientNet(stages, dropout=0.0, stochastic_depth_prob=0.0, num_classes=3)


def of_timm(architecture: str, **arguments: Any) -> torch.nn.Module:
    return timm().create_model(architecture, num_classes=3, **arguments)


def efficientnet_of_timm() -> torch.nn.Module:
    """A tenth of B0's blocks and widths."""
    small = {"channel_multiplier": 0.1, "depth_multiplier": 0.1, "num_classes": 3}
    return timm().models.efficientnet._gen_efficientnet(
        "tf_efficientnet_b0", **small, bn_eps=1e-3, bn_momentum=0.01, pad_type="same"
    )


def full(architecture: str, of_timm: bool) -> torch.nn.Module:
    """At its full size, without numbers."""
    create = timm().create_model if of_timm else vision().models.get_model
    with torch.device("meta"):
        return create(architecture)


SMALL_VGG = {"stages": (1, 2), "widths": (6, 7), "dropout": 0.0}
ATTO = {"depths": [1, 1, 2, 1], "dims": [6, 8, 8, 9], "patch_size": 4, "ls_init_value": 0.1}
DENSE = {"growth_rate": 3, "block_config": [1, 2], "bn_size": 2}
FAMILIES = {
    "vgg": Net(lambda: vgg(True), named("vgg11_bn"), SMALL_VGG | {"dense": (12, 60)}),
    "densenet": Net(densenet, named("densenet121", **DENSE)),
}
NAMES = {
    "vgg_plain": Net(lambda: vgg(False), named("vgg11"), SMALL_VGG | {"dense": (12, 60)}),
    "vgg_timm": Net(vgg_of_timm, named("vgg11"), SMALL_VGG | {"dense": (8, 4096)}, 25),
    "densenet_timm": Net(lambda: of_timm("densenet121", **DENSE), named("densenet121", **DENSE)),
    "convnext_torchvision": Net(convnext, named("convnext_tiny"), {"stages": (1, 2), "widths": (6, 8)}),
    "convnext_timm": Net(lambda: of_timm("convnext_atto", **ATTO), named("convnext_atto", **ATTO)),
    "efficientnet_torchvision": Net(
        efficientnet,
        named("efficientnet_b0"),
        {"stages": ((1, 3, 1, 1, 16), (2, 5, 2, 3, 24)), "stem": 8, "top": 96, "dropout": 0.0, "stochastic_depth": 0.0},
    ),
    "efficientnet_timm": Net(
        efficientnet_of_timm,
        named("tf_efficientnet_b0"),
        {"width": 0.1, "depth": 0.1, "dropout": 0.0, "stochastic_depth": 0.0},
    ),
}
