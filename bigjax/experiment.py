"""What one run is: its configuration and its parts."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import flax.linen as nn
import numpy as np
import optax

from bigjax import UsageError, sharding
from bigjax.data.sources import Split
from bigjax.run.processes import DistributedConfig
from bigjax.sharding import MeshConfig
from bigjax.task import Batch, Key, ModelState, Params, Task


@dataclass(frozen=True)
class RunConfig:
    """The flags that every experiment has; a script adds its own fields and gives its own defaults."""

    workdir: str | None = None  # default: runs/NAME; may be gs://bucket/folder
    seed: int = 0
    split_seed: int = 0  # of what is held out of your own data, and for validation: not the run's seed
    steps: int | None = None  # updates; of steps, epochs and minutes whichever ends first
    epochs: float | None = None  # passes over the training split
    minutes: float | None = None  # of training; turned into a number of steps once the speed is known
    batch_size: int = 128  # examples an update, over all devices
    accumulate: int = 1  # parts that the batch is computed in, one after the other
    data: str = "mnist5k"  # a name, or a path to your own data
    eval_data: str | None = None  # a path; without it a tenth of your own data is held out
    validation: float = 0.0  # share of the training split held out for choices
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the computation; parameters are float32
    ema: float = 0.0  # decay a step of the averaged parameters that evaluation uses; 0: off
    nonfinite: Literal["stop", "skip"] = "stop"  # what a NaN or infinite loss or gradient does
    hang_seconds: float = 1800.0  # an update that takes longer ends the run, with the stacks of all threads; 0: never
    mesh: MeshConfig = MeshConfig()
    distributed: DistributedConfig = DistributedConfig()
    log_every: int = 50
    eval_every: int = 500
    save_every: int = 500  # updates
    save_minutes: float = 10.0  # and when the last save is so long ago; 0: only by updates
    keep: int = 2  # checkpoints
    best: str | None = (
        None  # keep the best checkpoints too, by a number of the validation split: max:accuracy, min:loss
    )
    resume: bool = True  # --no-resume: start over in this working directory, dropping what is there
    init_from: str | None = None  # a working directory whose parameters to start from
    tensorboard: bool = False
    profile: bool = False  # trace the first updates after compilation into workdir/profile, for TensorBoard or Perfetto
    compilation_cache: bool = True  # in ~/.cache/bigjax


ABOVE_ZERO = set(
    "steps epochs minutes batch_size accumulate log_every eval_every save_every keep learning_rate latent heads layers "
    "width context vocabulary length embedding code".split()
)
BELOW_ONE = {"validation", "ema", "dropout", "label_smoothing"}


def check(config: RunConfig) -> None:
    """Raises UsageError for a value that makes no sense, naming its flag."""
    for f in dataclasses.fields(config):
        value, flag = getattr(config, f.name), "--" + f.name.replace("_", "-")
        numbers = value if isinstance(value, tuple) else (value,)
        for v in numbers:
            if isinstance(v, bool) or not isinstance(v, int | float):
                continue
            if not np.isfinite(v):
                raise UsageError(f"{flag} {v}: give a finite number")
            if v <= 0 and (f.name in ABOVE_ZERO or isinstance(value, tuple)):
                raise UsageError(f"{flag} {v}: give a number above 0")
            if v < 0:
                raise UsageError(f"{flag} {v}: give a number that is not negative")
            if v >= 1 and f.name in BELOW_ONE:
                raise UsageError(f"{flag} {v}: give a number from 0 up to, but below, 1")
    if config.batch_size % config.accumulate:
        raise UsageError(f"--accumulate {config.accumulate} does not divide --batch-size {config.batch_size}")
    if config.best and config.best.partition(":")[0] not in ("max", "min"):
        raise UsageError(f"--best {config.best}: say max:METRIC or min:METRIC, as max:accuracy or min:loss")
    if config.best and not config.validation:
        raise UsageError("--best chooses on the validation split: hold one out with --validation 0.1")


@dataclass(frozen=True)
class Published:
    """A result from elsewhere, with its source, to set beside ours.

    Reached if ours is at least (or, for a loss, at most) it.
    """

    metric: str
    value: float
    source: str
    better: Literal["higher", "lower"] = "higher"

    def compare(self, metrics: Mapping[str, float]) -> dict[str, Any]:
        ours = metrics.get(self.metric)
        sign = 1 if self.better == "higher" else -1
        reached = None if ours is None else bool(sign * ours >= sign * self.value)
        return {"metric": self.metric, "value": self.value, "source": self.source, "reached": reached}


@dataclass(frozen=True)
class Pictures:
    """Images (N, H, W) or (N, H, W, C) in [0, 1] for the report, each with its caption, so many a row."""

    images: np.ndarray
    captions: Sequence[str] | None = None
    columns: int = 10


@dataclass(frozen=True)
class Experiment:
    """The parts of one run: real objects, made by a script's `build(config)`.

    tx: number of updates of the run -> {player: optax transformation}; schedules need to know the end.
    train, test: mappings of arrays with one leading axis, or readers by index (bigjax.data).
    augment: (batch, key) -> batch, on the device, inside the step.
    transform: (example, NumPy generator) -> example, on the host, for splits read by index: decoding, crops of varying
        size. The generator is random per (seed, epoch, row). The test split is read as it is.
    evaluators: run on the host at evaluation steps, for what (sum, count) cannot hold; their numbers appear as
        eval/NAME.
    gallery: pictures or text for the report, made at evaluation steps.
    rules: which parts of the state are split over which mesh axes (bigjax.sharding).
    """

    model: nn.Module | Mapping[str, nn.Module]
    task: Task
    tx: Callable[[int], Mapping[str, optax.GradientTransformation]]
    train: Split
    test: Split
    name: str = "experiment"
    class_names: Sequence[str] | None = None
    augment: Callable[[Batch, Key], Batch] | None = None
    transform: Callable[[dict[str, np.ndarray], np.random.Generator], dict[str, np.ndarray]] | None = None
    evaluators: Mapping[str, Callable[[Params, ModelState, Key], dict[str, float]]] = field(default_factory=dict)
    gallery: Mapping[str, Callable[[Params, ModelState, Key], Pictures | str]] = field(default_factory=dict)
    published: Sequence[Published] = ()
    rules: sharding.Rules = sharding.RULES
    facts: Mapping[str, Any] = field(default_factory=dict)  # of the data (a hash, a version): recorded in result.json

    def models(self) -> dict[str, nn.Module]:
        """The modules by player."""
        return {"model": self.model} if isinstance(self.model, nn.Module) else dict(self.model)
