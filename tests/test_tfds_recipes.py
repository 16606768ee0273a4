"""The full-set recipes, for two steps on tiny TFDS sets of the real names: their data, and the published numbers."""

import functools
import io
import json
import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from test_experiments import load
from tfds_fixture import build_set

from bigjax import UsageError, cli, train
from bigjax.data import sources
from bigjax.data.reading import Images

WORDS = ("the film was good", "a very bad plot", "it is not what i saw before", "we all liked every minute")


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """cifar10 with 40 + 30 images, imagenet2012 with 24 + 12 of many sizes, imdb_reviews with 24 + 10 texts, lm1b with
    50 + 12.
    """
    folder, random = tmp_path_factory.mktemp("tfds"), np.random.default_rng(0)

    def images(count: int) -> list[dict]:
        shape = (count, 32, 32, 3)
        return [{"image": x, "label": n % 10} for n, x in enumerate(random.integers(0, 256, shape, np.uint8))]

    def photos(count: int) -> list[dict]:
        found = []
        for n in range(count):
            height, width = random.integers(20, 60, 2)
            image = Image.fromarray(random.integers(0, 256, (height, width, 3), np.uint8))
            image.convert("L" if n == 1 else "RGB").save(buffer := io.BytesIO(), format="JPEG")
            found.append({"image": buffer.getvalue(), "label": n % 1000, "file_name": f"{n}.JPEG"})
        return found

    def reviews(count: int) -> list[dict]:
        return [{"text": f"{WORDS[n % 4]}, {n}", "label": n % 2} for n in range(count)]

    def sentences(count: int) -> list[dict]:
        return [{"text": f"{n} {WORDS[n % 4]} ."} for n in range(count)]

    build_set(
        folder,
        "cifar10",
        "3.0.2",
        lambda f: {"image": f.Image(shape=(32, 32, 3)), "label": f.ClassLabel(num_classes=10)},
        {"train": images(40), "test": images(30)},
    )
    build_set(
        folder,
        "imagenet2012",
        "5.1.0",
        lambda f: {
            "image": f.Image(encoding_format="jpeg"),
            "label": f.ClassLabel(num_classes=1000),
            "file_name": f.Text(),
        },
        {"train": photos(24), "validation": photos(12)},
    )
    build_set(
        folder,
        "imdb_reviews",
        "1.0.0",
        lambda f: {"text": f.Text(), "label": f.ClassLabel(names=["neg", "pos"])},
        {"train": reviews(24), "test": reviews(10)},
        config="plain_text",
    )
    build_set(folder, "lm1b", "1.1.0", lambda f: {"text": f.Text()}, {"train": sentences(50), "test": sentences(12)})
    return folder


@pytest.fixture
def recipe(sets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """recipe(script, flags...) runs two steps of it; the experiment that was built, and its result.json."""
    monkeypatch.setenv("TFDS_DATA_DIR", str(sets))
    monkeypatch.chdir(tmp_path)

    def run(script: str, *flags: str) -> tuple[Any, dict[str, Any]]:
        module, built = load(script), []

        @functools.wraps(module.build)
        def build(config: Any) -> Any:
            built.append(module.build(config))
            return built[0]

        cli.main(module.Config, build, ["--steps", "2", "--batch-size", "8", *flags])
        return built[0], json.loads((tmp_path / "runs" / script / "result.json").read_text())

    return run


@pytest.mark.slow
def test_gan_on_cifar10(recipe: Any, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture) -> None:
    """Its classifier is trained on the same images, at the first evaluation, and not by `build`."""
    short = {"steps": 2, "batch_size": 8, "features": (4, 8), "dense": (8,)}
    mnist_cnn = vars(load("mnist_cnn")) | {"Config": functools.partial(load("mnist_cnn").Config, **short)}
    monkeypatch.setattr(runpy, "run_path", lambda path: mnist_cnn)
    small = ["--generator-features", "8", "4", "4", "--discriminator-features", "4", "4", "--latent", "4"]
    experiment, result = recipe("mnist_gan", "--data", "cifar10", *small)
    assert experiment.train["image"].shape == (40, 32, 32, 3) and len(experiment.test["image"]) == 30
    [published] = result["published"]
    assert published["metric"] == "eval/fid" and published["value"] == 21.7 and published["reached"] is None
    assert result["metrics"]["eval/frechet_ratio"] > 0
    classifier = json.loads(Path("runs/mnist_gan_classifier_cifar10/result.json").read_text())
    assert sum(map(sum, classifier["confusion"])) == 30
    assert result["metrics"]["eval/judge_accuracy"] == classifier["metrics"]["eval/accuracy"]
    out, err = capfd.readouterr()
    assert err.count("training the classifier, mnist_cnn.py on cifar10, in runs/mnist_gan_classifier_cifar10") == 1
    assert [line.split() for line in out.splitlines() if "eval/fid" in line] == [
        ["eval/fid", "-", "21.7", "not", "measured"]
    ]
    assert "step 2 eval" in out and "mnist_cnn," not in out  # the classifier's own training says nothing
    mnist_gan = load("mnist_gan")
    resized = {"data": "cifar10", "images": Images(resize=8)}
    for changed in ({"data": "mnist5k"}, {"data": "cifar10", "split_seed": 1}, resized):  # it knows our test rows
        config = mnist_gan.Config(classifier="runs/mnist_gan_classifier_cifar10", **changed)
        with pytest.raises(UsageError, match="classifier_cifar10 is of other data \\(.* -> .*\\): give"):
            mnist_gan.classifier_of(config)
    assert cli.parse(mnist_gan.Config, "train", args=["--judge", "x"])[0].classifier == "x"  # its name once


FEW = "--steps 2 --batch-size 8 --eval-every 2 --save-every 2".split()
SMALL = {  # what makes the models of the rows small, and the side and the published number of each
    "vit_imagenet": ("--side 28 --layers 1 --width 8 --heads 2 --patch 7", 28, 0.765),
    "resnet_cifar10": ("--model small", 32, 0.9125),
    "resnet_imagenet": ("--model small --side 24", 24, 0.7654),
}


@pytest.mark.parametrize("row", SMALL)
def test_classifiers(row: str, recipe: Any) -> None:
    """By the arguments of their rows, but smaller."""
    script = f"{row.split('_')[0]}_classify"
    module, (small, side, number) = load(script), SMALL[row]
    arguments, imagenet = module.ROWS[row]["arguments"].split(), "imagenet" in row
    experiment, result = recipe(script, *arguments, *FEW, *small.split())
    test = experiment.test
    shape = (test[1] if imagenet else {"image": test["image"][1]})["image"].shape
    assert shape == (side, side, 3) and 0 <= result["metrics"]["eval/accuracy"] < 0.9
    assert (experiment.transform is not None) is imagenet and (experiment.gallery == {}) is imagenet
    config = cli.parse(module.Config, "train", args=arguments)[0]
    [published] = module.build(config).published
    assert (published.metric, published.value) == ("eval/accuracy", number)


def test_lstm_on_imdb(recipe: Any) -> None:
    experiment, result = recipe("text_lstm", "--data", "imdb", "--embedding", "4", "--hidden", "4", "--length", "12")
    assert len(experiment.train["tokens"]) == 24 and experiment.class_names == ("neg", "pos")
    assert sum(map(sum, result["confusion"])) == 10
    [published] = result["published"]
    assert published["metric"] == "eval/accuracy" and published["value"] == 0.865
    assert published["reached"] is (result["metrics"]["eval/accuracy"] >= 0.865) is False


def test_gpt_on_lm1b(recipe: Any) -> None:
    experiment, result = recipe(
        "python_gpt", "--data", "lm1b", "--layers", "1", "--width", "8", "--heads", "2", "--context", "64"
    )
    data = sources.load("lm1b")
    assert len(experiment.train) == 50 and len(data.test["text"]) == 12
    for row, behind in ((3, (4, 5)), (49, (0, 1))):  # the last goes on with the first
        expected = "".join("\n" + data.train["text"][n] for n in (row, *behind)) + "\n"
        window = experiment.train[row]
        assert bytes(window["tokens"].astype(np.uint8)) == expected.encode()[:65] and window["length"] == 65
    counted = experiment.test["length"] - experiment.test["start"]
    assert counted.sum() == sum(len(text) + 1 for text in data.test["text"])  # each byte once, newlines too
    [published] = result["published"]
    assert published == {**published, "metric": "eval/bits_per_byte", "value": 0.874, "reached": False}
    assert result["metrics"]["eval/bits_per_byte"] > 5 and "corpus_sha256" not in result


@pytest.mark.parametrize("script", ["mnist_gan", "text_lstm", "python_gpt", "vit_classify", "resnet_classify"])
def test_embedded_data_have_no_published_numbers(script: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """And `build` trains and writes nothing."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "fit", lambda *_, **__: pytest.fail("build trains"))
    module = load(script)
    published = module.build(module.Config()).published
    assert [p.source for p in published] == (["xz -9 on the same bytes, in this run"] if script == "python_gpt" else [])
    assert not list(tmp_path.iterdir())
