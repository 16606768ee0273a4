"""ConvNeXt, EfficientNet, VGG and DenseNet: what is wrong in one line, branches dropped by row, what a config says.

That they compute what they should, tests/test_parity.py compares.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bigjax import UsageError
from bigjax.models import VGG, ConvNeXt, DenseNet, EfficientNet
from bigjax.models import convnext as convnext_file
from bigjax.models import densenet as densenet_file
from bigjax.models import efficientnet as efficientnet_file
from bigjax.models import vgg as vgg_file
from bigjax.pretrained import convnext, densenet, efficientnet, vgg
from bigjax.task import forward

IMAGES = (2, 32, 32, 3)
B0 = {"depthwise_padding": [16], "width_coefficient": 1.0, "depth_coefficient": 1.1, "hidden_dim": 1280}


@pytest.mark.parametrize(
    ("model", "shape", "said"),
    [
        (
            ConvNeXt(),
            (2, 31, 64, 3),
            "of at least 32 pixels a side, not an array of shape .*: resize them, or use fewer",
        ),
        (ConvNeXt(widths=(4, 4)), IMAGES, "widths .* and stages .* differ in number: give one width a stage"),
        (ConvNeXt(stochastic_depth=1.0), IMAGES, "stochastic_depth 1.0 is no probability: use one below 1, 0 for none"),
        (ConvNeXt(remat="some"), IMAGES, "remat 'some' is unknown: use one of none, full, dots"),
        (ConvNeXt(activation="some"), IMAGES, "activation 'some' is unknown: use one of gelu"),
        (EfficientNet(), (32, 32, 3), "EfficientNet takes images .*, not an array of shape"),
        (
            EfficientNet(padding="valid"),
            IMAGES,
            "padding 'valid' is unknown: use same, symmetric, or numbers of blocks",
        ),
        (EfficientNet(stochastic_depth=-0.1), IMAGES, "stochastic_depth -0.1 is no probability"),
        (EfficientNet(remat="some"), IMAGES, "remat 'some' is unknown"),
        (VGG(), (2, 31, 31, 3), "this VGG takes images .* of at least 32 pixels a side.*: resize them, or use fewer"),
        (VGG(widths=(4, 4)), IMAGES, "differ in number: give one width a stage"),
        (VGG(remat="some"), IMAGES, "remat 'some' is unknown"),
        (
            DenseNet(),
            (2, 28, 28, 3),
            "this DenseNet takes images .* of at least 29 pixels a side.*: resize them, or use",
        ),
        (DenseNet(stem="mnist"), IMAGES, "stem 'mnist' is unknown: use imagenet or cifar"),
        (DenseNet(remat="some"), IMAGES, "remat 'some' is unknown"),
    ],
)
def test_what_is_wrong_is_one_line(model: Any, shape: tuple[int, ...], said: str) -> None:
    with pytest.raises(UsageError, match=said) as e:
        jax.eval_shape(model.init, jax.random.key(0), jax.ShapeDtypeStruct(shape, "float32"))
    assert "\n" not in str(e.value)


def test_an_example_passes_by_a_block_as_a_whole_and_by_itself() -> None:
    """Half of the time: then the logits are those of the model without that block; else its branch counts twice."""
    model, rows = convnext_file.TINY, 16
    image = jax.random.uniform(jax.random.key(0), (rows, 8, 8, 3))
    variables = jax.jit(model.init)(jax.random.key(1), image)
    scale = variables["params"]["stage_1_0"]["layer_scale"]

    @jax.jit
    def without_and_twice(variables: Any) -> list[jax.Array]:
        given = []
        for times in (0.0, 2.0):
            block = variables["params"]["stage_1_0"] | {"layer_scale": times * scale}
            given.append(model.apply({"params": variables["params"] | {"stage_1_0": block}}, image))
        return given

    @jax.jit
    def trained(index_B: jax.Array) -> jax.Array:
        key = jax.random.key(2)
        return forward(model, variables, (image[index_B],), key=key, index_B=index_B, train=True)[0]

    logits, (without, twice) = trained(jnp.arange(rows)), without_and_twice(variables)
    passed = np.isclose(logits, without, atol=1e-5).all(1)
    assert 2 < passed.sum() < rows - 2
    np.testing.assert_allclose(logits, np.where(passed[:, None], without, twice), atol=1e-5)
    np.testing.assert_allclose(trained(jnp.arange(rows)[::-1]), logits[::-1], atol=1e-5)  # wherever a row is


def test_blocks_and_channels_grow_as_published() -> None:
    """The channels and blocks of B3 and B7, as Tan and Le's own code makes them."""
    b3 = EfficientNet(width=1.2, depth=1.4)
    assert [b3.rounded(n) for n in (32, 16, 24, 40, 80, 112, 192, 320, 1280)] == [
        40, 24, 32, 48, 96, 136, 232, 384, 1536,
    ]  # fmt: skip
    assert [stage[0] for i, j, stage in b3.blocks() if not j] == [2, 3, 3, 5, 5, 6, 2]
    assert len(EfficientNet(width=2.0, depth=3.1).blocks()) == 55


def test_means_and_halves() -> None:
    """A row that does not divide: parts overlap, as everybody's adaptive pooling has them. An odd last row is left."""
    np.testing.assert_allclose(vgg_file.means(3, 4) @ jnp.arange(4.0), [0.5, 1.5, 2.5])
    np.testing.assert_allclose(vgg_file.means(4, 2) @ jnp.arange(2.0), [0, 0, 1, 1])
    np.testing.assert_array_equal(vgg_file.means(7, 7), np.eye(7))
    x = jnp.arange(15.0).reshape(1, 3, 5, 1)
    np.testing.assert_allclose(densenet_file.halved(x)[0, ..., 0], [[3.0, 5.0]])


@pytest.mark.parametrize("file", [convnext_file, efficientnet_file, vgg_file, densenet_file])
def test_remat_recomputes(file: Any) -> None:
    """The backward pass convolves more often."""
    x = jnp.zeros(file.TINY_INPUTS[0].shape)
    variables = jax.eval_shape(file.TINY.init, jax.random.key(0), x)

    def convolutions(remat: str) -> int:
        model, rngs = file.TINY.clone(remat=remat), {"dropout": jax.random.key(1)}
        loss = lambda v: model.apply(v, x, train=True, mutable="batch_stats", rngs=rngs)[0].sum()  # noqa: E731
        return str(jax.make_jaxpr(jax.grad(loss))(variables)).count("conv_general_dilated[")

    assert convolutions("full") > convolutions("none") > 0


@pytest.mark.parametrize(
    ("family", "config", "said"),
    [
        (
            densenet,
            {"architecture": "densenet121", "model_args": {"aa_layer": "blur"}},
            "densenet121 the arguments aa_",
        ),
        (
            vgg,
            {"architecture": "vgg16", "model_args": {"mlp_ratio": 2}},
            "arguments mlp_ratio, which are not known here",
        ),
        (
            convnext,
            {"architecture": "convnext_tiny", "model_args": {"use_grn": True}},
            "use_grn, .*: only depths, dims",
        ),
        (efficientnet, {"architectures": ["x"], **B0, "hidden_act": "relu"}, "hidden_act = 'relu', which is not known"),
        (efficientnet, {"architectures": ["x"], **B0, "pooling_type": "max"}, "pooling_type = 'max'"),
        (efficientnet, {"architectures": ["x"], **B0, "hidden_dim": 99}, "hidden_dim 99, where .* make them .*1280"),
        (efficientnet, {"architectures": ["x"], **B0, "in_channels": [8] * 7}, "says in_channels .*: correct it"),
        (efficientnet, {"architectures": ["x"], **B0, "depth_divisor": 64, "hidden_dim": 1280}, "changes neither the"),
    ],
)
def test_a_config_that_says_more_is_refused(family: Any, config: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said) as e:
        family.read(config, set())
    assert "\n" not in str(e.value)


def test_a_config_says_what_differs_among_them() -> None:
    """Padding, epsilon and momentum of three libraries; what a size is called."""
    read = efficientnet.read
    assert EfficientNet(**read({"architectures": ["x"], **B0}, set())).padding == (16,)
    names = {"features.0.0.weight"}
    slow, fast = {"epsilon": 1e-3, "momentum": 0.99}, {"epsilon": 1e-5, "momentum": 0.9}
    for name, there, expected in (
        ("tf_efficientnet_b1", set(), slow | {"padding": "same"}),
        ("efficientnet_b5", set(), fast | {"padding": "symmetric"}),
        ("efficientnet_b5", names, slow | {"padding": "symmetric"}),
        ("efficientnet_b4", names, fast | {"padding": "symmetric", "width": 1.4, "depth": 1.8}),
    ):
        found = read({"architecture": name, "num_classes": 7}, there)
        assert found.items() >= (expected | {"outputs": 7}).items(), name
    for model in (EfficientNet(padding="same", width=1.1, depth=1.2), EfficientNet(padding="symmetric", epsilon=0.1)):
        assert EfficientNet(**read(efficientnet.FAMILY.write(model), set())) == model
    assert vgg.FAMILY.write(VGG(batch_norm=True))["architecture"] == "vgg16_bn"
    assert densenet.FAMILY.write(DenseNet(blocks=(6, 12, 36, 24), growth=48, width=96))["architecture"] == "densenet161"
    for family, model, told in (
        (vgg, VGG(widths=(4,) * 5), "only those of DEPTHS have"),
        (densenet, DenseNet(stem="cifar"), "only stem='imagenet' of width 2 × growth has"),
        (efficientnet, EfficientNet(stem=8), "only 32 and 1280 have"),
        (
            efficientnet,
            EfficientNet(padding="same", width=3.0),
            "use that of transformers, padding=.., or one of SIZES",
        ),
    ):
        with pytest.raises(UsageError, match=told):
            family.FAMILY.write(model)
