"""Features of pretrained models: of texts and of images, whatever their batch is, and what has none."""

from pathlib import Path

import chex
import jax
import numpy as np
import pytest
from test_pretrained import unpacked
from test_readme import hub_folder
from test_user_files import said_by

from bigjax import pretrained

TEXTS = ["a b c", "d", "e f g h a", "b a"]


@pytest.mark.parametrize("name", ["bert", "bert_sequence", "gpt2"])
def test_texts(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    hub_folder(folder, name)
    features_ND = pretrained.features(folder, TEXTS)
    model, variables = pretrained.load(folder)
    chex.assert_shape(features_ND, (4, model.width))
    np.testing.assert_allclose(np.linalg.norm(features_ND, axis=1), 1, rtol=1e-6)
    for text, row_D in zip(TEXTS, features_ND):  # alone, and without padding
        tokens_1L = np.array([pretrained.tokenizer(folder).encode(text)], np.int32)
        _, state = jax.jit(lambda v, t: model.apply(v, t, mutable="intermediates"))(variables, tokens_1L)
        mean_D = np.asarray(state["intermediates"]["features"][0])[0].mean(0)
        np.testing.assert_allclose(row_D, mean_D / np.linalg.norm(mean_D), atol=1e-6)
    np.testing.assert_allclose(pretrained.features(folder, TEXTS, batch_size=1), features_ND, atol=1e-6)
    np.testing.assert_allclose(pretrained.features(folder, np.array(TEXTS)), features_ND, atol=1e-6)
    cut = pretrained.features(folder, ["a b c " * 30, ("a b c " * 30)[: 2 * model.context]])
    np.testing.assert_allclose(*cut, atol=1e-6)


def test_images(tmp_path: Path) -> None:
    unpacked("vit", tmp_path)
    side = pretrained.load(tmp_path)[0].image
    image_NHWC = np.random.default_rng(0).integers(0, 255, (3, side, side, 3), dtype=np.uint8)
    features_ND = pretrained.features(tmp_path, image_NHWC, batch_size=2)
    np.testing.assert_allclose(np.linalg.norm(features_ND, axis=1), 1, rtol=1e-6)
    np.testing.assert_allclose(pretrained.features(tmp_path, image_NHWC / 255.0), features_ND, atol=1e-5)


def test_what_has_none(tmp_path: Path) -> None:
    for name in ("vit", "t5", "bert"):
        (tmp_path / name).mkdir()
        unpacked(name, tmp_path / name)
    image_NHWC = np.zeros((1, 8, 8, 3))
    for name, inputs, said in (
        ("vit", ["a"], "holds a ViT, which takes images: give such"),
        ("bert", image_NHWC, "holds a BERT, which takes texts: give such"),
        ("t5", ["a"], "holds a T5, which has no features of a whole text: give a BERT or a GPT"),
        ("bert", [], "features are of a list of texts or images, not of []: give at least one in a list"),
        ("bert", "a text", "features are of a list of texts or images, not of 'a text': give at least one in a list"),
        ("bert", ["a"], "has no tokenizer.json: let transformers write it"),
    ):
        assert said in said_by(pretrained.features, tmp_path / name, inputs)
