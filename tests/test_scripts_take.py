"""What each experiment script takes of data, what it says of others, and how users' data are read by flags.

N examples, H height, W width, C channels.
"""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from PIL import Image
from test_experiments import SCRIPTS, load
from test_user_files import pictures, said_by, written
from tfds_fixture import build_set

from bigjax import UsageError, cli
from bigjax.data import corpus, sources, takes, tfds, tokens
from bigjax.data.pictures import resized
from bigjax.step import to_float

DECLARED = {
    name.split("/")[1].removesuffix(".py"): fields for name, fields in takes.declared(takes.scripts(), "TAKES").items()
}
IMAGES = [name for name, fields in DECLARED.items() if "image" in fields]


def arrays(path: Path, **fields: Any) -> Path:
    np.savez(path, **fields)
    return path


def lines(path: Path, row: Callable[[int], dict[str, Any]], count: int = 40) -> Path:
    return written(path, "".join(json.dumps(row(n)) + "\n" for n in range(count)))


def table(path: Path, header: str, row: Callable[[int], str], count: int = 40) -> Path:
    return written(path, "\n".join([header, *map(row, range(count))]))


@pytest.fixture(scope="module")
def kinds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, tuple[str, ...]]]:
    """Data of each kind: its name as --data, and the fields that it holds."""
    folder = tmp_path_factory.mktemp("kinds")
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (40, 8, 8, 1), np.uint8)
    x = rng.random((40, 5))
    whole = {
        "an embedded set": ("digits", ("image", "label")),
        "pictures": (pictures(folder / "pictures", 20), ("image", "label")),
        "images of classes": (arrays(folder / "classes.npz", image=image, label=np.arange(40) % 2), ("image", "label")),
        "images with numbers": (arrays(folder / "numbers.npz", image=image, target=x[:, 0]), ("image", "target")),
        "columns of classes": (table(folder / "a.csv", "a,b,label", lambda n: f"{n},1,{n % 2}"), ("x", "label")),
        "columns of numbers": (arrays(folder / "x.npz", x=x, target=x[:, 0]), ("x", "target")),
        "texts of classes": (lines(folder / "t.jsonl", lambda n: {"text": f"it {n}", "label": n % 2}), ("text", "label")),
        "texts in a table": (table(folder / "t.csv", "text,label", lambda n: f"it {n},{n % 2}"), ("text", "label")),
        "pairs": (lines(folder / "p.jsonl", lambda n: {"source": f"a {n}", "target": "b"}), ("source", "target")),
        "tokens": (f"tokens:{folder / 'tokens'}", ("tokens",)),
        "text": (written(folder / "book.txt", "It was a dark night.\n" * 2000), ("text",)),
    }  # fmt: skip
    written(folder / "tokens" / "train.bin", np.arange(900, dtype="<u2").tobytes())
    written(folder / "tokens" / "test.bin", np.arange(300, dtype="<u2").tobytes())
    return {kind: (str(name), fields) for kind, (name, fields) in whole.items()}


KINDS = (
    "an embedded set", "pictures", "images of classes", "images with numbers", "columns of classes",
    "columns of numbers", "texts of classes", "texts in a table", "pairs", "tokens", "text",
)  # fmt: skip
CLASSIFIERS = "mnist_gan.py, experiments/vision/mnist_cnn.py, experiments/vision/mnist_lstm.py"
TAKING = {  # of some fields the scripts, as a user is told them
    ("text", "label"): "use experiments/text/text_lstm.py for those, or give other data",
    ("image", "label"): f"use experiments/generate/{CLASSIFIERS}, experiments/vision/mnist_mlp.py for those, or",
    ("x", "target"): "use experiments/tables/diabetes_linear.py for those, or",
    ("tokens",): "use experiments/text/gpt.py for those, or",
    ("source", "target"): "and target: give other data",
}


def test_every_script_says_what_it_takes() -> None:
    assert DECLARED.keys() == SCRIPTS.keys()
    assert all(load(script).TAKES == fields for script, fields in DECLARED.items())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("script", SCRIPTS)
def test_data_that_a_script_does_not_take(script: str, kind: str, kinds: dict[str, Any]) -> None:
    """As --data and as --eval-data one line says what it takes, what they hold, and which script takes those."""
    (name, held), fields, module = kinds[kind], DECLARED[script], load(script)
    if set(fields) <= set(held):
        return
    own = next(name for name, holds in kinds.values() if set(fields) <= set(holds))
    for flags in ({"data": name}, {"data": own, "eval_data": name}):
        said = said_by(module.build, module.Config(**flags))
        if script == "gpt" and "eval_data" in flags:
            assert said == "gpt.py evaluates on the test.bin beside the tokens it trains on: leave out --eval-data"
            continue
        if script == "gpt" and kind in ("text", "texts of classes"):
            prepare = f"python -m bigjax prepare {name} --to DIR, then --data tokens:DIR"
            assert said == f"{name} is text, not yet in tokens: {prepare}"
            continue
        words = {"x": "x (numbers)"}
        both = [" and ".join(words.get(f, f) for f in given) for given in (fields, held)]
        assert said.startswith(f"this script takes {both[0]}, but {name} holds {both[1]}: ")
        assert TAKING.get(held, "") in said and f"{script}.py" not in said


def test_the_test_above_has_every_kind(kinds: dict[str, Any]) -> None:
    assert set(KINDS) == kinds.keys()
    assert {fields for _, fields in kinds.values()} > set(DECLARED.values()) - {("image",)}


def test_readers_are_looked_into() -> None:
    """Data that are read by index, of a user's own too, are known by their first example."""

    class Reader:
        def __len__(self) -> int:
            return 4

        def __getitem__(self, row: int) -> dict[str, np.ndarray]:
            return {"picture": np.zeros((4, 4, 1), np.uint8), "label": np.int32(0)}

    said = said_by(takes.check, Reader(), ("image", "label"), name="mine")
    assert said == "this script takes image and label, but mine holds picture and label: give other data"
    assert "this script takes image, but the split holds picture and label" in said_by(
        sources.image_statistics, Reader()
    )


@pytest.mark.parametrize("content", ["TAKES = (", "TAKES = fields()", b"TAKES = '\xff'"])
def test_a_script_that_cannot_be_read_hides_no_mistake(
    content: str | bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In ./experiments, which may be anything."""
    script = written(tmp_path / "experiments" / "a" / "b.py", content)
    monkeypatch.chdir(tmp_path)
    assert "give other data" in said_by(takes.check, ("text",), ("image",), name="mine")
    assert "b.py" in said_by(takes.declared, script.parents[1], "TAKES")


# ---- images of any size


@pytest.mark.parametrize("shape", [(8, 8, 1), (17, 23, 3)])
@pytest.mark.parametrize("script", IMAGES)
def test_images_of_any_size_are_learned_from(script: str, shape: tuple[int, ...], tmp_path: Path) -> None:
    """Every loss of it is traced, without being compiled."""
    rng = np.random.default_rng(0)
    fields = {"image": rng.integers(0, 256, (30, *shape), np.uint8), "label": np.arange(30) % 3}
    module = load(script)
    experiment = module.build(module.Config(data=str(arrays(tmp_path / "a.npz", **fields))))
    task, key = experiment.task, jax.random.key(0)
    batch = to_float({k: v[:2] for k, v in experiment.train.items()})
    batch |= {"index": np.arange(2, dtype=np.int32), "mask": np.ones(2, np.float32)}

    def pass_(key: jax.Array) -> Any:
        params, state = task.init(key, batch)
        return [loss(params, state, batch, key)[0] for loss in task.losses.values()], task.evaluate(
            params, state, batch, key
        )

    losses, metrics = jax.eval_shape(pass_, key)
    assert len(losses) == len(task.models) and metrics
