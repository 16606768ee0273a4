"""What the verb evaluate judges: the run in the working directory, on its own test split or on other data."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from bigjax import UsageError
from bigjax.experiment import Experiment, RunConfig, home_of
from bigjax.run import spoken, workdir

READING = ("images", "columns")  # groups of flags that say how data are read (data.reading)
Build = Callable[[Any], Experiment]


def as_trained(
    Config: type[RunConfig], build: Build, given: RunConfig, *, name: str, arguments: Sequence[str]
) -> tuple[RunConfig, Build]:
    """The configuration that the run was trained with, and the flags given on top of it; and what builds that.

    Other data, by --data, --eval-data or --split, and how these are read, give the test split and the evaluators alone:
    what was trained, and on what, stays what it was.
    """
    from bigjax.look import flags

    home = home_of(given, name)
    record = workdir.read_config(home)
    if (its := record.get("experiment", name)) != name:
        raise UsageError(f"{home} holds a run of {its}, not of {name}: use that script, or its --workdir")
    free = {k: getattr(given, k) for k in workdir.FREE}
    trained = replace(workdir.restored(Config(), record["config"]), **free)
    asked = flags.parse(Config, "evaluate", args=arguments, default=trained)[0]
    if (asked.data, asked.eval_data, splits(asked)) == (trained.data, trained.eval_data, splits(trained)):
        return asked, build
    other = asked.data if asked.data != trained.data else asked.eval_data or asked.data
    groups = {k: getattr(trained, k) for k in READING if hasattr(trained, k)}
    own = replace(asked, data=trained.data, eval_data=trained.eval_data, **groups)

    def both(config: RunConfig) -> Experiment:
        experiment, judge = build(config), build(replace(asked, data=trained.data, eval_data=other))
        if spoken.digest(experiment.tokenizer) != spoken.digest(judge.tokenizer):
            raise UsageError(
                f"the run made its tokens without the rows that it held out of {trained.data}, and beside other data "
                "they can't be made again: train with --eval-data, or with a --tokenizer-file"
            )
        facts = {**experiment.facts, "own_test": experiment.test}  # which the run is known by
        return replace(experiment, test=judge.test, evaluators=judge.evaluators, facts=facts)

    return own, both


def splits(config: RunConfig) -> list[str | None]:
    """What --split says, in whichever group it is."""
    return [getattr(getattr(config, group, None), "split", None) for group in READING]
