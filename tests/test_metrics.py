"""Metrics against scikit-learn and NumPy: B batch, C classes, K calibration bins."""

import warnings

import chex
import jax
import jax.numpy as jnp
import numpy as np
import sklearn.metrics
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from bigjax import metrics as measure
from bigjax.tasks import confusion

B, C = 12, 5
few = settings(max_examples=40, deadline=None)
classes_B = st.lists(st.integers(0, C - 1), min_size=B, max_size=B).map(lambda v: np.array(v, np.int32))
masks_B = st.lists(st.booleans(), min_size=B, max_size=B).map(lambda v: np.array(v, np.float32))
# thousandths between the edges k/15 of the bins, and both ends
shares_B = st.lists(st.sampled_from([0.0, 1.0, *((np.arange(1001) + 0.5) / 1001)]), min_size=B, max_size=B).map(
    lambda v: np.array(v, np.float32)
)


@jax.jit
def measured(
    label_B: np.ndarray, prediction_B: np.ndarray, confidence_B: np.ndarray, mask_B: np.ndarray
) -> measure.Metrics:
    correct_B = label_B == prediction_B
    rows = {"accuracy": (correct_B, jnp.ones(B))} | confusion.class_counts(prediction_B, label_B, classes=C)
    rows |= confusion.calibration(confidence_B, correct_B)
    return {name: tuple(measure.total(part, mask_B) for part in pair) for name, pair in rows.items()}


@few
@given(classes_B, classes_B, masks_B)
def test_classes_agree_with_scikit_learn(label_B: np.ndarray, prediction_B: np.ndarray, mask_B: np.ndarray) -> None:
    assume(mask_B.any())
    out = measured(label_B, prediction_B, np.full(B, 0.5, np.float32), mask_B)
    label, prediction = label_B[mask_B > 0], prediction_B[mask_B > 0]
    counts_CC = out["confusion"][0]
    chex.assert_shape(counts_CC, (C, C))
    np.testing.assert_array_equal(counts_CC, sklearn.metrics.confusion_matrix(label, prediction, labels=range(C)))
    each = sklearn.metrics.precision_recall_fscore_support(label, prediction, labels=range(C), zero_division=0)
    macro = sklearn.metrics.precision_recall_fscore_support(label, prediction, average="macro", zero_division=0)
    ours, summary = confusion.per_class(*confusion.counts_by_class(out)), confusion.summarize_classes(out)
    for i, name in enumerate(("precision", "recall", "f1")):
        chex.assert_shape(ours[name], (C,))
        np.testing.assert_allclose(ours[name], each[i], rtol=1e-6)
        np.testing.assert_allclose(summary[f"macro_{name}"], macro[i], rtol=1e-6)
    np.testing.assert_allclose(summary["accuracy"], sklearn.metrics.accuracy_score(label, prediction), rtol=1e-6)
    np.testing.assert_allclose(summary["worst_class_accuracy"], min(each[1][c] for c in set(label)), rtol=1e-6)


@few
@given(shares_B, classes_B, classes_B, masks_B)
def test_calibration_error_agrees_with_its_definition(
    confidence_B: np.ndarray, label_B: np.ndarray, prediction_B: np.ndarray, mask_B: np.ndarray
) -> None:
    out = measured(label_B, prediction_B, confidence_B, mask_B)
    (confidence_K, counts_K), (correct_K, _) = (out[f"calibration_{k}"] for k in ("confidence", "correct"))
    bins = 15
    chex.assert_shape([confidence_K, correct_K, counts_K], (bins,))
    expected, total = 0.0, mask_B.sum()
    for k in range(bins):
        last = k == bins - 1
        inside = (mask_B > 0) & (confidence_B >= k / bins) & ((confidence_B < (k + 1) / bins) | last)
        if inside.any():
            gap = abs((label_B == prediction_B)[inside].mean() - confidence_B[inside].mean())
            expected += gap * inside.sum() / total
    np.testing.assert_allclose(confusion.calibration_error(confidence_K, correct_K, counts_K), expected, atol=1e-6)


@few
@given(
    classes_B,
    classes_B,
    shares_B,
    masks_B,
    st.lists(st.integers(0, 3), min_size=B, max_size=B),
    st.permutations(range(4)),
)
def test_parts_merged_in_any_grouping_equal_the_whole(
    label_B: np.ndarray,
    prediction_B: np.ndarray,
    share_B: np.ndarray,
    mask_B: np.ndarray,
    part: list[int],
    order: list[int],
) -> None:
    assume(mask_B.any())
    whole = measured(label_B, prediction_B, share_B, mask_B)
    a, b, c, d = (measured(label_B, prediction_B, share_B, mask_B * (np.array(part) == p)) for p in order)
    for merged in (
        measure.merge(measure.merge(measure.merge(a, b), c), d),
        measure.merge(measure.merge(a, b), measure.merge(c, d)),
    ):
        chex.assert_trees_all_close(merged, whole, rtol=1e-6)
        chex.assert_trees_all_close(confusion.summarize_classes(merged), confusion.summarize_classes(whole), atol=1e-6)


@few
@given(classes_B, classes_B, classes_B, shares_B, shares_B, masks_B)
def test_masked_rows_count_for_nothing(
    label_B: np.ndarray,
    prediction_B: np.ndarray,
    junk_B: np.ndarray,
    share_B: np.ndarray,
    noise_B: np.ndarray,
    mask_B: np.ndarray,
) -> None:
    real_B = mask_B > 0
    other = (
        np.where(real_B, label_B, junk_B),
        np.where(real_B, prediction_B, junk_B[::-1]),
        np.where(real_B, share_B, noise_B),
    )
    chex.assert_trees_all_equal(measured(label_B, prediction_B, share_B, mask_B), measured(*other, mask_B))


def test_means_are_of_what_was_counted_and_nan_of_nothing() -> None:
    metrics = {
        "a": (jnp.array(6.0), jnp.array(4.0)),
        "none": (jnp.array(0.0), jnp.array(0.0)),
        "wide": (jnp.ones(3), jnp.ones(3)),
    }
    out = measure.means(metrics)
    assert out.keys() == {"a", "none"} and out["a"] == 1.5 and np.isnan(out["none"])


def test_nothing_counted_gives_nan_without_a_warning() -> None:
    zeros_B = np.zeros(B, np.int32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        out = confusion.summarize_classes(measured(zeros_B, zeros_B, np.zeros(B, np.float32), np.zeros(B, np.float32)))
    assert np.isnan([out["accuracy"], out["macro_f1"], out["worst_class_accuracy"]]).all()
