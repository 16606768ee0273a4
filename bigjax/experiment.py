"""What one run is: its configuration and its parts."""

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, Protocol

import jax
import numpy as np
import optax

from bigjax import UsageError, place, sharding
from bigjax.sharding import DistributedConfig, MeshConfig
from bigjax.task import Batch, Key, ModelState, Params, Task


class Reader(Protocol):
    """Random access to examples. `hold_out` goes by an attribute `names` (N,), of files for instance, if there is one,
    and says what each class gives if there is `label` (N,).
    """

    def __len__(self) -> int: ...

    def __getitem__(self, row: int) -> dict[str, np.ndarray]: ...


Split = Mapping[str, np.ndarray] | Reader  # in memory, with equal leading axes; or to be read and decoded by index


def size_of(split: Split) -> int:
    """The number of examples. UsageError: there are none, or no fields, or fields of unequal length."""
    fields = split if isinstance(split, Mapping) else {"examples": split}
    if taken := {"index", "mask"} & fields.keys():
        raise UsageError(f"a field is called {min(taken)!r}, which bigjax gives to every batch: rename it")
    if isinstance(split, Mapping) and (bad := [k for k, v in fields.items() if not getattr(v, "shape", ())]):
        raise UsageError(f"field {bad[0]!r} is no array with one row an example, but a {type(fields[bad[0]]).__name__}")
    sizes = {name: len(value) for name, value in fields.items()}
    if len(set(sizes.values())) > 1:
        told = ", ".join(f"{name} {size}" for name, size in sizes.items())
        raise UsageError(f"the fields have unequal lengths ({told}): give each of them one row an example")
    if not any(sizes.values()):
        raise UsageError(f"the data has no {'examples' if sizes else 'fields'}: give arrays with one row an example")
    return next(iter(sizes.values()))


OnLog = Callable[[int, str, Mapping[str, float]], Any]


# ---- flags


@dataclass(frozen=True)
class Within:
    """What the numbers of a flag may be: `learning_rate: Annotated[float, Positive] = 1e-3`, also in tuples."""

    least: float
    most: float = math.inf
    open: bool = False  # the least itself is not allowed
    whole: bool = False

    def refuses(self, value: float) -> str | None:
        """What to give instead of `value`; None if it will do."""
        fits = self.least < value < self.most or (value == self.least and not self.open)
        if fits and not (self.whole and isinstance(value, float)):
            return None
        if self.most < math.inf:
            return f"a {'whole ' * self.whole}number from {self.least} up to, but below, {self.most}"
        return "a number above 0" if self.open else f"a number from {self.least:g} upwards"


Positive, NonNegative, Fraction = Within(0, open=True), Within(0), Within(0, 1)
Seed, Count = Within(0, 2**64, whole=True), Within(1, 2**31, whole=True)  # a count is int32 on the devices


@dataclass(frozen=True)
class RunConfig:
    """The flags that every experiment has; a script adds its own fields and gives its own defaults."""

    # ---- run
    workdir: str | None = None  # where everything of the run is kept; default: runs/NAME; may be gs://bucket/folder
    seed: Annotated[int, Seed] = 0  # of the parameters, the order of the data, and all noise
    # ---- length
    steps: Annotated[int | None, Count] = None  # updates; of steps, epochs and minutes whichever ends first
    epochs: Annotated[float | None, Positive] = None  # passes over the training split
    minutes: Annotated[float | None, Positive] = None  # of training; made a number of steps once the speed is known
    # ---- data
    data: str = "mnist5k"  # a name, or a path to your own data
    eval_data: str | None = None  # a path; without it about a tenth of your own data is held out
    validation: Annotated[float, Fraction] = 0.0  # share of the training split held out for choices
    split_seed: Annotated[int, Seed] = 0  # of what is held out of your own data or for validation
    # ---- optimization
    batch_size: Annotated[int, Positive] = 128  # examples an update, over all devices
    accumulate: Annotated[int, Positive] = 1  # parts that the batch is computed in, one after the other
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the computation; parameters are float32
    ema: Annotated[float, Fraction] = 0.0  # decay an update of the averages that evaluation uses; 0: off
    nonfinite: Literal["stop", "skip"] = "stop"  # what a NaN or infinite loss or gradient does
    # ---- log
    log_every: Annotated[int, Count] = 50  # updates between lines of the log, each the mean over them
    eval_every: Annotated[int, Positive] = 500  # updates between evaluations on the test split
    tensorboard: bool = False  # write event files too, into workdir/tensorboard
    peak_tflops: Annotated[float | None, Positive] = None  # of one device, for `mfu`; known of TPUs, H100 and H200
    profile: bool = False  # trace the second log window into workdir/profile, for TensorBoard or Perfetto
    # ---- checkpoint
    save_every: Annotated[int, Positive] = 500  # updates between checkpoints
    save_minutes: Annotated[float, NonNegative] = 10.0  # and when the last save is so long ago; 0: only by updates
    keep: Annotated[int, Positive] = 2  # checkpoints; the older ones go
    best: str | None = None  # keep the best too, by a number of the validation split: max:accuracy, min:loss
    resume: bool = True  # --no-resume: start over in this working directory, dropping what is there
    extend: bool = False  # go on to more --steps, --epochs or --minutes than the run there has had
    accept_changes: bool = False  # go on although the code or the data are not those that the run began with
    init_from: str | None = None  # a working directory whose parameters to start from
    # ---- device
    fuse: Annotated[int | None, Positive] = None  # updates in one dispatch; unset: several where an update is short
    resident: bool = True  # keep a training split on the devices that is in memory, and small
    deterministic: bool = False  # on a GPU: the same bits in every run, at some cost; elsewhere they always are
    hang_seconds: Annotated[float, NonNegative] = 1800.0  # any part that takes longer ends the run; 0: never
    compilation_cache: bool = True  # keep compiled programs in ~/.cache/bigjax
    mesh: MeshConfig = MeshConfig()
    distributed: DistributedConfig = DistributedConfig()


class Told:  # help(RunConfig) shows the comments above, in their groups
    def __get__(self, *_: Any) -> str:
        from bigjax.look.flags import described

        return described(RunConfig)


RunConfig.__doc__ = Told()


def home_of(config: RunConfig, name: str) -> Any:
    """The working directory, an epath.Path; `name` is the experiment's. UsageError: a bucket that can't be reached."""
    from bigjax.run.places import reached

    return reached(place(f"runs/{name}" if config.workdir is None else config.workdir, "--workdir "))


def check(config: RunConfig) -> None:
    """Raises UsageError for a value that its annotation doesn't allow, naming its flag."""
    from bigjax.run.limits import numbers

    for flag, value, allowed in numbers(config):
        if isinstance(value, float) and not math.isfinite(value):  # a whole number may be too large for a float
            raise UsageError(f"--{flag} {value}: give a finite number")
        if instead := next(filter(None, (within.refuses(value) for within in allowed)), None):
            raise UsageError(f"--{flag} {value}: give {instead}")
    if config.batch_size % config.accumulate:
        raise UsageError(f"--accumulate {config.accumulate} does not divide --batch-size {config.batch_size}")
    if config.best and config.best.partition(":")[0] not in ("max", "min"):
        raise UsageError(f"--best {config.best}: say max:METRIC or min:METRIC, as max:accuracy or min:loss")
    if config.best and not config.validation:
        raise UsageError("--best chooses on the validation split: hold one out with --validation 0.1")


def key_of(seed: int) -> Key:
    """The key of a whole number below 2^64, each its own; below 2^32 it is `jax.random.key(seed)`."""
    with jax.enable_x64(True), jax.transfer_guard("allow"):
        return jax.random.key(np.uint64(seed))


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


Transformations = optax.GradientTransformation | Mapping[str, optax.GradientTransformation]


@dataclass(frozen=True)
class Experiment:
    """The parts of one run: real objects, made by a script's `build(config)`.

    tx: an optax transformation, for each player a state of its own; or {player: transformation}; or a function of the
        run's number of updates that gives either: schedules need to know the end.
    train, test: mappings of arrays with one leading axis, or readers by index (bigjax.data); test None: no evaluation.
    initial: state -> (the state that a new run begins with, a line that says so): weights from elsewhere; what its
        `fingerprint()` gives, if it has one, is compared when the run is resumed (bigjax.pretrained.begin).
    augment: (batch, key) -> batch, on the device, inside the step.
    transform: (example, NumPy generator) -> example, on the host, for splits read by index: decoding, crops of varying
        size. The generator is random per (seed, epoch, row). The test split is read as it is.
    evaluators: for what (sum, count) cannot hold, at evaluation steps; their numbers appear as eval/NAME. They and the
        gallery are called on every process, under the mesh, with the state as it is split (`sharding.to_host` gives
        NumPy arrays of what they need).
    gallery: pictures or text for the report, made at evaluation steps.
    on_log: called on process 0 with (step, split, values) of each line of the log; if it returns True the run ends
        there, evaluated, saved, with a result.
    tokenizer: what tokens are, kept in the working directory: `bytes`, characters by number, a folder with
        tokenizer.json, or a tokenizer of `tokenizers` or `pretrained.tokens`. The verb sample writes by it.
    rules: which parts of the state are split over which mesh axes (bigjax.sharding).
    """

    task: Task
    tx: Transformations | Callable[[int], Transformations]
    train: Split
    test: Split | None
    name: str = "experiment"
    class_names: Sequence[str] | None = None
    initial: Callable[[Any], tuple[Any, str]] | None = None
    augment: Callable[[Batch, Key], Batch] | None = None
    transform: Callable[[dict[str, np.ndarray], np.random.Generator], dict[str, np.ndarray]] | None = None
    evaluators: Mapping[str, Callable[[Params, ModelState, Key], dict[str, float]]] = field(default_factory=dict)
    gallery: Mapping[str, Callable[[Params, ModelState, Key], Pictures | str]] = field(default_factory=dict)
    on_log: OnLog | None = None
    published: Sequence[Published] = ()
    tokenizer: Any = None
    rules: sharding.Rules = sharding.RULES
    facts: Mapping[str, Any] = field(default_factory=dict)  # of the data (a hash, a version): recorded in result.json

    def transformations(self, steps: int) -> dict[str, optax.GradientTransformation]:
        """By player, for a run of so many updates. UsageError: a player with a loss but no tx, or the other way."""
        plain = isinstance(self.tx, optax.GradientTransformation | Mapping)
        if not plain and (not callable(self.tx) or "learning_rate" in inspect.signature(self.tx).parameters):
            raise UsageError(f"tx is {self.tx!r}: give an optax transformation, as optax.sgd(1e-3), or steps -> one")
        given = self.tx if plain else self.tx(steps)
        if isinstance(given, optax.GradientTransformation):
            return dict.fromkeys(self.task.losses, given)
        if not isinstance(given, Mapping):
            raise UsageError(f"tx gives a {type(given).__name__}: give an optax transformation, or a dict by player")
        for player in self.task.losses.keys() - given.keys():
            raise UsageError(f"player {player!r} has a loss but no tx: add it to tx ({', '.join(given) or 'empty'})")
        for player in given.keys() - self.task.losses.keys():
            there = ", ".join(self.task.losses)
            raise UsageError(f"tx names the player {player!r}, which has no loss (there are {there}): take it out")
        return dict(given)
