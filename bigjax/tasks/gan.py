"""Two players: a generator of images, and the discriminator that it is to deceive.

B batch, H height, W width, C channels, Z numbers of a code or a latent.
"""

from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from bigjax import UsageError
from bigjax.metrics import Metrics
from bigjax.task import Batch, Key, ModelState, Params, Task, Tree, forward, initialize, row_keys, variables


def adversarial(
    generator: nn.Module,
    discriminator: nn.Module,
    *,
    loss: Literal["non-saturating", "hinge", "wasserstein-gp"] = "non-saturating",
    penalty: float = 10.0,
) -> Task:
    """Two players: "discriminator" is updated first, then "generator" against it (Goodfellow et al. 2014).

    generator: latent (B, Z) -> images; its field `latent` is Z, `classes` the number of labels that it is conditioned
    on (0: none); discriminator: images -> logits (B,). non-saturating: cross-entropy, the generator's with its labels
    swapped; hinge (Lim & Ye 2017); wasserstein-gp: with `penalty` × (gradient norm − 1)² between real and generated
    (Gulrajani et al. 2017; one update of the discriminator for each of the generator's, where their algorithm 1 has
    five). The latent is keyed by example. Evaluation: the share of real and of generated images that the discriminator
    takes for what they are.
    """
    if loss not in ("non-saturating", "hinge", "wasserstein-gp"):
        raise UsageError(f"no adversarial loss is called {loss!r}: use non-saturating, hinge or wasserstein-gp")
    real_loss = {"non-saturating": lambda d: jax.nn.softplus(-d), "hinge": lambda d: jax.nn.relu(1 - d)}
    fake_loss = {"non-saturating": jax.nn.softplus, "hinge": lambda d: jax.nn.relu(1 + d)}

    def labels(batch: Batch) -> tuple[Array, ...]:
        return (batch["label"],) if generator.classes else ()

    def generated(params: Params, state: ModelState, batch: Batch, key: Key, *, train: bool) -> tuple[Array, Tree]:
        keys_B = row_keys(jax.random.fold_in(key, 1), batch["index"])
        z_BZ = jax.vmap(lambda key: jax.random.normal(key, (generator.latent,)))(keys_B)
        own = variables(params, state, "generator")
        return forward(generator, own, (z_BZ, *labels(batch)), key=key, index_B=batch["index"], train=train)

    def discriminated(
        params: Params, own_state: Tree, image: Array, batch: Batch, key: Key, *, train: bool
    ) -> tuple[Array, Tree]:
        own = {"params": params["discriminator"], **own_state}
        return forward(discriminator, own, (image, *labels(batch)), key=key, index_B=batch["index"], train=train)

    def init(key: Key, batch: Batch) -> tuple[Params, ModelState]:
        z_BZ, keys = jnp.zeros((len(batch["image"]), generator.latent)), jax.random.split(key)
        parts = {
            "discriminator": initialize(discriminator, keys[0], batch["image"], *labels(batch)),
            "generator": initialize(generator, keys[1], z_BZ, *labels(batch)),
        }
        return {k: params for k, (params, _) in parts.items()}, {k: state for k, (_, state) in parts.items()}

    def discriminator_loss(params: Params, state: ModelState, batch: Batch, key: Key) -> Any:
        mask_B, (fake, _) = batch["mask"], generated(params, state, batch, key, train=True)
        fake, keys = jax.lax.stop_gradient(fake), jax.random.split(jax.random.fold_in(key, 2), 3)
        real_B, own = discriminated(params, state["discriminator"], batch["image"], batch, keys[0], train=True)
        fake_B, own = discriminated(params, own, fake, batch, keys[1], train=True)
        if loss == "wasserstein-gp":
            share_B = jax.vmap(jax.random.uniform)(row_keys(keys[2], batch["index"]))
            between = fake + share_B.reshape(-1, 1, 1, 1) * (batch["image"] - fake)
            slope = jax.grad(lambda x: discriminated(params, own, x, batch, keys[2], train=True)[0].sum())(between)
            norm_B = jnp.sqrt(jnp.square(slope).sum((1, 2, 3)) + 1e-12)
            loss_B = fake_B - real_B + penalty * jnp.square(norm_B - 1)
        else:
            loss_B = real_loss[loss](real_B) + fake_loss[loss](fake_B)
        total, count = (loss_B * mask_B).sum(), mask_B.sum()
        return (total, count), (own, {"discriminator_loss": (total, count)})

    def generator_loss(params: Params, state: ModelState, batch: Batch, key: Key) -> Any:
        fake, own = generated(params, state, batch, key, train=True)
        fake_B, _ = discriminated(params, state["discriminator"], fake, batch, jax.random.fold_in(key, 2), train=True)
        loss_B = jax.nn.softplus(-fake_B) if loss == "non-saturating" else -fake_B
        total, count = (loss_B * batch["mask"]).sum(), batch["mask"].sum()
        return (total, count), (own, {"generator_loss": (total, count)})

    def evaluate(params: Params, state: ModelState, batch: Batch, key: Key) -> Metrics:
        mask_B, (fake, _) = batch["mask"], generated(params, state, batch, key, train=False)
        out = {}
        for name, image, sign in (("real", batch["image"], 1), ("generated", fake, -1)):
            logit_B, _ = discriminated(params, state["discriminator"], image, batch, key, train=False)
            out[f"{name}_recognised"] = (((sign * logit_B > 0).astype(jnp.float32) * mask_B).sum(), mask_B.sum())
        return out

    losses = {"discriminator": discriminator_loss, "generator": generator_loss}
    models = {"discriminator": discriminator, "generator": generator}
    return Task(models, init, losses, evaluate)
