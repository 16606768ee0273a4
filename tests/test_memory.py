"""--remat auto, by stand-ins for the devices' memory."""

import json
from pathlib import Path

import pytest
from test_experiments import load, run

from bigjax import cli, sharding
from bigjax.program import Program
from bigjax.run import memory

FLAGS = "--model tiny --context 64 --batch-size 32 --steps 2".split()


@pytest.fixture(scope="module")
def needs() -> dict[str, float]:
    """Bytes for an update of the tiny GPT, by what is computed again."""
    gpt, out = load("gpt"), {}
    for remat in memory.REMATS:
        config, _ = cli.parse(gpt.Config, "train", args=[*FLAGS, "--remat", remat])
        experiment, mesh = gpt.build(config), sharding.make_mesh(config.mesh, batch_size=config.batch_size)
        out[remat] = memory.needed(Program(experiment, config, experiment.train, steps=2, mesh=mesh))
    return out


def test_they_are_in_the_order_of_what_they_need(needs: dict[str, float]) -> None:
    none, dots, full = needs.values()
    assert none > dots > full > 2**20


@pytest.mark.parametrize("fits", [*memory.REMATS, None, "nothing"])
def test_the_first_that_fits_is_taken_and_kept(
    fits: str | None,
    needs: dict[str, float],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    """Where nobody limits the memory, none; where nothing fits, the smallest. The run keeps what it began with."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(memory, "room", lambda: {None: None, "nothing": 1}.get(fits, needs.get(fits)))
    run("gpt", *FLAGS, "--remat", "auto")
    taken = {None: "none", "nothing": "full"}.get(fits, fits)
    assert f"what the backward pass computes again: {taken}\n" in capsys.readouterr().out
    config = tmp_path / "runs" / "gpt" / "config.json"
    assert json.loads(config.read_text())["config"]["remat"] == taken
    if fits == "full":
        monkeypatch.setattr(memory, "room", lambda: None)
        run("gpt", *FLAGS, "--remat", "auto")  # finished: with other settings it would be refused
        assert "is finished" in capsys.readouterr().out


def test_the_folder_of_another_script_is_refused_with_what_differs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    run("diabetes_linear", "--workdir", "r")
    with pytest.raises(SystemExit) as end:
        run("gpt", *FLAGS, "--remat", "auto", "--workdir", "r")
    said = capsys.readouterr().err
    assert end.value.code == 2 and said.startswith("error: ") and "belongs to a run with other settings" in said, said
