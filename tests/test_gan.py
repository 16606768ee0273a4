import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bigjax import UsageError
from bigjax.models import Discriminator, Generator

SMALL = Generator(image=(8, 8, 1), latent=5, features=(6, 4, 4))


def count(model, *inputs) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(model.init, jax.random.key(0), *inputs)["params"]))


def test_parameter_counts_of_the_classic_listings():
    assert count(Generator(image=(32, 32, 3)), jnp.zeros((1, 100))) == 2_444_931
    assert count(Discriminator(), jnp.zeros((1, 28, 28, 1))) == 74_433


@pytest.mark.parametrize("image", [(28, 28, 1), (32, 32, 3)])
def test_the_two_fit_each_other(image):
    generator, discriminator = Generator(image=image, features=(8, 4, 4)), Discriminator(features=(4, 8))

    def both(key):
        z = jnp.zeros((2, 100))
        x, _ = generator.init_with_output(key, z)
        return x, discriminator.init_with_output(key, x)[0]

    x, logit = jax.eval_shape(both, jax.random.key(0))
    assert x.shape == (2, *image) and logit.shape == (2,)


def test_images_lie_between_0_and_1():
    z = 50 * jax.random.normal(jax.random.key(0), (8, 5))
    x = SMALL.apply(SMALL.init(jax.random.key(1), z), z)
    assert 0 <= float(x.min()) < 0.1 and 0.9 < float(x.max()) <= 1


def test_spectral_norm_makes_every_layer_of_norm_1():
    model = Discriminator(features=(4,), spectral_norm=True, pool="flatten", slope=1.0)
    x = jax.random.uniform(jax.random.key(0), (4, 8, 8, 1))
    variables = model.init(jax.random.key(1), x)
    for _ in range(30):
        _, state = model.apply(variables, x, train=True, mutable="batch_stats")
        variables = {"params": variables["params"], **state}
    params = variables["params"]

    def divided(kernel):
        return kernel / jnp.linalg.svd(kernel.reshape(-1, kernel.shape[-1]), compute_uv=False)[0]

    params = {
        "conv_0": {"kernel": divided(params["conv_0"]["kernel"])},
        "logit": {"kernel": divided(params["logit"]["kernel"]), "bias": params["logit"]["bias"] + 3.0},
    }
    plain = Discriminator(features=(4,), pool="flatten", slope=1.0).apply({"params": params}, x)
    shifted = {**variables["params"], "logit": {**variables["params"]["logit"], "bias": params["logit"]["bias"]}}
    normed = model.apply({**variables, "params": shifted}, x)
    chex.assert_trees_all_close(normed, plain, rtol=1e-3, atol=1e-4)


def test_spectral_state_moves_in_training_only():
    model = Discriminator(features=(4,), spectral_norm=True)
    x = jnp.ones((2, 8, 8, 1))
    variables = model.init(jax.random.key(0), x)
    _, trained = model.apply(variables, x, train=True, mutable="batch_stats")
    _, evaluated = model.apply(variables, x, mutable="batch_stats")
    chex.assert_trees_all_equal(evaluated["batch_stats"], variables["batch_stats"])
    assert not np.allclose(trained["batch_stats"]["conv_0_right"], variables["batch_stats"]["conv_0_right"])


def test_the_discriminator_sows_its_features():
    model, x = Discriminator(features=(4, 6)), jnp.ones((2, 8, 8, 1))
    _, state = model.apply(model.init(jax.random.key(0), x), x, mutable="intermediates")
    chex.assert_shape(state["intermediates"]["features"][0], (2, 6))


def test_gradient_penalty_can_be_differentiated():
    model = Discriminator(features=(3,), pool="flatten")
    x = jax.random.uniform(jax.random.key(0), (2, 4, 4, 1))
    variables = model.init(jax.random.key(1), x)
    penalty = jax.grad(lambda v: (jax.grad(lambda x: model.apply(v, x).sum())(x) ** 2).sum())(variables)
    assert float(jnp.abs(penalty["params"]["conv_0"]["kernel"]).max()) > 0


def test_labels_change_what_both_give():
    generator = Generator(image=(8, 8, 1), latent=5, features=(6, 4), classes=3)
    discriminator = Discriminator(features=(4,), classes=3)
    z, x, label = jnp.ones((2, 5)), jnp.ones((2, 8, 8, 1)), jnp.array([0, 2])
    for model, input_ in ((generator, z), (discriminator, x)):
        variables = model.init(jax.random.key(0), input_, label)
        y = model.apply(variables, input_, label)
        assert not np.allclose(y[0], y[1])
        with pytest.raises(UsageError, match="3 classes.*labels"):
            model.apply(variables, input_)


@pytest.mark.parametrize("image", [(17, 23, 1), (30, 28, 3), (1, 2, 1)])
def test_images_have_any_size(image):
    """Made on a grid that covers them, whose edge is cut off."""
    model = Generator(image, latent=5, features=(4, 3, 2))
    variables = model.init(jax.random.key(0), jnp.zeros((1, 5)))
    height, width = (-(-side // 4) for side in image[:2])
    assert variables["params"]["dense_0"]["kernel"].shape == (5, height * width * 4)
    chex.assert_shape(model.apply(variables, jnp.ones((2, 5))), (2, *image))


def test_mistakes_are_named():
    with pytest.raises(UsageError, match="5 numbers, not 7"):
        SMALL.init(jax.random.key(0), jnp.zeros((1, 7)))
    with pytest.raises(UsageError, match="'mean'.*max or flatten"):
        Discriminator(pool="mean").init(jax.random.key(0), jnp.zeros((1, 8, 8, 1)))
