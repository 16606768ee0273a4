"""The loop: `fit` runs the one step over an experiment's batches, in a working directory that can be resumed."""

import contextlib
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import flax.linen as nn
import jax
from etils import epath

from bigjax import Interrupted, UsageError, sharding
from bigjax.evaluation import evaluate, evaluation, evaluator
from bigjax.experiment import Experiment, OnLog, RunConfig, Split, check, home_of, size_of
from bigjax.metrics import Metrics
from bigjax.program import AHEAD, Program, planned_steps
from bigjax.step import TrainState, train_step
from bigjax.task import variables

__all__ = ["Run", "TrainState", "evaluate", "fit", "train_step"]


@dataclass(frozen=True)
class Run:
    """What `fit` gives back. `run.model.apply(run.variables, x)` takes averages where the run keeps them."""

    result: dict[str, Any]
    workdir: epath.Path
    models: Mapping[str, nn.Module] = field(repr=False)  # by player
    read: Callable[[], TrainState] = field(repr=False)

    @cached_property
    def state(self) -> TrainState:
        """At the end; of a run that was finished before it is read when first asked for."""
        return self.read()

    @property
    def model(self) -> nn.Module:
        return self.models[self.player]

    @property
    def variables(self) -> dict[str, Any]:
        return variables(*self.state.evaluated(), self.player)

    @property
    def player(self) -> str:
        """The only one. UsageError: there are several."""
        from bigjax.run.restore import player_of

        return player_of(self.models, workdir=self.workdir)

    @property
    def history(self) -> dict[str, dict[int, float]]:
        """The log, metrics.jsonl: `run.history["eval/accuracy"]` is {step: value}."""
        from bigjax.run.log import history

        return history(self.workdir)


def fit(experiment: Experiment, config: RunConfig, *, quiet: bool = False, on_log: OnLog | None = None) -> Run:
    """Trains to the end, evaluates, writes the working directory; resumes what is there, gives back what is finished.

    on_log: as `Experiment.on_log`, which it joins.

    Raises UsageError for whatever the user can put right, a loss that is no longer finite among it.
    """
    from bigjax.data import pipeline
    from bigjax.data.feeds import seconds_an_update
    from bigjax.look.display import Display, summary
    from bigjax.look.profile import tracing
    from bigjax.run import alike, guard, machine, processes, restore, watch
    from bigjax.run import workdir as folder
    from bigjax.run.identity import extend, identify, longer, trial
    from bigjax.run.lines import Clock

    check(config)
    guard.quiet()
    machine.keep_memory()
    machine.repeat_bits(config.deterministic)
    machine.forgive_terminal()
    machine.cache_compilations(config.compilation_cache)
    with alike.ready(experiment.name, "train", config):
        mesh = sharding.make_mesh(config.mesh, batch_size=config.batch_size)  # errors come before anything is written
        train, splits = experiment.train, {"eval": experiment.test}
        if config.validation:
            train, held = pipeline.hold_out(train, fraction=config.validation, split_seed=config.split_seed)
            splits = {"validation": held, **splits}
        pipeline.batches(train, seed=config.seed, batch_size=config.batch_size)  # as do its own
        for split in (train, *splits.values()):
            if isinstance(split, Mapping):
                experiment.task.check(split)
        home, clock = home_of(config, experiment.name), Clock()
        fresh = not config.resume or not (home / "config.json").exists()
        if fresh and (home / "config.json").exists():
            Program(experiment, config, train, steps=1, mesh=mesh)  # a mistake must not cost the run that is there
    shown = Display(enabled=not quiet and processes.first())
    traced = tracing(home, shown.line) if config.profile else contextlib.nullcontext()
    with (
        watch.watched(config.hang_seconds, "what is before an update, or between two"), folder.locked(home),
        guard.storage(home), guard.signals() as signalled, shown as display, traced as trace, jax.set_mesh(mesh),
    ):  # fmt: skip
        try:
            finished = folder.open_workdir(home, experiment, config)
            display.phase("compiling")
            begin = partial(signalled.attempt, where="as it began")

            def make(steps: int) -> Program:
                with watch.watching("reading the data's first example"):
                    return begin(partial(Program, experiment, config, train, steps=steps, mesh=mesh))

            def seconds_a_step() -> float:
                with clock.timing("compile"), display.phase("planning"):
                    return seconds_an_update(trial(make(steps=10**6), {"train": train, **splits}))

            size = size_of(train)
            planned = partial(planned_steps, config, size, seconds_a_step)
            steps = folder.once(home, "steps", planned)
            program, more = make(steps=steps), longer(home, config)
            with clock.timing("compile"), display.phase("checking data"):
                reads = partial(identify, accept=config.accept_changes and not finished, tell=display.line)
                records = [begin(reads, home, program, {"train": train, **splits})]
            if more:
                program, finished = make(steps=planned()), None
                records.append(extend(home, program, before=steps))
                display.line(f"extended from {steps:,} to {program.steps:,} updates")
            if finished:
                display.line(f"{home} is finished; this is its result (--no-resume starts over)")
                display.close()
                summary(finished, report=str(home / "report.html"), console=display.console)
                return Run(finished, home, experiment.task.models, partial(restore.last_state, home, program))
            started = start(program, home, display, clock)
            for record in records:
                record()
        except Exception:
            # nothing has begun: the corrected command must not find a run with other settings
            if fresh and processes.first():
                folder.clear(home)
            raise
        hooks = [hook for hook in (experiment.on_log, on_log, trace) if hook]
        run = loop(program, home, splits, started, display=display, clock=clock, signalled=signalled, hooks=hooks)
        display.close()
        summary(run.result, report=str(home / "report.html"), console=display.console)
        return run


def start(program: Program, home: epath.Path, display: Any, clock: Any) -> tuple[Any, int, TrainState, Metrics]:
    """(checkpoints, step, state, window): resumed; or else initialized, from weights that are there if asked."""
    from bigjax.run import restore
    from bigjax.run.checkpoint import Checkpoints

    config = program.config
    checkpoints = Checkpoints(home / "checkpoints", keep=config.keep, best=config.best)
    if (step := checkpoints.newest(tell=display.line)) is not None:
        display.line(f"resuming at step {step}")
        checkpoints.set_aside(step)
        return checkpoints, step, *restore.resume(checkpoints, step, program)
    with clock.timing("compile"):
        state = jax.block_until_ready(program.initialize(program.key))
    return checkpoints, 0, restore.begun(state, program, tell=display.line), program.fresh_window()


def loop(
    program: Program,
    home: epath.Path,
    splits: Mapping[str, Split | None],
    started: tuple[Any, int, TrainState, Metrics],
    *,
    display: Any,
    clock: Any,
    signalled: Any,
    hooks: list[OnLog],
) -> Run:
    """From where `start` stands to the end: updates, log windows, evaluations, checkpoints, the result."""
    from bigjax.data.feeds import Feeding
    from bigjax.data.prefetch import Shapes, doing, next_batch
    from bigjax.look.diagnose import blame, layer_rows
    from bigjax.look.gallery import draw
    from bigjax.look.report import write_report
    from bigjax.run import processes
    from bigjax.run import workdir as folder
    from bigjax.run.lines import Lines, kept
    from bigjax.run.log import Log
    from bigjax.run.shown import only_shown
    from bigjax.run.watch import UPDATE, watching

    experiment, config = program.experiment, program.config
    checkpoints, step, state, window = started
    feeding, first, dropped, saved = Feeding(program, step), step, int(state.skipped), time.monotonic()
    with only_shown("the table of layers", display.line):
        rows = layer_rows(program.begin, state.params)
        display.table(experiment.name, rows, total=sum(n for _, _, n in rows))
    with contextlib.ExitStack() as stack:
        checkpoints = stack.enter_context(contextlib.closing(checkpoints))
        log = Log(home, step=step, tensorboard=config.tensorboard, active=processes.first(), tell=display.line)
        log, batches = stack.enter_context(contextlib.closing(log)), stack.enter_context(feeding.batches())
        forgiven, controls = int(window["skipped"][0]), program.controls(dropped=dropped)
        lines = Lines(
            log, display, clock, hooks, program, forgiven=forgiven, dropped=dropped, attempt=signalled.attempt
        )
        measure = evaluator(experiment.task, batch_size=config.batch_size, seed=config.seed, mesh=program.mesh)
        under_way, shapes = deque[Any](), Shapes(program)  # updates that the device has not finished; batches' shapes
        measured: tuple[dict[str, dict[str, float]], Metrics] = ({}, {})

        def judge(*, tell: bool = True) -> bool:
            """Evaluates; whether it came to its end before a signal did."""
            nonlocal measured
            display.phase("evaluating")
            with clock.timing("eval"):
                if found := signalled.attempt(evaluation, program, measure, state, splits):
                    measured = found
                if found and tell:
                    lines.tell_evaluation(step, measured[0])
                    signalled.attempt(draw, program, home, state, step, display.line)
            return found is not None

        # stopped in the evaluation of this step; or between the last save and the result, when the log has its lines
        if ((owed := lines.owes(step)) or step == program.steps) and not judge(tell=owed):
            raise Interrupted(signalled(step), f"at step {step}, which is saved")
        while step < program.steps and not lines.ends:
            compiling = shapes.new(step)  # such an update alone: so the time to compile is known
            display.phase("compiling" if compiling else "training")
            with clock.timing("compile" if compiling else "train"), watching(partial(doing, program, step), UPDATE):
                batch = signalled.attempt(next_batch, batches, program, step)
                if moved := batch is not None:  # else a signal has come: what there is now is saved
                    state, window, told = feeding.update(state, window, batch, program.key, controls)
                    under_way.append(told)
                if moved and (compiling or len(under_way) > AHEAD):  # the device never waits, and no batches pile up
                    under_way.popleft().block_until_ready()
            step = feeding.stop(step) if moved else step
            if moved and compiling:
                lines.begin(step, batches.wait_seconds)

            number, done = signalled(step), step == program.steps
            at_log, at_eval, at_save = (
                moved and (done or step % n == 0) for n in (config.log_every, config.eval_every, config.save_every)
            )
            if at_log or at_eval or at_save or not processes.several():  # several ask the clock of process 0
                due = signalled.save() or 0 < config.save_minutes * 60 < time.monotonic() - saved
                at_save |= processes.from_first(lambda due=due: due)
            bad = False
            if at_log:
                checkpoints.check()
                bad = lines.read()  # the window before, while the device works on
                lines.set_aside(step, window, batches.wait_seconds)
                window = program.fresh_window()
            if at_eval or at_save or lines.ends or number is not None:  # nothing is saved before its numbers are known
                bad |= lines.read() or int(state.skipped) > dropped
            if bad and config.nonfinite == "stop":
                wrong, there = blame(program, state, dropped=dropped), kept(checkpoints.wait())
                remedy = "lower --learning-rate, or pass --nonfinite skip to drop such updates"
                raise UsageError(f"{wrong}; {there}; {remedy}")

            values, judged = None, True
            if at_eval or lines.ends:
                judged = judge()
                values, number = measured[0].get("validation") if judged else None, number or signalled(step)
            if not judged and (lines.ends or config.best):  # which need its numbers: all of it is done again
                raise Interrupted(number, f"at step {step}; {kept(checkpoints.wait())}")
            if at_save or lines.ends or number is not None:
                display.phase("saving")
                with clock.timing("checkpoint"):
                    log.flush()
                    checkpoints.save(step, {"state": state, "window": window}, metrics=values)
                saved, number = time.monotonic(), number or signalled(step)
            if number is not None and not (judged and (done or lines.ends)):
                checkpoints.wait()
                raise Interrupted(number, f"at step {step}, which is saved")

        with clock.timing("checkpoint"):
            checkpoints.wait()
        result = folder.make_result(
            experiment,
            config,
            state=state,
            values={"train": folder.last_line(home, "train"), **measured[0]},
            counts=measured[1],
            seconds=clock.all(),
            examples=(step - first - len(shapes.widths)) * config.batch_size,  # the time of these is in `compile`
        )
        if processes.first():
            folder.write_json(home / "result.json", result)
            with only_shown("report.html", display.line), display.phase("writing the report"):
                write_report(home)
    return Run(result, home, experiment.task.models, lambda: state)
