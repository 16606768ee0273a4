"""Judgements on the host that (sum, count) cannot hold: distances between distributions, diversity, probes.

N examples, F features, Z numbers of a code, C classes.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from bigjax import sharding
from bigjax.data import pipeline
from bigjax.data.readers import gathered
from bigjax.data.takes import check
from bigjax.step import to_float
from bigjax.task import Key, ModelState, Params, mode, variables

PROBED = 10_000
Evaluator = Callable[[Params, ModelState, Key], dict[str, float]]


def images_of(split: pipeline.Split, count: int | None = None) -> np.ndarray:
    """The first `count` images (N, H, W, C) of a split as floats in [0, 1]."""
    check(split, ("image",), name="the split")
    count = pipeline.size_of(split) if count is None else min(count, pipeline.size_of(split))
    return _floats(
        (split if isinstance(split, Mapping) else gathered(split.__getitem__, range(count)))["image"][:count]
    )


def _floats(image_NHWC: np.ndarray) -> np.ndarray:
    with jax.transfer_guard("allow"):
        return np.asarray(to_float({"image": jnp.asarray(image_NHWC)})["image"])


def frechet_distance(a_NF: np.ndarray, b_NF: np.ndarray) -> float:
    """|μa − μb|² + tr(Σa + Σb − 2 (Σa Σb)^½) between two sets of features (Heusel et al. 2017, equation 6)."""
    a_NF, b_NF = np.asarray(a_NF, np.float64), np.asarray(b_NF, np.float64)
    cov_a, cov_b = (np.atleast_2d(np.cov(x_NF, rowvar=False)) for x_NF in (a_NF, b_NF))
    # the eigenvalues of Σa Σb are those of the symmetric Σa^½ Σb Σa^½, real and not negative
    values, vectors = np.linalg.eigh(cov_a)
    root_a = (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T
    cross = np.sqrt(np.clip(np.linalg.eigvalsh(root_a @ cov_b @ root_a), 0, None)).sum()
    return float(np.square(a_NF.mean(0) - b_NF.mean(0)).sum() + np.trace(cov_a) + np.trace(cov_b) - 2 * cross)


def nearest_other(x_NF: np.ndarray) -> np.ndarray:
    """The Euclidean distance of each row to the nearest other row (N,)."""
    x_NF = np.asarray(x_NF, np.float64).reshape(len(x_NF), -1)
    squares_N = np.square(x_NF).sum(1)
    distance_NN = squares_N[:, None] + squares_N[None] - 2 * x_NF @ x_NF.T
    np.fill_diagonal(distance_NN, np.inf)
    return np.sqrt(np.clip(distance_NN.min(1), 0, None))


def to_numpy(function: Callable[..., Any]) -> Callable[..., Any]:
    """Of f(variables, *arrays) -> arrays the compiled form that takes and gives NumPy arrays.

    It runs where the variables lie, over the mesh that is set; every process must call it.
    """
    compiled = jax.jit(function)

    def call(variables: Any, *inputs: np.ndarray) -> Any:
        with jax.transfer_guard("allow"):  # it is given NumPy arrays: they are to be moved
            return sharding.to_host(compiled(variables, *inputs))

    return call


def normal(key: Key, shape: tuple[int, ...]) -> np.ndarray:
    """Standard normal numbers, on the host."""
    with jax.transfer_guard("allow"):
        return np.asarray(jax.random.normal(key, shape))


def generate_images(generator: nn.Module, params: Params, model_state: ModelState, key: Key, count: int) -> np.ndarray:
    """`count` images (N, H, W, C) of the player "generator"; a conditioned one is given the classes in turn.

    Compiled once for a generator and a count.
    """
    labels = (np.arange(count) % generator.classes,) if generator.classes else ()
    latent_NZ = normal(key, (count, generator.latent))
    return _generating(generator)(variables(params, model_state, "generator"), latent_NZ, *labels)


@functools.cache
def _generating(generator: nn.Module) -> Callable[..., np.ndarray]:
    return to_numpy(functools.partial(generator.apply, **mode(type(generator).__call__, False)))


Classifier = tuple[nn.Module, Any, float]  # a module of images that sows `features`, its variables, its test accuracy


def generated_images(generator: nn.Module, classifier: Callable[[], Classifier], test: pipeline.Split) -> Evaluator:
    """Judges a generator by a classifier: what it takes 1,000 samples for, and how they lie among its features.

    classifier: called once, at the first evaluation; test: the real images, at least 1,000.
    judge_accuracy: the classifier's, as it came; classes_covered: classes with at least one sample;
    smallest_class_share: of the rarest class among the samples; frechet_ratio: the Fréchet distance of 500 samples to
    500 real images over that between disjoint 500s of real images (mean of 10 fixed splits); diversity_ratio: the
    median distance, in pixels, of a sample to its nearest other sample, over the same of as many real images.
    """

    @functools.cache
    def ready() -> Evaluator:
        with jax.set_mesh(None):  # it may be trained now: a run inside a run has a mesh of its own
            module, weights, accuracy = classifier()
        return _told_by(module, jax.tree.map(np.asarray, weights), accuracy, generator, test)

    return lambda params, model_state, key: ready()(params, model_state, key)


def _told_by(
    classifier: nn.Module, weights: Any, accuracy: float, generator: nn.Module, test: pipeline.Split
) -> Evaluator:
    real = images_of(test, 1000)

    @to_numpy
    def look(weights: Any, image: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits, state = classifier.apply(
            weights, image, **mode(type(classifier).__call__, False), mutable="intermediates"
        )
        return logits.argmax(-1), state["intermediates"]["features"][0].reshape(len(image), -1)

    features_real = look(weights, real)[1]
    orders = [np.random.default_rng(i).permutation(len(real)) for i in range(10)]
    half = len(real) // 2
    halves = [(features_real[o[:half]], features_real[o[half : 2 * half]]) for o in orders]
    between_real = float(np.mean([frechet_distance(a, b) for a, b in halves]))
    spread_real = float(np.median(nearest_other(real)))

    def tell(params: Params, model_state: ModelState, key: Key) -> dict[str, float]:
        fake = generate_images(generator, params, model_state, key, len(real))
        label, features = look(weights, fake)
        share_C = np.bincount(label, minlength=classifier.outputs) / len(fake)
        pick = orders[0][:half]
        return {
            "judge_accuracy": accuracy,
            "frechet_ratio": float(np.mean([frechet_distance(features[pick], a) for a, _ in halves])) / between_real,
            "diversity_ratio": float(np.median(nearest_other(fake))) / spread_real,
            "classes_covered": float((share_C > 0).sum()),
            "smallest_class_share": float(share_C.min()),
        }

    return tell


def encoder(model: nn.Module) -> Callable[[Any, jax.Array], jax.Array]:
    """(variables, images) -> an autoencoder's codes, a VAE's means (N, Z)."""

    def encode(variables: Any, image: jax.Array) -> jax.Array:
        code = model.apply(variables, image, method="encode")
        return code[0] if isinstance(code, tuple) else code

    return encode


def _some(split: pipeline.Split) -> Mapping[str, np.ndarray]:
    if isinstance(split, Mapping):
        return split
    return gathered(split.__getitem__, np.unique(np.linspace(0, len(split) - 1, PROBED).astype(int)))


def linear_probe(model: nn.Module, train: pipeline.Split, test: pipeline.Split, *, ridge: float = 1e-2) -> Evaluator:
    """How well a linear map of an autoencoder's codes (a VAE's means) tells the labels: `probe_accuracy`.

    Nothing where a split has no labels. Ridge regression on one-hot labels, in closed form, fitted on the training
    split and scored on the test split; a split that is read by index is read at the first evaluation, PROBED examples
    of it, evenly spread.
    """
    codes = to_numpy(encoder(model))

    @functools.cache
    def read() -> list[tuple[np.ndarray, np.ndarray]]:
        labelled = [_some(split) for split in (train, test) if "label" in pipeline.example(split)]
        return [(_floats(some["image"]), np.asarray(some["label"])) for some in labelled]

    def probe(params: Params, model_state: ModelState, key: Key) -> dict[str, float]:
        if len(splits := read()) < 2:
            return {}
        mine = variables(params, model_state)
        (a_NZ, a_N), (b_NZ, b_N) = ((np.asarray(codes(mine, x), np.float64), y) for x, y in splits)
        centre, spread = a_NZ.mean(0), a_NZ.std(0) + 1e-9
        a_NZ, b_NZ = ((x - centre) / spread for x in (a_NZ, b_NZ))
        a_NZ, b_NZ = (np.concatenate([x, np.ones((len(x), 1))], 1) for x in (a_NZ, b_NZ))
        target_NC = np.eye(a_N.max() + 1)[a_N]
        weights_ZC = np.linalg.solve(a_NZ.T @ a_NZ + ridge * len(a_NZ) * np.eye(a_NZ.shape[1]), a_NZ.T @ target_NC)
        return {"probe_accuracy": float(((b_NZ @ weights_ZC).argmax(1) == b_N).mean())}

    return probe
