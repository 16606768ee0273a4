"""A text from another: the task against its formula, pairs as tokens, docstrings, and the script.

B batch, L positions that are read, M that are written, V vocabulary.
"""

import itertools
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array
from test_experiments import load, run
from test_user_files import said_by, written
from tfds_fixture import build_set

from bigjax import UsageError, pretrained
from bigjax.data import docstrings, pairs, pipeline, sources, text
from bigjax.data.pipeline import Dataset
from bigjax.look import texts
from bigjax.models import T5
from bigjax.run import spoken
from bigjax.tasks import sequence_to_sequence
from bigjax.tasks.classification import padding
from bigjax.use import generate

KEY = jax.random.key(0)
TINY = T5(vocabulary=11, layers=1, width=8, heads=2, head=3, mlp=12, buckets=4, distance=6, dropout=0.0)


def batch_of(**changes: Any) -> dict[str, Array]:
    """Two rows: 3 and 2 real tokens to read, 2 and 3 to write."""
    fields = {
        "tokens": np.array([[5, 6, 7, 0], [8, 9, 0, 0]], np.int32),
        "length": np.array([3, 2], np.int32),
        "target": np.array([[4, 1, 0, 0], [3, 2, 1, 0]], np.int32),
        "target_length": np.array([2, 3], np.int32),
        "index": np.arange(2, dtype=np.int32),
        "mask": np.ones(2, np.float32),
    }
    return jax.tree.map(jnp.asarray, fields | changes)


class Shown(nn.Module):
    """Its logits are 2 for the token that the decoder is given, and 0 for all others."""

    vocabulary: int = 11

    @nn.compact
    def __call__(self, tokens_BL: Array, decoder_tokens_BM: Array, mask_BL: Array) -> Array:
        return 2.0 * jax.nn.one_hot(decoder_tokens_BM, self.vocabulary)


def test_the_decoder_is_given_the_target_one_later_behind_the_start() -> None:
    """So what it is given is never what it is to write here but where a token is written twice in a row."""
    task, state = sequence_to_sequence(Shown(), start=0), {"model": {}}
    batch = batch_of(target=np.array([[4, 1, 0, 0], [3, 3, 1, 0]], np.int32))
    (total, count), _ = task.losses["model"](state, state, batch, KEY)
    other, right = np.log(10 + np.exp(2)), np.log(10 + np.exp(2)) - 2
    assert count == 5 and float(total) == pytest.approx(4 * other + right, rel=1e-5)
    begun = sequence_to_sequence(Shown(), start=4)  # the first row begins with it
    assert float(begun.losses["model"](state, state, batch, KEY)[0][0]) == pytest.approx(
        3 * other + 2 * right, rel=1e-5
    )


def test_smoothing_is_of_the_training_loss_alone() -> None:
    state, batch, share = {"model": {}}, batch_of(), 0.1
    plain, smooth = (sequence_to_sequence(Shown(), label_smoothing=s) for s in (0.0, share))
    logits_BMV = 2.0 * np.eye(11)[np.array([[0, 4, 1, 0], [0, 3, 2, 1]])]
    p_BMV = logits_BMV - np.log(np.exp(logits_BMV).sum(-1, keepdims=True))
    wanted_BMV = (1 - share) * np.eye(11)[np.asarray(batch["target"])] + share / 11
    weight_BM = np.arange(4) < np.asarray(batch["target_length"])[:, None]
    expected = -(wanted_BMV * p_BMV).sum(-1)[weight_BM].sum()
    assert float(smooth.losses["model"](state, state, batch, KEY)[0][0]) == pytest.approx(expected, rel=1e-5)
    a, b = (task.evaluate(state, state, batch, KEY) for task in (plain, smooth))
    assert float(a["loss"][0]) == pytest.approx(float(b["loss"][0])) and float(a["loss"][1]) == 5


def test_padding_leaves_no_trace() -> None:
    """Whatever stands in it, of what is read and of what is written: the same loss and the same gradients."""
    task = sequence_to_sequence(TINY, label_smoothing=0.1)
    params, state = task.init(KEY, batch_of())
    loss = jax.jit(jax.value_and_grad(lambda p, batch: task.losses["model"](p, state, batch, KEY)[0][0]))
    plain = loss(params, batch_of())
    tokens = np.array([[5, 6, 7, 9], [8, 9, 4, 2]], np.int32)
    target = np.array([[4, 1, 7, 7], [3, 2, 1, 10]], np.int32)
    other = loss(params, batch_of(tokens=tokens, target=target))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), plain, other)
    seen = loss(params, batch_of(tokens=tokens, length=np.array([4, 2], np.int32)))
    assert not np.isclose(plain[0], seen[0], rtol=1e-4)


def test_the_share_of_padding_is_of_both_sides() -> None:
    sizes = {"length": jnp.array([4, 1]), "target_length": jnp.array([1, 2])}
    batch = {"tokens": jnp.zeros((2, 4), jnp.int32), "target": jnp.zeros((2, 3), jnp.int32), **sizes}
    missing_B, places_B = padding(batch)["padding_share"]
    assert missing_B.tolist() == [2, 4] and places_B.tolist() == [7, 7]


def test_tokens_of_another_vocabulary_are_one_line() -> None:
    task = sequence_to_sequence(TINY)
    task.check(jax.device_get(batch_of()))
    said = "target has the token 11, and the model's vocabulary is 11: give the tokenizer that the model was made for"
    assert said == said_by(task.check, jax.device_get(batch_of(target=np.array([[4, 11], [3, 1]]))))
    assert "tokens has the token 12, and" in said_by(task.check, jax.device_get(batch_of(tokens=np.full((2, 4), 12))))
    assert "start 11 is not in the model's vocabulary of 11" in said_by(sequence_to_sequence, TINY, start=11)


# ---- pairs of texts as tokens

ENGLISH = ("A man reads.", "Two dogs run over green grass.", "A woman in a red hat.", "Children play near water.")
GERMAN = ("Ein Mann liest.", "Zwei Hunde laufen über grünes Gras.", "Eine Frau mit rotem Hut.", "Kinder am Wasser.")


def dataset(train: int = 40, test: int = 3, **changes: Any) -> Dataset:
    def split(size: int) -> dict[str, np.ndarray]:
        sides = {"source": ENGLISH, "target": GERMAN}
        return {k: np.array([texts[n % 4] for n in range(size)], object) for k, texts in sides.items()}

    return Dataset(split(train), {**split(test), **changes}, name="captions")


def test_one_tokenizer_of_the_training_split_for_both_sides() -> None:
    """Its texts come back as they were, in lower case where that is asked for; words of the test split aren't known."""
    data = dataset(source=np.array(["Zebras", "a", "a"], object))
    coder = pairs.train_coder(data, vocabulary=400)
    assert coder.get_vocab_size() <= 400
    for word in ("Children", "Kinder"):
        assert len(coder.encode(word).ids) == 1  # and the end, which is added where tokens are made
    assert len(coder.encode("Zebras").ids) > 2
    end = pairs.ended(coder, where="it")
    for sentence in (*ENGLISH, *GERMAN):
        ids = coder.encode(sentence).ids
        assert ids[-1] == end and ids.count(end) == 1 and coder.decode(ids).strip() == sentence
    small = pairs.lowered(pairs.train_coder(data, vocabulary=400, lower_case=True))
    pairs.ended(small, where="it")
    assert small.decode(small.encode("Zwei Hunde ÜBER").ids).strip() == "zwei hunde über"
    assert len(small.encode("CHILDREN").ids) == 2 and spoken.digest(small) != spoken.digest(coder)
    again = pairs.train_coder(dataset(), vocabulary=400)
    pairs.ended(again, where="it")
    assert spoken.digest(again) == spoken.digest(coder)  # whatever is in the test split


def test_batches_of_pairs_are_cut_on_both_sides() -> None:
    """Also where one side has more room than the other, which then stays whole; no real token is lost."""
    length_N, target_N = np.arange(1, 25, dtype=np.int32), np.arange(24, 0, -1, dtype=np.int32) // 3 + 1
    fields = {"length": length_N, "target_length": target_N}
    fields["tokens"] = (np.arange(24)[None] < length_N[:, None]).astype(np.int32)
    fields["target"] = (np.arange(12)[None] < target_N[:, None]).astype(np.int32)
    split, shapes = pairs.by_length(fields), set()
    for batch in itertools.islice(pipeline.batches(split, seed=0, batch_size=4), 6):
        shapes.add((batch["tokens"].shape[1], batch["target"].shape[1]))
        np.testing.assert_array_equal(batch["tokens"].sum(1), batch["length"])
        np.testing.assert_array_equal(batch["target"].sum(1), batch["target_length"])
    assert shapes == {(8, 8), (16, 12), (24, 12)}


def test_what_is_cut_and_left_out_is_said_once(capsys: pytest.CaptureFixture[str]) -> None:
    data = dataset()
    coder = pairs.train_coder(data, vocabulary=600)
    whole = pairs.encode(coder, data)
    assert capsys.readouterr().err == ""
    assert whole.train["tokens"].shape[1] % 8 == 0 and whole.train["tokens"].dtype == np.int32
    lengths = [len(coder.encode(sentence).ids) for sentence in GERMAN]
    assert whole.train["target_length"][:4].tolist() == lengths
    assert whole.references == list(data.test["target"]) and whole.sources == list(data.test["source"])
    for split, field, lengths_N in ((whole.train, "tokens", "length"), (whole.test, "target", "target_length")):
        tokens_NL, length_N = split[field], split[lengths_N]
        real_NL = np.arange(tokens_NL.shape[1]) < length_N[:, None]
        assert (tokens_NL[np.arange(len(tokens_NL)), length_N - 1] == whole.end).all()
        assert ((tokens_NL != 0) == real_NL).all()
    data.train["target"][0] = "  "
    data.test["source"][1] = ""
    longest = max(lengths)
    cut = pairs.encode(coder, data, length=4, target_length=longest - 1)
    long, few = lengths.index(longest), min(len(coder.encode(s).ids) for s in ENGLISH)
    assert few > 4 and cut.train["tokens"].shape[1] == 4 and (cut.train["tokens"][:, 3] == cut.end).all()
    assert capsys.readouterr().err == (
        f"captions: of 40 pairs of the train split 1 left out, as a text is empty; 10 left out, as the target has more "
        f"than {longest - 1} tokens (--target-length); 29 cut to the 4 tokens of --length that are read\n"
        "captions: of 3 pairs of the test split 1 left out, as a text is empty; 2 cut to the 4 tokens of --length that "
        "are read\n"
    )
    assert len(cut.train["tokens"]) == 29 and len(cut.references) == len(cut.test["tokens"]) == 2 and long == 1
    before = pairs.encode(coder, dataset(), prefix="A man: ")
    np.testing.assert_array_equal(before.test["target"], whole.test["target"][:3])
    assert coder.decode(before.test["tokens"][0].tolist()).strip() == "A man: A man reads."


def test_mistakes_of_tokens_are_named() -> None:
    data = dataset()
    coder = pairs.train_coder(data, vocabulary=400)
    assert "use a length of at least 2" in said_by(pairs.encode, coder, data, length=1)
    said = said_by(pairs.encode, coder, data, target_length=2)
    assert said.startswith(
        "captions: no pair of the train split has two texts and a target of 2 tokens at most: give a"
    )
    other = text.train_tokenizer(ENGLISH, kind="words")
    assert "the tokenizer of it has no token that ends a text ([END], </s>, " in said_by(pairs.ended, other, where="it")


# ---- functions and docstrings

SOURCE = b'''
def lines(): "on its own line"

class A:
    async def readLines2(self, path, *, HTTPPort=(1, 2)) -> list[str]:
        """Read the lines of a file.

        More of it.
        """
        # why
        return open(path)

    def short(self):
        """Too short."""
        return 1

def outer(a_b: int = 3,
          c=")"):
    \'\'\'Take what is inside.\'\'\'
    def inner():
        """
        Another one within it.
        """
    return inner
'''


def test_functions_and_the_first_lines_of_their_docstrings() -> None:
    found = dict((first, source) for source, first in docstrings.documented(SOURCE))
    assert found == {
        "Read the lines of a file.": (
            "async def readLines2(self, path, *, HTTPPort=(1, 2)) -> list[str]:\n    # why\n    return open(path)"
        ),
        "Take what is inside.": (
            'def outer(a_b: int = 3,\n          c=")"):\n    def inner():\n        """\n'
            '        Another one within it.\n        """\n    return inner'
        ),
        "Another one within it.": "def inner():",
    }
    words = [docstrings.name_as_words(source) for source in found.values()]
    assert words == ["read lines 2 path http port", "outer a b c", "inner"]
    assert docstrings.name_as_words("no function") == ""


def test_docstrings_of_the_library_are_split_by_file() -> None:
    data = sources.load("python_docstrings", takes=("source", "target"))
    sizes = [len(split["source"]) for split in (data.train, data.test)]
    assert 3000 < sizes[0] < 6000 and 250 < sizes[1] < 600  # of CPython 3.11 to 3.14
    shared = {*zip(data.train["source"], data.train["target"])} & {*zip(data.test["source"], data.test["target"])}
    assert len(shared) < 0.02 * sizes[1]
    assert len(data.facts["corpus_sha256"]) == 64


# ---- through TFDS, and from files


def test_pairs_of_a_tfds_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"de": german, "en": english, "id": n} for n, (german, english) in enumerate(zip(GERMAN, ENGLISH))]
    features = lambda f: {"de": f.Text(), "en": f.Text(), "id": f.Scalar(np.int32)}  # noqa: E731
    splits = {"train": rows, "test": rows[:2]}
    build_set(tmp_path, "wmt14_translate", "1.0.0", features, splits, config="de-en", supervised=("de", "en"))
    build_set(tmp_path, "news_commentary", "1.0.0", features, splits)
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    takes = ("source", "target")
    name = "tfds:wmt14_translate/de-en"
    data = sources.load(name, takes=takes)
    assert {*zip(data.train["source"], data.train["target"])} == {*zip(GERMAN, ENGLISH)}
    assert "its de is read and its en written: see --source and --target" in capsys.readouterr().err
    for told in ({"source": "en"}, {"target": "de"}, {"source": "en", "target": "de"}):
        data = sources.load(name, takes=takes, **told)
        assert {*zip(data.test["source"], data.test["target"])} == {*zip(ENGLISH[:2], GERMAN[:2])}
    assert "--source id: the TFDS set" in said_by(sources.load, name, takes=takes, source="id")
    assert "name the text that is read by --source" in said_by(
        sources.load, name, takes=takes, source="en", target="en"
    )
    said = said_by(sources.load, "tfds:news_commentary", takes=takes)
    assert "has de (text), en (text), id (number of int32): name the text that is read by --source, and another" in said


def test_pairs_of_files(tmp_path: Path) -> None:
    rows = [{"en": english, "de": german} for english, german in zip(ENGLISH, GERMAN)]
    path = written(tmp_path / "a.jsonl", "".join(json.dumps(row) + "\n" for row in 3 * rows))
    takes = ("source", "target")
    needed = "it needs source and target: rename yours, or name them by --source and --target"
    assert said_by(sources.load, str(path), takes=takes) == f"{path} has the columns en, de: {needed}"
    comma = written(tmp_path / "a.csv", "en,de\na,b\n" * 20)
    assert said_by(sources.load, str(comma), takes=takes) == f"{comma} has the columns en, de: {needed}"
    data = sources.load(str(path), takes=takes, source="en", target="de")
    assert {*zip(data.train["source"], data.train["target"])} <= {*zip(ENGLISH, GERMAN)}
    assert "--source is for .csv, .jsonl and TFDS, and python_docstrings is none" in said_by(
        sources.load, "python_docstrings", takes=takes, source="en"
    )
    for lacking in ('{"source": "a"}', '{"source": "a", "target": " "}'):
        path = written(tmp_path / "b.jsonl", '{"source": "a", "target": "b"}\n' + lacking)
        assert said_by(sources.load, str(path), takes=takes).endswith(
            "b.jsonl, line 2 has no target: fill it in or remove the line"
        )


# ---- the script


def captions(path: Path) -> str:
    rows = [{"source": ENGLISH[n % 4], "target": GERMAN[n % 4]} for n in range(40)]
    return str(written(path, "".join(json.dumps(row) + "\n" for row in rows)))


def test_what_is_written_is_scored_and_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Here it is the source; against it stands the reference as it was, not as its tokens have it."""
    pytest.importorskip("sacrebleu", reason='pip install -e ".[text]"')
    path, module = captions(tmp_path / "p.jsonl"), load("translate")
    asked: list[dict[str, Any]] = []

    def echo(model: Any, variables: Any, prompt_BL: np.ndarray, *, length_B: np.ndarray, **how: Any) -> Any:
        asked.append(how)
        return SimpleNamespace(tokens_RN=prompt_BL, length_R=length_B)

    monkeypatch.setattr(generate, "generate", echo)
    flags = {"data": path, "eval_data": path, "lower_case": True, "vocabulary": 600, "target_length": 4}
    made = module.build(module.Config(**flags | {"target_length": 32, "prefix": "x "}))
    found = made.evaluators["written"]({"model": {}}, {}, KEY)
    expected = texts.scores([*GERMAN] * 10, lower_case=True).score([f"x {sentence}" for sentence in ENGLISH] * 10)
    assert found == pytest.approx(expected) and found.keys() == {"bleu", "chrf", "rouge_l"}
    model, end = made.task.models["model"], int(made.test["target"][0, made.test["target_length"][0] - 1])
    assert asked[0] == {"length": 32, "stop": end, "start": 0, "beams": 5, "length_penalty": 1.0}
    assert model.vocabulary <= 600 and (made.train["tokens"] < model.vocabulary).all()
    assert made.facts["signatures"].keys() == found.keys() and "|case:lc|" in made.facts["signatures"]["bleu"]
    assert made.tokenizer.id("eos_token") == end and made.published == []
    shown = made.gallery["written"]({"model": {}}, {}, KEY)
    assert "source     A man reads.\nreference  Ein Mann liest.\nwritten    x a man reads." in shown
    multi30k = captions(tmp_path / "en_de_test_2016.jsonl")
    published = module.build(module.Config(**flags | {"eval_data": multi30k, "target_length": 32})).published
    assert [(p.metric, p.value) for p in published] == [("eval/bleu", 41.02)]


def test_weights_of_a_t5_bring_its_tokens(tmp_path: Path) -> None:
    pytest.importorskip("sacrebleu", reason='pip install -e ".[text]"')
    path, module = captions(tmp_path / "p.jsonl"), load("translate")
    coder = pairs.train_coder(dataset(), vocabulary=400)
    model = TINY.clone(vocabulary=coder.get_vocab_size() + 3)
    variables = jax.jit(model.init)(KEY, *(jnp.zeros((1, 2), jnp.int32),) * 2)
    pretrained.save(tmp_path / "t5", model, variables)
    coder.save(str(tmp_path / "t5" / "tokenizer.json"))
    flags = {"data": path, "eval_data": path, "pretrained": str(tmp_path / "t5")}
    made = module.build(module.Config(**flags, dropout=0.1))
    assert made.task.models["model"] == made.initial.model.clone(dropout=0.1)
    assert made.initial.model.vocabulary == model.vocabulary and made.initial.model.width == model.width
    assert made.train["tokens"].max() < coder.get_vocab_size()
    coder.add_special_tokens([f"<extra_{n}>" for n in range(9)])
    coder.save(str(tmp_path / "larger.json"))
    said = said_by(module.build, module.Config(**flags, tokenizer_file=str(tmp_path / "larger.json")))
    assert (
        f"larger.json has {coder.get_vocab_size():,} tokens, and the model a vocabulary of {model.vocabulary}" in said
    )
    assert "holds a T5 with layers 1, not 3" in said_by(module.build, module.Config(**flags, layers=3))
    flags.pop("pretrained")
    said = said_by(module.build, module.Config(**flags, width=30))
    assert said == "--width 30 is no multiple of --heads 4: change one of the two"


@pytest.mark.slow
def test_pairs_that_were_learned_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sacrebleu", reason='pip install -e ".[text]"')
    monkeypatch.chdir(tmp_path)
    path = captions(tmp_path / "p.jsonl")
    shape = "--layers 1 --width 32 --heads 2 --mlp 32 --vocabulary 600 --dropout 0 --ema 0 --batch-size 8 --steps 150"
    run("translate", "--data", path, "--eval-data", path, *shape.split())
    result = json.loads((tmp_path / "runs" / "translate" / "result.json").read_text())
    assert result["metrics"]["eval/bleu"] > 90 and result["metrics"]["eval/accuracy"] > 0.95
    page = (tmp_path / "runs" / "translate" / "report.html").read_text()
    assert "source     A man reads.\nreference  Ein Mann liest.\nwritten    Ein Mann liest." in page


@pytest.mark.parametrize(
    ("script", "fields"),
    [("translate", {"vocabulary": 300}), ("text_lstm", {}), ("text_cnn", {}), ("bert_classify", {}), ("char_gpt", {})],
)
def test_other_data_of_tokens_that_are_gone(
    script: str, fields: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Judged on other data, all rows would be trained on, of which the run held some out: other tokens."""
    from bigjax.run import judged, workdir

    pytest.importorskip("sacrebleu", reason='pip install -e ".[text]"')
    monkeypatch.chdir(tmp_path)
    rows = [{"source": f"{ENGLISH[n % 4]} {n}", "target": f"{GERMAN[n % 4]} {n * n}"} for n in range(40)]
    if script != "translate":
        rows = [{"text": f"{row['target']} {chr(n + 200)}", "label": n % 2} for n, row in enumerate(rows)] * 3
    others = [{**row, "text": "€"} for row in rows[:30]]  # a character that no other text has
    for name, some in (("p.jsonl", rows), ("q.jsonl", others)):
        written(tmp_path / name, "".join(json.dumps(row) + "\n" for row in some))
    module = load(script)
    config = module.Config(data="p.jsonl", **fields)
    monkeypatch.setattr(workdir, "read_config", lambda home: {"config": workdir.settings(config)})
    asked, build = judged.as_trained(
        module.Config, module.build, config, name=script, arguments=["--eval-data", "q.jsonl", "--workdir", "r"]
    )
    with pytest.raises(UsageError, match="the run made its tokens without the rows that it held out of p.jsonl"):
        build(asked)
