"""GPT byte by byte on Python's standard library, on your own text, or on the One Billion Word benchmark.

Measured: bits per byte 1.884 in 291 s on 2 CPU cores, commit b56f7ab.

    python experiments/text/python_gpt.py
    python experiments/text/python_gpt.py --minutes 20
    python experiments/text/python_gpt.py --data book.txt                          # or a folder of .txt, a .jsonl, ...
    python experiments/text/python_gpt.py --data lm1b --context 512 --minutes 600  # lm1b, through TFDS
"""

from dataclasses import dataclass
from typing import Annotated

import optax

from bigjax import cli, optim
from bigjax.data import corpus, reading, text
from bigjax.experiment import Experiment, NonNegative, Positive, Published, RunConfig
from bigjax.look.gallery import speaker, text_sample
from bigjax.models import GPT
from bigjax.ops import optimizers
from bigjax.tasks import next_token

TAKES = ("text",)
ROWS = {
    "python_gpt": {"data": "python", "metric": "eval/bits_per_byte"},
    "python_gpt_20": {"arguments": "--minutes 20", "data": "python", "metric": "eval/bits_per_byte"},
    "python_gpt_lm1b": {
        "arguments": "--data lm1b --context 512 --minutes 600",
        "data": "lm1b",
        "metric": "eval/bits_per_byte",
    },
}

PROMPT = {"python": b"def ", "lm1b": b"The "}
SAMPLE = 400  # bytes
CHOE = "Choe et al., arXiv:1908.10322, 2019: 40 layers, on bytes; sentence by sentence, where ours sees those before"


@dataclass(frozen=True)
class Config(RunConfig):
    data: str = "python"  # or lm1b (TFDS), or a path to your own .txt, folder of them, or .jsonl or .csv with text
    columns: cli.Flat[reading.Text] = reading.Text()
    minutes: float | None = 4.0
    batch_size: int = 16
    learning_rate: Annotated[float, Positive] = 0.02  # of Muon, for matrices
    adam_rate: Annotated[float, Positive] = 3e-3  # for embeddings, norms and biases
    schedule: optim.Schedule = "warmup-cosine"  # how both learning rates change over the run
    weight_decay: Annotated[float, NonNegative] = 0.01  # a share × learning rate of each matrix, an update
    context: Annotated[int, Positive] = 256  # bytes that are seen at once
    layers: Annotated[int, Positive] = 4  # blocks of attention and MLP
    width: Annotated[int, Positive] = 192  # numbers a byte is carried by from block to block
    heads: Annotated[int, Positive] = 4  # of attention
    eval_every: int = 10**6
    save_every: int = 500


def build(c: Config) -> Experiment:
    options = {"eval_data": c.eval_data, "split_seed": c.split_seed, "takes": TAKES, **vars(c.columns)}
    data = corpus.load(c.data, length=c.context, batch_size=c.batch_size, **options)
    xz, published, prompt = data.facts.get("xz_bits_per_byte"), [], PROMPT.get(c.data, b"\n")
    if c.data == "lm1b":
        published = [Published("eval/bits_per_byte", 0.874, CHOE, better="lower")]
    elif xz is not None:
        published = [Published("eval/bits_per_byte", xz, "xz -9 on the same bytes, in this run", better="lower")]
    context = max(c.context, SAMPLE + len(prompt))
    shape = {"vocabulary": 256, "layers": c.layers, "width": c.width, "heads": c.heads, "context": context}
    model = GPT(**shape, position="rotary", norm="rms", activation="gelu", bias=False, dtype=c.dtype)

    def tx(steps: int) -> optax.GradientTransformation:
        rates = [optim.schedule(c.schedule, peak, steps=steps) for peak in (c.learning_rate, c.adam_rate)]
        return optimizers.muon(rates[0], adam_rate=rates[1], weight_decay=c.weight_decay)

    return Experiment(
        task=next_token(model, bytes_a_token=1),
        tx=tx,
        train=data.train,
        test=text.byte_windows(data.test, length=c.context, stride=max(c.context // 2, 1)),
        gallery={"sample": text_sample(model, list(prompt), speak=speaker(None), length=SAMPLE)},
        tokenizer="bytes",
        facts=data.facts,
        published=published,
    )


if __name__ == "__main__":
    cli.main(Config, build)
