"""What is measured: metrics are (sum, count) pairs, merged by adding, on any number of devices.

C classes, K calibration bins, B batch.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

Metrics = dict[str, tuple[Array, Array]]

CALIBRATION_BINS = 15


def merge(a: Metrics, b: Metrics) -> Metrics:
    """Adds two sets of metrics, name by name."""
    return jax.tree.map(jnp.add, a, b)


def means(metrics: Metrics) -> dict[str, float]:
    """sum / count of every metric whose sum is one number; nan where nothing was counted."""
    host = jax.device_get(metrics)
    return {k: float(s) / float(n) if n else float("nan") for k, (s, n) in host.items() if np.ndim(s) == 0}


def confusion(prediction_B: Array, label_B: Array, mask_B: Array, *, classes: int) -> tuple[Array, Array]:
    """Counts (C, C), row = the label, column = the prediction; rows of the batch with mask 0 are not counted."""
    counts_CC = jnp.zeros((classes, classes)).at[label_B, prediction_B].add(mask_B)
    return counts_CC, mask_B.sum()


def calibration(confidence_B: Array, correct_B: Array, mask_B: Array) -> tuple[Array, Array]:
    """What the expected calibration error needs: (2, K) sums of confidence and correctness a bin, and the K counts."""
    bin_B = jnp.clip((confidence_B * CALIBRATION_BINS).astype(jnp.int32), 0, CALIBRATION_BINS - 1)
    zeros_K = jnp.zeros(CALIBRATION_BINS)
    sums_2K = jnp.stack([zeros_K.at[bin_B].add(v_B * mask_B) for v_B in (confidence_B, correct_B)])
    return sums_2K, zeros_K.at[bin_B].add(mask_B)


def calibration_error(sums_2K: np.ndarray, counts_K: np.ndarray) -> float:
    """Expected calibration error in [0, 1]: mean |confidence - accuracy| over bins, weighted by their examples.

    Guo et al., "On Calibration of Modern Neural Networks", ICML 2017, equation 3.
    """
    return float(np.abs(sums_2K[0] - sums_2K[1]).sum() / max(counts_K.sum(), 1))


def per_class(counts_CC: np.ndarray) -> dict[str, np.ndarray]:
    """Precision, recall and F1 of each class from confusion counts; 0 where there is nothing to divide by."""
    counts_CC = np.asarray(counts_CC, np.float64)
    hits_C, labelled_C, predicted_C = np.diag(counts_CC), counts_CC.sum(1), counts_CC.sum(0)

    def ratio(a_C: np.ndarray, b_C: np.ndarray) -> np.ndarray:
        return np.divide(a_C, b_C, out=np.zeros_like(a_C), where=b_C > 0)

    return {
        "precision": ratio(hits_C, predicted_C),
        "recall": ratio(hits_C, labelled_C),
        "f1": ratio(2 * hits_C, labelled_C + predicted_C),
    }


def summarize_classes(metrics: Metrics) -> dict[str, float]:
    """Means, and from the confusion counts macro precision, recall, F1, the worst class's accuracy, calibration error.

    As scikit-learn does, a class that is neither in the labels nor predicted does not enter the macro means.
    """
    out = means(metrics)
    counts_CC = np.asarray(jax.device_get(metrics["confusion"][0]))
    seen_C = (counts_CC.sum(0) + counts_CC.sum(1)) > 0
    labelled_C = counts_CC.sum(1) > 0
    for name, values_C in (scores := per_class(counts_CC)).items():
        out[f"macro_{name}"] = float(values_C[seen_C].mean()) if seen_C.any() else float("nan")
    out["worst_class_accuracy"] = float(scores["recall"][labelled_C].min()) if labelled_C.any() else float("nan")
    sums_2K, counts_K = jax.device_get(metrics["calibration"])
    out["calibration_error"] = calibration_error(sums_2K, counts_K)
    return out
