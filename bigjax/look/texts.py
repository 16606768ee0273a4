"""Judgements of texts that a model writes, by the reference implementations of their scores, and samples of them.

N texts, B of a batch, L tokens that are read, R that are written.
"""

import importlib.metadata
from collections.abc import Callable, Mapping, Sequence
from textwrap import shorten
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np

from bigjax import UsageError
from bigjax.experiment import size_of
from bigjax.look.evaluators import Evaluator
from bigjax.run.watch import dog
from bigjax.sharding import to_host
from bigjax.task import Key, ModelState, Params, variables

NEEDED = 'scores of generated text need the package {}: pip install -e ".[text]"'
TOKENIZE = ("13a", "intl", "char", "zh")  # that need no other package
SHOWN = 400  # characters of a text in a sample


class Scores(NamedTuple):
    """score: N texts -> {"bleu", "chrf", "rouge_l"}, each from 0 to 100. signatures: how each is computed."""

    score: Callable[[Sequence[str]], dict[str, float]]
    signatures: dict[str, str]


def scores(references: Sequence[str], *, lower_case: bool = False, tokenize: str = "13a") -> Scores:
    """BLEU and chrF of the corpus by sacrebleu, ROUGE-L (the mean F1 of the texts) by rouge-score, against one
    reference a text.

    lower_case: of BLEU and chrF; ROUGE-L is always lower-cased, stems words and takes lines for sentences, as is usual.
    tokenize: of BLEU, as sacrebleu calls it ("zh" for Chinese, say). UsageError: a package is missing, or a reference.
    """
    try:
        from sacrebleu.metrics import BLEU, CHRF
    except ImportError:
        raise UsageError(NEEDED.format("sacrebleu")) from None
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError:
        raise UsageError(NEEDED.format("rouge-score")) from None
    references = list(references)
    if not references:
        raise UsageError("there is no reference to score texts by: give a test split that is not empty")
    if tokenize not in TOKENIZE:
        raise UsageError(f"BLEU is not tokenized by {tokenize!r} here: use {', '.join(TOKENIZE)}")
    bleu = BLEU(lowercase=lower_case, tokenize=tokenize, references=[references])
    chrf, rouge = CHRF(lowercase=lower_case, references=[references]), RougeScorer(["rougeLsum"], use_stemmer=True)

    def score(texts: Sequence[str]) -> dict[str, float]:
        if len(texts) != len(references):
            raise UsageError(f"{len(texts)} texts are to be scored by {len(references)} references: give one for each")
        pairs = zip(references, texts, strict=True)
        return {
            "bleu": float(bleu.corpus_score(list(texts), None).score),
            "chrf": float(chrf.corpus_score(list(texts), None).score),
            "rouge_l": 100 * float(np.mean([rouge.score(*pair)["rougeLsum"].fmeasure for pair in pairs])),
        }

    version = importlib.metadata.version("rouge-score")
    signatures = {name: metric.get_signature().format() for name, metric in (("bleu", bleu), ("chrf", chrf))}
    return Scores(score, signatures | {"rouge_l": f"rougeLsum|f:1|stemmer:yes|mean|rouge-score:{version}"})


Write = Callable[[Params, ModelState, Mapping[str, np.ndarray]], list[str]]


def writer(
    model: nn.Module,
    speak: Callable[[list[int]], str],
    *,
    length: int,
    stop: int | None = None,
    start: int = 0,
    beams: int = 5,
    length_penalty: float = 1.0,
    batch_size: int = 50,
) -> Write:
    """A function (params, model state, split) -> the text that the model writes for each of its `tokens` (N, L), of
    which `length` (N,) are real, by beam search; with one beam the likeliest token each time.

    All batches have one shape; texts of like length are together. speak: tokens -> text. The others: as of `generate`.
    """
    from bigjax.use import generate

    how = {"length": length, "stop": stop, "start": start, "beams": beams, "length_penalty": length_penalty}
    how |= {"temperature": 0.0} if beams == 1 else {}

    def write(params: Params, model_state: ModelState, split: Mapping[str, np.ndarray]) -> list[str]:
        mine, order = variables(params, model_state), np.argsort(split["length"], kind="stable")
        out = [""] * size_of(split)
        for first in range(0, len(order), batch_size):
            dog().beat()
            row_B = order[first : first + batch_size]
            full_B = np.resize(row_B, batch_size)  # the last is filled up with some of its own
            prompt = {"length_B": split["length"][full_B], **how}
            with jax.transfer_guard("allow"):  # it is given NumPy arrays: they are to be moved
                made = generate.generate(model, mine, split["tokens"][full_B], **prompt)
            tokens_RN, length_R = to_host((made.tokens_RN, made.length_R))
            for row, tokens_N, count in zip(row_B, tokens_RN, length_R):
                out[row] = speak(tokens_N[:count].tolist()).strip()
        return out

    return write


def written(
    write: Write, split: Mapping[str, np.ndarray], score: Callable[[Sequence[str]], dict[str, float]]
) -> Evaluator:
    """The scores of what is written for a whole split."""

    def judge(params: Params, model_state: ModelState, key: Key) -> dict[str, float]:
        return score(write(params, model_state, split))

    return judge


def samples(
    write: Write, split: Mapping[str, np.ndarray], sources: Sequence[str], references: Sequence[str], *, count: int = 10
) -> Callable[[Params, ModelState, Key], str]:
    """Some of a split, evenly spread: what is read, its reference, and what the model writes."""
    rows = np.unique(np.linspace(0, len(references) - 1, count).astype(int))

    def show(params: Params, model_state: ModelState, key: Key) -> str:
        texts = write(params, model_state, {k: v[rows] for k, v in split.items()})
        triples = [(sources[n], references[n], text) for n, text in zip(rows, texts, strict=True)]
        return "\n\n".join("\n".join(map(_told, ("source", "reference", "written"), triple)) for triple in triples)

    return show


def _told(what: str, text: Any) -> str:
    return f"{what:<10} {shorten(text, SHOWN, placeholder=' ...')}"
