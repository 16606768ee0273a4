"""The trace as a hook."""

from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from etils import epath

from bigjax.look.profile import tracing


def traced(home: Path, *lines: str) -> int:
    """How many traces there are after such lines, of which the first two are training's, and an update behind each."""
    with tracing(epath.Path(home)) as on_log:
        for step, split in enumerate(lines):
            on_log(step, split, {"loss": 0.5})
            jax.block_until_ready(jnp.arange(8.0) * step)
            assert len(list(home.rglob("*.xplane.pb"))) == (lines[: step + 1].count("train") >= 2)
    return len(list(home.rglob("*.xplane.pb")))


@pytest.mark.parametrize("lines", [("train", "eval", "train", "train"), ("eval", "train", "eval")])
def test_from_one_training_line_to_the_next_or_the_end(lines: tuple[str, ...], tmp_path: Path) -> None:
    assert traced(tmp_path, *lines) == 1
    assert list((tmp_path / "profile").iterdir())


def test_a_run_without_a_line_is_not_traced(tmp_path: Path) -> None:
    assert traced(tmp_path) == 0 and not (tmp_path / "profile").exists()
