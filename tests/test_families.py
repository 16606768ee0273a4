"""What must hold of every family through the one step: a new one joins by a line in FAMILIES.

Each is trained for 30 updates on the same eight examples, once straight and once killed and resumed; all tests share
these runs.
"""

import dataclasses
import inspect
import json
import re
import threading
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import blobs

from bigjax import metrics, optim, sharding, step, train
from bigjax.data import pipeline
from bigjax.evaluation import evaluator
from bigjax.experiment import Experiment, RunConfig
from bigjax.models import (
    BERT,
    CNN,
    GPT,
    LSTM,
    T5,
    VAE,
    Autoencoder,
    Discriminator,
    Generator,
    Inception,
    Mixtral,
    ResNet,
    ViT,
)
from bigjax.models.convnext import ConvNeXt
from bigjax.models.efficientnet import EfficientNet
from bigjax.program import Program
from bigjax.task import Task, fields
from bigjax.tasks import classify, masked_token, next_token, span_corruption
from bigjax.tasks.gan import adversarial
from bigjax.tasks.images import reconstruct, variational
from bigjax.tasks.spans import hidden_spans

STEPS, SAVED, KILLED = 30, 12, 15  # checkpoints every 12 updates; the killed run ends with its window of 15 untold
BATCH, TEST = 8, 13
Models = nn.Module | Mapping[str, nn.Module]


def drawings(size: int, *, seed: int) -> dict[str, np.ndarray]:
    """Blobs in black and white, which can be given back without any loss."""
    split = blobs(size, seed=seed)
    return split | {"image": np.where(split["image"] > 90, 255, 0).astype(np.uint8)}


def texts(size: int, *, seed: int) -> dict[str, np.ndarray]:
    """Tokens (size, 6) of 1 to 6 real ones; the label is whether the first is above 5."""
    random = np.random.default_rng(seed)
    length = random.integers(1, 7, size).astype(np.int32)
    tokens = random.integers(1, 11, (size, 6)).astype(np.int32) * (np.arange(6) < length[:, None])
    return {"tokens": tokens, "length": length, "label": (tokens[:, 0] > 5).astype(np.int32)}


def windows(size: int, *, seed: int) -> dict[str, np.ndarray]:
    """Tokens (size, 7) of which the targets from `start` to `length` count, at least one a row."""
    random = np.random.default_rng(seed)
    start = random.integers(1, 4, size).astype(np.int32)
    length = random.integers(start + 1, 8).astype(np.int32)
    return {"tokens": random.integers(0, 11, (size, 7)).astype(np.int32), "start": start, "length": length}


def chants(size: int, *, seed: int) -> dict[str, np.ndarray]:
    """Tokens (size, 6) of 2 to 6 real ones, in each row the same again and again."""
    random = np.random.default_rng(seed)
    length = random.integers(2, 7, size).astype(np.int32)
    tokens = random.integers(2, 5, (size, 1)).astype(np.int32) * (np.arange(6) < length[:, None])
    return {"tokens": tokens, "length": length}


def posters(size: int, *, seed: int) -> dict[str, np.ndarray]:
    """Blobs of 28 pixels a side."""
    split = blobs(size, seed=seed)
    return split | {"image": split["image"].repeat(7, axis=1).repeat(7, axis=2)}


@dataclasses.dataclass(frozen=True)
class Family:
    """task: of the models. falls: the metric that training lowers. counts: of the test split -> how much is counted."""

    models: Models
    task: Callable[[Any], Task]
    data: Callable[..., dict[str, np.ndarray]] = blobs
    falls: str = "loss"
    counts: Callable[[Mapping[str, np.ndarray]], int] = lambda split: TEST
    tx: Callable[[int], Mapping[str, optax.GradientTransformation]] = lambda steps: {"model": optax.adam(0.02)}
    ema: float = 0.0
    by_row: bool = True  # no statistics of the batch, so parts of it add up to the whole


def gan(models: Mapping[str, nn.Module]) -> Task:
    return adversarial(models["generator"], models["discriminator"], loss="hinge")


AUTO = {"image": (4, 4, 1), "code": 3, "encoder_features": (8,), "decoder_features": (8,)}
FAMILIES = {
    "cnn": Family(
        CNN(features=(4,), dense=(6,), pools=1, padding="SAME", outputs=3, batch_norm=True, dropout=0.1),
        partial(classify, classes=3, top_k=2),
        ema=0.8,
        by_row=False,
    ),
    "lstm_images": Family(LSTM(hidden=(6,), outputs=3, dropout=0.1), partial(classify, classes=3)),
    "lstm_tokens": Family(
        LSTM(vocabulary=11, embedding=4, hidden=(6,), pool="mean", outputs=1, dropout=0.1),
        partial(classify, classes=2, inputs=fields("tokens", "length")),
        data=texts,
    ),
    "gpt": Family(
        GPT(vocabulary=11, layers=2, width=8, heads=2, context=6, dropout=0.1, scan=True),
        partial(next_token, bytes_a_token=1),
        data=windows,
        counts=lambda split: int((split["length"] - split["start"]).sum()),
        tx=lambda steps: {"model": optax.adam(optim.schedule("cosine", 0.03, steps=steps))},
    ),
    "mixtral": Family(
        Mixtral(vocabulary=11, layers=2, width=8, heads=2, kv_heads=1, experts=3, mlp=12, context=6, scan=True),
        partial(next_token, balance=0.05),
        data=windows,
        counts=lambda split: int((split["length"] - split["start"]).sum()),
    ),
    "bert": Family(
        BERT(vocabulary=11, layers=1, width=8, heads=2, context=6, head="masked"),
        partial(masked_token, mask=1, vocabulary=11, special=(0,), share=0.4),
        data=chants,
        counts=lambda split: int(np.maximum(np.round(0.4 * split["length"]), 1).sum()),
    ),
    "t5": Family(
        T5(vocabulary=11, layers=1, width=8, heads=2, head=4, mlp=12, buckets=4, distance=6),
        partial(span_corruption, sentinels=(10, 9), end=1, share=0.5, mean=1.5),
        data=chants,
        counts=lambda split: sum(sum(hidden_spans(int(n), share=0.5, mean=1.5)) + 1 for n in split["length"]),
    ),
    "vit": Family(
        ViT(image=4, patch=2, layers=1, width=8, heads=2, outputs=3, dropout=0.1), partial(classify, classes=3)
    ),
    "resnet": Family(
        ResNet(stages=(1,), block="basic", width=4, stem="cifar", outputs=3),
        partial(classify, classes=3),
        ema=0.8,
        by_row=False,
    ),
    "inception": Family(
        Inception(outputs=3, blocks=("5b A 32",), shrink=16, dropout=0.1),
        partial(classify, classes=3),
        data=posters,
        ema=0.8,
        by_row=False,
    ),
    "gan": Family(
        {
            "generator": Generator((4, 4, 1), latent=3, features=(6,), batch_norm=True, classes=3),
            "discriminator": Discriminator(features=(4,), pool="flatten", spectral_norm=True, classes=3, dropout=0.1),
        },
        gan,
        falls="discriminator_loss",
        tx=lambda steps: {"discriminator": optax.adam(0.03), "generator": optax.adam(0.001)},
        ema=0.8,
        by_row=False,
    ),
    "autoencoder": Family(Autoencoder(**AUTO, dropout=0.1), reconstruct, data=drawings),
    "vae": Family(VAE(**AUTO), partial(variational, beta=0.1), data=drawings, ema=0.8),
    "convnext": Family(
        ConvNeXt(stages=(2,), widths=(6,), patch=2, layer_scale=0.5, stochastic_depth=0.1, outputs=3),
        partial(classify, classes=3),
    ),
    "efficientnet": Family(
        EfficientNet(stages=((1, 3, 1, 2, 4),), stem=4, top=6, divisor=2, momentum=0.9, dropout=0.1, outputs=3),
        partial(classify, classes=3),
        by_row=False,
    ),
}


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
        assert np.sum(count) == expected, name
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
