"""Texts by their characters, and the recipes of char_gpt.py."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
from test_experiments import load
from test_user_files import said_by, written

from bigjax.data import characters

TEXT = "To be, or not to be: ünïcode 𝛼\n" * 10


def test_characters_are_counted_once_and_come_back(tmp_path: Path) -> None:
    name = str(written(tmp_path / "a.txt", TEXT))
    data = characters.load(name, length=7, stride=3)
    cut = int(0.9 * len(TEXT))
    assert data.class_names == tuple(sorted(set(TEXT)))
    for split, part, once in ((data.train, TEXT[:cut], False), (data.test, TEXT[cut:], True)):
        targets = ""
        for tokens, length in zip(split["tokens"], split["length"], strict=True):
            targets += "".join(data.class_names[t] for t in tokens[1:length])
        assert (targets == part) is once
        assert set(map(ord, targets)) == set(map(ord, part))
    assert data.train["tokens"][1, 0] == data.train["tokens"][0, 3]


def test_a_text_to_evaluate_on(tmp_path: Path) -> None:
    """Its characters are of the vocabulary too."""
    name, other = (str(written(tmp_path / f"{n}.txt", text)) for n, text in enumerate((TEXT, "ß" * 20)))
    data = characters.load(name, eval_data=other, length=7, stride=7)
    assert {data.class_names[t] for t in data.test["tokens"][:, 1:].ravel() if t} == {"ß"}
    assert np.sum(data.test["length"] - 1) == 20
    assert "has 9 characters to train on: give more, or lower --context 10" in said_by(
        characters.load, str(written(tmp_path / "short.txt", "0123456789a")), length=10, stride=5
    )


def test_the_classic_recipe(tmp_path: Path) -> None:
    module, name = load("char_gpt"), str(written(tmp_path / "a.txt", TEXT))
    for classic, position, norm in ((True, "learned", "layer"), (False, "rotary", "rms")):
        built = module.build(module.Config(data=name, classic=classic, context=16))
        model = built.task.models["model"]
        assert (model.layers, model.heads, model.width, model.position, model.norm) == (4, 4, 128, position, norm)
        assert not built.published


def test_the_published_value_is_of_one_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module, name = load("char_gpt"), str(written(tmp_path / "a.txt", TEXT))
    monkeypatch.setattr(module, "SHAKESPEARE", hashlib.sha256(TEXT.encode()).hexdigest())
    (published,) = module.build(module.Config(data=name, context=16)).published
    assert (published.metric, published.value, published.better) == ("eval/loss", 1.88, "lower")
