"""What is counted of classes: confusion, precision, recall, F1, calibration. C classes, K calibration bins, B batch."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from bigjax.metrics import Bins, Metrics, means

CALIBRATION_BINS = 15
LARGE = 1000  # classes above which no confusion matrix is kept


def class_counts(prediction_B: Array, label_B: Array, *, classes: int) -> dict[str, tuple[Bins, Array]]:
    """What `summarize_classes` needs: `confusion` (C, C), row = the label, column = the prediction.

    Above LARGE classes three counts (C,) instead: `labelled`, `predicted`, `hits`.
    """
    one_B = jnp.ones_like(label_B)
    if classes <= LARGE:
        return {"confusion": (Bins((label_B, prediction_B), (classes, classes)), one_B)}
    hit_B = jnp.where(prediction_B == label_B, label_B, -1)
    parts = {"labelled": label_B, "predicted": prediction_B, "hits": hit_B}
    return {name: (Bins((index_B,), (classes,)), one_B) for name, index_B in parts.items()}


def calibration(confidence_B: Array, correct_B: Array) -> dict[str, tuple[Bins, Bins]]:
    """What the expected calibration error needs: by bin of confidence, the sums of both and the examples."""
    bin_B = jnp.clip((confidence_B * CALIBRATION_BINS).astype(jnp.int32), 0, CALIBRATION_BINS - 1)
    parts, one_B = {"confidence": confidence_B, "correct": correct_B.astype(jnp.float32)}, jnp.ones_like(confidence_B)
    bins = partial(Bins, (bin_B,), (CALIBRATION_BINS,))
    return {f"calibration_{name}": (bins(value_B), bins(one_B)) for name, value_B in parts.items()}


def calibration_error(confidence_K: np.ndarray, correct_K: np.ndarray, counts_K: np.ndarray) -> float:
    """Expected calibration error in [0, 1]: mean |confidence - accuracy| over bins, weighted by their examples.

    Guo et al., "On Calibration of Modern Neural Networks", ICML 2017, equation 3. Sums and counts by bin.
    """
    return float(np.abs(np.asarray(confidence_K) - correct_K).sum() / max(np.sum(counts_K), 1))


def counts_by_class(metrics: Metrics) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(hits, labelled, predicted), each (C,), from merged `class_counts`."""
    if "confusion" not in metrics:
        return tuple(np.asarray(metrics[k][0]) for k in ("hits", "labelled", "predicted"))
    counts_CC = np.asarray(metrics["confusion"][0])
    return np.diag(counts_CC), counts_CC.sum(1), counts_CC.sum(0)


def per_class(hits_C: np.ndarray, labelled_C: np.ndarray, predicted_C: np.ndarray) -> dict[str, np.ndarray]:
    """Precision, recall and F1 of each class from its counts; 0 where there is nothing to divide by."""

    def ratio(a_C: np.ndarray, b_C: np.ndarray) -> np.ndarray:
        return np.divide(a_C, b_C, out=np.zeros(len(a_C)), where=b_C > 0)

    return {
        "precision": ratio(hits_C, predicted_C),
        "recall": ratio(hits_C, labelled_C),
        "f1": ratio(2 * hits_C, labelled_C + predicted_C),
    }


def summarize_classes(metrics: Metrics) -> dict[str, float]:
    """Means, and from the counts by class macro precision, recall, F1, the worst class's accuracy, calibration error.

    As scikit-learn does, a class that is neither in the labels nor predicted does not enter the macro means.
    """
    out = means(metrics)
    counts = hits_C, labelled_C, predicted_C = counts_by_class(jax.device_get(metrics))
    seen_C = labelled_C + predicted_C > 0
    for name, values_C in (scores := per_class(*counts)).items():
        out[f"macro_{name}"] = float(values_C[seen_C].mean()) if seen_C.any() else float("nan")
    recall_C = scores["recall"][labelled_C > 0]
    out["worst_class_accuracy"] = float(recall_C.min()) if len(recall_C) else float("nan")
    (confidence_K, counts_K), (correct_K, _) = (metrics[f"calibration_{k}"] for k in ("confidence", "correct"))
    out["calibration_error"] = calibration_error(confidence_K, correct_K, counts_K)
    return out


def class_details(metrics: Metrics) -> dict[str, Any]:
    """For result.json: precision, recall and F1 by class, and the confusion matrix where there is one."""
    scores = {k: v.tolist() for k, v in per_class(*counts_by_class(metrics)).items()}
    matrix = {"confusion": metrics["confusion"][0].tolist()} if "confusion" in metrics else {}
    return {**matrix, "per_class": scores}
