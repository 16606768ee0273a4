"""Optimizers that look at matrices: each layer of a scanned stack (under "layers") is a matrix of its own.

So is each expert (under "experts").
"""

from typing import Any

import jax
import optax

from bigjax.optim import NO_DECAY, mask, path_string


def stacked(path: tuple[Any, ...]) -> int:
    """How many of a leaf's leading axes count layers of a scanned stack, or experts."""
    return len({"layers", "experts"} & set(path_string(path).split("/")))


def matrices(params: Any) -> Any:
    """For every leaf, how Muon takes it: (inputs, output) axes of hidden kernels, None for what Adam updates instead.

    None: embeddings, positions, the output layer (unembedding, head, logits, logit, out), biases, scales.
    """

    def numbers(path: tuple[Any, ...], leaf: Any) -> Any:
        *layer, name = path_string(path).split("/")
        if name != "kernel" or {"unembedding", "head", "logits", "logit", "out"} & set(layer):
            return None
        axes = tuple(range(stacked(path), leaf.ndim))
        return optax.contrib.MuonDimensionNumbers(axes[:-1], axes[-1:])

    return jax.tree_util.tree_map_with_path(numbers, params)


def muon(
    learning_rate: optax.ScalarOrSchedule,
    *,
    adam_rate: optax.ScalarOrSchedule,
    weight_decay: float = 0.0,
    b2: float = 0.95,
) -> optax.GradientTransformation:
    """optax.contrib.muon on `matrices`, and on the rest Adam with its own rate, with Nesterov momentum as Muon's.

    Jordan et al., "Muon: an optimizer for hidden layers in neural networks", 2024.
    """
    return optax.contrib.muon(
        learning_rate,
        adam_learning_rate=adam_rate,
        adam_b2=b2,
        weight_decay=weight_decay,
        muon_weight_dimension_numbers=matrices,
    )


def trust_ratios() -> optax.GradientTransformation:
    """Scales each update by |parameter| / |update|, one ratio a leaf, or a layer of a scanned stack.

    1 where either is 0.
    """

    def update(updates: Any, state: Any, params: Any) -> tuple[Any, Any]:
        def scale(path: tuple[Any, ...], u: jax.Array, p: jax.Array) -> jax.Array:
            axes = tuple(range(stacked(path), u.ndim))
            size_u, size_p = (jax.numpy.sqrt(jax.numpy.square(x).sum(axes, keepdims=True)) for x in (u, p))
            usable = (size_u > 0) & (size_p > 0)
            return u * jax.numpy.where(usable, size_p / jax.numpy.where(usable, size_u, 1.0), 1.0)

        return jax.tree_util.tree_map_with_path(scale, updates, params), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def lamb(
    learning_rate: optax.ScalarOrSchedule,
    *,
    weight_decay: float = 0.0,
    no_decay: str = NO_DECAY,
    b1: float = 0.9,
    b2: float = 0.999,
) -> optax.GradientTransformation:
    """LAMB (You et al. 2020), with the trust ratio of a scanned stack taken layer by layer."""
    return optax.chain(
        optax.scale_by_adam(b1=b1, b2=b2, eps=1e-6),
        optax.add_decayed_weights(weight_decay, mask=mask(no_decay, matching=False)),
        trust_ratios(),
        optax.scale_by_learning_rate(learning_rate),
    )
