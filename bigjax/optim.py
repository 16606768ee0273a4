"""How it is updated: what optax lacks in one call. All else is plain optax, written in an experiment's `build`."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import jax
import optax

from bigjax import UsageError
from bigjax.experiment import Fraction, NonNegative, Positive

Schedule = Literal["constant", "step", "cosine", "warmup-cosine", "rsqrt"]
NO_DECAY = r"(bias|scale|mean|var|embedding_bias)$"


def schedule(name: Schedule, peak: float, *, steps: int, warmup: float = 0, end: float = 0.0) -> optax.Schedule:
    """A learning rate by name over `steps` updates, from `peak` down to `end` (a fraction of the peak).

    constant; step: × 0.1 at 50 %, 75 % and 90 %; cosine; warmup-cosine: linear from 0 over `warmup` updates, then
    cosine; rsqrt: linear over `warmup` updates, then ∝ 1/√update (Vaswani et al. 2017, section 5.3, with `peak` at its
    top). A `warmup` below 1 is that share of the run; 0 is 5 % of it.
    """
    if warmup and name in ("constant", "step", "cosine"):
        raise UsageError(f"schedule {name!r} has no warm-up: use warmup-cosine or rsqrt, or leave warmup at 0")
    if name == "constant":
        return optax.constant_schedule(peak)
    if name == "step":
        return optax.piecewise_constant_schedule(peak, {int(steps * f): 0.1 for f in (0.5, 0.75, 0.9)})
    if name == "cosine":
        return optax.cosine_decay_schedule(peak, max(steps, 1), alpha=end)
    warmup = max(round(warmup * steps if warmup < 1 else warmup), 1) if warmup else max(steps // 20, 1)
    if name == "warmup-cosine":
        return optax.warmup_cosine_decay_schedule(0.0, peak, warmup, max(steps, warmup + 1), end_value=end * peak)
    if name == "rsqrt":
        return lambda n: peak * jax.numpy.minimum((n + 1) / warmup, jax.numpy.sqrt(warmup / (n + 1)))
    raise UsageError(f"unknown schedule {name!r}: use one of {', '.join(Schedule.__args__)}")


def path_string(path: tuple[Any, ...]) -> str:
    """A leaf's place in a tree as `conv_0/kernel`."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def mask(pattern: str, *, matching: bool = True) -> Callable[[Any], Any]:
    """A function of a parameter tree: True where the leaf's path (`conv_0/kernel`) matches the regex (or does not)."""
    found = re.compile(pattern).search
    return lambda params: jax.tree_util.tree_map_with_path(
        lambda path, _: bool(found(path_string(path))) is matching, params
    )


def adamw(
    learning_rate: optax.ScalarOrSchedule,
    *,
    weight_decay: float = 0.0,
    no_decay: str = NO_DECAY,
    clip: float | None = None,
    b1: float = 0.9,
    b2: float = 0.999,
) -> optax.GradientTransformation:
    """optax.adamw with the gradient clipped to a global norm first and no decay where the path matches `no_decay`.

    Loshchilov and Hutter, "Decoupled Weight Decay Regularization", 2017: each decayed parameter shrinks by
    learning_rate × weight_decay × itself an update.
    """
    update = optax.adamw(learning_rate, b1=b1, b2=b2, weight_decay=weight_decay, mask=mask(no_decay, matching=False))
    return optax.chain(optax.clip_by_global_norm(clip), update) if clip else update


@dataclass(frozen=True)
class AdamW:
    """AdamW under a schedule: a group of flags; called with the run's number of updates, it is the transformation."""

    learning_rate: Annotated[float, Positive] = 1e-3  # at the schedule's highest
    schedule: Schedule = "warmup-cosine"  # how the learning rate changes over the run
    warmup: Annotated[float, NonNegative] = 0.0  # updates that it rises over; below 1 that share of the run; 0: 5 %
    weight_decay: Annotated[float, NonNegative] = 0.0  # a share × learning rate of each kernel, an update
    clip: Annotated[float, NonNegative] = 0.0  # the gradient's greatest norm; 0: any
    b1: Annotated[float, Fraction] = 0.9  # decay of the mean of gradients
    b2: Annotated[float, Fraction] = 0.999  # decay of the mean of their squares

    def rate(self, steps: int) -> optax.Schedule:
        return schedule(self.schedule, self.learning_rate, steps=steps, warmup=self.warmup)

    def __call__(self, steps: int) -> optax.GradientTransformation:
        return adamw(self.rate(steps), weight_decay=self.weight_decay, clip=self.clip, b1=self.b1, b2=self.b2)
