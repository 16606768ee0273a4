"""The loop: `fit` runs the one step over an experiment's batches, in a working directory that can be resumed."""

import contextlib
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
from etils import epath

from bigjax import Interrupted, UsageError, sharding
from bigjax.evaluation import evaluate, evaluation, evaluator
from bigjax.experiment import Experiment, OnLog, RunConfig, Split, check, home_of, size_of
from bigjax.metrics import Metrics
from bigjax.program import AHEAD, Program, planned_steps
from bigjax.step import TrainState, train_step

__all__ = ["Run", "TrainState", "evaluate", "fit", "train_step"]


@dataclass(frozen=True)
class Run:
    """What `fit` gives back; `state` is None if the run was finished before."""

    state: TrainState | None
    result: dict[str, Any]
    workdir: epath.Path

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
    from bigjax.look.display import Display, summary
    from bigjax.look.profile import tracing
    from bigjax.run import alike, guard, machine, processes, watch
    from bigjax.run import workdir as folder
    from bigjax.run.identity import extend, identify, longer, trial
    from bigjax.run.lines import Clock

    check(config)
    guard.quiet()
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
            make = partial(Program, experiment, config, train, mesh=mesh)

            def seconds_a_step() -> float:
                with clock.timing("compile"), display.phase("planning"):
                    return trial(make(steps=10**6), {"train": train, **splits}).seconds_a_step()

            size = size_of(train)
            planned = partial(planned_steps, config, size, seconds_a_step)
            steps = folder.once(home, "steps", planned)
            program, more = make(steps=steps), longer(home, config)
            with clock.timing("compile"), display.phase("checking data"):
                accept = config.accept_changes and not finished
                records = [identify(home, program, {"train": train, **splits}, accept=accept, tell=display.line)]
            if more:
                program, finished = make(steps=planned()), None
                records.append(extend(home, program, before=steps))
                display.line(f"extended from {steps:,} to {program.steps:,} updates")
            if finished:
                display.line(f"{home} is finished; this is its result (--no-resume starts over)")
                display.close()
                summary(finished, report=str(home / "report.html"), console=display.console)
                return Run(None, finished, home)
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
    """(checkpoints, step, state, window): resumed; or else initialized, from another run's parameters if asked."""
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
    if config.init_from:
        state, said = restore.transfer(state, config.init_from)
        display.line(said)
    return checkpoints, 0, state, program.fresh_window()


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
    from bigjax.data.prefetch import doing, next_batch
    from bigjax.look.diagnose import blame, layer_rows
    from bigjax.look.gallery import draw
    from bigjax.look.report import write_report
    from bigjax.run import processes
    from bigjax.run import workdir as folder
    from bigjax.run.lines import Lines
    from bigjax.run.log import Log
    from bigjax.run.shown import only_shown
    from bigjax.run.watch import UPDATE, watching

    experiment, config = program.experiment, program.config
    checkpoints, step, state, window = started
    first, dropped, saved = step, int(state.skipped), time.monotonic()
    with only_shown("the table of layers", display.line):
        rows = layer_rows(program.begin, state.params)
        display.table(experiment.name, rows, total=sum(n for _, _, n in rows))
    with contextlib.ExitStack() as stack:
        checkpoints = stack.enter_context(contextlib.closing(checkpoints))
        log = Log(home, step=step, tensorboard=config.tensorboard, active=processes.first(), tell=display.line)
        log, batches = (stack.enter_context(contextlib.closing(x)) for x in (log, program.batches(step)))
        forgiven, controls = int(window["skipped"][0]), program.controls(dropped=dropped)
        lines = Lines(log, display, clock, hooks, program, forgiven=forgiven, dropped=dropped)
        measure = evaluator(experiment.task, batch_size=config.batch_size, seed=config.seed, mesh=program.mesh)
        under_way: deque[Any] = deque()  # updates that the device has not finished
        measured: tuple[dict[str, dict[str, float]], Metrics] = ({}, {})

        while step < program.steps and not lines.ends:
            compiling = step == first  # the first update alone: so the time to compile is known
            display.phase("compiling" if compiling else "training")
            with clock.timing("compile" if compiling else "train"), watching(partial(doing, program, step), UPDATE):
                batch = next_batch(batches, program, step)
                state, window, told = program.update(state, window, batch, program.key, controls)
                under_way.append(told)
                if compiling or len(under_way) > AHEAD:  # the device never waits, and no batches pile up
                    under_way.popleft().block_until_ready()
            step += 1
            if compiling:
                lines.begin(step, batches.wait_seconds)

            number, done = signalled(step), step == program.steps
            at_log, at_eval, at_save = (
                done or step % n == 0 for n in (config.log_every, config.eval_every, config.save_every)
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
                wrong, kept = blame(program, state, dropped=dropped), checkpoints.wait()
                kept = "no checkpoint was saved before it" if kept is None else f"the checkpoint of step {kept} is kept"
                remedy = "lower --learning-rate, or pass --nonfinite skip to drop such updates"
                raise UsageError(f"{wrong}; {kept}; {remedy}")

            values = None
            if at_eval or lines.ends:
                display.phase("evaluating")
                with clock.timing("eval"):
                    measured = evaluation(program, measure, state, splits)
                    lines.tell_evaluation(step, measured[0])
                    draw(program, home, state, step, display.line)
                values, number = measured[0].get("validation"), number or signalled(step)
            if at_save or lines.ends or number is not None:
                display.phase("saving")
                with clock.timing("checkpoint"):
                    log.flush()
                    checkpoints.save(step, {"state": state, "window": window}, metrics=values)
                saved, number = time.monotonic(), number or signalled(step)
            if number is not None and not (done or lines.ends):
                checkpoints.wait()
                raise Interrupted(number, step)

        if step == first:  # killed between the last save and the result: the log has the lines already
            measured = evaluation(program, measure, state, splits)
        with clock.timing("checkpoint"):
            checkpoints.wait()
        result = folder.make_result(
            experiment,
            config,
            state=state,
            values={"train": folder.last_line(home, "train"), **measured[0]},
            counts=measured[1],
            seconds=clock.all(),
            examples=(step - first - 1) * config.batch_size,  # the first update's time is in `compile`
        )
        if processes.first():
            folder.write_json(home / "result.json", result)
            with only_shown("report.html", display.line), display.phase("writing the report"):
                write_report(home)
    return Run(state, result, home)
