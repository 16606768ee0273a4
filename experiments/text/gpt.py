"""GPT-2, GPT-3 and Llama shapes on your own tokens, from one device to a pod; and its plan for a slice you don't have.

Measured: not yet.

    python experiments/text/gpt.py --data tokens:DIR --batch-size 64              # see python -m bigjax prepare
    python experiments/text/gpt.py plan --model gpt3_175b --batch-size 512 --topology v5p:8x8x8 --mesh.fsdp 64 \\
        --mesh.tensor 8
"""

import sys
from dataclasses import dataclass
from typing import Annotated, Literal

import jax
import numpy as np

from bigjax import UsageError, cli, optim
from bigjax.data import tokens
from bigjax.experiment import Experiment, Positive, RunConfig
from bigjax.look.gallery import speaker, text_sample
from bigjax.models import GPT
from bigjax.tasks import next_token

METRIC = "eval/bits_per_byte"  # of text whose bytes are known
TAKES = ("tokens",)
# Vocabularies are filled up to a multiple of 128, so that they can be split.
GPT2 = {"vocabulary": 50304, "context": 1024}  # Radford et al. 2019, table 2
LLAMA = {  # Grattafiori et al. 2024, table 3
    "vocabulary": 128_256,
    "context": 8192,
    "kv_heads": 8,
    "position": "rotary",
    "norm": "rms",
    "activation": "swiglu",
    "bias": False,
}
PRESETS = {
    "tiny": {"vocabulary": 1024, "layers": 2, "width": 128, "heads": 2, "context": 256},  # to try a command
    "gpt2_124m": GPT2 | {"layers": 12, "width": 768, "heads": 12},
    "gpt2_350m": GPT2 | {"layers": 24, "width": 1024, "heads": 16},
    "gpt2_774m": GPT2 | {"layers": 36, "width": 1280, "heads": 20},
    "gpt2_1558m": GPT2 | {"layers": 48, "width": 1600, "heads": 25},
    "gpt3_175b": GPT2 | {"layers": 96, "width": 12288, "heads": 96, "context": 2048},  # Brown et al. 2020, table 2.1
    "llama_1b": LLAMA | {"layers": 16, "width": 2048, "heads": 32, "mlp": 8192},  # its model card, Llama 3.2
    "llama_8b": LLAMA | {"layers": 32, "width": 4096, "heads": 32, "mlp": 14336, "tied": False},
    "llama_70b": LLAMA | {"layers": 80, "width": 8192, "heads": 64, "mlp": 28672, "tied": False},
}


@dataclass(frozen=True)
class Config(RunConfig):
    data: str = "random"  # tokens at random, to try speed; or tokens:DIR
    model: Literal[tuple(PRESETS)] | None = None  # gpt2_124m; without an accelerator tiny
    steps: int | None = 1000
    batch_size: int = 8
    context: Annotated[int | None, Positive] = None  # tokens a row; the model's own by default
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    adamw: cli.Flat[optim.AdamW] = optim.AdamW(learning_rate=3e-4, weight_decay=0.1, clip=1.0, b2=0.95)
    attention: Literal["auto", "plain", "splash", "cudnn"] = "auto"  # auto: by splash on TPU, by cuDNN on a GPU
    split_residual: bool = False  # the stream between blocks over mesh.tensor: less memory, more traffic
    scan: bool = True  # over layers: compiles in the time of one
    remat: Literal["auto", "none", "dots", "full"] = "full"  # what is computed again; auto: as little as fits


def build(c: Config) -> Experiment:
    backend = jax.default_backend()
    small = c.model is None and backend == "cpu" and c.attention == "auto"  # which is settled where a slice is planned
    if small:
        print("no accelerator here: this is the tiny model; give --model for another", file=sys.stderr)
    preset = PRESETS[c.model or ("tiny" if small else "gpt2_124m")]
    length = c.context or preset["context"]
    how = {"attention": c.attention, "split_residual": c.split_residual, "scan": c.scan, "remat": c.remat}
    model = GPT(**preset | {"context": length}, **how, dtype=c.dtype)
    if c.eval_data is not None:
        raise UsageError("gpt.py evaluates on the test.bin beside the tokens it trains on: leave out --eval-data")
    if c.data == "random":
        random_NL = np.random.default_rng(c.seed).integers(0, model.vocabulary, (1024, length + 1), dtype=np.int32)
        train, test = {"tokens": random_NL}, {"tokens": random_NL[:8]}
        bytes_a_token, gallery, tokenizer = None, {}, None
    else:
        data = tokens.load(c.data, vocabulary=model.vocabulary)
        train = tokens.Windows(data.train, length=length, stride=length, once=False)
        test = tokens.Windows(data.test, length=length, before=data.facts["before"])
        bytes_a_token, known = data.facts["bytes_a_token"], data.facts["corpus_sha256"] is not None
        tokenizer = data.facts["tokenizer"] or ("bytes" if known else None)
        prompt, speak = data.test[:16], speaker(data.facts["tokenizer"], known=known)
        gallery = {"sample": text_sample(model, prompt, speak=speak, length=200)}
    return Experiment(
        task=next_token(model, bytes_a_token=bytes_a_token),
        tx=c.adamw,
        train=train,
        test=test,
        gallery=gallery,
        tokenizer=tokenizer,
    )


if __name__ == "__main__":
    cli.main(Config, build)
