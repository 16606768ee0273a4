"""Several updates in one dispatch, and data that live on the devices: the same numbers, whatever ends a dispatch."""

from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import blobs, tiny_experiment
from families import FAMILIES

from bigjax import UsageError, train
from bigjax.data import order
from bigjax.data.feeds import MOST, Feeding
from bigjax.data.lengths import ByLength
from bigjax.experiment import Experiment, RunConfig
from bigjax.models import CNN, MLP
from bigjax.ops.counted import convolves, flops
from bigjax.program import Program
from bigjax.run.log import read_log
from bigjax.tasks import classify

FLAGS = {"steps": 12, "batch_size": 8, "log_every": 4, "eval_every": 12, "save_every": 6}


def experiment() -> Experiment:
    """With all that an update may have: averages, statistics of batches, noise; 60 rows, so that batches straddle."""
    return tiny_experiment(
        model=MLP(features=(8,), outputs=3, dropout=0.1, batch_norm=True),
        augment=lambda batch, key: {**batch, "image": batch["image"] + 0.01 * jax.random.normal(key, (8, 4, 4, 1))},
    )


def fit(folder: Path, **changes: Any) -> train.Run:
    return train.fit(experiment(), RunConfig(workdir=str(folder), ema=0.9, **(FLAGS | changes)), quiet=True)


def lines(folder: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in r.items() if k != "examples_per_second"} for r in read_log(folder / "metrics.jsonl")]


@pytest.fixture(scope="module")
def fused(tmp_path_factory: pytest.TempPathFactory) -> tuple[train.Run, Path]:
    folder = tmp_path_factory.mktemp("fused") / "run"
    return fit(folder, fuse=5, resident=True), folder


def test_fused_and_resident_is_the_same_run(fused: tuple[train.Run, Path], tmp_path: Path) -> None:
    plain = fit(tmp_path / "plain", fuse=1, resident=False)
    chex.assert_trees_all_close(fused[0].state, plain.state, rtol=1e-4, atol=1e-6)
    ours, theirs = lines(fused[1]), lines(tmp_path / "plain")
    assert [(r["step"], r["split"]) for r in ours] == [(r["step"], r["split"]) for r in theirs]
    for a, b in zip(ours, theirs, strict=True):
        assert {k: v for k, v in a.items() if k != "split"} == pytest.approx({k: b[k] for k in a if k != "split"}, 1e-3)


@pytest.mark.parametrize("changes", [{"log_every": 1}, {"log_every": 3, "save_every": 7, "eval_every": 5}])
def test_where_a_dispatch_ends_changes_no_bit(
    changes: dict[str, int], fused: tuple[train.Run, Path], tmp_path: Path
) -> None:
    chex.assert_trees_all_equal(fit(tmp_path / "run", fuse=5, resident=True, **changes).state, fused[0].state)


def test_stopped_and_resumed_it_has_the_same_bits(fused: tuple[train.Run, Path], tmp_path: Path) -> None:
    def stop(step: int, split: str, values: Any) -> None:
        if step == 8:
            raise KeyboardInterrupt

    config = RunConfig(workdir=str(tmp_path / "run"), ema=0.9, **FLAGS, fuse=5, resident=True)
    with pytest.raises(KeyboardInterrupt):
        train.fit(experiment(), config, quiet=True, on_log=stop)
    chex.assert_trees_all_equal(train.fit(experiment(), config, quiet=True).state, fused[0].state)
    assert lines(tmp_path / "run") == lines(fused[1])


@pytest.mark.parametrize("fuse, resident", [(1, True), (4, True), (4, False)])
def test_batches_are_the_same_bit_for_bit(fuse: int, resident: bool) -> None:
    made = experiment()
    config = RunConfig(**FLAGS, fuse=fuse, resident=resident)
    program = Program(made, config, made.train, steps=12)
    with jax.set_mesh(program.mesh):
        feeding, step, seen = Feeding(program, start=3), 3, []
        with feeding.batches() as fed, program.batches(3) as plain:
            while step < 12:
                feed, stop = next(fed), feeding.stop(step)
                assert int(feed.count) == stop - step <= fuse
                for i in range(stop - step):
                    batch = {k: v[i] for k, v in jax.tree.map(np.asarray, feed.batches).items()}
                    if resident:
                        rows = {k: np.asarray(v)[batch["index"]] for k, v in feed.resident.items()}
                        batch |= rows | {"mask": np.ones(8, np.float32)}
                    chex.assert_trees_all_equal(batch, jax.tree.map(np.asarray, next(plain)))
                seen.append(stop)
                step = stop
        # alone at first, and then never past what is due
        assert seen == ([4, 6, 8, 12] if fuse == 4 else list(range(4, 13)))


def test_not_finite_in_the_middle_of_a_dispatch_is_found_at_its_update(tmp_path: Path) -> None:
    broken = experiment()
    row = int(order.rows_of(broken.train, seed=0, batch_size=8)(6)[0])
    image = np.asarray(broken.train["image"], np.float32)
    image[row] = np.nan
    made = tiny_experiment(train={**broken.train, "image": image})
    first = next(n for n in range(12) if row in order.rows_of(made.train, seed=0, batch_size=8)(n))
    with pytest.raises(UsageError, match=rf"update {first + 1} \(batch {first}\) is not finite: the data's 'image'"):
        train.fit(made, RunConfig(workdir=str(tmp_path / "run"), **FLAGS, fuse=12, resident=True), quiet=True)


def test_long_updates_and_convolutions_are_not_fused() -> None:
    def most(model: Any, **changes: Any) -> int:
        made = tiny_experiment(model=model, **changes)
        return Feeding(Program(made, RunConfig(**FLAGS), made.train, steps=12), start=0).most

    wide = MLP(features=(4096, 4096), outputs=3)
    assert most(MLP(features=(8,), outputs=3)) == MOST and most(wide) == 1
    assert most(CNN(features=(4,), dense=(), pools=1, outputs=3)) == 1  # on a CPU
    data = blobs(60, seed=0)

    class Reader:
        def __len__(self) -> int:
            return 60

        def __getitem__(self, row: int) -> dict[str, np.ndarray]:
            return {k: v[row] for k, v in data.items()}

    assert most(MLP(features=(8,), outputs=3), train=Reader()) == 1


def test_work_counts_products_also_inside_loops() -> None:
    def thrice(x: jax.Array, w: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda x, _: (jax.jit(jnp.matmul)(x, w), None), x, None, length=3)[0]

    shapes = jax.ShapeDtypeStruct((2, 5), "float32"), jax.ShapeDtypeStruct((5, 5), "float32")
    jaxpr = jax.make_jaxpr(thrice)(*shapes).jaxpr
    assert (flops(jaxpr), convolves(jaxpr)) == (3 * 2 * 2 * 5 * 5, False)
    image, kernel = jax.ShapeDtypeStruct((2, 3, 6, 6), "float32"), jax.ShapeDtypeStruct((4, 3, 3, 3), "float32")
    convolve = lambda x, k: jax.lax.conv(x, k, (1, 1), "VALID")  # noqa: E731
    jaxpr = jax.make_jaxpr(convolve)(image, kernel).jaxpr
    assert (flops(jaxpr), convolves(jaxpr)) == (2 * (2 * 4 * 4 * 4) * (3 * 3 * 3), True)


def test_what_cannot_be_fused_or_resident_is_not() -> None:
    family = FAMILIES["lstm_tokens"]
    rows = ByLength(family.data(24, seed=0) | {"length": np.full(24, 4, np.int32)})
    made = Experiment(family.task(family.models), family.tx, rows, None)

    def feeding(made: Experiment, **flags: Any) -> Feeding:
        return Feeding(Program(made, RunConfig(**FLAGS, **flags), made.train, steps=12), start=0)

    assert (feeding(made).most, feeding(made).resident) == (1, False)
    with pytest.raises(UsageError, match="--fuse 3: its batches have several lengths: leave it out"):
        feeding(made, fuse=3)
    changed = Experiment(
        classify(MLP(features=(8,), outputs=3), classes=3), family.tx, blobs(24, seed=0), None,
        transform=lambda example, generator: example,
    )  # fmt: skip
    assert not feeding(changed).resident
