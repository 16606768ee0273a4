"""Scripts on TFDS sets: every kind of split serves every script, and a trained run is judged on other data."""

import functools
import json
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from test_experiments import load
from test_user_files import said_by
from tfds_fixture import build_set

from bigjax import cli
from bigjax.data import sources, tfds
from bigjax.data.pipeline import in_memory
from bigjax.look.evaluators import images_of, linear_probe
from bigjax.models import Autoencoder

SIDE = 8


def rows(count: int, names: str = "abc") -> list[dict[str, Any]]:
    """Pictures of three classes, a bright row each, that a small network tells apart."""
    image = np.random.default_rng(count).integers(0, 60, (count, SIDE, SIDE, 1), np.uint8)
    for n in range(count):
        image[n, n % 3] = 250
    return [{"image": x, "label": names[n % 3]} for n, x in enumerate(image)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tfds")

    def features(names: str, side: int | None = SIDE) -> Callable:
        return lambda f: {"image": f.Image(shape=(side, side, 1)), "label": f.ClassLabel(names=list(names))}

    build_set(path, "rows", "1.0.0", features("abc", None), {"train": rows(60), "test": rows(24)})  # read by index
    build_set(path, "other", "1.0.0", features("cab"), {"test": rows(30)})
    texts = [{"text": f"it {'good bad'.split()[n % 2]} {n}", "label": n % 2} for n in range(40)]
    build_set(path, "texts", "1.0.0", lambda f: {"text": f.Text(), "label": f.ClassLabel(names=["good", "bad"])},
        {"train": texts, "test": texts[:8]})  # fmt: skip
    return path


@pytest.fixture
def run(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    """run(script, flags...) trains two updates; its result.json."""
    monkeypatch.setenv("TFDS_DATA_DIR", str(folder))
    monkeypatch.chdir(tmp_path)

    def main(script: str, *flags: str) -> dict[str, Any]:
        module = load(script)
        cli.main(module.Config, module.build, [*flags, "--batch-size", "8", "--workdir", f"runs/{script}"])
        return json.loads(Path(f"runs/{script}/result.json").read_text())

    return main


def test_a_probe_of_codes_is_the_same_in_memory_and_by_index(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TFDS_DATA_DIR", str(folder))
    data = sources.load("rows", takes=("image",))
    assert not isinstance(data.train, dict)
    model = Autoencoder(image=(SIDE, SIDE, 1), encoder_features=(16,), code=6, decoder_features=(16,))
    params = {"model": model.init(jax.random.key(0), np.zeros((1, SIDE, SIDE, 1), np.float32))["params"]}
    by_index = linear_probe(model, data.train, data.test)(params, {}, jax.random.key(0))
    whole = data.in_memory()
    assert isinstance(whole.train, dict) and by_index == linear_probe(model, whole.train, whole.test)(
        params, {}, jax.random.key(0)
    )
    assert by_index["probe_accuracy"] > 0.9
    np.testing.assert_allclose(images_of(data.test, 5), in_memory(data.test)["image"][:5] / 255, rtol=1e-6)


def test_a_run_is_judged_on_other_data(run: Callable, capsys: pytest.CaptureFixture[str]) -> None:
    """On a set without a split to train on, whose classes are in another order, and on a user's own files."""
    fast = ["--features", "16", "--no-augment", "--learning-rate", "0.02", "--steps", "100", "--log-every", "100"]
    result = run("mnist_mlp", "--data", "rows", *fast)
    assert result["metrics"]["eval/accuracy"] > 0.9

    def judged(*flags: str) -> dict[str, float]:
        capsys.readouterr()
        module = load("mnist_mlp")
        cli.main(module.Config, module.build, ["evaluate", "--workdir", "runs/mnist_mlp", *flags])
        return json.loads(capsys.readouterr().out)

    assert judged()["eval/accuracy"] == result["metrics"]["eval/accuracy"]
    assert judged("--data", "tfds:other")["eval/accuracy"] > 0.9
    assert judged("--eval-data", "other", "--split", "test=test[:50%]")["eval/accuracy"] > 0.9
    assert judged("--split", "test=train[:50%]")["eval/accuracy"] > 0.9  # of the set that it was trained on
    image = np.stack([row["image"] for row in rows(12)])
    np.savez("own.npz", image=image, label=np.zeros(12, int), class_names=["b"])
    before = Path("runs/mnist_mlp/config.json").read_bytes()
    assert 0.2 < judged("--data", "own.npz")["eval/accuracy"] < 0.5  # a third of them is of that class
    assert Path("runs/mnist_mlp/config.json").read_bytes() == before
    module = load("mnist_mlp")
    said = said_by(module.build, module.Config(data="tfds:other"))
    assert "the TFDS set other has no split train, but test (30 examples): a trained run is judged on it by" in said


@pytest.mark.slow
@pytest.mark.parametrize("script", ["mnist_autoencoder", "mnist_vae", "mnist_gan", "text_lstm"])
def test_scripts_on_splits_that_are_read_by_index(script: str, run: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tfds, "IN_MEMORY", 0)
    short = {"steps": 2, "batch_size": 8, "features": (4, 8), "dense": (8,)}
    mnist_cnn = vars(load("mnist_cnn")) | {"Config": functools.partial(load("mnist_cnn").Config, **short)}
    monkeypatch.setattr(runpy, "run_path", lambda path: mnist_cnn)  # the GAN's classifier
    flags = {
        "mnist_gan": "--generator-features 8 4 --discriminator-features 4 4 --latent 4",
        "text_lstm": "--embedding 4 --hidden 4 --length 8",
    }.get(script, "")
    data = "texts" if script == "text_lstm" else "rows"
    result = run(script, "--data", data, "--steps", "2", *flags.split())
    assert result["step"] == 2 and all(np.isfinite(v) for v in result["metrics"].values() if v is not None)
    if script == "mnist_autoencoder":
        assert result["metrics"]["eval/probe_accuracy"] > 0.5
    report = Path(f"runs/{script}/report.html").read_text()
    assert ("samples" in report or "reconstructions" in report) or script.endswith("lstm")
