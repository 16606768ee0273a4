"""What must hold of every family through the one step: a new one joins by a line in FAMILIES.

Each is trained for 30 updates on the same eight examples, once straight and once killed and resumed; all tests share
these runs.
"""

import dataclasses
import inspect
import json
import re
import threading
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from families import BATCH, FAMILIES, TEST, Family

from bigjax import metrics, sharding, step, train
from bigjax.data import pipeline
from bigjax.evaluation import evaluator
from bigjax.experiment import Experiment, RunConfig
from bigjax.program import Program
from bigjax.task import Task

STEPS, SAVED, KILLED = 30, 12, 15  # checkpoints every 12 updates; the killed run ends with its window of 15 untold


class Killed(BaseException):
    """Stands for a process that ends."""


class Seen:
    """What a run was fed and did: the rows of its training batches, when its loss was traced, and its lines."""

    def __init__(self, task: Task, kill: int | None = None):
        self.rows: list[np.ndarray] = []
        self.events: list[str] = []
        self.kill = kill
        losses = {player: partial(self.traced, loss) for player, loss in task.losses.items()}
        self.task = dataclasses.replace(task, losses=losses, check=self.check)

    def traced(self, loss: Any, *arguments: Any) -> Any:
        self.events.append("traced")
        return loss(*arguments)

    def check(self, batch: Any) -> None:
        if threading.current_thread().name == "bigjax-prefetch":  # and not an evaluation's
            self.rows.append(np.asarray(batch["index"]))

    def told(self, step: int, split: str, values: Any) -> None:
        """The process ends before it has told the window of step `kill`."""
        self.events.append(split)
        if split == "train" and step == self.kill:
            raise Killed


class Trained(NamedTuple):
    family: Family
    experiment: Experiment
    straight: train.Run
    resumed: train.Run
    seen: list[Seen]  # of the straight run, the killed one, and what resumed it
    program: Program


def flags(folder: Path, family: Family, **changes: Any) -> RunConfig:
    options = {"steps": STEPS, "batch_size": BATCH, "log_every": 5, "eval_every": SAVED, "save_every": SAVED}
    options["resident"] = False  # the task's check sees every batch
    return RunConfig(workdir=str(folder), ema=family.ema, **(options | changes))


LONG = {"inception", "efficientnet", "t5"}  # to compile: many operations


@pytest.fixture(scope="module", params=[pytest.param(f, marks=pytest.mark.slow) if f in LONG else f for f in FAMILIES])
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    family, folder = FAMILIES[request.param], tmp_path_factory.mktemp(request.param)
    task = family.task(family.models)
    train_split, test_split = family.data(BATCH, seed=0), family.data(TEST, seed=1)
    experiment = Experiment(task, family.tx, train_split, test_split, name=request.param)
    straight, halves = (flags(folder / name, family) for name in ("straight", "halves"))
    seen = [Seen(task), Seen(task, KILLED), Seen(task)]

    def fit(config: RunConfig, seen: Seen) -> train.Run:
        return train.fit(dataclasses.replace(experiment, task=seen.task), config, quiet=True, on_log=seen.told)

    least = jax.config.jax_persistent_cache_min_compile_time_secs
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)  # the three compile the same
    try:
        run = fit(straight, seen[0])
        with pytest.raises(Killed):
            fit(halves, seen[1])
        resumed = fit(halves, seen[2])
        return Trained(family, experiment, run, resumed, seen, Program(experiment, straight, train_split, steps=STEPS))
    finally:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", least)


def log(run: train.Run) -> list[dict[str, Any]]:
    """The lines without the one number that depends on the clock."""
    lines = [json.loads(line) for line in (run.workdir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "examples_per_second"} for line in lines]


def first(trained: Trained) -> tuple[Any, dict[str, Any], jax.Array]:
    """(state before the first update, batch 0, key)."""
    program = trained.program
    with jax.set_mesh(program.mesh):
        one = sharding.put_batch(batch(trained, 0), program.mesh, BATCH)
        return program.initialize(program.key), one, program.key


def advanced(trained: Trained, batch: Any) -> tuple[Any, metrics.Metrics]:
    """(state, metrics) after the first update, by the run's own program."""
    program = trained.program
    with jax.set_mesh(program.mesh):
        controls = program.controls()._replace(log_every=1)
        return program.update(program.initialize(program.key), program.fresh_window(), batch, program.key, controls)[:2]


def batch(trained: Trained, n: int, **rows: Any) -> dict[str, np.ndarray]:
    return next(pipeline.batches(trained.experiment.train, start=n, **({"seed": 0, "batch_size": BATCH} | rows)))


def test_the_one_step_names_no_family() -> None:
    assert train.train_step is step.train_step
    source = inspect.getsource(step)
    assert not re.search("generator|discriminator|encoder|variational|token|isinstance.*(Task|Module)", source)


def test_eight_examples_are_learnt(trained: Trained) -> None:
    """The mean of the last window of updates against that of the first."""
    values = [line[trained.family.falls] for line in log(trained.straight) if line["split"] == "train"]
    assert len(values) == STEPS // 5 and np.isfinite(values).all()
    assert values[-1] < 0.8 * values[0], values


def test_every_players_parameters_and_state_move(trained: Trained) -> None:
    old, _, _ = first(trained)
    for part in ("params", "model_state", "ema"):
        before, after = getattr(old, part), getattr(trained.straight.state, part)
        moved = jax.tree.map(lambda a, b: not np.array_equal(a, b), before, after)
        assert all(jax.tree.leaves(moved)), moved
    players = set(trained.experiment.task.models)
    assert trained.straight.state.opt_state.keys() == trained.straight.state.params.keys() == players
    assert bool(trained.straight.state.ema) == bool(trained.family.ema)
    assert bool(jax.tree.leaves(trained.straight.state.model_state)) == (not trained.family.by_row)


def test_batch_n_is_a_function_of_seed_and_n(trained: Trained) -> None:
    """Row for row, in every field; what the updates were given, straight and resumed, is batch 0, 1, 2, …"""
    split, options = trained.experiment.train, {"seed": 3, "batch_size": 3}
    stream = pipeline.batches(split, **options)
    for n in range(6):
        rows = pipeline.batch_rows(n, size=BATCH, **options)
        here, there = next(stream), batch(trained, n, **options)
        chex.assert_trees_all_equal(here, there)
        chex.assert_trees_all_equal(here, {k: v[rows] for k, v in split.items()} | {"index": rows, "mask": np.ones(3)})
    assert not np.array_equal(batch(trained, 0, seed=4)["index"], batch(trained, 0, seed=3)["index"])
    expected = [batch(trained, n)["index"] for n in range(STEPS)]
    straight, killed, resumed = (seen.rows for seen in trained.seen)  # a few more than were used are read ahead
    np.testing.assert_array_equal(straight[:STEPS], expected)
    np.testing.assert_array_equal(killed[:KILLED], expected[:KILLED])
    np.testing.assert_array_equal(resumed[: STEPS - SAVED], expected[SAVED:])


def test_killed_and_resumed_is_straight_bit_for_bit(trained: Trained) -> None:
    """Parameters, optimizer, model state, averages, and every line of the log."""
    chex.assert_trees_all_equal(trained.resumed.state, trained.straight.state)
    assert int(trained.straight.state.step) == STEPS and int(trained.straight.state.skipped) == 0
    assert log(trained.resumed) == log(trained.straight)
    assert [line["step"] for line in log(trained.straight) if line["split"] == "eval"] == [12, 24, 30]
    values = [
        {k: v for k, v in run.result["metrics"].items() if "examples_per_second" not in k}
        for run in (trained.straight, trained.resumed)
    ]
    assert values[0] == values[1]


def test_the_step_is_traced_before_the_first_line_and_never_again(trained: Trained) -> None:
    for seen in trained.seen:
        first = seen.events.index("train")
        assert "traced" in seen.events[:first] and "traced" not in seen.events[first:]


@pytest.fixture(scope="module")
def evaluated(trained: Trained) -> metrics.Metrics:
    """The test split under the last state, in batches of 5 where the run took 8: padded by 2 rows, and by 3."""
    mesh, state = trained.program.mesh, trained.straight.state
    measure = evaluator(trained.experiment.task, batch_size=5, seed=0, mesh=mesh)
    return measure(*state.evaluated(), trained.experiment.test)


def test_evaluation_counts_each_example_once_for_any_batch_size(trained: Trained, evaluated: metrics.Metrics) -> None:
    expected = trained.family.counts(trained.experiment.test)
    for name, (_, count) in evaluated.items():
        places = trained.experiment.test["tokens"].size if name == "padding_share" else None
        assert np.sum(count) == (places or expected), name
    last = [line for line in log(trained.straight) if line["split"] == "eval"][-1]
    values = trained.experiment.task.summarize(evaluated)
    assert values.keys() <= last.keys() and values
    np.testing.assert_allclose([values[k] for k in values], [last[k] for k in values], rtol=1e-4, atol=1e-6)


def test_two_accumulated_parts_give_the_update_of_the_whole(trained: Trained) -> None:
    """Seen in the optimizer's moments, which are made of gradients: Adam's own updates blow rounding up."""
    if not trained.family.by_row:
        pytest.skip("has statistics of the batch")
    state, one, key = first(trained)
    one["mask"] = one["mask"] * (np.arange(BATCH) != 2).astype(np.float32)
    options = {
        "task": trained.experiment.task,
        "tx": trained.experiment.transformations(STEPS),
        "ema": trained.family.ema,
    }
    halves, out = jax.jit(partial(step.train_step, accumulate=2, **options))(state, one, key)
    whole, window = advanced(trained, one)
    chex.assert_trees_all_close(halves.opt_state, whole.opt_state, rtol=1e-3, atol=1e-6)
    assert out.keys() == window.keys()
    same = [k for k in out if "update_norm" not in k]
    for k in same:
        np.testing.assert_allclose(out[k], window[k], rtol=1e-3, atol=1e-6, err_msg=k)


def test_bfloat16_is_finite_and_near(trained: Trained) -> None:
    family, (state, one, key) = trained.family, first(trained)
    models = trained.experiment.task.models
    low = {k: m.clone(dtype="bfloat16") for k, m in models.items()}
    task, tx = family.task(low["model"] if "model" in low else low), dict.fromkeys(low, optax.sgd(0.1))
    state = state.replace(opt_state={k: tx[k].init(state.params[k]) for k in tx})
    state, out = jax.jit(partial(step.train_step, task=task, tx=tx, ema=family.ema))(state, one, key)
    chex.assert_tree_all_finite((state, out))
    assert int(state.skipped) == 0
    assert {x.dtype for x in jax.tree.leaves((state.params, state.ema))} == {jnp.dtype("float32")}
    _, window = advanced(trained, one)
    value, expected = (float(np.divide(*m[family.falls])) for m in (out, window))
    assert value != expected and abs(value - expected) < 0.05 * abs(expected)
