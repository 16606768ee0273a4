"""The loop: what is counted, written, resumed and refused. One run is 6 updates of 8 rows.

Few runs serve many tests.
"""

import dataclasses
import json
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import REPOSITORY, blobs, tiny_experiment

import bigjax
from bigjax import UsageError, metrics, train
from bigjax.data import feeds, pipeline
from bigjax.experiment import Pictures, Published, RunConfig
from bigjax.look.display import Display
from bigjax.look.pictures import load_gallery
from bigjax.models import MLP
from bigjax.run import identity, restore
from bigjax.run.checkpoint import Checkpoints
from bigjax.run.lines import Clock, Lines
from bigjax.task import Task
from bigjax.tasks import classify

FLAGS = {"steps": 6, "batch_size": 8, "log_every": 2, "eval_every": 3, "save_every": 3}


def flags(folder: Path, **changes: Any) -> RunConfig:
    return RunConfig(workdir=str(folder), **(FLAGS | changes))


def fit(folder: Path, experiment: Any = None, **changes: Any) -> train.Run:
    return train.fit(experiment or tiny_experiment(), flags(folder, **changes), quiet=True)


def log(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def numbers(folder: Path) -> list[dict[str, Any]]:
    """The log without the one number that depends on the clock."""
    return [{k: v for k, v in line.items() if k != "examples_per_second"} for line in log(folder)]


def saved(folder: Path, step: int) -> dict[str, Any]:
    checkpoints = Checkpoints(folder / "checkpoints", read_only=True)
    tree = checkpoints.restore(step, checkpoints.shapes(step))
    checkpoints.close()
    return tree


def killed_at_3(folder: Path, copy: Path) -> Path:
    """A copy of a run of 6 updates as a kill after its checkpoint 3 leaves it:
    later lines in the log, the last one torn.
    """
    shutil.copytree(folder, copy)
    for name in ("result.json", "report.html"):
        (copy / name).unlink()
    shutil.rmtree(copy / "checkpoints" / "6")
    (copy / "metrics.jsonl").write_text((copy / "metrics.jsonl").read_text()[:-9])
    return copy


class Killed(BaseException):
    """Stands for a process that ends."""


def rich(*, kill: int | None = None, seen: list[int] | None = None) -> Any:
    """The tiny experiment with everything that a run may have; `kill`: it dies at the n-th picture of this session."""
    drawn = seen if seen is not None else []

    def draw(params: Any, model_state: Any, key: Any) -> Pictures:
        drawn.append(0)
        if len(drawn) == kill:
            raise Killed
        return Pictures(np.full((2, 4, 4), 0.5), ["a", "b"])

    return tiny_experiment(
        model=MLP(features=(8,), outputs=3, dropout=0.1, batch_norm=True),
        augment=lambda batch, key: {**batch, "image": batch["image"] + 0.01 * jax.random.normal(key, (8, 4, 4, 1))},
        evaluators={"bias": lambda p, s, key: {"bias_sum": float(p["model"]["logits"]["bias"].sum())}},
        gallery={"halves": draw, "words": lambda p, s, key: "some text"},
        class_names=("top", "middle", "low"),
        published=(Published("eval/loss", 99.0, "a test", better="lower"),),
        facts={"corpus_sha256": "abc"},
    )


RICH = {"validation": 0.2, "ema": 0.9, "best": "max:accuracy"}


class Watched(NamedTuple):
    run: train.Run
    folder: Path
    traced: list[str]  # each time that the update was traced


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Watched:
    """6 updates in one go."""
    folder, traced, experiment = tmp_path_factory.mktemp("straight") / "run", [], rich()

    def augment(batch: Any, key: Any) -> Any:
        traced.append("update")
        return experiment.augment(batch, key)

    hook = lambda step, split, values: traced.append(f"{split} {step}") if split == "train" else None  # noqa: E731
    run = train.fit(dataclasses.replace(experiment, augment=augment), flags(folder, **RICH), quiet=True, on_log=hook)
    return Watched(run, folder, traced)


@pytest.fixture(scope="module")
def resumed(tmp_path_factory: pytest.TempPathFactory) -> Watched:
    """The same, but the process ends while it evaluates at step 6, after checkpoint 3, and is started again."""
    folder = tmp_path_factory.mktemp("resumed") / "run"
    with pytest.raises(Killed):
        fit(folder, rich(kill=2), **RICH)
    assert [line["step"] for line in log(folder)][-1] == 6  # of what a kill may leave, the lines beyond the checkpoint
    return Watched(fit(folder, rich(), **RICH), folder, [])


# ---- what step N means, and what a run writes


def test_step_n_is_n_batches(straight):
    run, folder, _ = straight
    chex.assert_trees_all_equal(run.state.step, jnp.int32(6))
    assert run.result["step"] == 6 and run.result["skipped"] == 0
    assert saved(folder, 3)["state"]["step"] == 3 and saved(folder, 6)["state"]["step"] == 6
    assert run.state.opt_state["model"][0].count == 6  # Adam's own
    assert [(line["step"], line["split"]) for line in log(folder)] == [
        (2, "train"),
        (3, "validation"),
        (3, "eval"),
        (4, "train"),
        (6, "train"),
        (6, "validation"),
        (6, "eval"),
    ]


def test_the_loop_is_train_step_over_the_batches_by_number(straight):
    """Checkpoint 3 is `train_step` over batches 0, 1, 2 and nothing else, up to how XLA groups additions."""
    experiment, config = rich(), flags(straight.folder, **RICH)
    rest, _ = pipeline.hold_out(experiment.train, fraction=0.2, split_seed=0)
    batches = pipeline.batches(rest, seed=0, batch_size=8)
    state, key = train.Program(experiment, config, rest, steps=6).initialize(jax.random.key(0)), jax.random.key(0)
    step = jax.jit(
        partial(
            train.train_step,
            task=experiment.task,
            tx=experiment.transformations(6),
            augment=experiment.augment,
            ema=0.9,
        )
    )
    for _ in range(3):
        state, _ = step(state, next(batches), key)
    chex.assert_trees_all_close(saved(straight.folder, 3)["state"]["params"], state.params, rtol=1e-5, atol=1e-6)


def test_the_seed_decides_the_first_parameters_and_the_order_of_the_data():
    begun = []
    for seed in (0, 1, 0):
        program = train.Program(tiny_experiment(), flags(Path("unused"), seed=seed), blobs(60, seed=0), steps=1)
        with program.batches(0) as batches:
            index_B = np.asarray(next(batches)["index"])
        begun.append((program.initialize(program.key).params["model"]["dense_0"]["kernel"], index_B))
    chex.assert_trees_all_equal(begun[0], begun[2])
    for a, b in zip(begun[0], begun[1], strict=True):
        assert (a != b).mean() > 0.5


def test_result_has_the_promised_keys(straight):
    result = json.loads((straight.folder / "result.json").read_text())
    assert result == json.loads(json.dumps(straight.run.result))
    assert result.keys() >= {
        "experiment",
        "step",
        "seed",
        "parameters",
        "metrics",
        "published",
        "seconds",
        "examples_per_second",
        "devices",
        "git_commit",
        "versions",
    }
    assert result["experiment"] == "tiny" and result["seed"] == 0 and result["corpus_sha256"] == "abc"
    assert result["parameters"] == 16 * 8 + 8 + 2 * 8 + 8 * 3 + 3
    assert result["published"] == [{"metric": "eval/loss", "value": 99.0, "source": "a test", "reached": True}]
    assert result["devices"] == {"platform": "cpu", "kind": "cpu", "count": 1, "processes": 1}
    assert result["class_names"] == ["top", "middle", "low"]
    assert np.sum(result["confusion"]) == 20  # each test image once
    assert {len(v) for v in result["per_class"].values()} == {3}
    last = {line["split"]: line for line in log(straight.folder)}
    for split in ("train", "validation", "eval"):
        for name in ("loss", "accuracy"):
            assert result["metrics"][f"{split}/{name}"] == last[split][name]


def test_time_is_accounted_for(straight):
    seconds = straight.run.result["seconds"]
    assert seconds.keys() == {"total", "compile", "train", "eval", "data_wait", "checkpoint"}
    assert (
        all(seconds[k] > 0 for k in ("total", "compile", "train", "eval", "checkpoint")) and seconds["data_wait"] >= 0
    )
    assert sum(seconds[k] for k in ("compile", "train", "eval", "checkpoint")) <= seconds["total"] + 0.05
    assert seconds["data_wait"] <= seconds["train"]  # of which it is a part
    assert straight.run.result["examples_per_second"] > 0


def test_every_train_line_has_norms_and_speed(straight):
    """Those of the layers are the window's last update's; of the parameters their roots add up to the whole."""
    for line in log(straight.folder):
        if line["split"] == "train":
            assert line["examples_per_second"] > 0 and line["skipped"] == 0
            for name in ("grad_norm", "param_norm", "update_norm"):
                layers = [line[f"{name}/model/{layer}"] for layer in ("dense_0", "norm_0", "logits")]
                assert line[name] > 0 and all(v > 0 for v in layers)
            whole = [line[f"param_norm/model/{layer}"] for layer in ("dense_0", "norm_0", "logits")]
            np.testing.assert_allclose(line["param_norm"], np.linalg.norm(whole), rtol=1e-5)
    last = {line["step"]: line for line in log(straight.folder) if line["split"] == "train"}[6]
    kernel = straight.run.state.params["model"]["logits"]
    size = np.linalg.norm([*np.ravel(kernel["kernel"]), *kernel["bias"]])
    np.testing.assert_allclose(last["param_norm/model/logits"], size, rtol=1e-5)


def test_evaluators_are_logged_and_in_the_result(straight):
    lines = [line for line in log(straight.folder) if line["split"] == "eval"]
    assert straight.run.result["metrics"]["eval/bias_sum"] == lines[-1]["bias_sum"]
    average = straight.run.state.ema["model"]["params"]["logits"]["bias"]
    np.testing.assert_allclose(lines[-1]["bias_sum"], average.sum(), rtol=1e-6)
    assert "bias_sum" not in next(line for line in log(straight.folder) if line["split"] == "validation")


def test_gallery_at_each_evaluation(straight):
    found = load_gallery(straight.folder)
    assert {name: list(steps) for name, steps in found.items()} == {"halves": [3, 6], "words": [3, 6]}
    assert found["words"][6] == "some text" and found["halves"][6].images.shape == (2, 4, 4)
    assert "some text" in (straight.folder / "report.html").read_text()


def test_evaluation_uses_the_averages(straight):
    """Parameters and statistics: with either of them live, the numbers are others."""
    state, experiment = straight.run.state, rich()
    batch = next(pipeline.eval_batches(experiment.test, batch_size=20))
    batch = {k: jnp.asarray(v) for k, v in batch.items()} | {"image": jnp.asarray(batch["image"] / np.float32(255))}

    def loss(params: Any, model_state: Any) -> float:
        return metrics.means(experiment.task.evaluate(params, model_state, batch, jax.random.key(0)))["loss"]

    params, model_state = state.evaluated()
    reached = straight.run.result["metrics"]["eval/loss"]
    np.testing.assert_allclose(reached, loss(params, model_state), rtol=1e-5)
    for other in (loss(state.params, model_state), loss(params, state.model_state)):
        assert abs(other - reached) > 1e-4
    again = train.evaluate(experiment, flags(straight.folder, **RICH))
    assert again["step"] == 6
    np.testing.assert_allclose(again["eval/loss"], reached, rtol=1e-5)
    assert again["eval/bias_sum"] == straight.run.result["metrics"]["eval/bias_sum"]


def test_an_evaluation_with_other_settings_is_refused(straight):
    with pytest.raises(UsageError, match=r"was trained with other settings: leave them out\n  ema: 0.9 -> 0.0"):
        train.evaluate(rich(), flags(straight.folder, **RICH | {"ema": 0.0}))


def test_an_evaluation_needs_no_optimizer_state(straight, tmp_path):
    """It reads what it needs: a checkpoint that lacks the rest serves."""
    shutil.copytree(straight.folder, tmp_path / "run")
    tree = saved(tmp_path / "run", 6)
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    small = Checkpoints(tmp_path / "run" / "checkpoints")
    small.save(6, {"state": {k: tree["state"][k] for k in ("ema", "model_state")}})
    small.wait()
    small.close()
    again = train.evaluate(rich(), flags(tmp_path / "run", **RICH))
    np.testing.assert_allclose(again["eval/loss"], straight.run.result["metrics"]["eval/loss"], rtol=1e-5)


def test_averages_start_from_the_first_update_not_from_chance(tmp_path):
    """As of a short run with a long memory: after 6 updates at .999 the average is their mean."""
    run = fit(tmp_path / "run", ema=0.999, steps=6)
    first = train.Program(tiny_experiment(), flags(tmp_path), tiny_experiment().train, steps=6)
    chance = first.initialize(first.key).params["model"]["logits"]["kernel"]
    mean, last = run.state.ema["model"]["params"]["logits"]["kernel"], run.state.params["model"]["logits"]["kernel"]
    assert 0.2 < float(jnp.abs(mean - chance).mean() / jnp.abs(last - chance).mean()) < 1.0


def test_validation_is_held_out_of_training(tmp_path):
    rest, held = pipeline.hold_out(blobs(60, seed=0), fraction=0.2, split_seed=0)
    assert pipeline.size_of(rest) + pipeline.size_of(held) == 60
    seen: list[bytes] = []
    keep = lambda image: seen.extend(np.round(255 * row).astype(np.uint8).tobytes() for row in image)  # noqa: E731

    def augment(batch: Any, key: Any) -> Any:
        jax.debug.callback(keep, batch["image"])
        return batch

    train.fit.__wrapped__(  # what it calls back computes as it likes
        tiny_experiment(augment=augment),
        flags(tmp_path / "run", validation=0.2, steps=None, epochs=1.2),
        quiet=True,
    )
    jax.effects_barrier()
    assert set(seen) == {image.tobytes() for image in rest["image"]}
    assert not set(seen) & {image.tobytes() for image in held["image"]}


# ---- speed: nothing compiles twice, nothing waits


def test_the_update_is_traced_before_the_first_line_and_never_again(straight):
    first = straight.traced.index("train 2")
    assert "update" in straight.traced[:first]
    assert straight.traced[first:] == ["train 2", "train 4", "train 6"]


def test_the_loop_never_waits_for_a_number(tmp_path):
    """A window is told when more updates have been handed over, and the device is not done with them."""
    under_way = []

    def hook(step: int, split: str, values: Any) -> None:
        under_way.append((step, sum(not x.is_ready() for x in jax.live_arrays())))

    def slow(grads: Any, state: Any, params: Any) -> Any:
        work = jax.lax.fori_loop(0, 60, lambda _, x: jnp.tanh(x @ x), jnp.full((400, 400), grads["logits"]["bias"][0]))
        return jax.tree.map(lambda g: -0.01 * g + 0 * work[0, 0], grads), state

    tx = optax.GradientTransformation(lambda params: optax.EmptyState(), slow)
    config = flags(tmp_path / "run", steps=8, eval_every=100, save_every=100)
    train.fit(tiny_experiment(tx=tx), config, quiet=True, on_log=hook)
    lines = dict(under_way[:3])
    assert lines.keys() == {2, 4, 6} and all(lines.values()), under_way


# ---- hooks


def test_a_hook_hears_every_line_and_ends_the_run_cleanly(tmp_path):
    heard = []

    def hook(step: int, split: str, values: Any) -> bool:
        heard.append((step, split, values["loss"]))
        return split == "train" and step == 4

    config = flags(tmp_path / "run", steps=60, eval_every=3, save_every=50)
    run = train.fit(tiny_experiment(on_log=hook), config, quiet=True)
    step = run.result["step"]
    assert 4 <= step <= 6 and step == int(run.state.step)  # a window is told while the next is under way
    assert heard == [(line["step"], line["split"], line["loss"]) for line in log(tmp_path / "run")]
    assert heard[-1][:2] == (step, "eval") and run.result["metrics"]["eval/loss"] == heard[-1][2]
    assert saved(tmp_path / "run", step)["state"]["step"] == step
    assert (tmp_path / "run" / "report.html").exists()
    again = train.fit(tiny_experiment(on_log=hook), config, quiet=True)
    assert again.result == run.result


def test_a_hook_may_end_at_an_evaluation(tmp_path):
    ends = lambda step, split, values: split == "eval"  # noqa: E731
    run = train.fit(tiny_experiment(), flags(tmp_path / "run", steps=60), quiet=True, on_log=ends)
    assert run.result["step"] == 3 and saved(tmp_path / "run", 3)["state"]["step"] == 3


def test_without_a_test_split_there_is_no_evaluation(tmp_path):
    run = fit(tmp_path / "run", tiny_experiment(test=None))
    assert {line["split"] for line in log(tmp_path / "run")} == {"train"}
    assert not any(k.startswith("eval/") for k in run.result["metrics"]) and run.result["step"] == 6
    with pytest.raises(UsageError, match="has no test split"):
        train.evaluate(tiny_experiment(test=None), flags(tmp_path / "run"))


# ---- interrupted = uninterrupted


def test_resumed_run_equals_the_straight_one_bit_for_bit(straight, resumed):
    chex.assert_trees_all_equal(resumed.run.state, straight.run.state)
    assert numbers(resumed.folder) == numbers(straight.folder)
    assert resumed.run.result["metrics"].keys() == straight.run.result["metrics"].keys()
    same = {k: v for k, v in straight.run.result["metrics"].items() if k != "train/examples_per_second"}
    assert same == {k: resumed.run.result["metrics"][k] for k in same}
    chex.assert_trees_all_equal(saved(resumed.folder, 6), saved(straight.folder, 6))


def test_speed_is_that_of_the_updates_that_were_timed(tmp_path):
    """Neither the update that compiles counts, nor those before a resumption."""
    clock, told = Clock(), []

    class Told:
        def write(self, step: int, split: str, values: Any) -> None:
            told.append((step, values.get("examples_per_second"), values["loss"]))

    program = SimpleNamespace(config=RunConfig(batch_size=8), steps=9, experiment=tiny_experiment())
    lines = Lines(Told(), Display(enabled=False), clock, [], program, forgiven=0)
    window = lambda loss: {"loss": (2 * loss, 2.0), "skipped": (0.0, 2.0)}  # noqa: E731
    lines.begin(1, waited=0.5)
    for step, seconds in ((1, 0.0), (2, 1.0), (4, 3.0)):
        clock.seconds["train"] = seconds
        lines.read()
        lines.set_aside(step, window(float(step)), waited=1.25)
    assert not lines.read() and not lines.read()
    assert told == [(1, None, 1.0), (2, 8.0, 2.0), (4, 8.0, 4.0)]
    assert clock.seconds["data_wait"] == 0.75


@pytest.mark.parametrize("torn", ["", '{"step": 4, "split": "tra'])
def test_log_left_by_a_kill_has_no_line_missing_and_none_twice(straight, tmp_path, torn):
    folder = killed_at_3(straight.folder, tmp_path / "copy")
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join(lines[:3]) + torn if torn else "".join(lines))
    run = fit(folder, rich(), **RICH)
    assert numbers(folder) == numbers(straight.folder)
    chex.assert_trees_all_equal(run.state, straight.run.state)


def test_finished_run_gives_its_result_and_runs_nothing(straight):
    before = {p: p.read_bytes() for p in straight.folder.iterdir() if p.is_file()}
    told = []
    run = train.fit(rich(), flags(straight.folder, **RICH), quiet=True, on_log=lambda *line: told.append(line))
    assert run.result == json.loads(before[straight.folder / "result.json"]) and not told
    assert "state" not in vars(run)  # nothing is read before it is asked for
    chex.assert_trees_all_equal(run.state, straight.run.state)
    model, variables = restore.load(straight.folder)
    chex.assert_trees_all_equal(run.variables, variables)
    assert run.model == model and repr(run) == f"Run(result={run.result!r}, workdir={run.workdir!r})"
    assert {p: p.read_bytes() for p in straight.folder.iterdir() if p.is_file()} == before


def test_killed_between_the_last_save_and_the_result(straight, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(straight.folder, folder)
    (folder / "result.json").unlink()
    run = fit(folder, rich(), **RICH)
    assert numbers(folder) == numbers(straight.folder)
    for key in ("metrics", "confusion"):
        assert run.result[key] == straight.run.result[key]
    assert json.loads((folder / "result.json").read_text())["step"] == 6 and (folder / "report.html").exists()


def test_no_resume_starts_over(straight, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(straight.folder, folder)
    run = fit(folder, steps=2, resume=False)
    assert run.result["step"] == 2 and [line["step"] for line in log(folder)] == [2, 2]
    assert (
        sorted(p.name for p in (folder / "checkpoints").glob("[0-9]*")) == ["2"] and not (folder / "gallery").exists()
    )


def other(**changes: Any) -> Any:
    return lambda: tiny_experiment(**changes)


def shifted(split: Any, row: int) -> Any:
    """The same split with one pixel of one row changed."""
    image = split["image"].copy()
    image[row, 0, 0, 0] ^= 1
    return split | {"image": image}


CHANGED = {  # how a script was edited, or its data -> what is said
    "learning rate": (other(tx=lambda steps: {"model": optax.adam(2e-2)}), "program: "),
    "dropout": (other(model=MLP(features=(8,), outputs=3, dropout=0.2)), "program: "),
    "width": (other(model=MLP(features=(16,), outputs=3, dropout=0.1)), r"dense_0/kernel: \(16, 8\) -> \(16, 16\)"),
    "loss": (other(task=classify(MLP(features=(8,), outputs=3, dropout=0.1), classes=3, l2=0.1, top_k=2)), "program: "),
    "evaluation": (other(task=classify(MLP(features=(8,), outputs=3, dropout=0.1), classes=3, top_k=1)), "program: "),
    "augmentation": (other(augment=lambda batch, key: batch | {"image": batch["image"] * 0.5}), "program: "),
    "a pixel": (other(train=shifted(blobs(60, seed=0), 31)), "train data, checksum of its values: "),
    "a pixel of the test set": (other(test=shifted(blobs(20, seed=1), 7)), "eval data, checksum of its values: "),
    "rows": (other(train=blobs(61, seed=0)), "train data, rows: 60 -> 61"),
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plain") / "run"
    fit(folder)
    return folder


@pytest.mark.parametrize("change", ["a pixel", "dropout", "evaluation"])
def test_an_evaluation_of_changed_code_or_data_is_refused(change, plain):
    experiment, said = CHANGED[change]
    with pytest.raises(UsageError, match=rf"other code or data(?s:.*){said}"):
        train.evaluate(experiment(), flags(plain))
    assert train.evaluate(tiny_experiment(), flags(plain))["step"] == 6


def test_a_changed_transform_on_the_host_is_refused(tmp_path):
    def scaled(by: int) -> Any:
        transform = lambda example, random: example | {"image": example["image"] // by}  # noqa: E731
        return tiny_experiment(transform=transform)

    fit(tmp_path / "run", scaled(1), steps=2)
    with pytest.raises(UsageError, match="other code or data(?s:.*)program: "):
        fit(tmp_path / "run", scaled(2), steps=2)


def test_changes_that_do_not_go_on_are_not_recorded(plain, tmp_path):
    """Accepted, but of another shape; or of a finished run: the run stays what it was."""
    folder = killed_at_3(plain, tmp_path / "copy")
    record = (folder / "config.json").read_text()
    with pytest.raises(UsageError, match="of another model or optimizer"):
        fit(folder, CHANGED["width"][0](), accept_changes=True)
    assert (folder / "config.json").read_text() == record
    assert fit(folder).result["step"] == 6
    with pytest.raises(UsageError, match="other code or data"):
        fit(folder, CHANGED["learning rate"][0](), accept_changes=True)


def test_a_mistake_with_no_resume_costs_nothing(plain, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(plain, folder)
    broken = tiny_experiment(task=classify(MLP(features=(8,), outputs=4), classes=3))
    with pytest.raises(UsageError, match="gives 4 logits for 3 classes"):
        fit(folder, broken, resume=False)
    assert fit(folder).result["step"] == 6 and (folder / "checkpoints" / "6").exists()


def test_a_traceback_before_the_first_update_leaves_no_run_behind(tmp_path):
    class Wrong(nn.Module):
        def __call__(self, x: Any) -> Any:
            return x.nothing

    with pytest.raises(AttributeError):
        fit(tmp_path / "run", tiny_experiment(task=classify(Wrong(), classes=3)))
    assert fit(tmp_path / "run", steps=2).result["step"] == 2


def test_metrics_with_a_slash_are_in_the_result(tmp_path):
    task = classify(MLP(features=(8,), outputs=3), classes=3)
    named = dataclasses.replace(task, summarize=lambda m: {"head/accuracy": metrics.means(m)["accuracy"]})
    result = fit(tmp_path / "run", tiny_experiment(task=named), steps=2).result["metrics"]
    assert 0 <= result["eval/head/accuracy"] <= 1 and not any("norm/" in k for k in result)


@pytest.mark.parametrize("finished", [False, True], ids=["interrupted", "finished"])
@pytest.mark.parametrize("change", CHANGED)
def test_changed_code_or_data_is_refused(change, finished, plain, tmp_path):
    """The settings are the same, and so is config.json: what trains, or what it trains on, is not."""
    experiment, said = CHANGED[change]
    folder = tmp_path / "copy"
    shutil.copytree(plain, folder) if finished else killed_at_3(plain, folder)
    before = {p: p.read_bytes() for p in folder.iterdir() if p.is_file()}
    with pytest.raises(UsageError, match=rf"other code or data: .*--accept-changes(?s:.*){said}"):
        fit(folder, experiment())
    assert {p: p.read_bytes() for p in folder.iterdir() if p.is_file()} == before
    assert (folder / "checkpoints" / "3").exists()


def test_accepted_changes_go_on_and_are_recorded(plain, tmp_path):
    folder, experiment = killed_at_3(plain, tmp_path / "copy"), CHANGED["learning rate"][0]
    run = fit(folder, experiment(), accept_changes=True)
    assert run.result["step"] == 6
    assert "program" in json.loads((folder / "config.json").read_text())["changes"][0]
    (folder / "result.json").unlink()
    assert fit(folder, experiment()).result["step"] == 6  # it is the run's own now
    with pytest.raises(UsageError, match="other code"):
        fit(folder)


def test_an_unchanged_program_on_another_mesh_or_version_goes_on(plain, tmp_path):
    folder = killed_at_3(plain, tmp_path / "copy")
    record = json.loads((folder / "config.json").read_text())
    record["identity"]["programs"] = {"elsewhere": "another program"}
    (folder / "config.json").write_text(json.dumps(record))
    assert fit(folder).result["step"] == 6
    assert "elsewhere" in json.loads((folder / "config.json").read_text())["identity"]["programs"]


def test_a_drop_in_the_window_that_was_open_does_not_stop_a_later_session(tmp_path):
    """It was saved at step 2, within the log window of 1 to 6."""
    experiment = nan_at(1)
    fit(tmp_path / "skip", experiment, steps=3, log_every=6, nonfinite="skip", save_every=2)
    folder = tmp_path / "skip"
    record = json.loads((folder / "config.json").read_text())
    record |= {"steps": 6, "config": record["config"] | {"steps": 6}}
    (folder / "config.json").write_text(json.dumps(record))
    for name in ("result.json", "checkpoints/3", "checkpoints/manifests/3.json"):
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    run = fit(folder, experiment, steps=6, log_every=6, save_every=2)  # resumes at 2, where one is dropped
    assert run.result["step"] == 6 and run.result["skipped"] == 1


def test_dropped_updates_that_were_accepted_do_not_stop_a_later_session(tmp_path):
    """--nonfinite skip, resumed with stop: it stops at the next bad batch, which it names, and not before."""
    fit(tmp_path / "run", nan_at(1, 4), steps=3, nonfinite="skip")
    record = json.loads((tmp_path / "run/config.json").read_text())
    record |= {"steps": 6, "config": record["config"] | {"steps": 6}}
    (tmp_path / "run/config.json").write_text(json.dumps(record))
    (tmp_path / "run/result.json").unlink()
    with pytest.raises(UsageError, match=r"update 5 \(batch 4\) is not finite.*augmented batch.*step 3 is kept"):
        fit(tmp_path / "run", nan_at(1, 4), steps=6)
    run = fit(tmp_path / "run", nan_at(1), steps=6, accept_changes=True)
    assert run.result["step"] == 6 and run.result["skipped"] == 1 and int(run.state.opt_state["model"][0].count) == 5


# ---- how long


@pytest.mark.parametrize("minutes, steps", [(1e-9, [1, 2, 3, 4, 5, 6]), (0, [6]), (60, [6])])
def test_it_saves_when_so_many_minutes_are_over(minutes, steps, tmp_path):
    fit(tmp_path, save_minutes=minutes, save_every=10**6, keep=9, fuse=1)
    assert sorted(int(p.name) for p in (tmp_path / "checkpoints").iterdir() if p.name.isdigit()) == steps


def test_steps_epochs_minutes_whichever_ends_first():
    def planned(**limits: Any) -> int:
        return train.planned_steps(RunConfig(batch_size=8, **limits), 60, lambda: 0.5)

    assert planned(steps=7) == 7
    assert planned(epochs=2) == 15  # 120 / 8
    assert planned(epochs=0.001) == 1
    assert planned(minutes=1) == 120
    assert planned(steps=100, epochs=2, minutes=1) == 15
    assert planned(steps=100, epochs=20, minutes=0.5) == 60
    with pytest.raises(UsageError, match="--steps, --epochs or --minutes"):
        planned()
    assert planned(steps=3, epochs=1e308) == 3
    for much in ({"epochs": 1e300}, {"minutes": 1e308}):
        with pytest.raises(UsageError, match="make 2,147,483,648 updates or more: give less, or --steps"):
            planned(**much)


def test_minutes_become_a_number_of_steps_that_is_kept(tmp_path):
    """It was measured on another machine, as the run's record says."""
    fit(tmp_path / "run", steps=None, minutes=1e-9)
    record = json.loads((tmp_path / "run/config.json").read_text())
    assert record["steps"] == 1
    (tmp_path / "run/result.json").unlink()
    (tmp_path / "run/config.json").write_text(json.dumps(record | {"steps": 2}))
    assert fit(tmp_path / "run", steps=None, minutes=1e-9).result["step"] == 2


def test_seconds_a_step_are_measured_without_touching_the_run():
    experiment = tiny_experiment()
    program = train.Program(experiment, flags(Path("unused")), experiment.train, steps=10)
    with jax.set_mesh(program.mesh):
        assert 1e-5 < feeds.seconds_an_update(program) < 1.0
        chex.assert_trees_all_equal(program.initialize(program.key).step, jnp.int32(0))


def test_epochs_resolve_on_what_is_left_after_the_validation_split(tmp_path):
    run = fit(tmp_path / "run", steps=None, epochs=0.5, validation=0.2)
    assert run.result["step"] == 3 == json.loads((tmp_path / "run/config.json").read_text())["steps"]


def test_schedules_are_made_for_the_steps_that_the_run_has(tmp_path):
    asked = []
    experiment = tiny_experiment(tx=lambda steps: asked.append(steps) or {"model": optax.sgd(0.1)})
    fit(tmp_path / "run", experiment, steps=None, epochs=0.4)
    assert asked and set(asked) == {3}


# ---- checkpoints that are kept


def counting(scores: list[float]) -> Task:
    """The parameter counts the updates, and its score is looked up."""

    def loss(params: Any, model_state: Any, batch: Any, key: Any) -> Any:
        count = batch["mask"].sum()
        return (-params["model"]["w"] * count, count), ({}, {})

    def evaluate(params: Any, model_state: Any, batch: Any, key: Any) -> Any:
        count = batch["mask"].sum()
        return {"score": (jnp.asarray(scores)[jnp.round(params["model"]["w"]).astype(int)] * count, count)}

    init = lambda key, batch: ({"model": {"w": jnp.zeros(())}}, {})  # noqa: E731
    return Task({}, init, {"model": loss}, evaluate)


@pytest.mark.parametrize("best", ["max:score", "min:score"])
def test_best_checkpoint_of_the_validation_split_is_kept(tmp_path, best):
    experiment = tiny_experiment(task=counting([0, 0.1, 0.9, 0.05, 0.5, 0.4]), tx=optax.sgd(1.0))
    fit(tmp_path / "run", experiment, steps=5, eval_every=1, save_every=1, keep=1, validation=0.2, best=best)
    kept = {int(p.name) for p in (tmp_path / "run/checkpoints").glob("[0-9]*")}
    assert kept == ({2, 5} if best == "max:score" else {3, 5})


def test_best_by_a_number_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(UsageError, match=r"--best: the validation split has no 'acuracy': use one of .*accuracy"):
        fit(tmp_path / "run", steps=1, validation=0.2, best="max:acuracy")


def test_last_k_are_kept(tmp_path):
    fit(tmp_path / "run", steps=4, save_every=1, eval_every=9, keep=2)
    assert sorted(p.name for p in (tmp_path / "run/checkpoints").glob("[0-9]*")) == ["3", "4"]


# ---- numbers that are not finite


def nan_at(*bad: int) -> Any:
    """The tiny experiment whose augmentation makes the pixels of these batches NaN; it tells a batch by its rows."""
    split = blobs(60, seed=0)
    rows = jnp.stack([jnp.asarray(next(pipeline.batches(split, seed=0, batch_size=8, start=n))["index"]) for n in bad])

    def augment(batch: Any, key: Any) -> Any:
        hit = (batch["index"][None] == rows).all(-1).any()
        return {**batch, "image": jnp.where(hit, jnp.nan, batch["image"])}

    return tiny_experiment(augment=augment)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """NaN in batch 4, the fifth: between the log lines of 4 and 8, the saves of 3 and 6."""
    folder = tmp_path_factory.mktemp("stopped") / "run"
    with pytest.raises(UsageError) as error:
        fit(folder, nan_at(4), steps=9, log_every=4, save_every=3, eval_every=9)
    return folder, str(error.value)


def test_nonfinite_stops_and_names_update_batch_and_cause(stopped):
    folder, said = stopped
    assert "update 5 (batch 4) is not finite" in said and "augmented batch" in said
    assert "checkpoint of step 3 is kept" in said and "--nonfinite skip" in said and "\n" not in said
    assert not (folder / "result.json").exists()


def test_nothing_newer_than_the_last_good_checkpoint_is_saved(stopped):
    folder, _ = stopped
    assert [p.name for p in (folder / "checkpoints").glob("[0-9]*")] == ["3"]
    state = saved(folder, 3)["state"]
    assert state["skipped"] == 0 and state["step"] == 3
    chex.assert_tree_all_finite(state["params"])
    assert [line["step"] for line in log(folder)] == [4]
    module, variables = bigjax.load(folder)
    assert np.isfinite(module.apply(variables, np.zeros((1, 4, 4, 1), np.float32))).all()


def test_resuming_with_skip_as_advised_goes_on(stopped, tmp_path):
    shutil.copytree(stopped[0], tmp_path / "copy")
    run = fit(tmp_path / "copy", nan_at(4), steps=9, log_every=4, save_every=3, eval_every=9, nonfinite="skip")
    assert run.result["step"] == 9 and run.result["skipped"] == 1
    lines = [line for line in log(tmp_path / "copy") if line["split"] == "train"]
    assert [(line["step"], line["skipped"]) for line in lines] == [(4, 0), (8, 0.25), (9, 0)]
    assert run.state.opt_state["model"][0].count == 8  # 9 batches are behind the state, 8 updates


def test_dropped_update_leaves_the_state_and_enters_no_mean(tmp_path):
    kept = fit(tmp_path / "two", nan_at(2), steps=2).state
    run = fit(tmp_path / "three", nan_at(2), steps=3, log_every=3, nonfinite="skip")
    chex.assert_trees_all_equal((run.state.params, run.state.opt_state), (kept.params, kept.opt_state))
    line = log(tmp_path / "three")[0]
    assert line["skipped"] == pytest.approx(1 / 3)
    assert np.isfinite(line["loss"]) and line["loss"] == pytest.approx(log(tmp_path / "two")[0]["loss"], rel=1e-6)


class Burst(nn.Module):
    @nn.compact
    def __call__(self, x: Any, *, train: bool = False) -> Any:
        x = nn.Dense(3, name="fine")(x.reshape(x.shape[0], -1))
        return nn.Dense(3, name="after")(Square(name="burst")(x * 1e30))


class Square(nn.Module):
    def __call__(self, x: Any) -> Any:
        return x * x


def test_the_first_module_that_overflows_is_named(tmp_path):
    experiment = tiny_experiment(task=classify(Burst(), classes=3))
    with pytest.raises(UsageError, match=r"update 1 \(batch 0\) .*module 'burst' of 'model' .*no checkpoint was saved"):
        fit(tmp_path / "run", experiment, steps=2)


# ---- starting from another run


def test_init_from_takes_what_fits_and_lists_what_is_left(straight):
    model = MLP(features=(8,), outputs=5, batch_norm=True)  # another head
    experiment = tiny_experiment(task=classify(model, classes=5))
    program = train.Program(experiment, flags(Path("unused"), ema=0.5), experiment.train, steps=1)
    fresh = program.initialize(program.key)
    state, said = restore.transfer(fresh, straight.folder)
    theirs = saved(straight.folder, 6)["state"]["params"]["model"]
    chex.assert_trees_all_equal(state.params["model"]["dense_0"], theirs["dense_0"])
    chex.assert_trees_all_equal(state.params["model"]["norm_0"], theirs["norm_0"])
    chex.assert_trees_all_equal(state.params["model"]["logits"], fresh.params["model"]["logits"])
    chex.assert_trees_all_equal(state.ema["model"]["params"], state.params["model"])
    assert state.step == 0
    took, left = said.splitlines()
    assert took.startswith("took 4 of 6 parameters from ") and "at step 6: model/dense_0/bias, model/dense_0/ke" in took
    assert (
        left == "  left as initialized: model/logits/bias (5,) (there (3,)), model/logits/kernel (8, 5) (there (8, 3))"
    )


@pytest.mark.parametrize(
    "old, new, same",
    [
        ((4, 6), (4, 6), True),
        ((4, 6), (4, 2, 3), True),
        ((4, 2, 3), (4, 6), True),
        ((6,), (1, 6), True),
        ((4, 6), (6, 4), False),
        ((4, 6), (24,), True),
        ((4, 6), (2, 12), False),
        ((4, 6), (4, 7), False),
        ((2, 6, 2), (2, 2, 6), False),
    ],
)
def test_shapes_that_only_group_their_axes_otherwise(old, new, same):
    assert restore.regrouped(old, new) == same


class Grouped(nn.Module):
    """A dense layer whose kernel is (inputs, *features); `twice` has it two times."""

    features: tuple[int, ...]
    twice: bool = False

    @nn.compact
    def __call__(self, x, *, train=False):
        kernel = self.param("kernel", nn.initializers.normal(), (16, *self.features))
        if self.twice:
            self.param("second", nn.initializers.normal(), (2,))
        return x.reshape(len(x), -1) @ kernel.reshape(16, -1)


def test_init_from_reshapes_and_says_so(tmp_path):
    first, second = (Grouped(f, twice=t) for f, t in (((2, 3), True), ((6,), False)))
    fit(tmp_path / "first", tiny_experiment(model=first, task=classify(first, classes=6)), steps=1)
    still = {"tx": lambda steps: {"model": optax.sgd(0.0)}}
    said = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bigjax.look.display.Display.line", lambda self, line: said.append(line))
        run = fit(
            tmp_path / "second",
            tiny_experiment(model=second, task=classify(second, classes=6), **still),
            steps=1,
            init_from=str(tmp_path / "first"),
        )
    theirs = saved(tmp_path / "first", 1)["state"]["params"]["model"]["kernel"]
    np.testing.assert_array_equal(run.state.params["model"]["kernel"], theirs.reshape(16, 6))
    (lines,) = (line.splitlines() for line in said if "took" in line)
    assert lines[1:] == ["  reshaped: model/kernel (16, 2, 3) -> (16, 6)", "  not in this model: model/second"]


def test_other_settings_are_refused_with_the_parameters_that_differ(straight, tmp_path):
    shutil.copytree(straight.folder, tmp_path / "run")
    (tmp_path / "run" / "result.json").unlink()
    model = MLP(features=(9,), outputs=3, batch_norm=True)
    wider = dataclasses.replace(rich(), task=classify(model, classes=3, top_k=2))
    with pytest.raises(UsageError) as refused:
        fit(tmp_path / "run", wider, **RICH | {"seed": 7})
    head, *lines = (line.strip() for line in str(refused.value).splitlines())
    assert "belongs to a run with other settings" in head and lines[0] == "seed: 0 -> 7"
    assert "state/params/model/dense_0/kernel: (16, 8) -> (16, 9)" in lines and not any("/mu/" in k for k in lines)


def test_init_from_is_used_by_a_run(straight, tmp_path):
    still = {"tx": lambda steps: {"model": optax.sgd(0.0)}, "model": MLP(features=(8,), outputs=3, batch_norm=True)}
    run = fit(tmp_path / "run", tiny_experiment(**still), steps=1, init_from=str(straight.folder))
    chex.assert_trees_all_equal(run.state.params, straight.run.state.params)


def test_init_from_that_cannot_serve_leaves_no_run_behind(straight, tmp_path):
    model = MLP(features=(7, 7), outputs=5)
    other = tiny_experiment(task=classify(model, classes=5))
    with pytest.raises(UsageError, match="none of its parameters"):
        fit(tmp_path / "run", other, init_from=str(straight.folder))
    with pytest.raises(UsageError, match="holds no run"):  # the corrected command is not met with "other settings"
        fit(tmp_path / "run", other, init_from=str(tmp_path / "nowhere"))
    shutil.copytree(straight.folder, tmp_path / "early")
    shutil.rmtree(tmp_path / "early" / "checkpoints")
    with pytest.raises(UsageError, match="holds no checkpoint"):
        fit(tmp_path / "run", other, init_from=str(tmp_path / "early"))
    assert not (tmp_path / "run" / "config.json").exists()


# ---- other errors, before anything is written


@pytest.mark.parametrize(
    "change, said",
    [
        ({"batch_size": 61}, "batch_size 61 does not fit 60 training examples"),
        ({"steps": None}, "--steps, --epochs or --minutes"),
        ({"steps": 0}, "--steps 0"),
    ],
)
def test_mistakes_leave_nothing_behind(tmp_path, change, said):
    with pytest.raises(UsageError, match=said) as error:
        fit(tmp_path / "run", **change)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run" / "config.json").exists()


def test_data_that_fails_in_the_background_ends_the_run(tmp_path):
    class Reader:
        label = blobs(60, seed=0)["label"]

        def __len__(self) -> int:
            return 60

        def __getitem__(self, row: int) -> dict[str, np.ndarray]:
            if row == late:
                raise OSError("disk on fire")
            return {k: v[row] for k, v in blobs_60.items()}

    blobs_60 = blobs(60, seed=0)
    late = int(pipeline.batch_rows(5, seed=0, batch_size=8, size=60)[3])
    with pytest.raises(UsageError, match=f"example {late} .*disk on fire"):
        fit(tmp_path / "run", tiny_experiment(train=Reader()), steps=7, save_every=2)


# ---- what people see


def test_display_shows_layers_phases_and_numbers(tmp_path, capsys):
    train.fit(rich(), flags(tmp_path / "run", steps=3), quiet=False)
    out = capsys.readouterr().out
    for words in (
        "dense_0",
        "logits",
        "179",
        "compiling",
        "training",
        "evaluating",
        "saving",
        "step 2/3",
        "examples/s",
        "step 3 eval: ",
        "eval/accuracy",
        "report: ",
    ):
        assert words in out, words
    train.fit(rich(), flags(tmp_path / "run", steps=3), quiet=False)
    assert "is finished" in (again := capsys.readouterr().out) and "eval/accuracy" in again and "training" not in again


SCRIPT = """
import sys
sys.path.insert(0, {tests!r})
from conftest import tiny_experiment
from bigjax import train
from bigjax.experiment import RunConfig
heavy = ("matplotlib", "tensorboardX", "tensorflow_datasets", "tensorflow")
import bigjax.look.report
bigjax.look.report.write_report = lambda home: print("loaded while training:", *(m for m in heavy if m in sys.modules))
for board in (False, True):
    config = RunConfig(workdir=f"run_{{board}}", steps=1, batch_size=8, tensorboard=board)
    train.fit(tiny_experiment(), config, quiet=True)
"""


def test_tensorboard_only_when_asked_and_nothing_heavy_otherwise(tmp_path):
    script = SCRIPT.format(tests=str(REPOSITORY / "tests"))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["loaded while training:", "loaded while training: tensorboardX"]
    assert not (tmp_path / "run_False/tensorboard").exists()
    (events,) = (tmp_path / "run_True/tensorboard").iterdir()
    content = events.read_bytes()
    assert events.name.startswith("events.out.tfevents") and b"train/loss" in content and b"eval/accuracy" in content


class Ragged:
    """Images of 5 × 5 to 7 × 7, read one by one."""

    def __len__(self) -> int:
        return 16

    def __getitem__(self, row: int) -> dict[str, np.ndarray]:
        side = 5 + row % 3
        return {"image": np.full((side, side, 1), 9, np.uint8), "label": np.int32(row % 3)}


def test_a_host_transform_crops_images_of_varying_size(fit_tiny):
    def crop(example, random):
        top = random.integers(0, example["image"].shape[0] - 3)
        return example | {"image": example["image"][top : top + 4, :4]}

    run = fit_tiny(tiny_experiment(train=Ragged(), transform=crop), steps=2)
    assert run.result["step"] == 2 and np.isfinite(run.result["metrics"]["train/loss"])


def test_the_split_seed_alone_decides_the_validation_split(fit_tiny):
    """So that runs of several seeds choose on the same rows, and none has trained on another's."""

    def held(**seeds: int) -> dict[str, Any]:
        run = fit_tiny(folder=str(seeds), steps=1, validation=0.2, **seeds)
        return json.loads((run.workdir / "config.json").read_text())["identity"]["data"]["validation"]

    first = held(seed=0, split_seed=0)
    assert held(seed=1, split_seed=0) == first != held(seed=0, split_seed=1)


class Odd:
    """Images that grow with the row."""

    def __len__(self) -> int:
        return 60

    def __getitem__(self, row: int) -> dict[str, np.ndarray]:
        return {"image": np.zeros((4 + row // 30, 4, 1), np.uint8), "label": np.int32(0)}


def test_images_of_several_sizes_are_one_line(tmp_path):
    """Also where the first of the test split has another size than the first that is trained on."""
    with pytest.raises(UsageError, match=r"image has shape \(\d, 4, 1\) in example \d+ but \(\d, 4, 1\) in example"):
        fit(tmp_path / "train", tiny_experiment(train=Odd()))
    bigger = {"image": np.zeros((20, 5, 4, 1), np.uint8), "label": np.zeros(20, np.int32)}
    whole = fit(tmp_path / "test", tiny_experiment(test=None))
    found = [
        identity.fingerprint_of_program(train.Program(e, flags(tmp_path / "unused"), e.train, steps=6))
        for e in (tiny_experiment(test=bigger), tiny_experiment(test=None), tiny_experiment())
    ]
    assert whole.result["step"] == 6 and found[0] == found[1] != found[2]


def test_a_test_split_that_is_the_training_data_is_said(tmp_path, capsys):
    data = blobs(60, seed=0)
    train.fit(tiny_experiment(train=data, test=dict(data)), flags(tmp_path / "same"))
    told = "the split 'eval' is the training data, row for row: it says nothing of other data"
    assert told in " ".join(capsys.readouterr().out.split())
    train.fit(tiny_experiment(), flags(tmp_path / "other"))
    assert "row for row" not in capsys.readouterr().out
