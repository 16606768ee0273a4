"""A pass through a model of tokens, with what it tells beside its logits: their factors, and what its routers find.

B batch, L positions, V vocabulary, N layers, E experts.
"""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from bigjax.ops.vocabulary import unmultiplied
from bigjax.task import Tree, forward


def factored(model: nn.Module, state: Mapping[str, Tree], inputs: tuple[Any, ...], **how: Any) -> tuple[Any, Tree]:
    """As `forward`, but of logits that are too many their `Factors`, for `token_losses`."""
    logits_BLV, state = forward(model, {**state, "factors": {}}, inputs, **how)
    return unmultiplied(logits_BLV, state.get("factors", {})), {k: v for k, v in state.items() if k != "factors"}


def routed(
    model: nn.Module, state: Mapping[str, Tree], inputs: tuple[Any, ...], *, train: bool, **how: Any
) -> tuple[Any, Tree]:
    """As `factored`; in training with what the routers find: ((logits_BLV, p_NBLE), model state)."""
    if not train:
        return factored(model, state, inputs, train=False, **how)
    logits, state = factored(model, {**state, "intermediates": {}}, inputs, train=True, **how)
    sown = jax.tree_util.tree_leaves_with_path(state["intermediates"])
    state = {k: v for k, v in state.items() if k != "intermediates"}
    found = [x for path, x in sown if "routed" in jax.tree_util.keystr(path)]
    return (logits, jnp.concatenate([x.reshape(-1, *x.shape[-3:]) for x in found])), state


def imbalance(p_NBLE: Array, weight_BL: Array, *, chosen: int) -> Array:
    """E Σₑ fₑ pₑ of each row, (B,): how often an expert is chosen times how likely it is found, mean of the layers.

    It is `chosen` where all experts are used alike, and more where some are preferred (Fedus et al. 2022, equations 4
    to 6). Theirs is of a device's batch; this is of each row, so that neither microbatches nor devices change it.
    """
    E = p_NBLE.shape[-1]
    taken_NBLE = jax.nn.one_hot(jax.lax.top_k(p_NBLE, chosen)[1], E).sum(-2)
    share_BL1 = (weight_BL / jnp.maximum(weight_BL.sum(-1, keepdims=True), 1.0))[..., None]
    often_NBE, likely_NBE = ((x * share_BL1[None]).sum(2) for x in (taken_NBLE, p_NBLE))
    return E * (often_NBE * likely_NBE).sum(-1).mean(0)
