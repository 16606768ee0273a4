"""Batches by length: which rows are in which batch, and what is cut. N rows, L positions, B rows of a batch."""

import itertools
import json
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import run_with_devices
from hypothesis import given, settings
from hypothesis import strategies as st

from bigjax import UsageError, train
from bigjax.data import lengths, pipeline, prefetch
from bigjax.data.lengths import ByLength, best_sizes
from bigjax.data.pipeline import batch_rows, batches, eval_batches, hold_out, rows_of, size_of
from bigjax.experiment import Experiment, RunConfig
from bigjax.models import TextCNN
from bigjax.program import Program
from bigjax.run.identity import fingerprint_of
from bigjax.tasks import classify

N, L, B = 61, 40, 8


class Killed(BaseException):
    """Stands for a process that ends."""


def texts(count: int = N, *, seed: int = 0, **fields: Any) -> ByLength:
    """Tokens from 1 up, of 1 to L, mostly few; the label is whether the first is above 5."""
    random = np.random.default_rng(seed)
    length_N = np.minimum(1 + random.geometric(0.1, count), L).astype(np.int32)
    tokens_NL = random.integers(1, 11, (count, L)).astype(np.int32) * (np.arange(L) < length_N[:, None])
    label_N = (tokens_NL[:, 0] > 5).astype(np.int32)
    return ByLength({"tokens": tokens_NL, "length": length_N, "label": label_N}, **fields)


def experiment(**changes: Any) -> Experiment:
    """A small network on such texts."""
    seen: list[tuple[int, ...]] = changes.pop("seen", [])

    def inputs(batch: Any) -> tuple[Any, Any]:
        seen.append(batch["tokens"].shape)  # each time that it is traced
        return batch["tokens"], batch["length"]

    model = TextCNN(vocabulary=11, embedding=4, widths=(2,), maps=3, outputs=2, dropout=0.1)
    parts = {"task": classify(model, classes=2, inputs=inputs), "tx": optax.adam(0.01), "name": "texts"}
    return Experiment(**parts | {"train": texts(), "test": texts(21, seed=1)} | changes)


def flags(folder: Path, **changes: Any) -> RunConfig:
    return RunConfig(
        workdir=str(folder),
        **{"steps": 12, "batch_size": B, "log_every": 6, "eval_every": 12, "save_every": 4} | changes,
    )


@settings(max_examples=60)
@given(st.integers(1, 40), st.integers(1, 60), st.integers(0, 2**40), st.integers(0, 2), st.integers(1, 4))
def test_every_row_once_an_epoch_whatever_the_pool(b: int, size: int, seed: int, epoch: int, pool: int) -> None:
    """Also in batches that straddle epochs, which stay as they are."""
    b, count = min(b, size), (epoch + 1) * size // min(b, size) + 1
    split = ByLength({"tokens": np.zeros((size, 9), int), "length": np.arange(size) % 9 + 1})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lengths, "POOL", pool)
        rows = rows_of(split, seed=seed, batch_size=b)
        found = np.concatenate([rows(n) for n in range(count)])
        np.testing.assert_array_equal(np.sort(found[epoch * size : (epoch + 1) * size]), np.arange(size))
        for n in range(count):
            if n * b // size != ((n + 1) * b - 1) // size:
                np.testing.assert_array_equal(rows(n), batch_rows(n, seed=seed, batch_size=b, size=size))


def test_a_pools_batches_hold_rows_of_like_length_in_a_random_order() -> None:
    """Each pool is `POOL` batches' rows, sorted; the batches' order is another in each epoch and for each seed."""
    size, orders = 48, []
    split = ByLength({"tokens": np.zeros((size, 48), int), "length": np.arange(1, 49)[::-1]})
    for seed, epoch in ((0, 0), (0, 1), (1, 0)):
        rows = rows_of(split, seed=seed, batch_size=4)
        length_NB = split.lengths[np.stack([rows(n) for n in range(12 * epoch, 12 * epoch + 12)])]
        assert sorted(map(tuple, length_NB)) == [tuple(range(n, n + 4)) for n in range(1, 49, 4)]
        orders.append(tuple(length_NB[:, 0]))
    assert len({*orders, tuple(sorted(orders[0]))}) == 4


def test_batches_are_a_function_of_seed_and_n_also_among_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """From any start, and row for row in the parts that processes read, which are all cut alike."""
    monkeypatch.setattr(lengths, "POOL", 3)
    split = texts()

    def some(count: int, **options: Any) -> list[dict[str, np.ndarray]]:
        return list(itertools.islice(batches(split, seed=3, batch_size=B, **options), count))

    straight = some(20)
    for start in (1, 4, 8):  # within a pool, at its beginning, and where a batch straddles
        for a, b in zip(straight[start:], some(20 - start, start=start), strict=True):
            chex.assert_trees_all_equal(a, b)
    parts = [some(20, rows=np.arange(4) + 4 * p) for p in range(2)]
    for n, whole in enumerate(straight):
        chex.assert_trees_all_equal(whole, {k: np.concatenate([p[n][k] for p in parts]) for k in whole})
    assert len({b["tokens"].shape for b in straight}) > 2


def test_batches_are_cut_to_the_smallest_size_that_holds_them() -> None:
    """No token is lost, and of the padding of training little more than half is left, here where few rows are alike."""
    split = texts()
    stream = list(itertools.islice(batches(split, seed=0, batch_size=B), 40))
    for batch in [*stream, *eval_batches(split, batch_size=B)]:
        width = batch["tokens"].shape[1]
        assert width == min(s for s in split.sizes if s >= batch["length"].max())
        rows = split["tokens"][np.where(batch["mask"] == 1, batch["index"], 0)]
        np.testing.assert_array_equal(batch["tokens"], rows[:, :width])
        assert not rows[:, width:].any()
    real, places = (sum(f(b["tokens"]) for b in stream) for f in (np.count_nonzero, np.size))
    assert 1 - real / places < 0.6 * (1 - (split["tokens"] != 0).mean())


def test_evaluation_keeps_the_order() -> None:
    index = np.concatenate([b["index"] for b in eval_batches(texts(21), batch_size=B)])
    np.testing.assert_array_equal(index, [*range(21), -1, -1, -1])


@settings(max_examples=40)
@given(st.lists(st.integers(1, 70), min_size=1, max_size=40), st.integers(1, 3))
def test_sizes_leave_least_padding(given: list[int], count: int) -> None:
    """Against all choices that there are; the last is as long as the longest row, to a multiple of 8 or the field."""
    most = 66
    length_N = np.minimum(given, most)
    found = best_sizes(length_N, most=most, count=count)
    every = sorted({min(-(-int(n) // 8) * 8, most) for n in length_N})

    def padding(sizes: Any) -> int:
        return sum(min(s for s in sizes if s >= n) for n in length_N)

    others = [(*c, every[-1]) for k in range(count) for c in itertools.combinations(every[:-1], k)]
    assert found == sorted(found) and len(found) <= count and found[-1] == every[-1]
    assert padding(found) == min(map(padding, others))


def test_parts_keep_the_lengths_and_the_sizes() -> None:
    split = texts()
    rest, held = hold_out(split, fraction=0.3, split_seed=0)
    assert size_of(rest) + size_of(held) == N and rest.sizes == held.sizes == split.sizes
    for part in (rest, held):
        np.testing.assert_array_equal(part.lengths, part["length"])
    assert type(pipeline.whole(split)) is dict


def test_two_fields_are_cut_by_the_longer() -> None:
    """As source and target are, whose lengths are given."""
    fields = {"source": np.ones((9, 30), int), "target": np.ones((9, 20), int)}
    split = ByLength(fields, cut=("source", "target"), lengths=np.arange(1, 10))
    batch = next(batches(split, seed=0, batch_size=3))
    assert batch["source"].shape == batch["target"].shape and batch["source"].shape[1] in split.sizes


def test_a_run_by_length(tmp_path: Path) -> None:
    """Each shape is compiled once and kept out of the speed; stopped and resumed it is the same run, bit for bit; the
    share of padding is told; parts of a batch add up; the longest is what is planned for."""
    seen: list[tuple[int, ...]] = []
    splits = {"train": texts(sizes=(8, 16, L)), "test": texts(21, seed=1, sizes=(16, L))}
    given = experiment(seen=seen, **splits)
    run = train.fit(given, flags(tmp_path / "a"), quiet=True)
    padded = {"eval": list(eval_batches(given.test, batch_size=B)), "train": []}
    padded["train"] = list(itertools.islice(batches(given.train, seed=0, batch_size=B), 12))
    widths = {name: {b["tokens"].shape for b in parts} for name, parts in padded.items()}
    assert len(widths["train"]) == 3
    traced = {shape: count for shape, count in Counter(seen).items() if shape in widths["train"] and shape[1] < L}
    assert traced == {shape: 1 + (shape in widths["eval"]) for shape in traced} and len(traced) > 1
    assert Program(given, flags(tmp_path / "a"), given.train, steps=1).batch_shapes["tokens"].shape == (B, L)
    again = train.fit(experiment(**splits), flags(tmp_path / "c", accumulate=2), quiet=True)
    chex.assert_trees_all_close(again.state.params, run.state.params, atol=1e-5)
    padded["train"] = padded["train"][6:]  # the last window
    for name, parts in padded.items():
        counted = [(b["tokens"].shape[1] * b["mask"].sum(), (b["length"] * b["mask"]).sum()) for b in parts]
        places, real = np.sum(counted, 0)
        assert run.result["metrics"][f"{name}/padding_share"] == pytest.approx(1 - real / places)
    assert run.result["examples_per_second"] > 0

    def stop(step: int, split: str, values: Any) -> None:
        raise Killed

    with pytest.raises(Killed):
        train.fit(given, flags(tmp_path / "b"), quiet=True, on_log=stop)
    resumed = train.fit(given, flags(tmp_path / "b"), quiet=True)
    chex.assert_trees_all_equal(resumed.state, run.state)


def test_what_is_compiled_counts_for_no_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever update is the first of its shape; and the speed that `--minutes` goes by has all shapes behind it."""
    program = Program(experiment(), RunConfig(batch_size=B), texts(), steps=9)
    shapes = prefetch.Shapes(program)
    width = [b["tokens"].shape[1] for b in itertools.islice(batches(program.train, seed=0, batch_size=B), 30)]
    assert [shapes.new(n) for n in range(30)] == [width[n] not in width[:n] for n in range(30)]
    assert len(shapes.widths) == len(set(width))
    monkeypatch.setattr(prefetch, "POOL", 30)
    assert prefetch.Shapes(program).all() == 1 + max(width.index(w) for w in width)
    plain = Program(experiment(), RunConfig(batch_size=B), dict(texts()), steps=9)
    assert prefetch.Shapes(plain).all() == 1
    assert prefetch.doing(program, 3).startswith(
        f"update 4 (batch 3: examples {', '.join(map(str, rows_of(program.train, seed=0, batch_size=B)(3)))}"
    )


def test_other_batches_are_another_run() -> None:
    """What is by length and was not, or is cut to other sizes, is told when a run is resumed."""
    fields = [fingerprint_of(s)["fields"] for s in (texts(), dict(texts()), texts(sizes=(16, L)))]
    assert len({json.dumps(f) for f in fields}) == 3
    assert fields[0]["by length"].startswith("cut to 8, 16") and "by length" not in fields[1]


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: texts(cut=("words",)), "rows by length have no field 'words': there are tokens, length, label"),
        (lambda: ByLength({"tokens": np.ones((2, 3))}), "rows by length have no field 'length': there are tokens"),
        (lambda: texts(lengths=np.arange(N)), "a row has the length 60, but tokens only 40 places: correct it"),
        (
            lambda: batches(texts(), seed=0, batch_size=B, transform=lambda e, _: e),
            "rows by length are cut by lengths that a transform may change: leave one of the two out",
        ),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said(call: Any, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        call()


def on_eight_devices(folder: str) -> None:
    """In a process of its own: the mesh splits the rows of each shape."""
    run = train.fit(experiment(tx=optax.sgd(0.1)), flags(Path(folder) / "eight"), quiet=True)
    np.savez(Path(folder) / "eight.npz", *jax.tree.leaves(run.state.params))


@pytest.mark.slow
def test_on_a_mesh(tmp_path: Path) -> None:
    run_with_devices(f"import test_lengths; test_lengths.on_eight_devices({str(tmp_path)!r})", folder=tmp_path)
    alone = train.fit(experiment(tx=optax.sgd(0.1)), flags(tmp_path / "alone"), quiet=True)
    there = np.load(tmp_path / "eight.npz")
    for a, b in zip(jax.tree.leaves(alone.state.params), there.values(), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_a_model_sees_no_difference(tmp_path: Path) -> None:
    """Cut or not, an example's logits are the same."""
    split, model = texts(), TextCNN(vocabulary=11, embedding=4, widths=(2, 3), maps=3)
    apply = jax.jit(partial(model.apply, model.init(jax.random.key(0), jnp.zeros((1, L), "int32"))))
    for batch in itertools.islice(batches(split, seed=0, batch_size=B), 3):
        whole = apply(split["tokens"][batch["index"]], batch["length"])
        np.testing.assert_allclose(apply(batch["tokens"], batch["length"]), whole, atol=1e-6)
