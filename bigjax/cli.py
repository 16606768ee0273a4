"""The verbs of an experiment script: train (the default), evaluate, plan, sample, report."""

import dataclasses
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import tyro

from bigjax.experiment import Experiment, RunConfig, check, home_of

Flat = tyro.conf.OmitArgPrefixes  # `adamw: Flat[AdamW]`: a group of flags without the group's name before each

VERBS = {
    "train": "train to the end (the default); resume what was interrupted, show what is finished",
    "evaluate": "evaluate the newest checkpoint of the working directory on the test split, or on other --data",
    "plan": "what a run would need on a TPU slice, and what bounds it there: compiled here, on a machine without one",
    "sample": "write on from a prompt, with the model of the working directory",
    "report": "write report.html again from the files of the working directory",
}


def main(Config: type[RunConfig], build: Callable[[Any], Experiment], arguments: Sequence[str] | None = None) -> None:
    """Runs a script's verb with its flags. A mistake of the user is one message on stderr and exit status 2."""
    from bigjax.look import flags
    from bigjax.run import machine, processes, words
    from bigjax.run.alike import shared
    from bigjax.run.judged import as_trained

    machine.keep_memory()
    machine.forgive_terminal()
    given = [] if words.typed() else sys.argv[1:]  # a notebook's are those of its kernel
    arguments = list(given if arguments is None else arguments)
    name = Path(getattr(sys.modules[build.__module__], "__file__", "notebook")).stem
    with words.by_flags(), words.leaving():
        verb = flags.take_verb(arguments, Config, VERBS, script=f"{name}.py")
        about = {"prog": f"{name}.py {verb}", "description": f"{VERBS[verb]}.\n\nVerbs: {' | '.join(VERBS)}"}
        if verb == "sample":
            from bigjax.tools.sample import of_script

            return of_script(arguments, name=name, **about)
        config, plans = parse(Config, verb, args=arguments, **about)
        if verb == "evaluate":
            config, build = as_trained(Config, build, config, name=name, arguments=arguments)
        config = flags.settle(config, Config())
        machine.repeat_bits(config.deterministic)
        if verb == "plan":
            from bigjax.tools.plan import write_plan

            home = home_of(config, f"{name}_plan")
            return write_plan(build, config, topology=plans.topology, home=home, everywhere=plans.search)
        with processes.joined(config.distributed, shared(name, verb, config)):
            run(verb, config, build, name=name)


def parse(Config: type[RunConfig], verb: str, **options: Any) -> tuple[RunConfig, Any]:
    """A script's flags and, with the verb plan, those of plan."""
    from bigjax.look import flags

    return flags.parse(Config, verb, **options)


def run(verb: str, config: RunConfig, build: Callable[[Any], Experiment], *, name: str) -> None:
    """One verb of the experiment called `name`."""
    from bigjax import evaluation, train
    from bigjax.look import report
    from bigjax.look.display import Display
    from bigjax.run import processes
    from bigjax.run.log import json_text
    from bigjax.run.memory import settled

    check(config)
    if verb == "report":
        return print(report.write_report(home_of(config, name))) if processes.first() else None
    if verb == "train":
        config = settled(config, build, home_of(config, name))
    waits = verb == "train" and processes.first() and sys.stdout.isatty()
    with Display(enabled=waits) as display, display.phase("reading data"):
        experiment = dataclasses.replace(build(config), name=name)
    if verb == "train":
        train.fit(experiment, config)
        return
    values = evaluation.evaluate(experiment, config)
    if processes.first():
        print(json_text(values))
