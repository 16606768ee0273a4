"""Pictures for the report. N images, C classes."""

import gc
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import run_with_devices
from jax import Array

from bigjax import sharding
from bigjax.data.text import train_tokenizer
from bigjax.look import gallery
from bigjax.look.evaluators import generate_images, generated_images, linear_probe
from bigjax.models import CNN, GPT, VAE, Autoencoder, Generator
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


class Logit(nn.Module):
    """The image's first pixel is the only logit."""

    @nn.compact
    def __call__(self, x_BHWC: Array, *, train: bool = False) -> Array:
        return 10 * x_BHWC.reshape(len(x_BHWC), -1)[:, :1]


def test_worst_mistakes_of_one_logit() -> None:
    split = labelled([[-0.5, 0, 0], [0.1, 0, 0], [0.3, 0, 0], [-0.3, 0, 0]], [0, 0, 1, 1])
    pictures = gallery.worst_mistakes(Logit(), split)({"model": {}}, {"model": {}}, KEY)
    np.testing.assert_array_equal(pictures.images, split["image"][[3, 1]])
    assert pictures.captions == ["1, taken for 0 (95%)", "0, taken for 1 (73%)"]


class Thousands(nn.Module):
    """Class 2000 whatever it sees."""

    @nn.compact
    def __call__(self, x_BHWC: Array, *, train: bool = False) -> Array:
        return jnp.tile(10.0 * jax.nn.one_hot(2000, 3000), (len(x_BHWC), 1))


def test_worst_mistakes_among_thousands_of_nameless_classes() -> None:
    pictures = gallery.worst_mistakes(Thousands(), labelled([[0, 0, 0]], [1500]))({"model": {}}, {"model": {}}, KEY)
    assert pictures.captions == ["1500, taken for 2000 (88%)"]


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


# --- on a mesh


class Watched(nn.Module):
    """A generator that notes how its kernel lies where it is computed with."""

    latent: int = 8
    classes: int = 0

    @nn.compact
    def __call__(self, z_BZ: Array, *, train: bool = False) -> Array:
        kernel_ZF = self.param("kernel", nn.initializers.normal(), (8, 16))
        jax.debug.inspect_array_sharding(kernel_ZF, callback=SEEN.append)
        return nn.sigmoid(z_BZ @ kernel_ZF).reshape(-1, *IMAGE)


SEEN: list[Any] = []


def on_a_mesh() -> None:
    """All of them on 8 devices, each with an eighth of the parameters: what one device gives."""
    vae = VAE(image=IMAGE, code=3, encoder_features=(32,), decoder_features=(32,))
    gan = Generator(IMAGE, latent=8, features=(16,), batch_norm=True, classes=3)
    cnn = CNN(features=(8,), dense=(), pools=1, padding="SAME", outputs=3)
    split = uniform(13) | {"label": np.arange(13, dtype=np.int32) % 3}
    z, labels, image = jnp.zeros((2, 8)), jnp.zeros(2, jnp.int32), jnp.zeros((2, *IMAGE))
    models = {"model": (vae, (image,)), "generator": (gan, (z, labels)), "classifier": (cnn, (image,))}
    weights = {
        k: jax.tree.map(np.array, jax.jit(m.init)(jax.random.key(i), *x))
        for i, (k, (m, x)) in enumerate(models.items())
    }
    params = {k: v["params"] for k, v in weights.items()}
    state = {k: {"batch_stats": v["batch_stats"]} if "batch_stats" in v else {} for k, v in weights.items()}
    looks = {
        "mistakes": lambda: lambda p, s, k: gallery.worst_mistakes(cnn, split)({"model": p["classifier"]}, s, k),
        "reconstructions": lambda: gallery.reconstructions(vae, split),
        "prior": lambda: gallery.prior_samples(vae, count=7),
        "walk": lambda: gallery.latent_walk(vae, split, rows=3, steps=5),
        "samples": lambda: gallery.generator_samples(gan, count=20),
        "nearest": lambda: gallery.nearest_training_images(gan, split, count=20),
        "classifier": lambda: generated_images(gan, lambda: (cnn, weights["classifier"], 0.5), split),
        "probe": lambda: linear_probe(vae, split, split),
    }
    expected = {name: make()(params, state, KEY) for name, make in looks.items()}
    mesh = sharding.make_mesh(sharding.MeshConfig(data=2, fsdp=4), batch_size=8)
    placed = sharding.place({"params": params, "model_state": state}, mesh)
    sharded = jax.device_put(
        (params, state), jax.tree.map(lambda x: x.sharding, (placed["params"], placed["model_state"]))
    )
    split_shapes = {x.shape for x in jax.tree.leaves(sharded) if not x.sharding.is_fully_replicated}
    assert len(split_shapes) > 6
    gc.collect()
    with jax.set_mesh(mesh):
        for name, make in looks.items():
            found, want = make()(*sharded, KEY), expected[name]
            whole = [x for x in jax.live_arrays() if x.shape in split_shapes and x.sharding.is_fully_replicated]
            assert not whole, (name, [x.shape for x in whole])
            if isinstance(want, dict):
                assert found.keys() == want.keys()
                np.testing.assert_allclose([*found.values()], [*want.values()], rtol=1e-3)
            else:
                assert isinstance(found.images, np.ndarray) and found.captions == want.captions
                np.testing.assert_allclose(found.images, want.images, rtol=1e-4, atol=1e-5)
        kernel = jax.device_put(
            np.ones((8, 16), np.float32), sharding.NamedSharding(mesh, sharding.PartitionSpec(None, "fsdp"))
        )
        gallery.generator_samples(Watched())({"generator": {"kernel": kernel}}, {"generator": {}}, KEY)
        assert SEEN and not any(where.is_fully_replicated for where in SEEN), SEEN


def test_on_a_mesh_the_state_stays_where_it_is(tmp_path: Path) -> None:
    run_with_devices("import test_gallery; test_gallery.on_a_mesh()", folder=tmp_path)


# --- text


def test_a_language_model_goes_on_with_its_prompt_as_far_as_its_context() -> None:
    model = GPT(vocabulary=7, layers=1, width=4, heads=1, context=6)
    params, state = made(model, "model", jnp.zeros((1, 2), jnp.int32))
    write = lambda *prompt, **options: gallery.text_sample(model, prompt, **options)(params, state, KEY)  # noqa: E731
    spoken = write(1, 2, speak=gallery.speaker(None, known=False)).split()
    assert spoken[:2] == ["1", "2"] and len(spoken) == 6 and all(0 <= int(token) < 7 for token in spoken)
    spoken = write(*range(6), speak=list, length=2)
    assert spoken[:3] == [0, 1, 2] and len(spoken) == 5  # of a long prompt half a context


def test_tokens_are_spoken_by_their_tokenizer_or_as_bytes(tmp_path: Path) -> None:
    assert gallery.speaker(None)(np.array([104, 105, 200])) == "hi\ufffd"
    coder = train_tokenizer(["ab ab cd cd", "ab cd"], kind="bpe", vocabulary=300)
    coder.save(str(tmp_path / "tokenizer.json"))
    ids = np.array(coder.encode("ab cd").ids)
    assert gallery.speaker(str(tmp_path / "tokenizer.json"))(ids) == coder.decode(ids.tolist())
