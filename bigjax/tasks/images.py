"""Tasks that learn to make images: reconstruct, variational.

B batch, H height, W width, C channels, Z numbers of a code or a latent.
"""

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax import Array

from bigjax import metrics as measure
from bigjax.metrics import Metrics
from bigjax.task import Batch, Key, Task, Tree, fields, forward, one_player, row_keys


def pixel_cross_entropy(logits_BHWC: Array, image_BHWC: Array) -> Array:
    """Binary cross-entropy (B,) of pixels in [0, 1], summed over an image, in nats.

    Grey values are taken as probabilities.
    """
    flat = partial(jax.lax.collapse, start_dimension=1)  # before, not behind: on CPU a third of the time
    return optax.sigmoid_binary_cross_entropy(flat(logits_BHWC), flat(image_BHWC)).sum(-1)


def reconstruct(model: nn.Module) -> Task:
    """Binary cross-entropy a pixel of `image` (B, H, W, C) under logits of the same shape (an autoencoder's)."""

    def per_example(logits_BHWC: Array, batch: Batch) -> tuple[Array, Array, dict]:
        loss_B = pixel_cross_entropy(logits_BHWC, batch["image"]) / math.prod(logits_BHWC.shape[1:])
        return loss_B, jnp.ones_like(loss_B), {}

    def summarize(metrics: Metrics) -> dict[str, float]:
        out = measure.means(metrics)
        return {"binary_cross_entropy": out["loss"], **out}

    return one_player(model, per_example, inputs=fields("image"), summarize=summarize)


def variational(model: nn.Module, *, beta: float = 1.0) -> Task:
    """Negative evidence lower bound in nats an image, with beta × the divergence from the prior.

    Kingma & Welling 2014; beta: Higgins et al. 2017. model: encode(x) -> (mean, log variance) (B, Z), decode(z) ->
    logits of the image. The noise is keyed by example. Evaluation measures with beta = 1: negative_elbo =
    reconstruction + divergence.
    """

    def sampled(module: nn.Module, x: Array, noise_BZ: Callable[[Array], Array], *, train: bool) -> tuple[Array, ...]:
        mean_BZ, log_variance_BZ = module.encode(x, train=train)
        z_BZ = mean_BZ + jnp.exp(log_variance_BZ / 2) * noise_BZ(mean_BZ)
        return module.decode(z_BZ, train=train), mean_BZ, log_variance_BZ

    def apply(
        model: nn.Module, state: Mapping[str, Tree], inputs: tuple, *, key: Key, index_B: Array, train: bool
    ) -> tuple[Any, Tree]:
        keys_B = row_keys(jax.random.fold_in(key, 1), index_B)

        def noise_BZ(like_BZ: Array) -> Array:
            return jax.vmap(lambda key: jax.random.normal(key, like_BZ.shape[1:]))(keys_B)

        inputs = (*inputs, noise_BZ)
        return forward(model, state, inputs, key=key, index_B=index_B, train=train, method=sampled)

    def terms(out: tuple[Array, ...], batch: Batch) -> dict[str, tuple[Array, Array]]:
        logits_BHWC, mean_BZ, log_variance_BZ = out
        reconstruction_B = pixel_cross_entropy(logits_BHWC, batch["image"])
        divergence_B = 0.5 * (jnp.square(mean_BZ) + jnp.exp(log_variance_BZ) - 1 - log_variance_BZ).sum(-1)
        one_B = jnp.ones_like(divergence_B)
        return {"reconstruction": (reconstruction_B, one_B), "divergence": (divergence_B, one_B)}

    def negative_elbo(out: tuple[Array, ...], batch: Batch, beta: float) -> tuple[Array, Array, dict]:
        parts = terms(out, batch)
        (reconstruction_B, one_B), (divergence_B, _) = parts.values()
        return reconstruction_B + beta * divergence_B, one_B, parts

    per_example, evaluate = partial(negative_elbo, beta=beta), partial(negative_elbo, beta=1.0)

    def summarize(metrics: Metrics) -> dict[str, float]:
        out = measure.means(metrics)
        return {"negative_elbo": out["loss"], **out}

    return one_player(model, per_example, inputs=fields("image"), apply=apply, evaluate=evaluate, summarize=summarize)
