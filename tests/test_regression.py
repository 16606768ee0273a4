"""R² and the mean absolute error: as on all rows at once, whatever the batches, and nan where float32 cannot tell."""

import flax.linen as nn
import jax
import numpy as np
import pytest

from bigjax import sharding
from bigjax.evaluation import evaluator
from bigjax.task import fields
from bigjax.tasks import regress


class Same(nn.Module):
    """The input is the output."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return x


def judged(out: np.ndarray, target: np.ndarray, *, batch_size: int = 8, **options: float) -> dict[str, float]:
    task = regress(Same(), inputs=fields("x"), **options)
    measure = evaluator(
        task, batch_size=batch_size, seed=0, mesh=sharding.make_mesh(sharding.MeshConfig(data=1), batch_size=batch_size)
    )
    nothing = {"model": {}}
    return task.summarize(measure(nothing, nothing, {"x": out, "target": target}))


def numbers(shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """(outputs, targets)"""
    random = np.random.default_rng(0)
    target = random.normal(size=shape).astype(np.float32)
    return target + random.normal(size=shape).astype(np.float32) * 0.3, target


@pytest.mark.parametrize(("shape", "batch_size"), [((21,), 8), ((21, 3), 8), ((21, 3), 5)])
def test_both_are_those_of_all_rows(shape, batch_size):
    out, target = numbers(shape)
    told = judged(out, target, batch_size=batch_size)
    residual, spread = np.square(out - target).sum(0), np.square(target - target.mean(0)).sum(0)
    assert told["r2"] == pytest.approx(np.mean(1 - residual / spread), rel=1e-5)
    assert told["mean_absolute_error"] == pytest.approx(np.abs(out - target).mean(), rel=1e-5)
    assert set(told) == {"loss", "mean_absolute_error", "r2"}


def test_targets_far_from_zero_are_measured_about_a_centre_or_not_at_all():
    out, target = numbers((400,))
    expected = judged(out, target)["r2"]
    assert judged(out + 50, target + 50)["r2"] == pytest.approx(expected, abs=2e-3)
    far = np.float32(4096)
    assert np.isnan(judged(out + far, target + far)["r2"])
    assert judged(out + far, target + far, centre=4096.0)["r2"] == pytest.approx(expected, abs=2e-3)


def test_a_column_that_never_varies_is_left_out():
    out, target = numbers((21, 2))
    alone = judged(out[:, 0], target[:, 0])["r2"]
    target[:, 1] = 0.75
    assert judged(out, target)["r2"] == pytest.approx(alone, rel=1e-5)
    assert np.isnan(judged(out[:, 1], target[:, 1])["r2"])


def test_the_mean_of_the_targets_explains_nothing():
    _, target = numbers((21,))
    assert judged(np.full_like(target, target.mean()), target)["r2"] == pytest.approx(0, abs=1e-5)
    assert judged(target, target)["r2"] == pytest.approx(1)
