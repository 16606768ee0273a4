"""Distances between sets of features, diversity, probes. N examples, F features, Z numbers of a code, C classes."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import Array

from bigjax.look.evaluators import (
    frechet_distance,
    generate_images,
    generated_images,
    images_of,
    linear_probe,
    nearest_other,
)

KEY = jax.random.key(0)


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape)


# --- the Fréchet distance


@settings(max_examples=20, deadline=None)
@given(features=st.integers(1, 6), size=st.integers(2, 12), seed=st.integers(0, 99))
def test_frechet_distance_is_0_to_itself_and_symmetric(features: int, size: int, seed: int) -> None:
    """Also with fewer examples than features, whose covariances are singular."""
    a_NF, b_NF = normal(size, features, seed=seed), 2 * normal(size + 3, features, seed=seed + 100) + 1
    scale = np.trace(np.atleast_2d(np.cov(a_NF, rowvar=False)))
    assert abs(frechet_distance(a_NF, a_NF)) < 1e-6 * max(scale, 1)
    np.testing.assert_allclose(frechet_distance(a_NF, b_NF), frechet_distance(b_NF, a_NF), rtol=1e-6, atol=1e-6)
    assert frechet_distance(a_NF, b_NF) > 0


def test_frechet_distance_of_uncorrelated_features_is_the_sum_over_them() -> None:
    """Σ (μa − μb)² + (σa − σb)² (Dowson & Landau 1982, with diagonal covariances)."""
    corners_NF = np.array([[x, y, z] for x in (-1, 1) for y in (-1, 1) for z in (-1, 1)], np.float64)
    mean_a, mean_b, wide_a, wide_b = np.array([[0, 1, 2], [3, 1, 0.5], [1, 2, 3], [0.5, 2, 7]])
    a_NF, b_NF = corners_NF * wide_a + mean_a, corners_NF * wide_b + mean_b
    unit = corners_NF[:, 0].std(ddof=1)
    expected = ((mean_a - mean_b) ** 2).sum() + (unit**2 * (wide_a - wide_b) ** 2).sum()
    np.testing.assert_allclose(frechet_distance(a_NF, b_NF), expected, rtol=1e-9)


@pytest.mark.parametrize("size", [200, 30])
def test_frechet_distance_is_that_of_the_matrix_square_root(size: int) -> None:
    linalg = pytest.importorskip("scipy.linalg")
    a_NF, b_NF = (normal(size, 5, seed=i) @ normal(5, 5, seed=i + 2) + normal(5, seed=i + 4) for i in (0, 1))
    cov_a, cov_b = (np.cov(x, rowvar=False) for x in (a_NF, b_NF))
    apart = ((a_NF.mean(0) - b_NF.mean(0)) ** 2).sum()
    expected = apart + np.trace(cov_a + cov_b - 2 * linalg.sqrtm(cov_a @ cov_b).real)
    np.testing.assert_allclose(frechet_distance(a_NF, b_NF), expected, rtol=1e-6)
    assert expected > 1.2 * apart  # the covariances matter


def test_frechet_distance_takes_float32_without_losing_the_difference() -> None:
    a_NF = normal(50, 3).astype(np.float32) + 1000
    np.testing.assert_allclose(frechet_distance(a_NF, a_NF + np.float32(0.5)), 0.75, rtol=1e-3)


# --- the nearest other


@pytest.mark.parametrize("shape", [(2, 1), (9, 3), (7, 2, 2, 1)])
def test_nearest_other_is_brute_force(shape: tuple[int, ...]) -> None:
    x = normal(*shape)
    x[1] = x[0] + (0.01 if len(shape) == 2 else 0)
    flat = x.reshape(len(x), -1)
    expected = [min(np.linalg.norm(a - b) for j, b in enumerate(flat) if j != i) for i, a in enumerate(flat)]
    np.testing.assert_allclose(nearest_other(x), expected, rtol=1e-6, atol=1e-7)


def test_copies_are_at_distance_0_however_large() -> None:
    x = np.float32(1000 * normal(3, 50))
    distance_N = nearest_other(np.concatenate([x, x[:2]]))
    assert (distance_N[[0, 1, 3, 4]] < 1e-2).all() and distance_N[2] > 1000


# --- generated images


class Blank(nn.Module):
    """The latent's first two numbers, spread over 2×2 pixels; `kind`: all, one mode, or half the spread."""

    kind: str = "same"
    latent: int = 4
    classes: int = 0

    @nn.compact
    def __call__(self, z_BZ: Array, label_B: Array | None = None, *, train: bool = False) -> Array:
        scale = self.param("scale", nn.initializers.ones, ())
        x_BD = {"same": 1.0, "narrow": 0.5, "one": 0.0}[self.kind] * z_BZ * scale
        if label_B is not None:
            x_BD = x_BD + 100.0 * label_B[:, None].astype(x_BD.dtype)
        return x_BD.reshape(-1, 2, 2, 1)


class Quadrants(nn.Module):
    """Which quadrant the first two pixels are in: four classes. Features: the pixels."""

    outputs: int = 4

    @nn.compact
    def __call__(self, x_BHWC: Array, *, train: bool = False) -> Array:
        x_BF = x_BHWC.reshape(len(x_BHWC), -1)
        self.sow("intermediates", "features", x_BF)
        right_B, up_B = ((x_BF[:, i] > 0).astype(jax.numpy.int32) for i in (0, 1))
        return jax.nn.one_hot(2 * right_B + up_B, 4)


def classifier() -> tuple[nn.Module, dict, float]:
    return Quadrants(), {"params": {}}, 0.75


@pytest.fixture(scope="module")
def judged() -> dict[str, dict[str, float]]:
    """What is said of generators that get the real distribution right, half as wide, and one image of it only."""
    real = {"image": normal(1000, 2, 2, 1, seed=3).astype(np.float32)}
    params, state = {"generator": {"scale": jnp.ones(())}}, {"generator": {}}
    kinds = ("same", "narrow", "one")
    return {k: generated_images(Blank(k), classifier, real)(params, state, KEY) for k in kinds}


KEYS = {"judge_accuracy", "frechet_ratio", "diversity_ratio", "classes_covered", "smallest_class_share"}


def test_a_generator_of_the_real_distribution_is_as_good_as_real(judged: Any) -> None:
    assert judged["same"].keys() == KEYS
    assert 0.5 < judged["same"]["frechet_ratio"] < 2
    assert 0.9 < judged["same"]["diversity_ratio"] < 1.1
    assert judged["same"]["classes_covered"] == 4 and 0.2 < judged["same"]["smallest_class_share"] <= 0.25


def test_a_narrower_generator_is_farther_and_less_diverse(judged: Any) -> None:
    assert judged["narrow"]["frechet_ratio"] > 10
    np.testing.assert_allclose(judged["narrow"]["diversity_ratio"], 0.5, rtol=0.1)
    assert judged["narrow"]["classes_covered"] == 4


def test_a_collapsed_generator_is_exposed(judged: Any) -> None:
    collapsed = judged["one"]
    assert collapsed["frechet_ratio"] > judged["narrow"]["frechet_ratio"]
    assert abs(collapsed["diversity_ratio"]) < 1e-5
    assert collapsed["classes_covered"] == 1 and collapsed["smallest_class_share"] == 0


def test_frechet_ratio_is_the_distance_over_that_between_halves_of_the_real_images() -> None:
    """The same with the splits written out; the samples enter by 500 too."""
    image = normal(1000, 2, 2, 1, seed=3).astype(np.float32)
    params, state = {"generator": {"scale": jnp.float32(1.3)}}, {"generator": {}}
    out = generated_images(Blank(), classifier, {"image": image})(params, state, KEY)
    fake = generate_images(Blank(), params, state, KEY, 1000)
    real_NF, fake_NF = image.reshape(1000, -1), fake.reshape(1000, -1)
    orders = [np.random.default_rng(i).permutation(1000) for i in range(10)]
    between = [frechet_distance(real_NF[o[:500]], real_NF[o[500:]]) for o in orders]
    to_real = [frechet_distance(fake_NF[orders[0][:500]], real_NF[o[:500]]) for o in orders]
    np.testing.assert_allclose(out["frechet_ratio"], np.mean(to_real) / np.mean(between), rtol=1e-4)
    spread = [np.median(nearest_other(x)) for x in (fake, image)]
    np.testing.assert_allclose(out["diversity_ratio"], spread[0] / spread[1], rtol=1e-5)


def test_generated_images_are_of_their_key_and_of_the_classes_in_turn() -> None:
    params, state = {"generator": {"scale": jnp.ones(())}}, {"generator": {}}
    plain, again, other = (generate_images(Blank(), params, state, jax.random.key(i), 7) for i in (0, 0, 1))
    assert plain.shape == (7, 2, 2, 1) and len(np.unique(plain)) == 28
    np.testing.assert_array_equal(plain, again)
    assert not np.isclose(plain, other).any()
    conditioned = generate_images(Blank(classes=3), params, state, KEY, 7)
    np.testing.assert_array_equal(np.round(conditioned.mean((1, 2, 3)) / 100), [0, 1, 2, 0, 1, 2, 0])


class Counted(Blank):
    """Counts how often it is traced."""

    @nn.compact
    def __call__(self, z_BZ: Array, label_B: Array | None = None, *, train: bool = False) -> Array:
        TRACED.append(z_BZ.shape)
        return super().__call__(z_BZ, label_B, train=train)


TRACED: list[tuple[int, ...]] = []


def test_images_are_compiled_once_for_a_generator_and_a_count() -> None:
    for count in (5, 6):
        for i in range(3):  # other parameters, another key, an equal module
            params, state = {"generator": {"scale": jnp.full((), i)}}, {"generator": {}}
            generate_images(Counted(), params, state, jax.random.key(i), count)
    assert TRACED == [(5, 4), (6, 4)]
    generate_images(Counted("narrow"), params, state, KEY, 5)
    assert len(TRACED) == 3


def test_the_classifier_is_called_once_at_the_first_evaluation() -> None:
    called: list[int] = []
    real = {"image": normal(20, 2, 2, 1).astype(np.float32)}
    evaluator = generated_images(Blank(), lambda: called.append(1) or classifier(), real)
    assert not called
    for _ in range(2):
        out = evaluator({"generator": {"scale": jnp.ones(())}}, {"generator": {}}, KEY)
        assert out["judge_accuracy"] == 0.75 and called == [1]


# --- images of a split


class Reader:
    """A split that must be read one by one."""

    def __init__(self, **arrays: np.ndarray) -> None:
        self.arrays = arrays

    def __len__(self) -> int:
        return len(self.arrays["image"])

    def __getitem__(self, row: int) -> dict[str, np.ndarray]:
        if row >= len(self):
            raise IndexError(row)
        return {k: v[row] for k, v in self.arrays.items()}


@pytest.mark.parametrize("kind", [dict, Reader])
def test_images_of_a_split_are_scaled_and_cut(kind: Any) -> None:
    pixels = np.arange(5 * 4, dtype=np.uint8).reshape(5, 2, 2, 1) * 12
    for count, kept in ((None, 5), (3, 3), (9, 5)):
        images = images_of(kind(image=pixels), count)
        assert images.dtype == np.float32
        np.testing.assert_allclose(images, pixels[:kept] / 255, rtol=1e-6)
    grey = pixels.astype(np.float32) / 255
    np.testing.assert_array_equal(images_of(kind(image=grey)), grey)


# --- the linear probe


class Codes(nn.Module):
    """Its code is the image, scaled; `pair` gives (mean, log variance) as a VAE does, the latter pure noise."""

    pair: bool = False

    @nn.compact
    def encode(self, x: Array, *, train: bool = False) -> Any:
        code_BZ = x.reshape(len(x), -1) * self.param("scale", nn.initializers.ones, ())
        return (code_BZ, jnp.zeros_like(code_BZ)) if self.pair else code_BZ


def separable(size: int, *, seed: int) -> dict[str, np.ndarray]:
    """Three classes along three directions that a plane each can part, far from the origin and of unequal scale."""
    label = (np.arange(size) % 3).astype(np.int32)
    code = np.eye(3)[label] + 0.1 * normal(size, 3, seed=seed)
    return {"image": (code * [1, 50, 0.02] + [40, -7, 3]).astype(np.float32).reshape(-1, 3, 1, 1), "label": label}


PARAMS, STATE = {"model": {"scale": jnp.ones(())}}, {"model": {}}


@pytest.mark.parametrize("pair", [False, True], ids=["autoencoder", "vae"])
def test_linear_probe_tells_separable_codes_apart(pair: bool) -> None:
    train, test = separable(60, seed=0), separable(30, seed=1)
    probe = linear_probe(Codes(pair), train, test)
    assert probe(PARAMS, STATE, KEY) == {"probe_accuracy": 1.0}
    assert probe({"model": {"scale": jnp.zeros(())}}, STATE, KEY)["probe_accuracy"] == pytest.approx(1 / 3, abs=0.01)


def test_linear_probe_is_fitted_on_training_and_scored_on_the_test_labels() -> None:
    train, test = separable(60, seed=0), separable(30, seed=1)
    wrong = test | {"label": np.where(np.arange(30) < 12, (test["label"] + 1) % 3, test["label"])}
    assert linear_probe(Codes(), train, wrong)(PARAMS, STATE, KEY)["probe_accuracy"] == pytest.approx(0.6)
    renamed = train | {"label": (train["label"] + 1) % 3}
    assert linear_probe(Codes(), renamed, test)(PARAMS, STATE, KEY)["probe_accuracy"] == 0


def test_linear_probe_without_labels_gives_nothing() -> None:
    train, test = separable(6, seed=0), separable(6, seed=1)
    del train["label"]
    assert linear_probe(Codes(), train, test)(PARAMS, STATE, KEY) == {}


def test_linear_probe_reads_what_lies_by_index_when_it_is_asked() -> None:
    train, test, read = separable(60, seed=0), separable(30, seed=1), []

    class Counting(Reader):
        def __getitem__(self, row: int) -> dict[str, np.ndarray]:
            read.append(row)
            return super().__getitem__(row)

    probe = linear_probe(Codes(), Counting(**train), Counting(**test))
    assert not read
    assert probe(PARAMS, STATE, KEY) == probe(PARAMS, STATE, KEY) == {"probe_accuracy": 1.0}
    assert len(read) == 60 + 30 + 2  # the first of each to see whether there are labels
