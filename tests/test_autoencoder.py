import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bigjax import UsageError
from bigjax.models import VAE, Autoencoder, ConvAutoencoder
from bigjax.models.autoencoder import interpolate, sample

IMAGE = (8, 8, 1)
TINY = {"image": IMAGE, "code": 3, "encoder_features": (4,), "decoder_features": (5,)}


def made(model_class, **fields):
    model = model_class(**TINY | fields)
    x = jax.random.uniform(jax.random.key(0), (2, *IMAGE))
    return model, model.init(jax.random.key(1), x), x


def test_parameter_count_of_the_classic_listing():
    shapes = jax.eval_shape(Autoencoder(dropout=0.5).init, jax.random.key(0), jnp.zeros((1, 28, 28, 1)))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes["params"])) == 109_552


@pytest.mark.parametrize("model_class", [Autoencoder, ConvAutoencoder])
def test_a_call_decodes_what_it_encodes(model_class):
    model, variables, x = made(model_class)
    code = model.apply(variables, x, method="encode")
    chex.assert_shape(code, (2, 3))
    logits, state = model.apply(variables, x, mutable="intermediates")
    chex.assert_shape(logits, x.shape)
    chex.assert_trees_all_close(logits, model.apply(variables, code, method="decode"), rtol=1e-6)
    chex.assert_trees_all_equal(state["intermediates"]["features"][0], code)


def test_vae_samples_with_a_stream_and_takes_the_mean_without():
    model, variables, x = made(VAE)
    logits, mean, log_variance = model.apply(variables, x)
    chex.assert_trees_all_close(logits, model.apply(variables, mean, method="decode"), rtol=1e-6)
    chex.assert_trees_all_equal((mean, log_variance), model.apply(variables, x, method="encode"))
    a, b = (model.apply(variables, x, rngs={"sample": jax.random.key(i)}).logits for i in (1, 2))
    assert not np.allclose(a, b) and not np.allclose(a, logits)


def test_the_spread_of_samples_is_the_encoders():
    model, variables, _ = made(VAE, encoder_features=(), decoder_features=())
    variables = jax.tree.map(jnp.zeros_like, variables)
    variables["params"]["encoder"]["out"]["bias"] = jnp.array([1.0, 2.0, 3.0, *np.log([0.25, 1.0, 4.0])])
    variables["params"]["decoder"]["out"]["kernel"] = jnp.zeros((3, 64)).at[jnp.arange(3), jnp.arange(3)].set(1.0)
    x = jnp.zeros((4000, *IMAGE))
    z = model.apply(variables, x, rngs={"sample": jax.random.key(0)}).logits.reshape(4000, -1)[:, :3]
    np.testing.assert_allclose(z.mean(0), [1, 2, 3], atol=0.15)
    np.testing.assert_allclose(z.std(0), [0.5, 1, 2], rtol=0.1)


@pytest.mark.parametrize("model_class", [Autoencoder, VAE])
def test_interpolation_starts_and_ends_at_the_reconstructions(model_class):
    model, variables, x = made(model_class)
    path = interpolate(model, variables, x[:1], x[1:], 5)
    chex.assert_shape(path, (5, 1, *IMAGE))
    logits = model.apply(variables, x)
    ends = jax.nn.sigmoid(logits[0] if model_class is VAE else logits)
    chex.assert_trees_all_close(path[jnp.array([0, -1]), 0], ends, rtol=1e-5)
    assert not np.allclose(path[2], path[0])


def test_samples_are_images_and_only_a_vae_has_them():
    model, variables, _ = made(VAE)
    images = sample(model, variables, jax.random.key(0), 6)
    chex.assert_shape(images, (6, *IMAGE))
    assert 0 < float(images.min()) and float(images.max()) < 1 and not np.allclose(images[0], images[1])
    model, variables, _ = made(Autoencoder)
    with pytest.raises(UsageError, match="use a VAE"):
        sample(model, variables, jax.random.key(0), 6)


def test_dropout_leaves_the_code_alone():
    model, variables, x = made(Autoencoder, dropout=0.5, encoder_features=())
    code = model.apply(variables, x, method="encode")
    dropped = model.apply(variables, x, train=True, rngs={"dropout": jax.random.key(0)}, method="encode")
    chex.assert_trees_all_equal(code, dropped)
    logits = [model.apply(variables, x, train=t, rngs={"dropout": jax.random.key(0)}) for t in (False, True)]
    assert not np.allclose(*logits)


@pytest.mark.parametrize("image", [(17, 23, 1), (5, 8, 3)])
def test_images_have_any_size(image):
    for model_class in (Autoencoder, ConvAutoencoder, VAE):
        model = model_class(image, 3, (4, 4), (4, 4))
        x = jnp.zeros((2, *image))
        out = jax.eval_shape(lambda x, model=model: model.init_with_output(jax.random.key(0), x)[0], x)
        chex.assert_shape(out[0] if model_class is VAE else out, x.shape)


def test_other_images_are_refused():
    with pytest.raises(UsageError, match=r"\(28, 28, 1\).*\(8, 8, 1\)"):
        Autoencoder().init(jax.random.key(0), jnp.zeros((1, 8, 8, 1)))
