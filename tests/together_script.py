"""Several processes joined by `jax.distributed.initialize`, as in a notebook, that try one call after the other.

python tests/together_script.py PORT COUNT INDEX FOLDER CASE...   prints a line of JSON for each case.
"""

import json
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from strict import blobs  # its settings are every test's

from bigjax import Interrupted, UsageError, evaluation, sharding, train
from bigjax.experiment import Experiment, RunConfig
from bigjax.models import MLP
from bigjax.tasks import classify

PORT, COUNT, INDEX, FOLDER = *map(int, sys.argv[1:4]), Path(sys.argv[4])
OTHER = COUNT - 1 == INDEX  # the last process is the one that differs

CONFIG = RunConfig(steps=8, batch_size=12, log_every=2, eval_every=4, save_every=4)


def experiment(
    *,
    rows: int = 48,
    seed: int = 0,
    tests: int = 13,
    width: int = 8,
    rate: float = 0.1,
    init: str = "lecun_normal",
    **parts: Any,
) -> Experiment:
    def norm(params: Any, model_state: Any, key: Any) -> dict[str, float]:
        return {"norm": float(np.sum([np.square(x).sum() for x in jax.tree.leaves(sharding.to_host(params))]))}

    model = MLP(features=(width,), outputs=3, kernel_init=init)
    given = {"evaluators": {"norm": norm}, "name": "together"} | parts
    data = {"train": blobs(rows, seed=seed), "test": blobs(tests, seed=1)}
    return Experiment(task=classify(model, classes=3), tx=optax.sgd(rate), **data, **given)


def fit(folder: Path | str, given: Experiment | None = None, **flags: Any) -> dict[str, Any]:
    hook = None if OTHER else lambda step, split, values: None  # what only one has
    run = train.fit(given or experiment(), replace(CONFIG, workdir=str(folder), **flags), quiet=True, on_log=hook)
    return {"step": run.result["step"], "norm": run.result["metrics"]["eval/norm"]}


def differs(**parts: Any) -> Callable[[], dict[str, Any]]:
    return lambda: fit(FOLDER / "refused", experiment(**(parts if OTHER else {})))


def with_x64() -> dict[str, Any]:
    jax.config.update("jax_enable_x64", OTHER)
    try:
        return fit(FOLDER / "refused")
    finally:
        jax.config.update("jax_enable_x64", False)


def interrupted() -> dict[str, Any]:
    """Each process in turn gets a signal in its evaluation; the third call goes to the end."""
    steps, asked = [], []

    def kill(params: Any, model_state: Any, key: Any) -> dict[str, float]:
        if len(steps) < 2 and len(steps) % COUNT == INDEX:
            os.kill(os.getpid(), signal.SIGINT)
        asked.append(0)
        return {"norm": 0.0}

    for _ in range(3):
        try:
            return {**fit(FOLDER / "stopped", experiment(evaluators={"kill": kill}), steps=60), "stopped": steps}
        except Interrupted as e:
            steps.append(str(e))
    return {"stopped": steps}


def begun() -> dict[str, Any]:
    """Stopped at its first evaluation."""
    ordinary = experiment()

    def kill(params: Any, model_state: Any, key: Any) -> dict[str, float]:
        os.kill(os.getpid(), signal.SIGINT)
        return ordinary.evaluators["norm"](params, model_state, key)

    try:
        return fit(FOLDER / "begun", replace(ordinary, evaluators={"norm": kill}))
    except Interrupted as e:
        return {"stopped": str(e)}


def judged(tests: int) -> dict[str, Any]:
    config = replace(CONFIG, workdir=str(FOLDER / "run"))
    return evaluation.evaluate(experiment(tests=tests if OTHER else 13), config)


def fails_alone() -> dict[str, Any]:
    """One ends in its evaluator; the others would wait for it."""

    def fail(params: Any, model_state: Any, key: Any) -> dict[str, float]:
        if OTHER:
            raise ArithmeticError("no number")
        return {"norm": 0.0}

    return fit(FOLDER / "failed", experiment(evaluators={"fail": fail}))


def drawn(alone: bool) -> dict[str, Any]:
    """A gallery that fails, in one or in all."""

    def draw(params: Any, model_state: Any, key: Any) -> str:
        if OTHER or not alone:
            raise ArithmeticError("no picture")
        return "a text"

    return fit(FOLDER / f"drawn_{alone}", experiment(gallery={"bad": draw}))


def spelled() -> dict[str, Any]:
    os.chdir(FOLDER)
    return fit("run" if OTHER else FOLDER / "run")


CASES: dict[str, Callable[[], dict[str, Any]]] = {
    "few": differs(rows=6),
    "rows": differs(rows=80),
    "content": differs(seed=5),
    "width": differs(width=12),
    "rate": differs(rate=0.01),
    "init": differs(init="he_normal"),
    "tests": differs(tests=100),
    "minutes": lambda: fit(FOLDER / "refused", experiment(seed=5 * OTHER), steps=None, minutes=1.0),
    "evaluators": differs(evaluators={}),
    "x64": with_x64,
    "flags": lambda: fit(FOLDER / "refused", batch_size=24 if OTHER else 12),
    "folders": lambda: fit(FOLDER / f"own_{INDEX}"),
    "bucket": lambda: fit("gs://bucket/run"),
    "buckets": lambda: fit(f"gs://bucket/own_{INDEX}"),
    "spelled": spelled,
    "again": lambda: fit(FOLDER / "run"),
    "judged": lambda: judged(13),
    "judged_otherwise": lambda: judged(100),
    "interrupted": interrupted,
    "begun": begun,
    "gone_on": lambda: fit(FOLDER / "begun"),
    "drawn": lambda: drawn(False),
    "drawn_alone": lambda: drawn(True),
    "fails_alone": fails_alone,
}


def main() -> None:
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"127.0.0.1:{PORT}", COUNT, INDEX, cluster_detection_method="deactivate")
    for case in sys.argv[5:]:
        try:
            said = CASES[case]()
        except UsageError as e:
            said = {"refused": str(e)}
        except ArithmeticError as e:
            said = {"raised": str(e)}
        print("CASE", json.dumps({case: said}), flush=True)


if __name__ == "__main__":
    main()
