"""What is shown of a run, which never ends it: where it fails, one line says so, and the run goes on."""

import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from bigjax.experiment import Experiment, RunConfig
from bigjax.run import processes

Tell = Callable[[str], Any]


@contextlib.contextmanager
def only_shown(what: str, tell: Tell) -> Iterator[None]:
    """While it is entered an error becomes a warning: tell(line)."""
    try:
        yield
    except Exception as e:
        kind = f"{type(e).__name__}: " * (str(e).strip() != "")
        tell(f"warning: {what} failed ({kind}{processes.first_line(e)}); the run goes on")


def own_metric(experiment: Experiment, config: RunConfig) -> str | None:
    """The number that a run is about, as eval/accuracy: by the script's METRIC or ROWS, or the first published."""
    script = sys.modules.get(type(config).__module__)
    named = [getattr(script, "METRIC", None), *(row["metric"] for row in getattr(script, "ROWS", {}).values())]
    named = [*filter(None, named), *(p.metric for p in experiment.published)]
    return named[0] if named else None


def for_report(
    experiment: Experiment, config: RunConfig, given: Mapping[str, Any], default: Mapping[str, Any]
) -> dict[str, Any]:
    """What config.json holds for the report alone: what is given otherwise than by default, what comes first."""
    first = {"metric": own_metric(experiment, config), "gallery": list(experiment.gallery)}
    return {"defaults": usual(given, default), **first}


def usual(given: Mapping[str, Any], default: Mapping[str, Any]) -> dict[str, Any]:
    """The default values of the flags that are given otherwise, in groups as they are."""
    inner = {k: usual(v, default[k]) if isinstance(v, dict) else default[k] for k, v in given.items() if k in default}
    return {k: v for k, v in inner.items() if v != given[k] and not (isinstance(given[k], dict) and not v)}
