"""--deterministic: what XLA is told before it starts, by stand-ins for where it runs. And what a start traces."""

import os

import jax
import pytest
from conftest import tiny_experiment
from jax._src import xla_bridge

from bigjax import UsageError, program
from bigjax.experiment import RunConfig
from bigjax.run import machine
from bigjax.step import train_step


@pytest.mark.parametrize("given", ["", "--xla_a=1"])
def test_before_jax_starts_xla_is_told_once(given: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XLA_FLAGS", given)
    monkeypatch.setattr(xla_bridge, "backends_are_initialized", lambda: False)
    machine.repeat_bits(False)
    assert os.environ["XLA_FLAGS"] == given
    for _ in range(2):
        machine.repeat_bits(True)
        assert os.environ["XLA_FLAGS"] == f"{given} --xla_gpu_deterministic_ops=true".strip()


def test_when_it_has_started_a_gpu_must_have_been_told(monkeypatch: pytest.MonkeyPatch) -> None:
    jax.devices()
    monkeypatch.setenv("XLA_FLAGS", "--xla_a=1")
    machine.repeat_bits(True)  # a CPU
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    with pytest.raises(UsageError, match="--deterministic: JAX has started without it: set XLA_FLAGS=--xla_gpu_det"):
        machine.repeat_bits(True)
    assert os.environ["XLA_FLAGS"] == "--xla_a=1"
    monkeypatch.setenv("XLA_FLAGS", "--xla_a=1 --xla_gpu_deterministic_ops=true")
    machine.repeat_bits(True)


def test_a_program_traces_its_step_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """For the shapes of its metrics and for the update."""
    traced, config = [], RunConfig(batch_size=8, steps=2)
    monkeypatch.setattr(program, "train_step", lambda *a, **k: traced.append(1) or train_step(*a, **k))
    made = tiny_experiment()
    program.Program(made, config, made.train, steps=2).lowered()
    assert len(traced) == 1
