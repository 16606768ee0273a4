"""BERT and T5 shapes on your own tokens: BERT restores tokens that are masked, T5 writes spans that are taken out.

Measured: not yet.

    python experiments/text/pretrain.py --data tokens:DIR --model bert_base --whole-word  # see python -m bigjax prepare
    python experiments/text/pretrain.py --data tokens:DIR --model t5_small --batch-size 128
    python experiments/text/pretrain.py plan --model t5_xxl --batch-size 512 --topology v5p:4x4x8 --mesh.fsdp 64
"""

import sys
from dataclasses import dataclass
from typing import Annotated, Literal

import jax
import numpy as np

from bigjax import UsageError, cli, optim
from bigjax.data import markers, tokens
from bigjax.experiment import Experiment, Positive, RunConfig
from bigjax.models import BERT, T5
from bigjax.tasks import masked_token, span_corruption
from bigjax.tasks.spans import longest_row

METRIC = "eval/loss"
TAKES = ("tokens",)
# Vocabularies are filled up to a multiple of 128, so that they can be split; a T5's context is of what it reads.
BERT_SHAPE = {"vocabulary": 30592, "context": 512}  # Devlin et al. 2019, section 3
T5_SHAPE = {"vocabulary": 32128, "context": 512}  # Raffel et al. 2020, sections 3.1 and 3.7
V1_1 = T5_SHAPE | {"activation": "geglu", "tied": False, "dropout": 0.0}  # its release of October 2020
PRESETS = {
    "bert_tiny": {"vocabulary": 1024, "layers": 2, "width": 128, "heads": 2, "context": 128},  # to try a command
    "bert_base": BERT_SHAPE | {"layers": 12, "width": 768, "heads": 12},
    "bert_large": BERT_SHAPE | {"layers": 24, "width": 1024, "heads": 16},
    "t5_tiny": {"vocabulary": 1024, "layers": 2, "width": 128, "heads": 2, "mlp": 256, "context": 128},
    "t5_small": T5_SHAPE | {"layers": 6, "width": 512, "heads": 8, "mlp": 2048},
    "t5_base": T5_SHAPE | {"layers": 12, "width": 768, "heads": 12, "mlp": 3072},
    "t5_large": T5_SHAPE | {"layers": 24, "width": 1024, "heads": 16, "mlp": 4096},
    "t5_xl": V1_1 | {"layers": 24, "width": 2048, "heads": 32, "mlp": 5120},
    "t5_xxl": V1_1 | {"layers": 24, "width": 4096, "heads": 64, "mlp": 10240},
}


@dataclass(frozen=True)
class Config(RunConfig):
    data: str = "random"  # bytes at random, to try speed; or tokens:DIR
    model: Literal[tuple(PRESETS)] | None = None  # bert_base; without an accelerator bert_tiny
    steps: int | None = 1000
    batch_size: int = 32
    context: Annotated[int | None, Positive] = None  # tokens that are read at once; the model's own by default
    vocabulary: Annotated[int | None, Positive] = None  # of the model; its own by default
    tokenizer: str | None = None  # a tokenizer.json, for tokens that have none beside them
    whole_word: bool = False  # BERT: all tokens of a word are chosen together
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    adamw: cli.Flat[optim.AdamW] = optim.AdamW(learning_rate=1e-4, weight_decay=0.01, clip=1.0)
    scan: bool = True  # over layers: compiles in the time of one
    remat: Literal["auto", "none", "dots", "full"] = "none"  # what is computed again; auto: as little as fits


def build(c: Config) -> Experiment:
    if c.model is None and jax.default_backend() == "cpu":
        print("no accelerator here: this is the tiny BERT; give --model for another", file=sys.stderr)
    name = c.model or ("bert_tiny" if jax.default_backend() == "cpu" else "bert_base")
    preset, asked = PRESETS[name], {"vocabulary": c.vocabulary, "context": c.context}
    fields = preset | {k: v for k, v in asked.items() if v} | {"scan": c.scan, "remat": c.remat, "dtype": c.dtype}
    vocabulary, context = fields["vocabulary"], fields["context"]
    if c.eval_data is not None:
        raise UsageError("pretrain.py evaluates on the test.bin beside the tokens it trains on: leave out --eval-data")
    tokenizer, data = c.tokenizer, None
    if c.data != "random":
        data = tokens.load(c.data, vocabulary=vocabulary)
        tokenizer = tokenizer or data.facts["tokenizer"]
        if tokenizer is None and data.facts["corpus_sha256"] is None:
            raise UsageError(f"nothing says what the tokens of {c.data} mean: name their tokenizer.json as --tokenizer")
    if name.startswith("bert"):
        model = BERT(**fields, head="masked")
        options, around = markers.of_masks(tokenizer, vocabulary=vocabulary)
        starts = options.pop("starts")
        task = masked_token(model, **options, vocabulary=vocabulary, starts=starts if c.whole_word else None)
        rows = {"length": context, **around}
    else:
        if c.whole_word:
            raise UsageError("--whole-word is of BERT's masks, and spans are of any tokens: leave it out")
        del fields["context"]
        model, rows = T5(**fields), {"length": longest_row(context)}
        task = span_corruption(model, **markers.of_spans(tokenizer, vocabulary=vocabulary))
    if data is None:
        shape = (1024, rows["length"])
        train = {"tokens": np.random.default_rng(c.seed).integers(0, 256, shape, dtype=np.int32)}
        test = {"tokens": train["tokens"][:8]}
    else:
        train, test = (tokens.Rows(split, **rows) for split in (data.train, data.test))
    return Experiment(task=task, tx=c.adamw, train=train, test=test)


if __name__ == "__main__":
    cli.main(Config, build)
