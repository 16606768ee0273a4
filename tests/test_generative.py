"""Losses of sequences and images against formulas written out.

B batch, L places, V vocabulary, H height, W width, C channels, Z numbers of a code or a latent, D pixels.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import Array

from bigjax import UsageError
from bigjax.data import text
from bigjax.evaluation import evaluator
from bigjax.models import VAE, Discriminator, Generator
from bigjax.sharding import MeshConfig, make_mesh
from bigjax.step import init_state, train_step
from bigjax.task import Task
from bigjax.tasks import next_token
from bigjax.tasks.gan import adversarial
from bigjax.tasks.images import pixel_cross_entropy, reconstruct, variational

KEY = jax.random.key(0)


def rows(mask: Any = None, **data: Any) -> dict[str, Array]:
    size = len(next(iter(data.values())))
    batch = {"index": np.arange(size, dtype=np.int32), "mask": np.ones(size, np.float32) if mask is None else mask}
    return {k: jnp.asarray(v, jnp.float32 if k == "mask" else None) for k, v in (batch | data).items()}


def permuted(batch: dict[str, Array], order: Any) -> dict[str, Array]:
    return jax.tree.map(lambda x: x[jnp.asarray(order)], batch)


def softplus(x: Any) -> np.ndarray:
    return np.logaddexp(0, np.asarray(x, np.float64))


def each(loss: Callable[..., Any]) -> Callable[..., np.ndarray]:
    """(params, state, batch, key) -> the loss of every row (B,): the sum under a mask of that row alone."""

    def one(params: Any, state: Any, batch: dict[str, Array], key: Array, mask_B: Array) -> Array:
        return loss(params, state, batch | {"mask": mask_B}, key)[0][0]

    vmapped = jax.jit(jax.vmap(one, (None, None, None, None, 0)))
    return lambda params, state, batch, key=KEY: np.asarray(
        vmapped(params, state, batch, key, jnp.eye(len(batch["mask"])))
    )


# --- next_token: a table of logits is the whole model, so that what is right does not depend on the window


class Table(nn.Module):
    """Logits of the next token by the last one alone."""

    vocabulary: int

    @nn.compact
    def __call__(self, tokens_BL: Array, *, train: bool = False) -> Array:
        return nn.Embed(self.vocabulary, self.vocabulary, name="table")(tokens_BL)


def table(vocabulary: int, **options: Any) -> tuple[Task, Any, np.ndarray]:
    """(task, params, -log p(next | last) (V, V))."""
    logits_VV = 2 * np.random.default_rng(0).normal(size=(vocabulary, vocabulary)).astype(np.float32)
    cost_VV = np.log(np.exp(np.float64(logits_VV)).sum(-1, keepdims=True)) - logits_VV
    return next_token(Table(vocabulary), **options), {"model": {"table": {"embedding": logits_VV}}}, cost_VV


STATE = {"model": {}}
TOKENS_BL = np.array([[1, 2, 3, 4, 0], [4, 4, 1, 0, 2], [3, 0, 1, 2, 2]], np.int32)


@pytest.mark.parametrize(
    ("fields", "counted"),  # which of the targets 1, 2, 3, 4 of each row
    [
        ({}, [[1, 2, 3, 4]] * 3),
        ({"length": [5, 3, 2]}, [[1, 2, 3, 4], [1, 2], [1]]),
        ({"length": [5, 3, 1], "start": [3, 1, 1]}, [[3, 4], [1, 2], []]),
        ({"start": [1, 4, 2]}, [[1, 2, 3, 4], [4], [2, 3, 4]]),
        ({"length": [5, 4, 4], "start": [2, 2, 2], "mask": [1, 0, 1]}, [[2, 3, 4], [], [2, 3]]),
        ({"mask": [0, 1, 0]}, [[], [1, 2, 3, 4], []]),
    ],
)
def test_next_token_is_numpys_mean_over_the_targets_that_count(fields: dict, counted: list[list[int]]) -> None:
    task, params, cost_VV = table(5)
    costs = [cost_VV[row[t - 1], row[t]] for row, places in zip(TOKENS_BL, counted) for t in places]
    right = [cost_VV[row[t - 1]].argmin() == row[t] for row, places in zip(TOKENS_BL, counted) for t in places]
    data = {k: np.array(v, np.int32) for k, v in fields.items() if k != "mask"}
    batch = rows(fields.get("mask"), tokens=TOKENS_BL, **data)
    (total, count), (state, out) = task.losses["model"](params, STATE, batch, KEY)
    np.testing.assert_allclose([total, count], [sum(costs), len(costs)], rtol=1e-5)
    assert state == {} and jax.device_get(out["accuracy"]) == (sum(right), len(costs))
    evaluated = task.evaluate(params, STATE, batch, KEY)
    np.testing.assert_allclose(evaluated["loss"], [sum(costs), len(costs)], rtol=1e-5)
    np.testing.assert_allclose(task.summarize(evaluated)["loss"], np.mean(costs), rtol=1e-5)


def test_next_token_looks_only_at_what_is_before() -> None:
    """No model input is the last token, and the target at place t is tokens[:, t]."""
    seen = []

    class Spy(nn.Module):
        @nn.compact
        def __call__(self, tokens_BL: Array, *, train: bool = False) -> Array:
            seen.append((np.asarray(tokens_BL), train))
            return jnp.zeros((*tokens_BL.shape, 5))

    task, batch = next_token(Spy()), rows(tokens=TOKENS_BL)
    task.losses["model"]({"model": {}}, STATE, batch, KEY)
    task.evaluate({"model": {}}, STATE, batch, KEY)
    assert [train for _, train in seen] == [True, False]
    for tokens_BL, _ in seen:
        np.testing.assert_array_equal(tokens_BL, TOKENS_BL[:, :-1])


DATA = bytes(np.random.default_rng(1).integers(97, 101, 41).astype(np.uint8))


@pytest.mark.parametrize("stride", [None, 5, 3, 1])
def test_every_held_out_byte_counts_once(stride: int | None) -> None:
    """Windows overlap, the last one is padded, and so is the last batch: the sum is that over the text itself."""
    task, params, cost_VV = table(128, bytes_a_token=1)
    split = text.byte_windows(DATA, length=8, stride=stride)
    evaluate = evaluator(task, batch_size=4, seed=0, mesh=make_mesh(MeshConfig(), batch_size=4))
    out = evaluate(params, STATE, split)
    expected = [cost_VV[a, b] for a, b in zip(b"\n" + DATA, DATA)]
    assert out["loss"][1] == out["accuracy"][1] == len(DATA)
    np.testing.assert_allclose(out["loss"][0], sum(expected), rtol=1e-5)
    summary = task.summarize(out)
    np.testing.assert_allclose(summary["bits_per_byte"], np.mean(expected) / np.log(2), rtol=1e-5)


def test_bits_per_byte_of_tokens_of_several_bytes_and_of_none() -> None:
    sums = {"loss": (np.float32(6 * np.log(2)), np.float32(2)), "accuracy": (np.float32(1), np.float32(2))}
    np.testing.assert_allclose(next_token(Table(5), bytes_a_token=4).summarize(sums)["bits_per_byte"], 0.75, rtol=1e-6)
    assert next_token(Table(5)).summarize(sums).keys() == {"loss", "accuracy"}


# --- reconstruct


def test_pixel_cross_entropy_is_numpys_sum_over_an_image() -> None:
    random = np.random.default_rng(0)
    logits_BHWC, image_BHWC = 3 * random.normal(size=(4, 3, 2, 2)), random.uniform(size=(4, 3, 2, 2))
    p_BHWC = 1 / (1 + np.exp(-logits_BHWC))
    expected = -(image_BHWC * np.log(p_BHWC) + (1 - image_BHWC) * np.log(1 - p_BHWC)).reshape(4, -1).sum(1)
    out_B = pixel_cross_entropy(*(jnp.asarray(x, jnp.float32) for x in (logits_BHWC, image_BHWC)))
    chex.assert_shape(out_B, (4,))
    np.testing.assert_allclose(out_B, expected, rtol=1e-5)


class Bias(nn.Module):
    """Logits that are its parameters, whatever the image."""

    @nn.compact
    def __call__(self, x_BHWC: Array, *, train: bool = False) -> Array:
        bias_HWC = self.param("bias", nn.initializers.normal(1.0), x_BHWC.shape[1:])
        return jnp.broadcast_to(bias_HWC[None], x_BHWC.shape)


def test_reconstruct_is_the_cross_entropy_a_pixel_of_the_real_rows() -> None:
    random, task = np.random.default_rng(0), reconstruct(Bias())
    image_BHWC = random.uniform(size=(3, 2, 2, 1)).astype(np.float32)
    batch = rows([1, 0, 1], image=image_BHWC)
    params, state = jax.jit(task.init)(KEY, batch)
    z_HWC, x_BHWC = np.float64(params["model"]["bias"])[None], np.float64(image_BHWC[[0, 2]])
    expected = (x_BHWC * softplus(-z_HWC) + (1 - x_BHWC) * softplus(z_HWC)).mean()
    (total, count), _ = task.losses["model"](params, state, batch, KEY)
    np.testing.assert_allclose([total / count, count], [expected, 2], rtol=1e-5)
    summary = task.summarize(task.evaluate(params, state, batch, KEY))
    np.testing.assert_allclose([summary["binary_cross_entropy"], summary["loss"]], [expected] * 2, rtol=1e-5)


# --- variational


class Given(nn.Module):
    """The first Z pixels are the code's mean, the next Z its log variance; decodes to the code itself."""

    code: int

    def encode(self, x: Array, *, train: bool = False) -> tuple[Array, Array]:
        x_BD = x.reshape(len(x), -1)
        return x_BD[:, : self.code], x_BD[:, self.code : 2 * self.code]

    def decode(self, z_BZ: Array, *, train: bool = False) -> Array:
        rest = jnp.zeros_like(z_BZ)  # the sum over pixels of softplus(z) - z·image
        return jnp.concatenate([z_BZ, rest], -1).reshape(len(z_BZ), -1, 1, 1)


def encoded(mean_BZ: Any, log_variance_BZ: Any) -> dict[str, Array]:
    x_BD = np.concatenate([mean_BZ, log_variance_BZ], -1).astype(np.float32)
    return rows(image=x_BD.reshape(*x_BD.shape, 1, 1))


def test_divergence_is_the_formula_never_negative_and_0_at_the_prior() -> None:
    random = np.random.default_rng(0)
    mean_BZ, log_variance_BZ = random.normal(size=(2, 50, 3))
    mean_BZ[:2] = 0
    log_variance_BZ[0] = 0
    batch, task = encoded(mean_BZ, log_variance_BZ), variational(Given(3))
    s_BZ = np.exp(log_variance_BZ / 2)
    expected_B = (-np.log(s_BZ) + (s_BZ**2 + mean_BZ**2) / 2 - 0.5).sum(1)  # of N(mean, s²) from N(0, 1)

    def one(mask_B: Array) -> Array:
        return task.losses["model"](STATE, STATE, batch | {"mask": mask_B}, KEY)[1][1]["divergence"][0]

    divergence_B = jax.jit(jax.vmap(one))(jnp.eye(50))
    np.testing.assert_allclose(divergence_B, expected_B, rtol=1e-4, atol=1e-5)
    assert divergence_B[0] == 0 and (divergence_B[1:] > 0).all()


def code_of(loss_B: np.ndarray) -> np.ndarray:
    """z of `Given(1)` on images of zeros: the loss with beta 0 is softplus(z) + log 2."""
    return np.log(np.expm1(loss_B - np.log(2)))


def test_noise_is_standard_normal_scaled_by_the_encoder_and_each_examples_own() -> None:
    size = 400
    loss = each(variational(Given(1), beta=0).losses["model"])

    def losses(mean: float, deviation: float, key: Array = KEY, index_B: Any = None) -> np.ndarray:
        batch = encoded(np.full((size, 1), mean), np.full((size, 1), 2 * np.log(deviation)))
        return loss(STATE, STATE, batch if index_B is None else batch | {"index": index_B}, key)

    noise = code_of(losses(0.0, 1.0))
    assert abs(noise.mean()) < 0.15 and abs(noise.std() - 1) < 0.1 and len(np.unique(noise)) == size
    again, other = code_of(losses(0.0, 1.0)), code_of(losses(0.0, 1.0, jax.random.key(1)))
    np.testing.assert_array_equal(again, noise)
    assert not np.isclose(other, noise).any()
    turned = code_of(losses(0.0, 1.0, index_B=jnp.arange(size)[::-1]))
    np.testing.assert_allclose(turned[::-1], noise, rtol=1e-5, atol=1e-5)
    mean, deviation = 0.3, 0.5
    z = mean + deviation * noise
    expected = softplus(z) - z * mean + np.log(2)  # the image is what the encoder was given: (mean, log variance)
    np.testing.assert_allclose(losses(mean, deviation), expected, rtol=1e-4, atol=1e-4)


TINY_VAE = VAE(image=(4, 4, 1), code=3, encoder_features=(6,), decoder_features=(6,))


def vae_batch(size: int = 6) -> dict[str, Array]:
    image = np.random.default_rng(0).uniform(size=(size, 4, 4, 1)).astype(np.float32)
    return rows([1, 1, 0] + [1] * (size - 3), image=image)


def test_without_noise_and_divergence_the_loss_is_the_cross_entropy_of_decode() -> None:
    task, batch = variational(TINY_VAE, beta=0.0), vae_batch()
    params, state = jax.jit(task.init)(KEY, batch)
    out = params["model"]["encoder"]["out"]  # a log variance of -200: z is the mean to the last bit
    out["kernel"], out["bias"] = out["kernel"].at[:, 3:].set(0), out["bias"].at[3:].set(-200.0)
    mean_BZ, _ = TINY_VAE.apply({"params": params["model"]}, batch["image"], method="encode")
    logits = TINY_VAE.apply({"params": params["model"]}, mean_BZ, method="decode")
    expected_B = pixel_cross_entropy(logits, batch["image"])
    np.testing.assert_allclose(each(task.losses["model"])(params, state, batch), expected_B, rtol=1e-5)
    (total, count), _ = task.losses["model"](params, state, batch, KEY)
    np.testing.assert_allclose([total, count], [(expected_B * batch["mask"]).sum(), 5], rtol=1e-5)


@pytest.mark.parametrize("beta", [0.0, 1.0, 4.0])
def test_beta_weighs_the_divergence_in_training_only(beta: float) -> None:
    task, batch = variational(TINY_VAE, beta=beta), vae_batch()
    params, state = jax.jit(task.init)(KEY, batch)
    (total, count), (_, out) = task.losses["model"](params, state, batch, KEY)
    reconstruction, divergence = (float(out[k][0] / out[k][1]) for k in ("reconstruction", "divergence"))
    assert divergence > 0.1
    np.testing.assert_allclose(total / count, reconstruction + beta * divergence, rtol=1e-5)
    values = task.summarize(task.evaluate(params, state, batch, KEY))
    np.testing.assert_allclose(values["negative_elbo"], values["reconstruction"] + values["divergence"], rtol=1e-5)
    plain = variational(TINY_VAE).summarize(variational(TINY_VAE).evaluate(params, state, batch, KEY))
    assert values == plain and values["negative_elbo"] == values["loss"]


def test_row_order_changes_no_rows_loss() -> None:
    task, batch, order = variational(TINY_VAE), vae_batch(), [4, 2, 0, 5, 1, 3]
    params, state = jax.jit(task.init)(KEY, batch)
    loss = each(task.losses["model"])
    loss_B, shuffled_B = loss(params, state, batch), loss(params, state, permuted(batch, order))
    np.testing.assert_allclose(shuffled_B, loss_B[order], rtol=1e-5)
    other_B = loss(params, state, batch | {"index": batch["index"] + 6})
    assert (np.abs(other_B - loss_B) > 1e-4).all()
    evaluated = [task.evaluate(params, state, b, KEY) for b in (batch, permuted(batch, order))]
    chex.assert_trees_all_close(*evaluated, rtol=1e-5)


# --- adversarial: the formulas, with a generator of one image and discriminators of few parameters

D = 4
FAKE_D = np.array([0.2, 0.9, 0.4, 0.6])
WEIGHT_D = np.array([0.7, -1.1, 0.4, 2.0])
REAL_BD = np.random.default_rng(0).uniform(size=(5, D))
MASK_B = np.array([1, 1, 0, 1, 1.0])


class One(nn.Module):
    """Gives its parameters as the image, whatever the latent."""

    latent: int = 2
    classes: int = 0

    @nn.compact
    def __call__(self, z_BZ: Array, label_B: Array | None = None, *, train: bool = False) -> Array:
        image_D = self.param("image", nn.initializers.ones, (D,))
        return jnp.broadcast_to(image_D.reshape(1, 2, 2, 1), (len(z_BZ), 2, 2, 1))


class Weigh(nn.Module):
    """w · x^power: the slope in x is w, or 2 w x."""

    power: int = 1

    @nn.compact
    def __call__(self, x_BHWC: Array, label_B: Array | None = None, *, train: bool = False) -> Array:
        weight_D = self.param("weight", nn.initializers.ones, (D,))
        return (x_BHWC.reshape(-1, D) ** self.power * weight_D[None]).sum(-1)


def pair(weight_D: Any = WEIGHT_D, fake_D: Any = FAKE_D) -> tuple[Any, Any]:
    params = {"discriminator": {"weight": weight_D}, "generator": {"image": fake_D}}
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params), {"discriminator": {}, "generator": {}}


def real(image_BD: Any = REAL_BD, mask_B: Any = MASK_B) -> dict[str, Array]:
    return rows(mask_B, image=np.asarray(image_BD, np.float32).reshape(-1, 2, 2, 1))


def mean_and_slope(task: Task, player: str, batch: dict[str, Array]) -> tuple[float, np.ndarray]:
    """The player's mean loss, and its gradient in the player's own parameters."""
    params, state = pair()

    def mean(own: Any) -> Array:
        (total, count), _ = task.losses[player]({**params, player: own}, state, batch, KEY)
        return total / count

    value, slope = jax.value_and_grad(mean)(params[player])
    return float(value), np.asarray(next(iter(slope.values())))


def sigmoid(x: Any) -> np.ndarray:
    return 1 / (1 + np.exp(-np.asarray(x)))


X_BD = REAL_BD[MASK_B > 0]
D_REAL_B, D_FAKE = X_BD @ WEIGHT_D, FAKE_D @ WEIGHT_D
NORM = np.linalg.norm(WEIGHT_D)  # of a linear discriminator's slope, everywhere
FORMULAS = {  # loss: (discriminator's, its gradient, generator's, its gradient)
    "non-saturating": (
        -(np.log(sigmoid(D_REAL_B)) + np.log(1 - sigmoid(D_FAKE))).mean(),
        (-(1 - sigmoid(D_REAL_B))[:, None] * X_BD).mean(0) + sigmoid(D_FAKE) * FAKE_D,
        -np.log(sigmoid(D_FAKE)),
        -(1 - sigmoid(D_FAKE)) * WEIGHT_D,
    ),
    "hinge": (
        np.maximum(0, 1 - D_REAL_B).mean() + max(0, 1 + D_FAKE),
        ((D_REAL_B < 1)[:, None] * -X_BD).mean(0) + (D_FAKE > -1) * FAKE_D,
        -D_FAKE,
        -WEIGHT_D,
    ),
    "wasserstein-gp": (
        D_FAKE - D_REAL_B.mean() + 10 * (NORM - 1) ** 2,
        FAKE_D - X_BD.mean(0) + 20 * (NORM - 1) * WEIGHT_D / NORM,
        -D_FAKE,
        -WEIGHT_D,
    ),
}


@pytest.mark.parametrize("loss", FORMULAS)
def test_adversarial_losses_and_gradients_are_the_formulas(loss: str) -> None:
    assert (D_REAL_B < 1).any() and (D_REAL_B > 1).any()  # so that the hinge has both sides
    task = adversarial(One(), Weigh(), loss=loss)
    d_loss, d_slope, g_loss, g_slope = FORMULAS[loss]
    for player, expected in (("discriminator", (d_loss, d_slope)), ("generator", (g_loss, g_slope))):
        value, slope = mean_and_slope(task, player, real())
        np.testing.assert_allclose(value, expected[0], rtol=1e-5, err_msg=player)
        np.testing.assert_allclose(slope, expected[1], rtol=1e-4, atol=1e-6, err_msg=player)
        (total, count), (_, out) = task.losses[player](*pair(), real(), KEY)
        assert count == 4 and out[f"{player}_loss"] == (total, count)
    assert list(task.losses) == ["discriminator", "generator"]


def test_gradient_penalty_by_hand_where_the_slope_depends_on_the_place() -> None:
    """Real and generated are the same image, so all between them is; what they add otherwise cancels."""
    weight, image = WEIGHT_D, FAKE_D
    n = np.sqrt((4 * weight**2 * image**2).sum())  # the slope of Σ w x² is 2 w x
    task = adversarial(One(), Weigh(power=2), loss="wasserstein-gp", penalty=3.0)
    value, slope = mean_and_slope(task, "discriminator", real([FAKE_D] * 5))
    np.testing.assert_allclose(value, 3 * (n - 1) ** 2, rtol=1e-4)
    np.testing.assert_allclose(slope, 6 * (n - 1) * 4 * weight * image**2 / n, rtol=1e-4)

    def penalty(w: np.ndarray) -> float:
        return 3 * (np.sqrt((4 * w**2 * image**2).sum()) - 1) ** 2

    steps = 1e-6 * np.eye(D)
    np.testing.assert_allclose(slope, [(penalty(weight + h) - penalty(weight - h)) / 2e-6 for h in steps], rtol=1e-3)


def test_the_penalty_is_taken_between_real_and_generated_at_each_examples_own_place() -> None:
    """d = x₀²/2 and images from 0 (generated) to 1 (real): the slope is the share of the way, so is its norm."""
    size, real_BD = 200, np.zeros((200, D))
    real_BD[:, 0] = 1
    task = adversarial(One(), Weigh(power=2), loss="wasserstein-gp", penalty=1.0)
    params, state = pair(np.array([0.5, 0, 0, 0]), np.zeros(D))
    batch = real(real_BD, np.ones(size))
    loss = each(task.losses["discriminator"])
    penalty_B = loss(params, state, batch) + 0.5  # d(generated) - d(real) = -1/2
    share_B = 1 - np.sqrt(np.clip(penalty_B, 0, None))
    assert share_B.min() < 0.05 and share_B.max() > 0.95 and abs(share_B.mean() - 0.5) < 0.08
    assert len(np.unique(share_B)) > 0.9 * size
    order = np.random.default_rng(0).permutation(size)
    shuffled_B = loss(params, state, permuted(batch, order)) + 0.5
    np.testing.assert_allclose(shuffled_B, penalty_B[order], rtol=1e-5, atol=1e-6)


def test_evaluation_is_the_share_of_each_kind_taken_for_what_it_is() -> None:
    task, (params, state) = adversarial(One(), Weigh()), pair()
    params["discriminator"]["weight"] = jnp.array([1.0, -1.0, 0, 0])
    out = jax.device_get(task.evaluate(params, state, real(), KEY))
    assert out["real_recognised"] == ((X_BD[:, 0] > X_BD[:, 1]).sum(), 4) and 0 < out["real_recognised"][0] < 4
    assert out["generated_recognised"] == (4, 4)  # 0.2 - 0.9 < 0
    assert task.summarize(out)["generated_recognised"] == 1


def test_an_unknown_loss_is_named() -> None:
    with pytest.raises(UsageError, match="'wgan': use non-saturating, hinge or wasserstein-gp"):
        adversarial(One(), Weigh(), loss="wgan")  # type: ignore[arg-type]


# --- adversarial: real networks

GENERATOR = Generator((4, 4, 1), latent=3, features=(5,))
DISCRIMINATOR = Discriminator(features=(4,), pool="flatten")
LABELLED = rows(
    [1, 1, 0, 1, 1, 1],
    image=np.random.default_rng(0).uniform(size=(6, 4, 4, 1)).astype(np.float32),
    label=np.array([0, 1, 2, 0, 1, 2], np.int32),
)
UNLABELLED = {k: v for k, v in LABELLED.items() if k != "label"}
RATES = {"discriminator": optax.adam(0.02), "generator": optax.adam(0.01)}


def start(task: Task, batch: dict[str, Array], tx: Any = RATES) -> Any:
    return jax.jit(partial(init_state, task=task, tx=tx, ema=0.0))(KEY, batch)


def step(task: Task, state: Any, batch: dict[str, Array], tx: Any = RATES, **options: Any) -> Any:
    return jax.jit(partial(train_step, task=task, tx=tx, **options))(state, batch, KEY)


def test_latents_are_each_examples_own() -> None:
    task, order = adversarial(GENERATOR, DISCRIMINATOR), [3, 0, 5, 1, 4, 2]
    params, state = jax.jit(task.init)(KEY, UNLABELLED)
    for player in ("discriminator", "generator"):
        loss = each(task.losses[player])
        loss_B, shuffled_B = loss(params, state, UNLABELLED), loss(params, state, permuted(UNLABELLED, order))
        np.testing.assert_allclose(shuffled_B, loss_B[order], rtol=1e-5)
        other_B = loss(params, state, UNLABELLED | {"index": UNLABELLED["index"] + 9})
        assert not np.isclose(other_B, loss_B, rtol=1e-5).any()
        if player == "generator":
            assert len(np.unique(loss_B)) == 6
    a, b = (task.evaluate(params, state, x, KEY) for x in (UNLABELLED, permuted(UNLABELLED, order)))
    chex.assert_trees_all_equal(a, b)


class Map(One):
    """A linear map of the latent."""

    @nn.compact
    def __call__(self, z_BZ: Array, label_B: Array | None = None, *, train: bool = False) -> Array:
        return nn.Dense(D)(z_BZ).reshape(-1, 2, 2, 1)


def test_accumulated_parts_give_both_players_update_of_the_whole() -> None:
    """With a latent and a place of the gradient penalty for every row."""
    task, batch = adversarial(Map(), Weigh(power=2), loss="wasserstein-gp"), real(REAL_BD[:4], [1, 1, 0, 1])
    tx = {"discriminator": optax.sgd(0.01), "generator": optax.sgd(0.1)}
    old = start(task, batch, tx)
    ends = [step(task, old, batch, tx, accumulate=n) for n in (1, 2)]
    chex.assert_trees_all_close(*ends, rtol=1e-4, atol=1e-6)
    moved = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), ends[0][0].params, old.params)
    assert min(jax.tree.leaves(moved)) > 1e-3


NORMED = (GENERATOR.clone(batch_norm=True, classes=3), DISCRIMINATOR.clone(spectral_norm=True, classes=3))


@pytest.fixture(scope="module")
def before_and_after() -> tuple[Task, Any, dict[str, Any]]:
    """A state, and what each player alone and both make of it; each generator is conditioned and has statistics."""
    task = adversarial(*NORMED)
    old = start(task, LABELLED)
    alone = {p: dataclasses.replace(task, losses={p: loss}) for p, loss in task.losses.items()}
    return task, old, {p: step(t, old, LABELLED)[0] for p, t in (alone | {"both": task}).items()}


PARTS = ("params", "opt_state", "model_state")


@pytest.mark.parametrize(("player", "other"), [("discriminator", "generator"), ("generator", "discriminator")])
def test_a_player_never_writes_what_is_the_others(before_and_after: Any, player: str, other: str) -> None:
    _, old, new = before_and_after
    for part in PARTS:
        before, after = getattr(old, part), getattr(new[player], part)
        chex.assert_trees_all_equal(after[other], before[other])
        assert after.keys() == before.keys() == {player, other}
        moved = jax.tree.map(lambda a, b: not np.array_equal(a, b), after[player], before[player])
        assert jax.tree.leaves(moved) and all(jax.tree.leaves(moved)), (part, moved)


def test_statistics_go_to_their_own_player(before_and_after: Any) -> None:
    task, old, new = before_and_after
    held = {p: {"/".join(k) for k in flat(s["batch_stats"])} for p, s in old.model_state.items()}
    assert held["generator"] == {"norm_0/mean", "norm_0/var"}
    assert held["discriminator"] == {"conv_0_right", "logit_right", "projection_right"}
    for player, loss in task.losses.items():
        _, (own, _) = loss(old.params, old.model_state, LABELLED, KEY)
        chex.assert_trees_all_equal_structs(own, old.model_state[player])
    # in one step the discriminator's is that of its own loss, the generator's comes after
    for part in PARTS:
        a, b = (getattr(new[k], part)["discriminator"] for k in ("both", "discriminator"))
        chex.assert_trees_all_close(a, b, rtol=1e-5, atol=1e-6)


def flat(tree: Any, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    return [p for k, v in tree.items() for p in (flat(v, (*path, k)) if isinstance(v, dict) else [(*path, k)])]


def test_the_generator_plays_against_the_new_discriminator(before_and_after: Any) -> None:
    task, old, new = before_and_after
    key = jax.random.fold_in(jax.random.fold_in(KEY, 0), 2)  # of step 0, of the second player

    def mean(own: Any, against: Any) -> Array:
        params = {"discriminator": against.params["discriminator"], "generator": own}
        state = {"discriminator": against.model_state["discriminator"], "generator": old.model_state["generator"]}
        (total, count), _ = task.losses["generator"](params, state, LABELLED, key)
        return total / count

    slope = jax.jit(jax.grad(mean))
    expected, stale = (slope(old.params["generator"], new[k] if k else old) for k in ("discriminator", None))
    mu = new["both"].opt_state["generator"][0].mu  # Adam's first moment is a tenth of the gradient
    chex.assert_trees_all_close(mu, jax.tree.map(lambda g: 0.1 * g, expected), rtol=1e-4, atol=1e-7)
    with pytest.raises(AssertionError):
        chex.assert_trees_all_close(mu, jax.tree.map(lambda g: 0.1 * g, stale), rtol=1e-2, atol=1e-4)


class Ignorant(Generator):
    """Conditioned, but makes nothing of the label."""

    def __call__(self, z_BZ: Array, label_B: Array | None = None, *, train: bool = False) -> Array:
        return super().__call__(z_BZ, jnp.zeros_like(label_B), train=train)


@pytest.mark.parametrize("classes", [(3, 0), (3, 3)], ids=["generator", "discriminator"])
def test_labels_condition_each_player(classes: tuple[int, int]) -> None:
    """With only one of them making use of it, the label changes the losses of its row and no other."""
    g, d = classes
    generator = (Ignorant if d else Generator)((4, 4, 1), latent=3, features=(5,), classes=g)
    task = adversarial(generator, DISCRIMINATOR.clone(classes=d))
    params, state = jax.jit(task.init)(KEY, LABELLED)
    other = LABELLED | {"label": LABELLED["label"].at[1].set(2)}
    for player in task.losses:
        loss = each(task.losses[player])
        a, b = (loss(params, state, x) for x in (LABELLED, other))
        assert np.flatnonzero(~np.isclose(a, b, rtol=1e-6)).tolist() == [1]


@pytest.mark.parametrize("player", ["discriminator", "generator"])
def test_a_players_own_loss_falls_while_the_other_stands_still(player: str) -> None:
    task = adversarial(*NORMED)
    task = dataclasses.replace(task, losses={player: task.losses[player]})
    state = start(adversarial(*NORMED), LABELLED)
    go = jax.jit(partial(train_step, task=task, tx=RATES))
    losses = []
    for _ in range(30):
        state, out = go(state, LABELLED, KEY)
        losses.append(float(np.divide(*out[f"{player}_loss"])))
    assert np.mean(losses[-3:]) < 0.8 * np.mean(losses[:3])
