"""Scores of generated text: against their definitions, and how texts are generated for them."""

import sys
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest

from bigjax import UsageError
from bigjax.look import texts
from bigjax.use import generate

pytest.importorskip("sacrebleu", reason='pip install -e ".[text]"')
pytest.importorskip("rouge_score", reason='pip install -e ".[text]"')


def test_scores_are_their_definitions() -> None:
    """BLEU: n-grams of the corpus, (8/9 · 6/7 · 4/5 · 2/3)^¼ here; ROUGE-L: the mean of 2 · LCS / (both lengths)."""
    told = texts.scores(["a b c d e", "k l m n"])
    found = told.score(["a b c d z", "k l m n"])
    assert found["bleu"] == pytest.approx(100 * (8 / 9 * 6 / 7 * 4 / 5 * 2 / 3) ** 0.25)
    assert found["rouge_l"] == pytest.approx(100 * (4 / 5 + 1) / 2)
    assert 50 < found["chrf"] < 100
    assert told.score(["a b c d e", "k l m n"]) == pytest.approx({"bleu": 100, "chrf": 100, "rouge_l": 100})
    assert told.score(["", ""]) == {"bleu": 0, "chrf": 0, "rouge_l": 0}
    short = told.score(["a b c d", "k l m n"])["bleu"]  # nothing wrong, but the brevity penalty
    assert short == pytest.approx(100 * np.exp(1 - 9 / 8))


def test_lower_case_and_punctuation() -> None:
    """Lower case where it is asked for, and then the signatures say so; a full stop is a token of its own."""
    references, written = ["Ein Mann, der etwas liest."], ["ein mann , der etwas liest ."]
    lower, mixed = (texts.scores(references, lower_case=lower) for lower in (True, False))
    assert lower.score(written)["bleu"] == pytest.approx(100) and lower.score(written)["chrf"] == pytest.approx(100)
    assert mixed.score(written)["bleu"] < 80 and mixed.score(written)["chrf"] < 95
    assert "|case:lc|" in lower.signatures["bleu"] and "|case:mixed|" in mixed.signatures["bleu"]
    assert "|case:lc|" in lower.signatures["chrf"] and "|case:mixed|" in mixed.signatures["chrf"]
    assert "|tok:13a|" in lower.signatures["bleu"] and "nrefs:1|" in lower.signatures["bleu"]
    assert lower.signatures["rouge_l"].startswith("rougeLsum|f:1|stemmer:yes|mean|rouge-score:")
    assert texts.scores(["我们走了"], tokenize="zh").score(["我们走了"])["bleu"] == pytest.approx(100)


@pytest.mark.parametrize(
    ("references", "how", "said"),
    [
        ([], {}, "there is no reference to score texts by"),
        (["a"], {"tokenize": "nonsense"}, "BLEU is not tokenized by 'nonsense' here: use 13a, "),
    ],
)
def test_mistakes_are_named(references: list[str], how: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        texts.scores(references, **how)
    with pytest.raises(UsageError, match="2 texts are to be scored by 1 references: give one for each"):
        texts.scores(["a"]).score(["a", "b"])


@pytest.mark.parametrize(
    ("module", "package"), [("sacrebleu.metrics", "sacrebleu"), ("rouge_score.rouge_scorer", "rouge-score")]
)
def test_a_missing_package_is_one_line(module: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UsageError) as wrong:
        texts.scores(["a"])
    assert str(wrong.value) == f'scores of generated text need the package {package}: pip install -e ".[text]"'


# ---- what is written


def test_texts_come_in_batches_of_one_shape_and_in_their_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seven texts in batches of three: each is of its own row, as long as it is said to be."""
    asked: list[Any] = []

    def fake(model: Any, variables: Any, prompt_BL: np.ndarray, *, length_B: np.ndarray, **how: Any) -> Any:
        asked.append((prompt_BL.shape, length_B.shape, length_B.tolist(), how))
        return SimpleNamespace(tokens_RN=jax.numpy.asarray(prompt_BL[:, ::-1]), length_R=jax.numpy.asarray(length_B))

    monkeypatch.setattr(generate, "generate", fake)
    length_N = np.array([2, 4, 1, 3, 4, 2, 1], np.int32)
    split = {"tokens": np.arange(28, dtype=np.int32).reshape(7, 4), "length": length_N}
    write = texts.writer(None, str, length=9, stop=1, beams=5, batch_size=3)
    found = write({"model": {}}, {}, split)
    assert found == [str(row[::-1][:n].tolist()) for row, n in zip(split["tokens"], length_N)]
    assert {shapes[:2] for shapes in asked} == {((3, 4), (3,))}
    assert [n for shapes in asked for n in shapes[2]] == [1, 1, 2, 2, 3, 4, 4, 4, 4]  # like lengths together
    assert asked[0][3] == {"length": 9, "stop": 1, "start": 0, "beams": 5, "length_penalty": 1.0}
    texts.writer(None, str, length=9, beams=1)({"model": {}}, {}, split)
    assert asked[-1][3]["temperature"] == 0.0 and asked[-1][0] == (50, 4)

    judged = texts.written(lambda *_: ["a", "b"], split, lambda texts: {"bleu": float(len(texts))})
    assert judged({}, {}, jax.random.key(0)) == {"bleu": 2.0}
    sources, references = [[f"{kind} {n}" for n in range(7)] for kind in ("read", "wanted")]
    shown = texts.samples(write, split, sources, references, count=2)({"model": {}}, {}, jax.random.key(0))
    assert shown == (
        "source     read 0\nreference  wanted 0\nwritten    [3, 2]\n\n"
        "source     read 6\nreference  wanted 6\nwritten    [27]"
    )
