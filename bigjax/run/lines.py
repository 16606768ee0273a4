"""What a run tells while it goes on, and how long each part of it took."""

import contextlib
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from bigjax import UsageError, metrics
from bigjax.experiment import OnLog
from bigjax.metrics import Metrics
from bigjax.program import Program
from bigjax.run import processes
from bigjax.run.flops import examples_at_peak
from bigjax.run.log import read_log
from bigjax.run.modules import only_here
from bigjax.run.rates import learning_rates
from bigjax.run.shown import only_shown, own_metric
from bigjax.run.watch import watching


class Clock:
    """Seconds by name, since it was made."""

    def __init__(self) -> None:
        self.begin = time.perf_counter()
        self.seconds = dict.fromkeys(("compile", "train", "eval", "data_wait", "checkpoint"), 0.0)

    @contextlib.contextmanager
    def timing(self, name: str) -> Iterator[None]:
        begin = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] += time.perf_counter() - begin

    def all(self) -> dict[str, float]:
        return {"total": time.perf_counter() - self.begin, **self.seconds}


class Lines:
    """What a run tells: each line goes to the log and to the hooks; a window's, once its updates are behind.

    ends: whether a hook has said that the run ends. forgiven: updates of the first window that an earlier session
    dropped and accepted; dropped: all of them, which moved no learning rate. attempt: as of `guard.Signals`.
    """

    def __init__(
        self,
        log: Any,
        display: Any,
        clock: Clock,
        hooks: list[OnLog],
        program: Program,
        *,
        forgiven: int = 0,
        dropped: int = 0,
        attempt: Callable[..., Any] = lambda call, *arguments: call(*arguments),
    ):
        self.attempt = attempt
        self.log, self.display, self.clock, self.hooks, self.program = log, display, clock, hooks, program
        self.ends, self.unread, self.mark, self.forgiven = False, None, None, forgiven
        self.dropped = dropped - forgiven  # before the window that is read next
        self.rates = learning_rates(program.experiment.transformations(program.steps))
        self.peak: float | None = None  # examples a second
        with only_shown("the utilization of the devices", display.line):
            self.peak = examples_at_peak(program)

    def begin(self, step: int, waited: float) -> None:
        """What is done counts neither for the speed nor, at first, for the wait for data: it compiled."""
        if self.mark is None:
            self.waited = waited
            self.display.begin(step, self.program.steps)
        self.mark = (self.clock.seconds["train"], step)
        if step == 1:  # once a run
            for line in only_here(self.program.experiment.task.models):
                self.display.line(line)

    def tell(self, step: int, split: str, values: dict[str, float]) -> None:
        if taken := {"step", "split"} & values.keys():
            raise UsageError(f"a number of {split} is called {min(taken)!r}, as the log's own: give it another name")
        self.log.write(step, split, values)
        # also without hooks: another process may have some
        asked = lambda: [self.attempt(ask, hook, step, split, values) for hook in self.hooks]  # noqa: E731
        self.ends |= processes.from_first(lambda: any(asked()))

    def set_aside(self, step: int, window: Metrics, waited: float) -> None:
        """The sums of a window that has ended, to be read while the device works on."""
        seconds, since = self.clock.seconds["train"] - self.mark[0], step - self.mark[1]
        speed = since * self.program.config.batch_size / seconds if seconds else float("nan")
        self.clock.seconds["data_wait"] = waited - self.waited
        self.unread, self.mark = (step, window, speed), (self.clock.seconds["train"], step)

    def read(self) -> bool:
        """Writes and shows the window set aside, if there is one; whether updates of it were dropped."""
        if self.unread is None:
            return False
        (step, window, speed), self.unread = self.unread, None
        values, seconds = metrics.means(window), self.clock.seconds
        dropped, more, self.forgiven = values["skipped"], float(window["skipped"][0]) > self.forgiven, 0
        if more and self.program.config.nonfinite == "stop":
            return True  # and the run stops here, without this line
        if dropped:
            since = "of the updates since the last line were not finite and dropped"
            self.display.line(f"step {step}: {dropped:.1%} {since}")
        self.dropped += round(float(window["skipped"][0]))
        values = self.learning_rate(step - 1 - self.dropped) | values
        told = {"examples_per_second": speed} | ({"mfu": speed / self.peak} if self.peak else {})
        self.tell(step, "train", values | (told if np.isfinite(speed) else {}))
        share = seconds["data_wait"] / max(seconds["train"], 1e-9)
        shown = {"metrics": self.in_order(values), "examples_per_second": speed, "data_wait_fraction": share}
        self.display.update(step, self.program.steps, **shown)
        return more

    def learning_rate(self, count: int) -> dict[str, float]:
        """That of an update before which `count` were applied."""
        rates, self.rates = self.rates, lambda count: {}  # which it stays if it fails: that is told once
        with only_shown("the learning rate", self.display.line):
            found, self.rates = rates(count), rates
            return found
        return {}

    def tell_evaluation(self, step: int, values: Mapping[str, dict[str, float]]) -> None:
        """A line for each split."""
        for split, numbers in values.items():
            self.tell(step, split, numbers)
            self.display.numbers(f"step {step:,} {split}:", self.in_order(numbers))

    def owes(self, step: int) -> bool:
        """Whether the evaluation of a step that is resumed is not in the log: it was interrupted."""
        due = step and (step == self.program.steps or step % self.program.config.eval_every == 0)
        there = lambda: any(r["step"] == step and r["split"] != "train" for r in read_log(self.log.path))  # noqa: E731
        return bool(due) and not processes.from_first(there)

    def in_order(self, values: Mapping[str, float]) -> dict[str, float]:
        """The experiment's own metric, losses, and the others as they came."""
        own = (own_metric(self.program.experiment, self.program.config) or "").partition("/")[2]
        return {k: values[k] for k in sorted(values, key=lambda k: (k != own, not k.endswith("loss")))}


def ask(hook: OnLog, *line: Any) -> bool:
    """Whether a hook says that the run ends. UsageError: it raises."""
    try:
        with watching("the hook on_log"):
            return bool(hook(*line))
    except Exception as e:
        if isinstance(e, UsageError):
            raise
        frame = traceback.extract_tb(e.__traceback__)[-1]
        raise UsageError(
            f"on_log failed at step {line[0]} ({type(e).__name__}: {processes.first_line(e)}; {frame.filename}, line "
            f"{frame.lineno}): correct it; the same command goes on from the last checkpoint"
        ) from e


def kept(step: int | None) -> str:
    """Of a run that ends early: its newest step that is saved, in words."""
    return "no checkpoint was saved before it" if step is None else f"the checkpoint of step {step} is kept"
