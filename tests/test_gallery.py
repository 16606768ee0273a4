"""Pictures for the report. N images, C classes."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array

from bigjax.look import gallery
from bigjax.look.evaluators import generate_images
from bigjax.models import VAE, Autoencoder, Generator
from bigjax.models.autoencoder import sample

KEY = jax.random.key(0)
IMAGE = (4, 4, 1)


def uniform(size: int) -> dict[str, np.ndarray]:
    return {"image": np.random.default_rng(0).integers(0, 256, (size, *IMAGE)).astype(np.uint8)}


def made(model: nn.Module, player: str, *inputs: Any) -> tuple[Any, Any]:
    """(params, model state) of one player."""
    variables = jax.jit(model.init)(jax.random.key(1), *inputs)
    return {player: variables["params"]}, {player: {}}


def autoencoder(kind: type = Autoencoder) -> tuple[nn.Module, Any, Any]:
    model = kind(image=IMAGE, code=3, encoder_features=(), decoder_features=())
    return model, *made(model, "model", jnp.zeros((1, *IMAGE)))


def generator(classes: int = 0) -> tuple[nn.Module, Any, Any]:
    model = Generator(IMAGE, latent=3, features=(4,), classes=classes)
    return model, *made(model, "generator", jnp.zeros((2, 3)), *([jnp.zeros(2, jnp.int32)] if classes else []))


def is_picture(pictures: gallery.Pictures, size: int, columns: int) -> None:
    assert pictures.images.shape == (size, *IMAGE) and pictures.columns == columns
    assert isinstance(pictures.images, np.ndarray)
    assert 0 <= pictures.images.min() and pictures.images.max() <= 1
    assert pictures.captions is None or len(pictures.captions) == size


# --- mistakes


class Pixels(nn.Module):
    """The image's first three pixels are the logits."""

    @nn.compact
    def __call__(self, x_BHWC: Array, *, train: bool = False) -> Array:
        return 10 * x_BHWC.reshape(len(x_BHWC), -1)[:, :3]


def labelled(logits_NC: Any, label: list[int]) -> dict[str, np.ndarray]:
    image = np.zeros((len(label), 16), np.float32)
    image[:, :3] = logits_NC
    return {"image": image.reshape(-1, *IMAGE), "label": np.array(label, np.int32)}


MISTAKEN = labelled([[1, 0, 0], [0.6, 0.5, 0], [0, 0.9, 0], [0, 0.1, 0.8], [0.2, 0, 0.1]], [0, 1, 0, 1, 0])


def test_worst_mistakes_come_first_with_what_they_were_taken_for() -> None:
    draw = gallery.worst_mistakes(Pixels(), MISTAKEN, class_names=("zero", "one", "two"))
    pictures = draw({"model": {}}, {"model": {}}, KEY)
    is_picture(pictures, 3, 5)
    np.testing.assert_array_equal(pictures.images, MISTAKEN["image"][[2, 3, 1]])
    assert pictures.captions == ["zero, taken for one (100%)", "one, taken for two (100%)", "one, taken for zero (73%)"]


def test_worst_mistakes_without_names_at_most_so_many_and_none_at_all() -> None:
    pictures = gallery.worst_mistakes(Pixels(), MISTAKEN, count=1)({"model": {}}, {"model": {}}, KEY)
    assert pictures.captions == ["0, taken for 1 (100%)"]
    right = labelled(np.eye(3), [0, 1, 2])
    pictures = gallery.worst_mistakes(Pixels(), right)({"model": {}}, {"model": {}}, KEY)
    assert len(pictures.images) == len(pictures.captions) == 0


def test_worst_mistakes_looks_at_each_image_once_whatever_the_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Row 0 is a mistake, and is what the last batch is padded with."""
    monkeypatch.setattr(gallery, "BATCH", 3)
    split = labelled([[0, 0.9, 0], [1, 0, 0], [1, 0, 0], [0, 0, 0.7]], [0, 0, 0, 1])
    pictures = gallery.worst_mistakes(Pixels(), split)({"model": {}}, {"model": {}}, KEY)
    np.testing.assert_array_equal(pictures.images, split["image"][[0, 3]])


# --- autoencoders


@pytest.mark.parametrize("kind", [Autoencoder, VAE])
def test_reconstructions_lie_below_their_images(kind: type) -> None:
    model, params, state = autoencoder(kind)
    split = uniform(23)
    pictures = gallery.reconstructions(model, split, count=20)(params, state, KEY)
    is_picture(pictures, 40, 10)
    variables, x = {"params": params["model"]}, jnp.asarray(split["image"][:20] / np.float32(255))
    logits = model.apply(variables, x)
    back = jax.nn.sigmoid(logits[0] if kind is VAE else logits)
    rows = pictures.images.reshape(4, 10, *IMAGE)
    np.testing.assert_allclose(rows[[0, 2]].reshape(x.shape), x, rtol=1e-6)
    np.testing.assert_allclose(rows[[1, 3]].reshape(x.shape), back, rtol=1e-4)


def test_reconstructions_of_a_few_images_still_lie_below_them() -> None:
    """Of 13 images the second row holds 3; what belongs to them must not slip into it."""
    model, params, state = autoencoder()
    split = uniform(13)
    rows = gallery.reconstructions(model, split)(params, state, KEY).images.reshape(4, 10, *IMAGE)
    np.testing.assert_allclose(rows[2, :3], split["image"][10:] / 255, rtol=1e-6)
    assert not rows[2:, 3:].any() and (rows[3, :3] > 0).all()


def test_prior_samples_are_the_vaes() -> None:
    model, params, state = autoencoder(VAE)
    pictures = gallery.prior_samples(model, count=7)(params, state, KEY)
    is_picture(pictures, 7, 10)
    np.testing.assert_allclose(pictures.images, sample(model, {"params": params["model"]}, KEY, 7), rtol=1e-5)


@pytest.mark.parametrize("kind", [Autoencoder, VAE])
def test_each_row_of_a_latent_walk_goes_from_one_reconstruction_to_another(kind: type) -> None:
    model, params, state = autoencoder(kind)
    split = uniform(9)
    pictures = gallery.latent_walk(model, split, rows=3, steps=5)(params, state, KEY)
    is_picture(pictures, 15, 5)
    walk = pictures.images.reshape(3, 5, *IMAGE)
    logits = model.apply({"params": params["model"]}, jnp.asarray(split["image"][:6] / np.float32(255)))
    back = np.asarray(jax.nn.sigmoid(logits[0] if kind is VAE else logits))
    np.testing.assert_allclose(walk[:, 0], back[:3], rtol=1e-4)
    np.testing.assert_allclose(walk[:, -1], back[3:], rtol=1e-4)
    steps = np.diff(np.log(walk / (1 - walk)), axis=1)  # the decoder is linear here: equal steps in its logits
    np.testing.assert_allclose(steps, np.broadcast_to(steps[:, :1], steps.shape), rtol=1e-2, atol=1e-3)


def test_a_latent_walk_takes_as_many_rows_as_there_are_images_for() -> None:
    model, params, state = autoencoder()
    is_picture(gallery.latent_walk(model, uniform(7), rows=5, steps=4)(params, state, KEY), 12, 4)


# --- generators


@pytest.mark.parametrize(("classes", "columns"), [(0, 10), (3, 9), (10, 10), (12, 10)])
def test_generator_samples_have_a_class_a_column(classes: int, columns: int) -> None:
    model, params, state = generator(classes)
    pictures = gallery.generator_samples(model, count=20)(params, state, KEY)
    is_picture(pictures, 20, columns)
    np.testing.assert_array_equal(pictures.images, generate_images(model, params, state, KEY, 20))
    if 0 < classes <= 10:
        assert columns % classes == 0


def test_nearest_training_images_lie_below_the_samples() -> None:
    model, params, state = generator()
    params = jax.tree.map(lambda w: 10 * w, params)  # so that the samples differ
    split = uniform(30)
    pictures = gallery.nearest_training_images(model, split, count=20)(params, state, KEY)
    is_picture(pictures, 40, 10)
    fake = generate_images(model, params, state, KEY, 20)
    images = split["image"] / np.float32(255)
    rows = pictures.images.reshape(4, 10, *IMAGE)
    np.testing.assert_array_equal(rows[[0, 2]].reshape(fake.shape), fake)
    near = np.square(fake[:, None] - images[None]).reshape(20, 30, -1).sum(-1).argmin(1)
    np.testing.assert_allclose(rows[[1, 3]].reshape(fake.shape), images[near], rtol=1e-6)
    assert len(np.unique(near)) > 1
