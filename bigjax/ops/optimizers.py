"""Optimizers that look at matrices: each layer of a scanned stack (under "layers") is a matrix of its own, as is each
expert (under "experts"). And SGD.
"""

from dataclasses import dataclass
from typing import Annotated, Any

import jax
import optax

from bigjax.experiment import Fraction, NonNegative, Positive
from bigjax.optim import NO_DECAY, AdamW, Schedule, adamw, mask, path_string, schedule


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


@dataclass(frozen=True)
class AdamWOrMuon(AdamW):
    """AdamW under a schedule, or Muon for matrices beside it: a group of flags."""

    muon: Annotated[float, NonNegative] = 0.0  # learning rate of Muon, for matrices, unclipped; 0: AdamW for all

    def __call__(self, steps: int) -> optax.GradientTransformation:
        if not self.muon:
            return super().__call__(steps)
        rate = schedule(self.schedule, self.muon, steps=steps, warmup=self.warmup)
        return muon(rate, adam_rate=self.rate(steps), weight_decay=self.weight_decay)


def trust_ratios(coefficient: float = 1.0) -> optax.GradientTransformation:
    """Scales each update by coefficient × |parameter| / |update|, one ratio a leaf, or a layer of a scanned stack.

    1 where either is 0.
    """

    def update(updates: Any, state: Any, params: Any) -> tuple[Any, Any]:
        def scale(path: tuple[Any, ...], u: jax.Array, p: jax.Array) -> jax.Array:
            axes = tuple(range(stacked(path), u.ndim))
            size_u, size_p = (jax.numpy.sqrt(jax.numpy.square(x).sum(axes, keepdims=True)) for x in (u, p))
            usable = (size_u > 0) & (size_p > 0)
            return u * jax.numpy.where(usable, coefficient * size_p / jax.numpy.where(usable, size_u, 1.0), 1.0)

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


def lars(
    learning_rate: optax.ScalarOrSchedule,
    *,
    weight_decay: float = 0.0,
    no_decay: str = NO_DECAY,
    trust: float = 0.001,
    momentum: float = 0.9,
    nesterov: bool = False,
) -> optax.GradientTransformation:
    """LARS (You et al. 2017), with the trust ratio of a scanned stack taken layer by layer.

    Where the path matches `no_decay` there is neither decay nor ratio: plain momentum.
    """
    others = mask(no_decay, matching=False)
    return optax.chain(
        optax.add_decayed_weights(weight_decay, mask=others),
        optax.masked(trust_ratios(trust), others),
        optax.scale_by_learning_rate(learning_rate),
        optax.trace(momentum, nesterov),
    )


def as_transformers(
    steps: int, *, peak: float = 5e-5, warmup: int = 500, weight_decay: float = 0.01
) -> optax.GradientTransformation:
    """AdamW as the Trainer of transformers has it: up in a line over `warmup` updates, down in a line to the end, the
    gradient clipped to 1. Its own defaults are no warm-up and no decay.
    """
    up, down = optax.linear_schedule(0.0, peak, warmup), optax.linear_schedule(peak, 0.0, max(steps - warmup, 1))
    return adamw(optax.join_schedules([up, down], [warmup]), weight_decay=weight_decay, clip=1.0)


def max_norm(limit: float, pattern: str) -> optax.GradientTransformation:
    """Last in a chain: of kernels whose path matches, what leads to one output keeps a norm of at most `limit` (Kim
    2014, section 2.1).
    """

    def one(u: jax.Array, p: jax.Array) -> jax.Array:
        norm = jax.numpy.linalg.norm(p + u, axis=tuple(range(p.ndim - 1)), keepdims=True)
        return (p + u) * (limit / jax.numpy.maximum(norm, limit)) - p

    def update(updates: Any, state: Any, params: Any) -> tuple[Any, Any]:
        return jax.tree.map(one, updates, params), state

    return optax.masked(optax.GradientTransformation(lambda params: optax.EmptyState(), update), mask(pattern))


@dataclass(frozen=True)
class SGD:
    """SGD with momentum under a schedule: a group of flags; called with the run's number of updates, it is the
    transformation.
    """

    learning_rate: Annotated[float, Positive] = 0.1  # at the schedule's highest
    schedule: Schedule = "warmup-cosine"  # how the learning rate changes over the run
    warmup: Annotated[float, NonNegative] = 0.0  # updates that it rises over; below 1 that share of the run; 0: 5 %
    momentum: Annotated[float, Fraction] = 0.9  # what stays of the sum of gradients, an update
    nesterov: bool = True  # the gradient is looked at a momentum ahead
    weight_decay: Annotated[float, NonNegative] = 0.0  # a share of each kernel, added to its gradient

    def rate(self, steps: int) -> optax.Schedule:
        return schedule(self.schedule, self.learning_rate, steps=steps, warmup=self.warmup)

    def __call__(self, steps: int) -> optax.GradientTransformation:
        decay = optax.add_decayed_weights(self.weight_decay, mask=mask(NO_DECAY, matching=False))
        return optax.chain(decay, optax.sgd(self.rate(steps), self.momentum, self.nesterov))


@dataclass(frozen=True)
class LARS(SGD):
    """LARS under a schedule, for large batches: each layer's update is of its kernel's size."""

    learning_rate: Annotated[float, Positive] = 1.0  # at the schedule's highest
    nesterov: bool = False  # the gradient is looked at a momentum ahead
    trust: Annotated[float, Positive] = 0.001  # the size of an update to that of its kernel, at a rate of 1

    def __call__(self, steps: int) -> optax.GradientTransformation:
        how = {"weight_decay": self.weight_decay, "momentum": self.momentum, "nesterov": self.nesterov}
        return lars(self.rate(steps), trust=self.trust, **how)
