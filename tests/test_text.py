"""Text data: N rows, L tokens, T bytes."""

import json
import subprocess
import sys

import chex
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bigjax import UsageError
from bigjax.data import text
from bigjax.data.pipeline import batches

SENTENCES = [
    "the quick brown fox jumps over the lazy dog",
    "Pack my box with five dozen liquor jugs!",
    "ünïcödé 漢字 → naïve café",
    "def f(x):\n    return x + 1\n",
] * 5
TRAIN_FILES, TEST_FILES = text.listed(held_out=False), text.listed(held_out=True)


@pytest.fixture(scope="module")
def corpus():
    return text.python_corpus()


def test_corpus_is_the_same_each_time_and_splits_by_file(corpus):
    again = text.python_corpus()
    assert corpus == again and len(corpus.facts["corpus_sha256"]) == 64
    assert not set(TRAIN_FILES) & set(TEST_FILES)
    assert len(set(TRAIN_FILES + TEST_FILES)) == 266
    assert b"\nclass BaseSelectorEventLoop" not in corpus.train  # asyncio.selector_events is held out, heapq is not
    assert b'"""Heap queue algorithm' in corpus.train and b'"""Heap queue algorithm' not in corpus.test
    size = len(corpus.train) + len(corpus.test)
    assert size > 6e6 and 0.08 < len(corpus.test) / size < 0.1


def test_corpus_hash_covers_both_sides(monkeypatch, corpus):
    read = text.read_modules
    for side in (TRAIN_FILES, TEST_FILES):
        change = {side: lambda files: [files[0] + b"#", *files[1:]]}
        monkeypatch.setattr(text, "read_modules", lambda files, c=change: c.get(files, lambda x: x)(read(files)))
        assert text.python_corpus().facts != corpus.facts


def test_no_held_out_file_repeats_one_of_training():
    def shingles(file):
        words = file.decode("utf-8").split()
        return {hash(tuple(words[i : i + 8])) for i in range(len(words) - 7)}

    held_out = [shingles(file) for file in text.read_modules(TEST_FILES)]
    for name, file in zip(TRAIN_FILES, text.read_modules(TRAIN_FILES), strict=True):
        seen = shingles(file)
        for other, mine in zip(TEST_FILES, held_out, strict=True):
            assert len(mine & seen) <= 0.12 * min(len(mine), len(seen)) + 20, (name, other)


def test_a_missing_module_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(text.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    with pytest.raises(UsageError, match="module __future__ is not in .*: install Python"):
        text.python_corpus()
    with pytest.raises(UsageError, match="module asyncio.__main__ is not in"):
        text.python_topics()


def test_topics_are_balanced_and_share_no_file(corpus):
    topics = text.python_topics(length=300, train_size=30, test_size=20)
    assert len(topics.class_names) == 10
    for split, size in ((topics.train, 30), (topics.test, 20)):
        assert split["text"].shape == split["label"].shape == (10 * size,) and split["label"].dtype == np.int32
        np.testing.assert_array_equal(np.bincount(split["label"]), [size] * 10)
        assert all(isinstance(piece, str) and 0 < len(piece) <= 300 for piece in split["text"])
    asyncio = topics.class_names.index("asyncio")
    for split, files, others in (
        (topics.train, TRAIN_FILES, corpus.test),
        (topics.test, TEST_FILES, corpus.train),
    ):
        sources = "\0".join(f.decode() for f in text.read_modules(f for f in files if f.split(".")[0] == "asyncio"))
        pieces = split["text"][split["label"] == asyncio]
        assert all(piece in sources and sources[sources.index(piece) - 1] in "\n\0" for piece in pieces)
        assert len(set(pieces)) == len(pieces) and not any(piece.encode() in others for piece in pieces)
    again = text.python_topics(length=300, train_size=30, test_size=20)
    np.testing.assert_array_equal(topics.train["text"], again.train["text"])
    assert all(any(name in piece for piece in topics.train["text"]) for name in ("class ", "def "))


def test_pieces_cover_all_files_from_first_to_last():
    files = [b"a\n" * 50, b"b\n" * 5, b"c\n" * 200]  # the second is shorter than a piece
    pieces = text._pieces(files, 20, 60)
    assert {piece[0] for piece in pieces} == {"a", "b", "c"} and all(len(set(piece)) == 2 for piece in pieces)
    assert pieces[0] == "a\n" * 10 and pieces[-1] == "c\n" * 10 and "b\n" * 5 in pieces


@given(st.binary(min_size=1, max_size=70), st.integers(1, 12), st.data())
@settings(deadline=None)
def test_every_byte_is_a_target_once(data, length, draw):
    stride = draw.draw(st.integers(1, length))
    windows = text.byte_windows(data, length=length, stride=stride)
    N = len(windows["tokens"])
    chex.assert_shape([windows["tokens"]], (N, length + 1))
    assert windows["tokens"].dtype == windows["length"].dtype == np.int32
    assert ("start" in windows) == (stride < length)
    start = windows.get("start", np.ones(N, int))
    targets = [bytes(row[a:b].tolist()) for row, a, b in zip(windows["tokens"], start, windows["length"], strict=True)]
    assert b"".join(targets) == data and all(targets)
    assert all(row[0] == (b"\n" + data)[n * stride] for n, row in enumerate(windows["tokens"]))
    for row, n in zip(windows["tokens"], windows["length"], strict=True):
        assert not row[n:].any() and n >= 2
    assert (start[1:] > length - stride).all()


def test_byte_windows_feed_the_pipeline(corpus):
    windows = text.byte_windows(corpus.test, length=256, stride=64, once=False)
    assert "start" not in windows and not windows["tokens"].flags.owndata
    batch = next(batches(windows, seed=0, batch_size=4))
    chex.assert_shape(batch["tokens"], (4, 257))
    for row, index in zip(batch["tokens"], batch["index"], strict=True):
        assert bytes(row[1:].tolist()) == corpus.test[index * 64 : index * 64 + 256]


def test_xz_bits_per_byte():
    noise = np.random.default_rng(0).integers(0, 256, 20_000, np.uint8).tobytes()
    assert 8 <= text.xz_bits_per_byte(noise) < 8.1
    assert 0 < text.xz_bits_per_byte(noise, after=noise) < 0.2
    assert text.xz_bits_per_byte(b"a" * 20_000) < 0.1


@pytest.mark.parametrize("kind", ["bpe", "wordpiece", "words"])
def test_tokenizers_pad_with_zero_and_are_deterministic(kind):
    tokenizer = text.train_tokenizer(SENTENCES, kind=kind, vocabulary=300)
    assert tokenizer.token_to_id("[PAD]") == 0 and tokenizer.token_to_id("[UNK]") == 1
    assert tokenizer.get_vocab_size() <= 300
    assert text.train_tokenizer(iter(SENTENCES), kind=kind, vocabulary=300).to_str() == tokenizer.to_str()
    encoded = text.encode(tokenizer, np.array(SENTENCES, object), length=12)
    chex.assert_shape([encoded["tokens"], encoded["length"]], [(20, 12), (20,)])
    assert encoded["tokens"].dtype == encoded["length"].dtype == np.int32
    for row, n, sentence in zip(encoded["tokens"], encoded["length"], SENTENCES, strict=True):
        ids = tokenizer.encode(sentence).ids
        assert row[:n].tolist() == ids[:12] and n == min(12, len(ids)) and not row[n:].any() and row[:n].all()
    specials = [token["content"] for token in json.loads(tokenizer.to_str())["added_tokens"]]
    assert specials == ["[PAD]", "[UNK]"] and tokenizer.decode([0, 1]) == ""
    if kind != "bpe":
        assert text.encode(tokenizer, ["\u0416"], length=3)["tokens"].tolist() == [[1, 0, 0]]
    if kind == "bpe":
        assert all(tokenizer.decode(tokenizer.encode(sentence).ids) == sentence for sentence in SENTENCES)


def test_tokenizers_are_the_same_in_another_process():
    code = (
        "import sys, hashlib, json; from bigjax.data.text import train_tokenizer; texts = json.load(sys.stdin)\n"
        "for kind in ('bpe', 'wordpiece', 'words'): print(train_tokenizer(texts, kind=kind, vocabulary=300).to_str())"
    )
    output = subprocess.run(
        [sys.executable, "-c", code], input=json.dumps(SENTENCES), capture_output=True, text=True, check=True
    ).stdout
    here = [text.train_tokenizer(SENTENCES, kind=k, vocabulary=300).to_str() for k in ("bpe", "wordpiece", "words")]
    assert output.splitlines() == here


def test_byte_tokenizer():
    tokenizer = text.byte_tokenizer()
    assert tokenizer.get_vocab_size() == 258
    for sentence in [*SENTENCES, "\0\t é"]:
        assert [i - 2 for i in tokenizer.encode(sentence).ids] == list(sentence.encode())
        assert tokenizer.decode(tokenizer.encode(sentence).ids) == sentence


def test_load_tokenizer(tmp_path):
    tokenizer = text.train_tokenizer(SENTENCES, vocabulary=300)
    plain = tokenizer.to_str()
    tokenizer.enable_padding(length=50)
    tokenizer.enable_truncation(2)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    for path in (tmp_path, tmp_path / "tokenizer.json"):
        assert text.load_tokenizer(str(path)).to_str() == plain


def test_truncation_keeps_the_closing_token():
    from tokenizers.processors import TemplateProcessing

    tokenizer = text.train_tokenizer(SENTENCES, vocabulary=300)
    tokenizer.post_processor = TemplateProcessing(single="$A [UNK]", special_tokens=[("[UNK]", 1)])
    assert text.encode(tokenizer, SENTENCES, length=5)["tokens"][:, -1].tolist() == [1] * 20
    assert tokenizer.truncation is None


def test_mistakes_end_in_one_line(tmp_path):
    (tmp_path / "other.json").write_text("{}")
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00")
    tokenizer = text.byte_tokenizer()
    for call, message in (
        (lambda: text.load_tokenizer(str(tmp_path / "no.json")), "cannot be read"),
        (lambda: text.load_tokenizer(str(tmp_path / "binary.json")), "cannot be read"),
        (lambda: text.load_tokenizer(str(tmp_path / "other.json")), "is not a tokenizer.json"),
        (lambda: text.train_tokenizer([]), "no text to train"),
        (lambda: text.train_tokenizer(["", " \n"]), "no text to train"),
        (lambda: text.train_tokenizer(["a"], kind="unigram"), "no tokenizer 'unigram': use bpe, wordpiece or words"),
        (lambda: text.train_tokenizer(["a"], vocabulary=100), "use at least 258"),
        (lambda: text.train_tokenizer(["a", 3]), "text 1 .* is a int"),
        (lambda: text.encode(tokenizer, ["a", ""], length=4), r"text 1 .* has no tokens"),
        (lambda: text.encode(tokenizer, ["a"], length=0), "at least 1"),
        (lambda: text.encode(tokenizer, [], length=4), "no texts"),
        (lambda: text.byte_windows(b"", length=4), "no bytes"),
        (lambda: text.byte_windows(b"abc", length=4, stride=5), "stride 5"),
        (lambda: text.byte_windows(b"abc", length=0), "stride 0"),
        (lambda: text.xz_bits_per_byte(b""), "no bytes"),
        (lambda: text.python_topics(train_size=0), "at least 1"),
    ):
        with pytest.raises(UsageError, match=message) as error:
            call()
        assert "\n" not in str(error.value)
