"""Scripts that classify texts: which tokens, cut where, what a BERT of others begins with, and what is refused."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from test_experiments import load, run
from test_pretrained import unpacked
from test_user_files import said_by
from tfds_fixture import build_set

from bigjax.data import sentences, sources, text
from bigjax.data.lengths import ByLength
from bigjax.ops.optimizers import as_transformers
from bigjax.run.rates import learning_rates
from bigjax.use.text import fits

WORDS = "good bad film plot a the of is".split()


@pytest.fixture(autouse=True)
def reviews(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """reviews.jsonl in the current folder: 40 texts of 1 to 20 words, of two classes; and `bert`, of the hub."""
    monkeypatch.chdir(tmp_path)
    random = np.random.default_rng(0)
    rows = [
        {"text": " ".join([WORDS[n % 2], *random.choice(WORDS[2:], random.integers(0, 20))]), "label": n % 2}
        for n in range(40)
    ]
    Path("reviews.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Path("bert").mkdir()
    unpacked("bert", Path("bert"))  # of a context of 9
    coder = text.train_tokenizer([row["text"] for row in rows], kind="words", vocabulary=20)
    sentences.between_marks(coder).save("bert/tokenizer.json")


def build(script: str, *arguments: str):
    module = load(script)
    from bigjax import cli

    config, _ = cli.parse(module.Config, "train", args=["--data", "reviews.jsonl", *arguments])
    return module.build(config)


def test_a_bert_begins_with_a_folders_weights_and_tokens(capsys: pytest.CaptureFixture) -> None:
    """Under a new head; what is longer than its context is cut, and that is said once."""
    run("bert_classify", "--data", "reviews.jsonl", "--pretrained", "bert", "--steps", "2", "--batch-size", "8")
    out, err = capsys.readouterr()
    assert (
        "took 39 of 41 arrays from bert; as initialized: params/logits/bias (2,), params/logits/kernel (12, 2)" in out
    )
    [line] = [line for line in err.splitlines() if "cut" in line]
    said = "40 texts fill the model's context of 9 tokens: what is longer is cut"
    assert line.startswith("reviews.jsonl: ") and line.endswith(said)
    result = json.loads(Path("runs/bert_classify/result.json").read_text())
    assert 0 <= result["metrics"]["eval/padding_share"] < 0.5 and result["step"] == 2
    split = build("bert_classify", "--pretrained", "bert").train
    coder = text.load_tokenizer("bert")
    marks = [coder.token_to_id(name) for name in ("[CLS]", "[SEP]")]
    ends = split["tokens"][np.arange(len(split["length"])), split["length"] - 1]
    assert isinstance(split, ByLength) and split["tokens"].shape[1] == 9
    assert (split["tokens"][:, 0] == marks[0]).all() and (ends == marks[1]).all()


def test_from_scratch_the_first_token_is_the_texts_own(capsys: pytest.CaptureFixture) -> None:
    given = build("bert_classify", "--layers", "1", "--width", "8", "--heads", "2", "--length", "30")
    model, tokens = given.task.models["model"], given.train["tokens"]
    assert (model.layers, model.width, model.context, model.head, model.outputs) == (1, 8, 30, "sequence", 2)
    assert model.vocabulary == tokens.max() + 1 and (tokens[:, 0] == model.vocabulary - 2).all()
    assert "is cut" not in capsys.readouterr().err and given.initial is None
    plain = build("bert_classify", "--no-by-length", "--length", "30").train
    assert type(plain) is dict and plain["tokens"].shape == tokens.shape


def test_the_classic_recipe() -> None:
    """Up to 5e-5 in 500 updates, and down in a line to the end."""
    rates = learning_rates({"model": as_transformers(1500)})
    found = [rates(n)["learning_rate"] for n in (0, 250, 500, 1000, 1500)]
    np.testing.assert_allclose(found, [0, 2.5e-5, 5e-5, 2.5e-5, 0], atol=1e-12)


def test_what_is_wrong_is_said() -> None:
    """Tokenizers that are missing or another model's, and flags that would not count."""
    begin = "bert_classify", "--pretrained", "bert"
    assert said_by(build, *begin, "--vocabulary", "30") == (
        "--pretrained brings its own tokens: leave out --tokenizer and --vocabulary"
    )
    assert "holds a BERT with layers 2, not 3: leave out what asks for that" in said_by(build, *begin, "--layers", "3")
    shutil.move("bert/tokenizer.json", "other.json")
    assert said_by(build, *begin).startswith("bert has no tokenizer.json: let transformers write it")
    assert build(*begin, "--tokenizer-file", "other.json").train["tokens"].max() < 23
    text.byte_tokenizer().save("bytes.json")
    assert said_by(build, *begin, "--tokenizer-file", "bytes.json") == (
        "the tokenizer of bytes.json has 258 tokens, and the model a vocabulary of 23: use the tokenizer that the "
        "model was trained with"
    )
    for vocabulary in (1000, 1111, 1128):  # filled up to a tenth, or to a multiple of 128
        fits(1000, vocabulary)
    for vocabulary in (999, 1129):
        assert f"has 1,000 tokens, and the model a vocabulary of {vocabulary:,}" in said_by(fits, 1000, vocabulary)


def test_classes_that_the_training_texts_have_not_are_refused() -> None:
    Path("test.jsonl").write_text('{"text": "a film", "label": 2}\n')
    said = said_by(build, "text_cnn", "--eval-data", "test.jsonl")
    assert "test.jsonl" in said and "2" in said


def test_glue_through_tfds_has_published_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whose texts are called `sentence`, and whose test split has no labels."""
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "tfds"))
    rows = [{"sentence": f"{WORDS[n % 2]} film", "label": n % 2, "idx": n} for n in range(20)]
    build_set(
        tmp_path / "tfds",
        "glue",
        "2.0.0",
        lambda f: {
            "sentence": f.Text(),
            "label": f.ClassLabel(names=["negative", "positive"]),
            "idx": f.Scalar(np.int32),
        },
        {"train": rows, "validation": rows[:6], "test": [row | {"label": -1} for row in rows]},
        config="sst2",
    )
    given = build("text_cnn", "--data", "tfds:glue/sst2", "--embedding", "4", "--maps", "2")
    assert len(given.train["label"]) == 20 and len(given.test["label"]) == 6
    assert given.class_names == ("negative", "positive")
    [published] = given.published
    assert (published.metric, published.value) == ("eval/accuracy", 0.827)
    assert build("text_cnn").published == [] and sources.load("reviews.jsonl").classes == 2
