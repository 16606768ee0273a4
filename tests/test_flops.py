"""The work of an update, counted; and what share of a device's peak a run makes of it."""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import pytest
from conftest import tiny_experiment

from bigjax import train
from bigjax.experiment import Experiment, RunConfig
from bigjax.models import GPT
from bigjax.ops import vocabulary
from bigjax.program import Program
from bigjax.run.flops import PEAKS, examples_at_peak, work
from bigjax.run.log import read_log
from bigjax.tasks import next_token
from bigjax.tools.slices import CHIPS

B, L, V, D, N = 4, 12, 64, 16, 2
CONFIG = RunConfig(batch_size=B, compilation_cache=False, steps=4, log_every=2)


def program(config: RunConfig = CONFIG, **fields: Any) -> Program:
    model = GPT(vocabulary=V, layers=N, width=D, heads=2, context=L, **fields)
    data = {"tokens": np.zeros((8, L + 1), np.int32)}
    return Program(Experiment(next_token(model), optax.sgd(0.1), data, None), config, data, steps=4)


FORWARD = B * L * (N * 2 * 12 * D * D + N * 2 * 2 * L * D + 2 * D * V)  # 12 D² a layer; scores and their sums; logits


@pytest.mark.parametrize("fields", [{}, {"scan": True}, {"remat": "full", "scan": True}, {"remat": "full"}])
def test_a_models_own_work_is_three_passes_whatever_is_done_again(fields: dict) -> None:
    """6N + 12·L·H·Q·T a token, as Chowdhery et al. count it, with N of the matrices."""
    given = program(**fields)
    assert work(given, "model") == 3 * FORWARD
    again = B * L * N * (2 * 8 * D * D + 2 * 2 * L * D) if "remat" in fields else 0  # all but a layer's last product
    assert work(given, "hardware") == 3 * FORWARD + again


def test_logits_in_parts_are_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vocabulary, "MOST", 4 * B * V * 4)
    assert work(program(), "model") == 3 * FORWARD
    assert work(program(), "hardware") == 3 * FORWARD + B * L * 2 * D * V


def test_the_peak_is_known_or_told() -> None:
    assert examples_at_peak(program()) is None  # a CPU's isn't
    told = program(RunConfig(batch_size=B, peak_tflops=2.0, compilation_cache=False, steps=4))
    assert examples_at_peak(told) == pytest.approx(B * 2e12 * jax.device_count() / (3 * FORWARD))
    assert {chip.flops for chip in CHIPS.values()} <= set(PEAKS.values())


def test_a_run_tells_its_share(tmp_path: Path) -> None:
    config = RunConfig(workdir=str(tmp_path), steps=8, batch_size=8, log_every=2, peak_tflops=1e-3, eval_every=8,
                       compilation_cache=False)  # fmt: skip
    result = train.fit(tiny_experiment(), config, quiet=True).result
    lines = [r for r in read_log(tmp_path / "metrics.jsonl") if r["split"] == "train"]
    shares = [r["mfu"] / r["examples_per_second"] for r in lines if "mfu" in r]
    assert len(shares) >= 3 and shares == pytest.approx([shares[0]] * len(shares)) and shares[0] > 0
    assert result["metrics"]["train/mfu"] == lines[-1]["mfu"]
    assert json.loads((tmp_path / "result.json").read_text())["metrics"]["train/mfu"] == lines[-1]["mfu"]
    assert "mfu" in (tmp_path / "report.html").read_text()
