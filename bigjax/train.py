"""The loop: `fit` runs the one step over an experiment's batches, in a working directory that can be resumed."""

import contextlib
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from etils import epath

from bigjax import Interrupted, UsageError, metrics, sharding
from bigjax.data import pipeline
from bigjax.data.prefetch import DataError
from bigjax.evaluation import make_evaluate
from bigjax.experiment import Experiment, RunConfig, check
from bigjax.look.diagnose import first_nonfinite, layer_rows
from bigjax.look.display import Display, summary
from bigjax.look.report import save_gallery, write_report
from bigjax.metrics import Metrics
from bigjax.program import Program, planned_steps
from bigjax.run import guard, processes, restore
from bigjax.run import workdir as folder
from bigjax.run.checkpoint import Checkpoints, to_stderr
from bigjax.run.guard import Watchdog
from bigjax.run.log import Log
from bigjax.step import TrainState, train_step
from bigjax.task import Key, ModelState, Params

__all__ = ["Run", "TrainState", "fit", "train_step"]


@dataclass(frozen=True)
class Run:
    """What `fit` gives back; `state` is None if the run was finished before."""

    state: TrainState | None
    result: dict[str, Any]
    workdir: epath.Path


class Watch:
    """Seconds by name, since it was made."""

    def __init__(self) -> None:
        self.begin = time.perf_counter()
        self.seconds = dict.fromkeys(("compile", "train", "eval", "data_wait", "checkpoint"), 0.0)

    def timed(self, name: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        begin = time.perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            self.seconds[name] += time.perf_counter() - begin

    def all(self) -> dict[str, float]:
        return {"total": time.perf_counter() - self.begin, **self.seconds}


def cache_compilations(on: bool) -> None:
    """JAX's persistent compilation cache, in the user's cache folder unless JAX_COMPILATION_CACHE_DIR says where."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    jax.config.update("jax_enable_compilation_cache", on)
    if on and not jax.config.jax_compilation_cache_dir:
        jax.config.update("jax_compilation_cache_dir", os.path.join(home, "bigjax", "compiled"))


def fit(experiment: Experiment, config: RunConfig, *, quiet: bool = False) -> Run:
    """Trains to the end, evaluates, writes the working directory; resumes what is there, gives back what is finished.

    Raises UsageError for whatever the user can put right, a loss that is no longer finite among it.
    """
    check(config)
    cache_compilations(config.compilation_cache)
    sharding.make_mesh(config.mesh, batch_size=config.batch_size)  # its errors come before anything is written
    train, held = experiment.train, None
    if config.validation:
        train, held = pipeline.hold_out(train, fraction=config.validation, split_seed=config.split_seed)
    pipeline.batches(train, seed=config.seed, batch_size=config.batch_size)  # as do its own
    home = epath.Path(config.workdir or f"runs/{experiment.name}")
    description = folder.describe(experiment, config)
    fresh = not config.resume or not (home / "config.json").exists()
    shown = Display(enabled=not quiet and processes.first())
    with folder.locked(home), guard.storage(home), guard.signals() as signalled, shown as display:

        def tree() -> list[str]:
            """How the newest state saved differs from what these settings give."""
            checkpoints = Checkpoints(home / "checkpoints", read_only=True)
            step = checkpoints.latest()
            here = Program(experiment, config, train, steps=1).state_shapes
            return checkpoints.changes(step, {"state": here}) if step is not None else []

        alone = list if processes.several() else tree  # opening checkpoints waits for all processes
        finished = processes.from_first(
            lambda: folder.open_workdir(home, description, resume=config.resume, tree=alone)
        )
        if finished:
            display.line(f"{home} is finished; this is its result (--no-resume starts over)")
            display.close()
            summary(finished, report=str(home / "report.html"), console=display.console)
            return Run(None, finished, home)
        try:
            loop = Loop(experiment, config, home, display, train=train, held=held, signalled=signalled)
        except UsageError:
            # nothing has begun: the corrected command must not find a run with other settings
            if fresh and processes.first():
                folder.clear(home)
            raise
        try:
            with jax.set_mesh(loop.program.mesh):
                return loop.run()
        finally:
            loop.close()


class Loop:
    """One run: its files, its clock, and where it stands."""

    def __init__(
        self,
        experiment: Experiment,
        config: RunConfig,
        home: epath.Path,
        display: Display,
        *,
        train: pipeline.Split,
        held: pipeline.Split | None,
        signalled: Callable[[int], int | None],
    ):
        self.experiment, self.config, self.home, self.display = experiment, config, home, display
        self.splits = ({"validation": held} if held is not None else {}) | {"eval": experiment.test}
        self.watch = Watch()
        display.phase("compiling")

        def seconds_a_step() -> float:
            with jax.set_mesh(sharding.make_mesh(config.mesh, batch_size=config.batch_size)):
                return self.watch.timed("compile", Program(experiment, config, train, steps=10**6).seconds_a_step)

        steps = folder.once(home, "steps", lambda: planned_steps(config, pipeline.size_of(train), seconds_a_step))
        self.program, self.steps = Program(experiment, config, train, steps=steps), steps
        self.evaluate = make_evaluate(
            experiment.task, batch_size=config.batch_size, seed=config.seed, mesh=self.program.mesh
        )
        self.checkpoints = Checkpoints(home / "checkpoints", keep=config.keep, best=config.best)
        with jax.set_mesh(self.program.mesh):
            self.step, self.state, self.window = self.start()
        self.first = self.step
        self.log = Log(home, step=self.step, tensorboard=config.tensorboard, active=processes.first())
        self.batches = self.program.batches(self.step)
        self.signalled, self.at = signalled, self.step  # the update that is under way
        self.watchdog = Watchdog(config.hang_seconds)
        self.unread: tuple[int, Metrics, float] | None = None  # (step, window, examples/s), not yet asked of the device
        self.mark = (0.0, self.step)  # seconds trained and step at the window's start
        self.saved = time.monotonic()
        self.waited = 0.0  # seconds for the batch of the update that compiled

    def start(self) -> tuple[int, TrainState, Metrics]:
        """Resume; or else initialize, from another run's parameters if asked."""
        program = self.program
        if (step := self.checkpoints.newest(tell=self.display.line)) is not None:
            self.display.line(f"resuming at step {step}")
            self.checkpoints.set_aside(step)
            saved = self.checkpoints.restore(step, {"state": program.state_shapes, "window": program.window_shapes})
            return step, saved["state"], saved["window"]
        state = self.watch.timed("compile", lambda: jax.block_until_ready(program.initialize(program.key)))
        if self.config.init_from:
            state, said = restore.transfer(state, self.config.init_from)
            self.display.line(said)
        return 0, state, program.fresh_window()

    def close(self) -> None:
        self.watchdog.closed.set()
        for part in (self.batches, self.log, self.checkpoints):
            part.close()

    def run(self) -> Run:
        config = self.config
        rows = layer_rows(self.program.begin, self.state.params)
        self.display.table(self.experiment.name, rows, total=sum(n for _, _, n in rows))
        count = min(1, self.steps - self.step)  # the first update alone: so the time to compile is known
        while self.step < self.steps:
            self.advance(count)
            done = self.step == self.steps
            if done or self.step % config.log_every == 0:
                self.end_window()
            evaluate, save = (done or self.step % n == 0 for n in (config.eval_every, config.save_every))
            save = save or (config.save_minutes > 0 and processes.from_first(self.due))
            if evaluate or save:
                self.read()
                if config.nonfinite == "stop" and int(self.state.skipped):  # in a window not ended: never saved
                    self.stop_nonfinite()
            values = self.watch.timed("eval", self.judge) if evaluate else {}
            if save:
                self.watch.timed("checkpoint", self.save, values)
            if (number := self.signalled(self.step)) is not None and not done:
                self.leave(number, saved=save)
            ends = [
                self.steps,
                *((self.step // n + 1) * n for n in (config.log_every, config.eval_every, config.save_every)),
            ]
            count = min(ends) - self.step
        return self.finish()

    def due(self) -> bool:
        """Whether the last save is --save-minutes ago."""
        return 0 < self.config.save_minutes * 60 < time.monotonic() - self.saved

    def leave(self, number: int, *, saved: bool) -> None:
        """Saves where it stands, and ends."""
        if not saved:
            self.read()
            if self.config.nonfinite == "stop" and int(self.state.skipped):
                self.stop_nonfinite()
            self.save({})
        self.wait()
        raise Interrupted(number, self.step)

    def working_on(self) -> str:
        """What the watchdog says."""
        rows = pipeline.batch_rows(
            self.at,
            seed=self.config.seed,
            batch_size=self.config.batch_size,
            size=pipeline.size_of(self.program.train),
        )
        return f"update {self.at + 1} (batch {self.at}: examples {', '.join(map(str, rows[:8]))}, ...)"

    def advance(self, count: int) -> None:
        """So many updates, of which the first of a session compiles."""
        compiling = self.step == self.first
        self.display.phase("compiling" if compiling else "training")

        traced = self.config.profile and self.step == self.first + 1

        made = 0

        def enough(so_far: int) -> bool:
            nonlocal made
            made = so_far
            self.at = self.step + so_far
            self.watchdog.beat()
            stop = self.signalled(self.at) is not None
            return stop or (self.due() and not processes.several())  # which agree when all are here

        def go() -> None:
            trace = jax.profiler.trace(str(self.home / "profile")) if traced else contextlib.nullcontext()
            with self.watchdog.watching(self.working_on), trace:
                self.state, self.window = self.program.chunk(
                    self.state, self.window, self.batches, count, enough=enough
                )
            if compiling:
                jax.block_until_ready(self.state)
                self.mark = (0.0, self.step + made)  # neither its time nor its examples count for the speed
                self.waited = self.batches.wait_seconds

        try:
            self.watch.timed("compile" if compiling else "train", go)
        except DataError as e:
            raise UsageError(f"{self.working_on()}: {e}; the same command goes on from the last checkpoint") from e
        if not made:
            raise UsageError(f"{self.working_on()}: the data ended; the same command goes on from the last checkpoint")
        self.step += made

    def end_window(self) -> None:
        """Takes the window's sums aside, and reads those of the window before while the device works on."""
        self.read()
        self.checkpoints.check()
        seconds, step = self.mark
        trained = self.watch.seconds["train"] - seconds
        speed = (self.step - step) * self.config.batch_size / trained if trained else float("nan")
        self.unread, self.window = (self.step, self.window, speed), self.program.fresh_window()
        self.mark = (self.watch.seconds["train"], self.step)

    def read(self) -> None:
        """Writes and shows the numbers of the window set aside, if there is one.

        Stops the run if they are not finite.
        """
        if self.unread is None:
            return
        (step, window, speed), self.unread = self.unread, None
        values = metrics.means(window)
        if values["skipped"] and self.config.nonfinite == "stop":
            self.stop_nonfinite()
        if values["skipped"]:
            self.display.line(
                f"step {step}: {values['skipped']:.1%} of the updates since the last line were not finite and dropped"
            )
        wait = self.watch.seconds["data_wait"] = self.batches.wait_seconds - self.waited
        self.log.write(step, "train", values | ({"examples_per_second": speed} if np.isfinite(speed) else {}))
        share = wait / max(self.watch.seconds["train"], 1e-9)
        self.display.update(step, self.steps, metrics=values, examples_per_second=speed, data_wait_fraction=share)

    def judge(self) -> dict[str, float]:
        """Evaluates every split, runs the evaluators, fills the gallery; the validation split's values."""
        self.display.phase("evaluating")
        params, model_state, key = self.state.ema or self.state.params, self.state.model_state, self.program.key
        whole = whole_for(self.experiment, params, model_state, self.program.mesh)
        out = {}
        for split, data in self.splits.items():
            counts = self.evaluate(params, model_state, data)
            out[split] = self.experiment.task.summarize(counts)
            if split == "eval":
                out[split] |= ask_evaluators(self.experiment, *whole, key)
                self.counts = counts
            self.log.write(self.step, split, out[split])
            shown = ", ".join(f"{k} {v:.4g}" for k, v in list(out[split].items())[:4])
            self.display.line(f"step {self.step} {split}: {shown}")
        if self.log.active:
            with jax.set_mesh(None):
                for name, draw in self.experiment.gallery.items():
                    save_gallery(self.home, self.step, name=name, item=draw(*whole, key))
        self.judged = out
        return out.get("validation", {})

    def save(self, validation: dict[str, float]) -> None:
        self.display.phase("saving")
        with self.watchdog.watching(lambda: f"the save of step {self.step}"):
            self.log.flush()
            self.checkpoints.save(self.step, {"state": self.state, "window": self.window}, metrics=validation or None)
        self.saved = time.monotonic()

    def wait(self) -> None:
        """Until the last save is there."""
        with self.watchdog.watching(lambda: "the last save"):
            self.checkpoints.wait()

    def stop_nonfinite(self) -> None:
        """The state has stood still since the bad batch, which its number gives back: finds the module to blame."""
        bad = int(self.state.step) - int(self.state.skipped)
        batch = next(pipeline.batches(self.program.train, start=bad, **(self.program.rows | {"rows": None})))
        task, augment = self.experiment.task, self.experiment.augment
        params, model_state = sharding.gathered((self.state.params, self.state.model_state), self.program.mesh)
        with jax.set_mesh(None):
            state = self.state.replace(params=params, model_state=model_state)
            where = first_nonfinite(task, augment, state, batch, jax.random.fold_in(self.program.key, bad))
        self.wait()
        kept = self.checkpoints.latest()
        raise UsageError(
            f"update {bad + 1} (batch {bad}) is not finite: {where}; "
            + (f"the checkpoint of step {kept} is kept" if kept is not None else "no checkpoint was saved before it")
            + "; lower --learning-rate, or pass --nonfinite skip to drop such updates"
        )

    def finish(self) -> Run:
        """Waits for the last checkpoint, then writes result.json and the report."""
        if self.first == self.steps:  # killed between the last save and the result: the log has the lines already
            self.log.active = False
            self.judge()
        self.watch.timed("checkpoint", self.wait)
        result = folder.make_result(
            self.experiment,
            self.config,
            state=self.state,
            values={"train": folder.last_line(self.home, "train"), **self.judged},
            counts=self.counts,
            seconds=self.watch.all(),
            examples=(self.steps - self.first - 1) * self.config.batch_size,  # the first update's time is in `compile`
        )
        if processes.first():
            folder.write_json(self.home / "result.json", result)
            write_report(self.home)
        self.display.close()
        summary(result, report=str(self.home / "report.html"), console=self.display.console)
        return Run(self.state, result, self.home)


def whole_for(experiment: Experiment, params: Params, model_state: ModelState, mesh: Any) -> tuple[Params, ModelState]:
    """The same on a device of this process, where evaluators or a gallery ask: every process must call this."""
    asked = experiment.evaluators or experiment.gallery
    return sharding.gathered((params, model_state), mesh) if asked else (params, model_state)


def ask_evaluators(experiment: Experiment, params: Params, model_state: ModelState, key: Key) -> dict[str, float]:
    """The numbers of all of an experiment's evaluators, each computed by every process for itself."""
    with jax.set_mesh(None):
        return {k: v for judge in experiment.evaluators.values() for k, v in judge(params, model_state, key).items()}


def evaluate(experiment: Experiment, config: RunConfig) -> dict[str, float]:
    """The test split's numbers under the newest checkpoint of the run's working directory."""
    check(config)
    home = epath.Path(config.workdir or f"runs/{experiment.name}")
    steps = folder.read_config(home)["steps"]
    checkpoints = Checkpoints(home / "checkpoints", read_only=True)
    if not steps or (step := checkpoints.newest(tell=to_stderr)) is None:
        raise UsageError(f"{home} holds no checkpoint yet: let it train until one is saved")
    program = Program(experiment, config, experiment.train, steps=steps)
    with jax.set_mesh(program.mesh):
        state = checkpoints.restore(step, {"state": program.state_shapes})["state"]
        checkpoints.close()
        judge = make_evaluate(experiment.task, batch_size=config.batch_size, seed=config.seed, mesh=program.mesh)
        params = state.ema or state.params
        values = experiment.task.summarize(judge(params, state.model_state, experiment.test))
        whole = whole_for(experiment, params, state.model_state, program.mesh)
        values |= ask_evaluators(experiment, *whole, program.key)
    return {"step": step, **{f"eval/{k}": v for k, v in values.items()}}
