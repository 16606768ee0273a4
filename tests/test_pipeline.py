"""Batches: B rows of a batch, N rows of a set."""

import itertools
import threading
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bigjax import UsageError
from bigjax.data.pipeline import Batch, Named, batch_rows, batches, eval_batches, hold_out, shares, size_of, take
from bigjax.data.prefetch import Prefetcher

N = 50
MEMORY = {"x": np.arange(N, dtype=np.float32)[:, None], "label": (np.arange(N) % 5).astype(np.int32)}


class Reader:
    """The same examples, one by one; the odd ones come late."""

    def __init__(self, broken: int = -1, label: np.ndarray | None = None) -> None:
        self.broken, self.label = broken, label

    def __len__(self) -> int:
        return N

    def __getitem__(self, row: int) -> dict[str, np.ndarray]:
        if row == self.broken:
            raise ValueError("torn")
        if row % 2:
            time.sleep(0.001)
        return {k: v[row] for k, v in MEMORY.items()}


def first(count: int, split, **options) -> list[Batch]:
    return list(itertools.islice(batches(split, **options), count))


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 40), st.integers(1, 60), st.integers(0, 2**40), st.integers(0, 3))
def test_every_row_once_an_epoch_and_batches_straddle(size: int, batch_size: int, seed: int, epoch: int) -> None:
    count = (epoch + 1) * size // batch_size + 1
    rows = np.concatenate([batch_rows(n, seed=seed, batch_size=batch_size, size=size) for n in range(count)])
    assert rows.dtype == np.int64 and len(rows) == count * batch_size
    np.testing.assert_array_equal(np.sort(rows[epoch * size : (epoch + 1) * size]), np.arange(size))


def test_rows_depend_on_seed_and_epoch_only() -> None:
    def epoch(seed: int, number: int, batch_size: int) -> list[int]:
        per = 40 // batch_size
        numbers = range(number * per, (number + 1) * per)
        return [int(r) for n in numbers for r in batch_rows(n, seed=seed, batch_size=batch_size, size=40)]

    assert epoch(0, 1, 8) == epoch(0, 1, 20)
    assert len({tuple(epoch(seed, number, 8)) for seed in (0, 1, -1) for number in (0, 1)}) == 6


def test_rows_are_the_documented_philox_permutation() -> None:
    order = np.random.Generator(np.random.Philox(key=np.array([7, 1], np.uint64))).permutation(10)
    np.testing.assert_array_equal(batch_rows(2, seed=7, batch_size=5, size=10), order[:5])


@pytest.mark.parametrize("split", [MEMORY, Reader()], ids=["memory", "reader"])
def test_batches_hold_their_rows(split) -> None:
    for n, batch in enumerate(first(8, split, seed=3, batch_size=16)):
        rows = batch_rows(n, seed=3, batch_size=16, size=N)
        np.testing.assert_array_equal(batch["index"], rows)
        np.testing.assert_array_equal(batch["x"][:, 0], rows)
        np.testing.assert_array_equal(batch["label"], rows % 5)
        assert (batch["index"].dtype, batch["mask"].dtype) == (np.int32, np.float32) and batch["mask"].all()


@pytest.mark.parametrize("split", [MEMORY, Reader()], ids=["memory", "reader"])
def test_starting_late_and_sharing_give_the_same_rows(split) -> None:
    whole = first(9, split, seed=3, batch_size=16)
    late = first(4, split, seed=3, batch_size=16, start=5)
    shares = [first(9, split, seed=3, batch_size=16, rows=np.arange(4) + 4 * p) for p in range(4)]
    for name in whole[0]:
        for a, b in zip(whole[5:], late, strict=True):
            np.testing.assert_array_equal(a[name], b[name])
        for n, a in enumerate(whole):
            np.testing.assert_array_equal(a[name], np.concatenate([share[n][name] for share in shares]))


@pytest.mark.parametrize("split", [MEMORY, Reader()], ids=["memory", "reader"])
def test_transform_draws_by_seed_epoch_and_row(split) -> None:
    def jitter(example: dict[str, np.ndarray], generator: np.random.Generator) -> dict[str, np.ndarray]:
        return {**example, "noise": generator.random(2)}

    def noise(batch_size: int, **options) -> dict[tuple[int, int], tuple]:
        made = first(2 * N // batch_size, split, batch_size=batch_size, transform=jitter, **options)
        flat = [(int(i), tuple(v)) for b in made for i, v in zip(b["index"], b["noise"], strict=True)]
        return {(place // N, row): value for place, (row, value) in enumerate(flat)}

    a, b = noise(10, seed=1), noise(25, seed=1)
    assert a == b and len(set(a.values())) == 2 * N  # another draw for each row and epoch
    assert not set(a.values()) & set(noise(10, seed=2).values())


@pytest.mark.parametrize("split", [MEMORY, Reader()], ids=["memory", "reader"])
@pytest.mark.parametrize("batch_size", [1, 16, 50, 64])
@pytest.mark.parametrize("parts", [1, 2])
def test_evaluation_counts_every_example_once(split, batch_size: int, parts: int) -> None:
    places = np.array_split(np.arange(batch_size), min(parts, batch_size))
    shares = [list(eval_batches(split, batch_size=batch_size, rows=rows)) for rows in places]
    assert {len(s) for s in shares} == {-(-N // batch_size)}
    rows = []
    for parts in zip(*shares, strict=True):
        batch = {k: np.concatenate([p[k] for p in parts]) for k in parts[0]}
        real = batch["mask"] == 1
        assert len(real) == batch_size and (batch["index"][~real] == -1).all() and (batch["x"][~real] == 0).all()
        np.testing.assert_array_equal(batch["x"][real, 0], batch["index"][real])
        np.testing.assert_array_equal(batch["label"][real], batch["index"][real] % 5)
        rows += list(batch["index"][real])
    assert rows == list(range(N))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (
            dict(batch_size=51),
            "batch_size 51 does not fit 50 training examples: pass --batch-size with a number from 1 to 50",
        ),
        (dict(batch_size=0), "batch_size 0 does not fit 50 training examples"),
    ],
)
def test_impossible_batches_are_refused_at_once(options: dict, text: str) -> None:
    with pytest.raises(UsageError, match=text):
        batches(MEMORY, seed=0, **options)


def test_broken_and_ragged_examples_are_named() -> None:
    with pytest.raises(UsageError, match=r"example 13 .*ValueError: torn"):
        first(5, Reader(broken=13), seed=0, batch_size=10)

    def ragged(example: dict[str, np.ndarray], generator: np.random.Generator) -> dict[str, np.ndarray]:
        return {"image": np.zeros((4 + (example["x"][0] == 13), 4, 1))}

    with pytest.raises(UsageError, match=r"image has shape \(\d, 4, 1\) in example .*example 13\b|in example 13 but"):
        [first(5, MEMORY, seed=s, batch_size=10, transform=ragged) for s in range(3)]


# ---- prefetch


def threads() -> set[str]:
    return {t.name for t in threading.enumerate() if t.name.startswith("bigjax")}


def test_prefetch_keeps_order_applies_put_and_ends() -> None:
    with Prefetcher(iter(range(20)), lambda i: i * i) as items:
        assert list(items) == [i * i for i in range(20)]
    assert not threads()


def test_prefetch_works_ahead_no_further_than_depth_and_in_another_thread() -> None:
    made = []

    def put(i: int) -> int:
        made.append(threading.current_thread().name)
        return i

    with Prefetcher(itertools.count(), put, depth=3) as items:
        assert next(items) == 0
        deadline = time.time() + 10
        while len(made) < 5 and time.time() < deadline:
            time.sleep(0.001)
        time.sleep(0.05)
        assert made == ["bigjax-prefetch"] * 5  # one taken, three ready, one in hand


def test_prefetch_measures_the_wait() -> None:
    def slow():
        for i in range(3):
            time.sleep(0.05)
            yield i

    with Prefetcher(slow(), lambda i: i) as items:
        list(items)
        assert 0.1 < items.wait_seconds < 2
    with Prefetcher(iter(range(3)), lambda i: i, depth=3) as items:
        time.sleep(0.1)
        list(items)
        assert items.wait_seconds < 0.05


def test_prefetch_closes_a_blocked_producer_and_its_iterator() -> None:
    closed = []

    def endless():
        try:
            yield from itertools.count()
        finally:
            closed.append(True)

    items = Prefetcher(endless(), lambda i: i, depth=1)
    assert next(items) == 0
    time.sleep(0.05)  # now it waits for room
    before = time.time()
    items.close()
    items.close()
    assert time.time() - before < 5 and closed and not threads()
    with pytest.raises(StopIteration):
        next(items)


@pytest.mark.parametrize("error", [ValueError("boom"), UsageError("boom"), SystemExit("boom")])
def test_prefetch_raises_what_failed(error: BaseException) -> None:
    def put(i: int) -> int:
        if i == 2:
            raise error
        return i

    items = Prefetcher(itertools.count(), put)
    with pytest.raises(UsageError if isinstance(error, UsageError) else RuntimeError, match="boom") as caught:
        list(items)
    assert caught.value.__cause__ is error
    items.close()
    assert not threads()


def test_prefetch_of_a_reader_leaves_no_thread() -> None:
    with Prefetcher(batches(Reader(), seed=0, batch_size=8), lambda b: b) as items:
        next(items)
    deadline = time.time() + 10
    while any("grain" in t.name for t in threading.enumerate()) and time.time() < deadline:
        time.sleep(0.01)
    assert not threads() and not [t.name for t in threading.enumerate() if "grain" in t.name]


# ---- hold_out


def rows_of(count: int, *, first: int = 0, classes: int = 3) -> dict[str, np.ndarray]:
    """Rows that differ, with their number in `row`; `x` and `text` say the same."""
    row = np.arange(first, first + count)
    text = np.array([f"text {n}" for n in row], object)
    return {"x": np.stack([row, -row], 1).astype(np.float32), "text": text, "label": (row % classes).astype(np.int32)}


def joined(*parts: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {k: np.concatenate([p[k] for p in parts]) for k in parts[0]}


def numbers(split) -> set[int]:
    return {int(n) for n in split["x"][:, 0]}


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 200), st.floats(0.01, 0.99), st.integers(-5, 1000))
def test_hold_out_loses_nothing_and_keeps_the_order(size: int, fraction: float, split_seed: int) -> None:
    rest, held = hold_out(rows_of(size), fraction=fraction, split_seed=split_seed)
    assert size_of(rest) and size_of(held) and numbers(rest) | numbers(held) == set(range(size))
    assert size_of(rest) + size_of(held) == size
    for part in (rest, held):
        assert (np.diff(part["x"][:, 0]) > 0).all()
        np.testing.assert_array_equal(part["label"], part["x"][:, 0] % 3)


@pytest.mark.parametrize("fraction", [0.1, 0.5, 0.8])
def test_hold_out_takes_about_the_share(fraction: float) -> None:
    sizes = [size_of(hold_out(rows_of(1000), fraction=fraction, split_seed=s)[1]) / 1000 for s in range(5)]
    assert max(abs(size - fraction) for size in sizes) < 0.07 and len(set(sizes)) > 1


def test_rows_that_are_added_or_reordered_move_no_other() -> None:
    """Twenty rows appended to a file redrew a split by position: most test rows had been trained on."""
    old, new = rows_of(200), rows_of(20, first=200)
    rest, held = hold_out(old, fraction=0.1, split_seed=0)
    order = np.random.default_rng(0).permutation(220)
    for more in (joined(old, new), joined(new, old), take(joined(old, new), order)):
        rest_more, held_more = hold_out(more, fraction=0.1, split_seed=0)
        assert numbers(rest) <= numbers(rest_more) and numbers(held) <= numbers(held_more)
    assert numbers(hold_out(take(old, np.arange(0, 200, 2)), fraction=0.1, split_seed=0)[1]) <= numbers(held)


def test_rows_that_are_alike_stay_on_one_side_whatever_their_labels() -> None:
    twice = joined(rows_of(100), rows_of(100) | {"label": np.zeros(100, np.int32)})
    rest, held = hold_out(twice, fraction=0.3, split_seed=0)
    assert not numbers(rest) & numbers(held) and size_of(held) == 2 * len(numbers(held))
    corrected = rows_of(100) | {"label": np.full(100, 2, np.int32)}
    assert numbers(hold_out(corrected, fraction=0.3, split_seed=0)[1]) == numbers(held)
    texts = {"source": np.array(["a", "ab", "b", "abc"] * 5, object), "target": np.array([*"abcdefghijklmnopqrst"])}
    rest, held = hold_out(texts, fraction=0.5, split_seed=1)
    assert not set(rest["source"]) & set(held["source"])


def test_fields_are_told_apart() -> None:
    """What stands in one field is not what stands in the next: "ab" + "c" are not "a" + "bc"."""
    texts = {"a": np.array(["ab", "a"], object), "b": np.array(["c", "bc"], object)}
    rest, held = hold_out(texts, fraction=0.5, split_seed=0)
    assert size_of(rest) == size_of(held) == 1


def test_the_split_seed_and_the_purpose_decide() -> None:
    split = rows_of(400)
    held = {
        (seed, purpose): frozenset(numbers(hold_out(split, fraction=0.2, split_seed=seed, purpose=purpose)[1]))
        for seed in (0, 1, 10)
        for purpose in ("test", "validation")
    }
    assert len(set(held.values())) == 6
    rest, _ = hold_out(split, fraction=0.2, split_seed=0, purpose="test")
    share = size_of(hold_out(rest, fraction=0.2, split_seed=0)[1]) / size_of(rest)
    assert 0.12 < share < 0.28  # what is left by one is no worse a place to hold out from


def test_readers_go_by_names_or_by_number() -> None:
    reader = Reader(label=MEMORY["label"])
    rest, held = hold_out(reader, fraction=0.2, split_seed=1)
    assert len(rest) + len(held) == N
    for view in (rest, held):
        rows = [int(view[n]["x"][0]) for n in range(len(view))]
        assert rows == sorted(rows)
        np.testing.assert_array_equal(view.label, MEMORY["label"][rows])
    reader.names = np.array([f"{n}.png" for n in range(N)])
    named = Named(MEMORY, reader.names)
    by_name, in_memory = (hold_out(split, fraction=0.2, split_seed=1) for split in (reader, named))
    for view, fields in zip(by_name, in_memory, strict=True):
        np.testing.assert_array_equal(view.names, fields.names)
        assert {int(view[n]["x"][0]) for n in range(len(view))} == numbers(fields)
    turned = hold_out(Named(MEMORY, reader.names[::-1]), fraction=0.2, split_seed=1)[1]
    assert set(turned.names) == set(in_memory[1].names) and numbers(turned) != numbers(in_memory[1])
    nested = hold_out(rest, fraction=0.3, split_seed=0)[1]
    assert {int(nested[n]["x"][0]) for n in range(len(nested))} <= {int(rest[n]["x"][0]) for n in range(len(rest))}


@pytest.mark.parametrize("fraction", [0.0, 1.0, -1.0, 2.0, float("nan")])
def test_hold_out_refuses_senseless_shares(fraction: float) -> None:
    with pytest.raises(UsageError, match="of the examples: give a share between 0 and 1"):
        hold_out(MEMORY, fraction=fraction, split_seed=0)


def test_hold_out_refuses_rows_that_are_all_alike() -> None:
    for split in ({"x": np.zeros((4, 2))}, rows_of(1)):
        with pytest.raises(UsageError, match=r"0.1 of \d examples, which are all alike: .* as --eval-data"):
            hold_out(split, fraction=0.1, split_seed=0)


def test_shares_tell_the_classes_that_are_off() -> None:
    def split(*counts: int) -> dict[str, np.ndarray]:
        return {"label": np.repeat(np.arange(len(counts)), counts)}

    assert shares(split(90, 90), split(10, 10), fraction=0.1) == "20 of 200 examples"
    assert shares(split(89, 91), split(11, 9), fraction=0.1) == "20 of 200 examples"
    said = "20 of 200 examples, not evenly by class: 13 of 100 of class cat, 7 of 100 of class dog"
    assert shares(split(87, 93), split(13, 7), fraction=0.1, class_names=("cat", "dog")) == said
    assert shares(split(87, 93), split(13, 7, 0), fraction=0.1) == said.replace("cat", "0").replace("dog", "1")
    assert shares({"x": np.zeros(9)}, {"x": np.zeros(1)}, fraction=0.1) == "1 of 10 examples"
    many = shares(split(*[50] * 30), split(*range(30)), fraction=0.1)
    assert many.count(" of class ") == 10 and "29 of 79 of class 29" in many


# ---- splits that are none


@pytest.mark.parametrize(
    ("split", "said"),
    [
        ({"image": np.zeros((5, 2)), "label": np.zeros(4)}, "unequal lengths (image 5, label 4): give each of them"),
        ({}, "the data has no fields: give arrays with one row an example"),
        ({"x": np.zeros((0, 3))}, "the data has no examples: give arrays with one row an example"),
        ({"x": np.zeros(3), "label": np.int32(1)}, "field 'label' is no array with one row an example, but a int32"),
        ([], "the data has no examples"),
    ],
)
def test_a_split_that_is_none_is_named(split, said: str) -> None:
    for use in (
        lambda: batches(split, seed=0, batch_size=1),
        lambda: next(eval_batches(split, batch_size=1)),
        lambda: hold_out(split, fraction=0.5, split_seed=0),
    ):
        with pytest.raises(UsageError) as caught:
            use()
        assert said in str(caught.value) and "\n" not in str(caught.value)
