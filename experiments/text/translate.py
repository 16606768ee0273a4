"""A text from another: translation, summaries. Python functions to their docstrings, or your own pairs; beam search.

Measured: bleu 38.54 in 2343 s on 2 CPU cores, commit ea5a130.

    python experiments/text/translate.py                                      # the first lines of Python's docstrings
    python experiments/text/translate.py --data pairs.jsonl --lower-case      # lines of {"source": ..., "target": ...}
    python experiments/text/translate.py --data tfds:wmt14_translate/de-en --source en
    python experiments/text/translate.py --data tfds:cnn_dailymail --pretrained FOLDER --prefix "summarize: "
"""

from dataclasses import dataclass
from typing import Annotated

from bigjax import UsageError, cli, pretrained
from bigjax.data import docstrings, pairs, reading, sources
from bigjax.data.text import load_tokenizer
from bigjax.experiment import Experiment, Fraction, NonNegative, Positive, Published, RunConfig, Within
from bigjax.look import texts
from bigjax.models import T5
from bigjax.ops import optimizers
from bigjax.pretrained import begin, tokens
from bigjax.tasks import sequence_to_sequence
from bigjax.use.text import fits

TAKES = ("source", "target")
ROWS = {  # docs/translate.md says of which files
    "translate_multi30k": {"data": "Multi30k, own .jsonl", "metric": "eval/bleu",
        "arguments": "--data multi30k/en_de_train.jsonl --eval-data multi30k/en_de_test_2016.jsonl --lower-case "
        "--dropout 0.1 --batch-size 64 --muon 0.02 --learning-rate 0.06"},
    "translate_docs": {"arguments": "--length 64 --minutes 10", "data": "python_docstrings", "metric": "eval/rouge_l"},
}  # fmt: skip
SMALL = {"layers": 4, "width": 128, "heads": 4, "mlp": 256}
WU = "Wu et al. 2021, Transformer-Tiny, lower-cased, beam 5: README-baseline.md of github.com/LividWo/Revisit-MMT"


@dataclass(frozen=True)
class Config(RunConfig):
    data: str = "python_docstrings"  # or a TFDS set, or your own .jsonl or .csv with source and target
    columns: cli.Flat[reading.Pair] = reading.Pair()
    pretrained: str | None = None  # a folder or hub id with weights of a T5 to begin with, and its tokenizer
    prefix: str = ""  # what goes before each source, by which a pretrained T5 knows its task
    tokenizer_file: str | None = None  # any tokenizer.json instead; else one is trained on the training split
    vocabulary: Annotated[int, Within(259)] = 6000  # tokens at most that are trained, for both sides
    lower_case: bool = False  # of all texts, and in BLEU and chrF
    length: Annotated[int | None, Positive] = None  # tokens of a source at most; else 98 % of them fit, up to 128
    target_length: Annotated[int | None, Positive] = None  # tokens of a target at most; likewise
    layers: Annotated[int | None, Positive] = None  # of the encoder, as many of the decoder; 4; the folder's
    width: Annotated[int | None, Positive] = None  # numbers a token is carried by; 128; the folder's
    heads: Annotated[int | None, Positive] = None  # of attention; 4; the folder's
    mlp: Annotated[int | None, Positive] = None  # hidden units; 256; the folder's
    dropout: Annotated[float, Fraction] = 0.3  # share dropped of the embedding and of what each layer adds
    label_smoothing: Annotated[float, Fraction] = 0.1  # share of each target spread over the vocabulary
    beams: Annotated[int, Positive] = 5  # of the search by which the test split is written
    length_penalty: Annotated[float, NonNegative] = 1.0  # the search divides log-probabilities by length ** this
    minutes: float | None = 30.0
    adamw: cli.Flat[optimizers.AdamWOrMuon] = optimizers.AdamWOrMuon(learning_rate=3e-3, weight_decay=1e-4, clip=1.0)
    ema: float = 0.999
    eval_every: int = 10**6


def build(c: Config) -> Experiment:
    asked = {k: v for k in SMALL if (v := getattr(c, k)) is not None}
    begun, shape = begin.weights(c.pretrained, T5, like=asked), SMALL | asked
    how = {"eval_data": c.eval_data, "split_seed": c.split_seed, "takes": TAKES, **vars(c.columns)}
    data = sources.load(c.data, **how).in_memory()
    if c.tokenizer_file or begun:
        coder = load_tokenizer(c.tokenizer_file) if c.tokenizer_file else pretrained.tokenizer(begun.folder).coder
    else:
        coder = pairs.train_coder(data, vocabulary=c.vocabulary, lower_case=c.lower_case)
    coder = pairs.lowered(coder) if c.lower_case else coder
    if not begun and shape["width"] % shape["heads"]:
        raise UsageError(f"--width {shape['width']} is no multiple of --heads {shape['heads']}: change one of the two")
    fresh = T5(tied=False, vocabulary=coder.get_vocab_size(), head=shape["width"] // shape["heads"], **shape)
    model = (begun.model if begun else fresh).clone(dropout=c.dropout, dtype=c.dtype)
    fits(coder.get_vocab_size(), model.vocabulary, where=c.tokenizer_file or c.pretrained)
    rows = pairs.encode(coder, data, length=c.length, target_length=c.target_length, prefix=c.prefix)
    judge, published = texts.scores(rows.references, lower_case=c.lower_case), []
    search = {"stop": rows.end, "beams": c.beams, "length_penalty": c.length_penalty}
    write = texts.writer(model, coder.decode, length=rows.test["target"].shape[1], **search)
    if c.data == "python_docstrings":
        copied = judge.score([docstrings.name_as_words(source) for source in rows.sources])["rouge_l"]
        published = [Published("eval/rouge_l", copied, "the function's name and arguments as words, in this run")]
    elif c.lower_case and str(c.eval_data).endswith("en_de_test_2016.jsonl"):
        published = [Published("eval/bleu", 41.02, WU)]
    return Experiment(
        task=sequence_to_sequence(model, label_smoothing=c.label_smoothing),
        tx=c.adamw,
        train=pairs.by_length(rows.train),
        test=rows.test,
        initial=begun,
        evaluators={"written": texts.written(write, rows.test, judge.score)},
        gallery={"written": texts.samples(write, rows.test, rows.sources, rows.references)},
        facts={**data.facts, "signatures": judge.signatures},
        published=published,
        tokenizer=tokens.Tokenizer(coder, {"eos_token": coder.id_to_token(rows.end)}),
    )


if __name__ == "__main__":
    cli.main(Config, build)
