"""Tokens that are hidden: masks and spans, against their definitions, and where they come from.

B batch, L positions, V vocabulary.
"""

import json
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import pytest
from jax import Array
from test_experiments import load
from test_user_files import said_by, written
from tokenizers import AddedToken, Tokenizer, models

from bigjax import UsageError
from bigjax.data import markers, text, tokens
from bigjax.models import T5
from bigjax.tasks import masked_token, span_corruption
from bigjax.tasks.masked import mask_tokens
from bigjax.tasks.spans import corrupted_lengths, hidden_spans, hide_spans, longest_row
from bigjax.tools import prepare

V, MASK, SPECIAL = 200, 3, (0, 1, 2)
KEY = jax.random.key(7)


def batch_of(tokens_BL: np.ndarray, length_B: np.ndarray | None = None) -> dict[str, np.ndarray]:
    rows = np.arange(len(tokens_BL), dtype=np.int32)
    batch = {"tokens": tokens_BL.astype(np.int32), "index": rows, "mask": np.ones(len(rows), np.float32)}
    return batch if length_B is None else batch | {"length": length_B.astype(np.int32)}


def drawn(rows: int, length: int, *, seed: int = 0) -> dict[str, np.ndarray]:
    """Text with special tokens in it, and padding of any length behind it."""
    random = np.random.default_rng(seed)
    tokens_BL = random.integers(4, V, (rows, length))
    tokens_BL[random.random((rows, length)) < 0.1] = 2
    return batch_of(tokens_BL, random.integers(1, length + 1, rows))


def within(count: int, of: int, share: float) -> None:
    """Of so many independent draws a count is what a share gives, up to 4.5 standard deviations."""
    assert abs(count - share * of) < 4.5 * (of * share * (1 - share)) ** 0.5, (count, of, share)


# ---- masks


def test_shares_of_what_is_chosen_and_of_what_it_becomes() -> None:
    batch = drawn(2000, 40)
    out = jax.device_get(jax.jit(mask_tokens(mask=MASK, vocabulary=V, special=SPECIAL))(batch, KEY))
    real_BL = np.arange(40) < batch["length"][:, None]
    may_BL = real_BL & ~np.isin(batch["tokens"], SPECIAL)
    chosen_BL = out["weight"] == 1
    assert not (chosen_BL & ~may_BL).any() and set(np.unique(out["weight"])) == {0.0, 1.0}
    few_B = may_BL.sum(1)
    expected_B = np.where(few_B > 0, np.maximum(np.round(np.float32(0.15) * few_B.astype(np.float32)), 1), 0)
    np.testing.assert_array_equal(chosen_BL.sum(1), expected_B)
    np.testing.assert_array_equal(out["target"], batch["tokens"])
    np.testing.assert_array_equal(out["tokens"][~chosen_BL], batch["tokens"][~chosen_BL])
    np.testing.assert_array_equal(out["real"], real_BL)
    seen, was = out["tokens"][chosen_BL], batch["tokens"][chosen_BL]
    within(int((seen == MASK).sum()), len(seen), 0.8 + 0.1 / V)
    within(int((seen == was).sum()), len(seen), 0.1 + 0.1 / V)
    others = seen[(seen != MASK) & (seen != was)]
    within(len(others), len(seen), 0.1 * (1 - 2 / V))
    within(int((others < V // 2).sum()), len(others), 0.5)  # of the whole vocabulary
    half_BL = may_BL & (np.arange(40) < 20)  # no place is favoured
    rows_B = batch["length"] == 40
    within(
        int((chosen_BL & half_BL)[rows_B].sum()),
        int(chosen_BL[rows_B].sum()),
        half_BL[rows_B].sum() / may_BL[rows_B].sum(),
    )


def test_whole_words_are_chosen_together() -> None:
    batch, starts = drawn(1500, 60, seed=1), np.random.default_rng(2).random(V) < 0.5
    out = jax.device_get(jax.jit(mask_tokens(mask=MASK, vocabulary=V, special=SPECIAL, starts=starts))(batch, KEY))
    chosen, of = 0, 0
    for tokens_L, length, chosen_L in zip(batch["tokens"], batch["length"], out["weight"] == 1):
        apart_L = np.isin(tokens_L, SPECIAL) | (np.arange(60) >= length)
        word_L = np.cumsum(starts[tokens_L] | apart_L)[~apart_L]
        sizes = [int((word_L == word).sum()) for word in np.unique(word_L)]
        took = [set(chosen_L[~apart_L][word_L == word]) for word in np.unique(word_L)]
        assert all(len(all_or_none) == 1 for all_or_none in took) and not chosen_L[apart_L].any()
        assert (
            abs(chosen_L.sum() - max(0.15 * sum(sizes), 1)) <= max(sizes, default=2) / 2 + 0.5
            or took.count({True}) == 1
        )
        chosen, of = chosen + chosen_L.sum(), of + sum(sizes)
    assert abs(chosen / of - 0.15) < 0.01


@pytest.mark.parametrize(
    "corrupt", [mask_tokens(mask=MASK, vocabulary=V, special=SPECIAL), hide_spans(sentinels=range(190, 200), end=1)]
)
def test_a_row_depends_on_its_index_and_the_key_alone(corrupt: Any) -> None:
    batch = drawn(6, 30)
    whole, order = jax.jit(corrupt)(batch, KEY), np.array([4, 1])
    part = jax.jit(corrupt)({k: v[order] for k, v in batch.items()}, KEY)
    for name, value in part.items():
        np.testing.assert_array_equal(value, whole[name][order], err_msg=name)
    other = jax.jit(corrupt)(batch, jax.random.key(8))
    assert (np.asarray(other["tokens"]) != np.asarray(whole["tokens"])).any(1).sum() > 3
    same = batch | {k: np.repeat(batch[k][:1], 6, 0) for k in ("tokens", "length")}
    assert len({row.tobytes() for row in np.asarray(jax.jit(corrupt)(same, KEY)["tokens"])}) > 1


# ---- spans

SENTINELS = tuple(range(199, 179, -1))


def test_lengths_are_those_of_the_paper() -> None:
    """512 tokens that are read are of 568, and 114 are written, as T5's own code has it."""
    assert longest_row(512) == 568 and corrupted_lengths(568) == (512, 114)
    assert [hidden_spans(n) for n in (0, 1, 2, 10, 20, 100)] == [(0, 0), (0, 0), (1, 1), (2, 1), (3, 1), (15, 5)]
    assert all(corrupted_lengths(longest_row(n))[0] <= n for n in range(4, 200))


@pytest.mark.parametrize(("share", "mean"), [(0.15, 3.0), (0.5, 3.0), (0.5, 1.0)])
def test_what_is_read_and_what_is_written_give_back_the_row(share: float, mean: float) -> None:
    """For rows of every length up to 40: as many tokens in as many spans, and the sentinels in order."""
    rows, L = 160, 40
    random = np.random.default_rng(3)
    batch = batch_of(random.integers(2, 150, (rows, L)), np.arange(rows) % (L + 1))
    corrupt = hide_spans(sentinels=SENTINELS, end=1, share=share, mean=mean)
    out = jax.device_get(jax.jit(corrupt)(batch, KEY))
    assert (out["tokens"].shape[1], out["target"].shape[1]) == corrupted_lengths(L, share=share, mean=mean)
    np.testing.assert_array_equal(out["decoder_tokens"][:, 1:], out["target"][:, :-1])
    assert (out["decoder_tokens"][:, 0] == 0).all()
    for n in range(rows):
        row, length = batch["tokens"][n], batch["length"][n]
        hidden, spans = hidden_spans(int(length), share=share, mean=mean)
        read, written = (out[name][n] for name in ("tokens", "target"))
        count, aim = int(out["real"][n].sum()), int(out["weight"][n].sum())
        assert (count, aim) == (length - hidden + spans + 1, hidden + spans + 1 if spans else 0)
        assert out["real"][n][:count].all() and out["weight"][n][:aim].all()
        assert read[count - 1] == 1 and not read[count:].any() and (not aim or written[aim - 1] == 1)
        marks = [list(x[np.isin(x, SENTINELS)]) for x in (read[:count], written[:aim])]
        assert marks[0] == marks[1] == list(SENTINELS[:spans])
        pieces = np.split(written[: max(aim - 1, 0)], np.flatnonzero(np.isin(written[: max(aim - 1, 0)], SENTINELS)))
        stands = {piece[0]: list(piece[1:]) for piece in pieces if len(piece)}
        assert all(stands.values()) and sum(map(len, stands.values())) == hidden
        assert read[0] not in SENTINELS  # a row begins with what is not hidden
        given = [t for token in read[: count - 1] for t in stands.get(token, [token])]
        assert given == list(row[:length])


def test_all_ways_to_cut_are_equally_likely() -> None:
    """Of five hidden tokens in two spans the first has 1, 2, 3 or 4; and where it begins."""
    rows = 3000
    batch = batch_of(np.full((rows, 33), 5))
    out = jax.device_get(jax.jit(hide_spans(sentinels=SENTINELS, end=1, share=0.15, mean=2.5))(batch, KEY))
    assert hidden_spans(33, mean=2.5) == (5, 2) and "real" not in out
    first_B = (out["target"] == SENTINELS[1]).argmax(1) - 1
    for size in (1, 2, 3, 4):
        within(int((first_B == size).sum()), rows, 1 / 4)
    place_B = (out["tokens"] == SENTINELS[0]).argmax(1)
    for place in (1, 10, 20):
        within(int((place_B == place).sum()), rows, (28 - place) / 378)


# ---- tasks


class Given(nn.Module):
    """Answers what its parameters say, whatever it is asked."""

    shape: tuple[int, ...]

    @nn.compact
    def __call__(self, *inputs: Array) -> Array:
        return self.param("logits", nn.initializers.zeros, self.shape)


def tasks() -> dict[str, Any]:
    batch = drawn(5, 30, seed=4)
    masks = {"mask": MASK, "vocabulary": V, "special": SPECIAL}
    spans = {"sentinels": SENTINELS, "end": 1}
    written = corrupted_lengths(30)[1]
    return {
        "masked": (batch, masked_token(Given((5, 30, V)), **masks), mask_tokens(**masks)),
        "spans": (batch, span_corruption(Given((5, written, V)), **spans), hide_spans(**spans)),
    }


@pytest.mark.parametrize("kind", ["masked", "spans"])
def test_who_knows_the_answers_has_no_loss_and_only_the_chosen_count(kind: str) -> None:
    """Everywhere else it is wrong; one answer of those that count is then wrong too."""
    batch, task, corrupt = tasks()[kind]
    out = jax.device_get(jax.jit(corrupt)(batch, jax.random.key(0)))  # as in every evaluation
    target_BM, counts_BM = out["target"], out["weight"] == 1
    answer_BM = np.where(counts_BM, target_BM, (target_BM + 1) % V)
    logits = 200.0 * np.eye(V, dtype=np.float32)[answer_BM]

    def evaluate(*given: Any) -> dict[str, tuple[float, float]]:
        return {k: (float(v), float(n)) for k, (v, n) in run(*given).items()}

    run = jax.jit(task.evaluate)
    found = evaluate({"model": {"logits": logits}}, {"model": {}}, batch, KEY)
    assert found["loss"] == (0, counts_BM.sum()) and found["accuracy"] == (counts_BM.sum(), counts_BM.sum())
    b, m = np.argwhere(counts_BM)[3]
    logits[b, m] = 200.0 * np.eye(V)[(target_BM[b, m] + 1) % V]
    found = evaluate({"model": {"logits": logits}}, {"model": {}}, batch, KEY)
    assert found["loss"] == (200, counts_BM.sum()) and found["accuracy"][0] == counts_BM.sum() - 1
    masked = evaluate(
        {"model": {"logits": logits}}, {"model": {}}, batch | {"mask": (np.arange(5) != b).astype(np.float32)}, KEY
    )
    assert masked["loss"] == (0, counts_BM.sum() - counts_BM[b].sum())


@pytest.mark.parametrize("kind", ["masked", "spans"])
def test_evaluation_is_corrupted_as_always_and_training_anew(kind: str) -> None:
    batch, task, _ = tasks()[kind]
    params, state = task.init(KEY, batch)
    params = {"model": {"logits": jax.random.normal(KEY, params["model"]["logits"].shape)}}
    evaluate, loss = jax.jit(task.evaluate), jax.jit(task.losses["model"])
    keys = [jax.random.key(n) for n in range(2)]
    evaluated = [evaluate(params, state, batch, key)["loss"][0] for key in keys]
    trained = [loss(params, state, batch, key)[0][0] for key in keys]
    assert evaluated[0] == evaluated[1]
    assert len({float(x) for x in (*trained, evaluated[0])}) == 3
    assert loss(params, state, batch, keys[0])[0][0] == trained[0]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"share": 0.0}, "share 0.0 of the tokens cannot be chosen: give a number between 0 and 1"),
        ({"mask": V}, "mask 200, special [0, 1, 2]: give tokens of the vocabulary, below 200"),
        ({"special": (0, -1)}, "mask 3, special [0, -1]: give tokens of the vocabulary, below 200"),
        ({"starts": np.ones(7, bool)}, "starts has the shape (7,): give a truth value for each of 200 tokens"),
    ],
)
def test_masks_that_cannot_be(options: dict[str, Any], said: str) -> None:
    assert said_by(mask_tokens, **({"mask": MASK, "vocabulary": V, "special": SPECIAL} | options)) == said


@pytest.mark.parametrize(
    ("options", "length", "said"),
    [
        ({"share": 1.0}, 30, "share 1.0, mean 3.0: give a share between 0 and 1, and a mean length of 1 or more"),
        ({"mean": 0.5}, 30, "share 0.15, mean 0.5: give a share between 0 and 1, and a mean length of 1 or more"),
        ({}, 80, "rows of 80 tokens have 4 spans to hide, for 3 sentinels: give shorter rows, or a larger vocabulary"),
        ({}, 1, "rows of 1 tokens have 0 spans to hide, for 3 sentinels: give longer rows"),
    ],
)
def test_spans_that_cannot_be(options: dict[str, Any], length: int, said: str) -> None:
    def run() -> None:
        hide_spans(sentinels=SENTINELS[:3], end=1, **options)(batch_of(np.ones((2, length))), KEY)

    assert said_by(run) == said
    small = "token 199 is not in the model's vocabulary of 150: give others, or a larger one"
    assert said_by(span_corruption, T5(vocabulary=150), sentinels=SENTINELS, end=1) == small


# ---- what tokens mean


def bert_tokenizer(path: Path) -> str:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "play", "##ing", "##s", "."]
    coder = Tokenizer(models.WordPiece({word: n for n, word in enumerate(words)}, unk_token="[UNK]"))
    coder.add_special_tokens(words[:5])
    coder.save(str(path))
    return str(path)


def t5_tokenizer(path: Path) -> str:
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁play", -1.0), ("ing", -1.0)]
    coder = Tokenizer(models.Unigram(pieces, unk_id=2))
    coder.add_special_tokens([AddedToken(f"<extra_id_{n}>", special=True) for n in reversed(range(100))])
    coder.save(str(path))
    return str(path)


def test_markers_of_tokenizers_that_have_them(tmp_path: Path) -> None:
    found, around = markers.of_masks(bert_tokenizer(tmp_path / "b.json"), vocabulary=12)
    assert (found["mask"], found["special"], around) == (4, (0, 1, 2, 3, 4), {"first": 2, "last": 3})
    assert found["starts"].tolist() == [True] * 6 + [False, False] + [True] * 4
    found = markers.of_spans(t5_tokenizer(tmp_path / "t.json"), vocabulary=128)
    assert found == {"sentinels": tuple(range(104, 4, -1)), "end": 1}  # <extra_id_0> is the last
    found, around = markers.of_masks(str(tmp_path / "t.json"), vocabulary=128)
    assert found["mask"] == 105 and around == {"first": None, "last": None}
    assert [found["starts"][n] for n in (3, 4)] == [True, False]


def test_markers_of_those_that_have_none(tmp_path: Path) -> None:
    """They are behind the tokens. Words of bytes, and of pieces of bytes, begin at what is no letter."""
    words = "it plays, playing plays\n" * 30
    for kind in ("bpe", "words", "bytes"):
        coder = text.byte_tokenizer() if kind == "bytes" else text.train_tokenizer([words], kind=kind, vocabulary=300)
        coder.save(str(path := tmp_path / f"{kind}.json"))
        size = coder.get_vocab_size()
        found, around = markers.of_masks(str(path), vocabulary=size + 50)
        assert found["mask"] == size and around["first"] is None and {0, 1, size} == set(found["special"])
        spans = markers.of_spans(str(path), vocabulary=size + 50)
        assert spans == {"end": size, "sentinels": tuple(range(size + 49, size, -1))}
        if kind == "bpe":
            assert all(found["starts"][int(coder.token_to_id(p))] for p in ("Ġ", "Ċ", ","))
            assert not any(found["starts"][int(coder.token_to_id(p))] for p in ("p", "Ã", "Ń"))
        pieces = coder.encode("it plays, playing").ids
        first = [coder.decode([i]) for i in pieces if found["starts"][i]]
        assert first == {"words": ["it", "plays", ",", "playing"], "bytes": [" ", ",", " "]}.get(kind, first)
    bytes_, _ = markers.of_masks(None, vocabulary=384)
    assert bytes_["mask"] == 256 and bytes_["special"] == (256,)
    assert [chr(b) for b in "a b,é\n".encode() if bytes_["starts"][b]] == [" ", ",", "\n"]
    said = "a vocabulary of 256 has no room for the tokens and a mask: give --vocabulary 384"
    assert said_by(markers.of_masks, None, vocabulary=256) == said
    said = "a vocabulary of 257 has no room for the tokens and an end and sentinels: give --vocabulary 384"
    assert said_by(markers.of_spans, None, vocabulary=257) == said


def test_rows_hold_every_token_once() -> None:
    held = tokens.Tokens(["a"], [np.arange(10, 35, dtype="<u2")], vocabulary=40)
    rows = tokens.Rows(held, length=8, first=1, last=2)
    assert len(rows) == 5
    got = [rows[n] for n in range(len(rows))]
    assert [list(row["tokens"]) for row in got[::4]] == [[1, 10, 11, 12, 13, 14, 15, 2], [1, 34, 2, 0, 0, 0, 0, 0]]
    assert [int(row["length"]) for row in got] == [8, 8, 8, 8, 3]
    assert [t for row in got for t in row["tokens"] if t >= 10] == list(range(10, 35))
    assert {row["tokens"].dtype for row in got} == {np.dtype("int32")}
    assert (
        len(tokens.Rows(held, length=25)) == 1 and list(tokens.Rows(held, length=25)[0]["tokens"]) == held[:].tolist()
    )
    with pytest.raises(UsageError, match="rows of 2 tokens hold none of the text: make them longer"):
        tokens.Rows(held, length=2, first=1, last=2)


# ---- the script


def built(*, model: str, **flags: Any) -> Any:
    module = load("pretrain")
    return module.build(module.Config(model=model, **flags))


@pytest.mark.parametrize("model", ["bert_tiny", "t5_tiny"])
def test_the_script_reads_prepared_text(model: str, tmp_path: Path) -> None:
    """Its loss is traced; what it reads comes back as the text that it was."""
    book = "".join(f"line {n} of the book\n" for n in range(600))
    prepare.write_tokens(str(written(tmp_path / "book.txt", book)), str(tmp_path / "t"))
    experiment = built(model=model, data=f"tokens:{tmp_path / 't'}", context=64, whole_word=model == "bert_tiny")
    example = experiment.train[0]
    assert bytes(example["tokens"].astype(np.uint8)).decode() == book[: len(example["tokens"])]
    batch = {k: np.stack([example[k]] * 2) for k in example} | {"index": np.arange(2, dtype=np.int32)}
    batch["mask"] = np.ones(2, np.float32)

    def pass_(key: Array) -> Any:
        params, state = experiment.task.init(key, batch)
        return experiment.task.losses["model"](params, state, batch, key)[0]

    assert [x.shape for x in jax.eval_shape(pass_, KEY)] == [(), ()]
    read = {"bert_tiny": 64, "t5_tiny": longest_row(64)}[model]
    assert example["tokens"].shape == (read,)


def test_what_the_script_refuses(tmp_path: Path) -> None:
    for split in ("train", "test"):
        written(tmp_path / "t" / f"{split}.bin", np.arange(300, dtype="<u2").tobytes())
    name = f"tokens:{tmp_path / 't'}"
    said = f"nothing says what the tokens of {name} mean: name their tokenizer.json as --tokenizer"
    assert said_by(built, model="bert_tiny", data=name) == said
    bert = bert_tokenizer(tmp_path / "b.json")
    rows = built(model="bert_tiny", data=name, tokenizer=bert).train[0]["tokens"]
    assert rows[0] == 2 and rows[-1] == 3 and len(rows) == 128
    said = "--whole-word is of BERT's masks, and spans are of any tokens: leave it out"
    assert said_by(built, model="t5_tiny", whole_word=True) == said
    said = "a vocabulary of 256 has no room for the tokens and a mask: give --vocabulary 384"
    assert said_by(built, model="bert_tiny", vocabulary=256) == said
    assert json.loads(Path(bert).read_text())["model"]["type"] == "WordPiece"
