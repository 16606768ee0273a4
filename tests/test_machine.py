"""--deterministic: what XLA is told before it starts, by stand-ins for where it runs."""

import os

import jax
import pytest
from jax._src import xla_bridge

from bigjax import UsageError
from bigjax.run import machine


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
