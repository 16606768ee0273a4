"""GPT character by character on any text; on Tiny Shakespeare beside nanoGPT's small recipe.

Measured: loss 1.59 ± 0.0115 (3 seeds) in 278 s on 1 CPU cores, commit 30d0a23.

    python experiments/text/char_gpt.py --data tinyshakespeare.txt            # or another .txt, a folder of them, ...
    python experiments/text/char_gpt.py --data tinyshakespeare.txt --classic  # by nanoGPT's recipe
    python experiments/text/char_gpt.py                                       # Python's standard library
"""

from dataclasses import dataclass
from typing import Annotated

import numpy as np
import optax

from bigjax import cli, optim
from bigjax.data import characters, reading
from bigjax.experiment import Experiment, NonNegative, Positive, Published, RunConfig
from bigjax.look.gallery import text_sample
from bigjax.models import GPT
from bigjax.ops import optimizers
from bigjax.run.limits import recipe
from bigjax.tasks import next_token

TAKES = ("text",)
ROWS = {  # the text is github.com/karpathy/char-rnn, data/tinyshakespeare/input.txt
    "char_gpt": {"arguments": "--data tinyshakespeare.txt", "data": "Tiny Shakespeare", "metric": "eval/loss",
                 "seeds": 3},
    "char_gpt_classic": {"arguments": "--data tinyshakespeare.txt --classic", "data": "Tiny Shakespeare",
                         "metric": "eval/loss", "seeds": 3},
}  # fmt: skip
SHAKESPEARE = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"  # SHA-256 of that text
NANOGPT = "nanoGPT's README, 'I only have a macbook': 4 layers, 4 heads, width 128, 64 characters, batch 12"
SAMPLE = 400  # characters


@dataclass(frozen=True)
class Config(RunConfig):
    data: str = "python"  # a path to your own .txt, folder of them, or .jsonl or .csv with text; or a TFDS set
    columns: cli.Flat[reading.Text] = reading.Text()
    steps: int | None = 2000
    batch_size: int = 12
    classic: bool = False  # nanoGPT's recipe: learned positions, LayerNorm, AdamW
    learning_rate: Annotated[float, Positive] = 0.02  # of Muon, for matrices
    adam_rate: Annotated[float, Positive] = 5e-3  # for embeddings and norms
    weight_decay: Annotated[float, NonNegative] = 0.01  # a share × learning rate of each matrix
    context: Annotated[int, Positive] = 64  # characters that are seen at once
    layers: Annotated[int, Positive] = 4  # blocks of attention and MLP
    width: Annotated[int, Positive] = 128  # numbers a character is carried by from block to block
    heads: Annotated[int, Positive] = 4  # of attention


def build(c: Config) -> Experiment:
    classic = recipe(c, "classic", "learning_rate", "adam_rate", "weight_decay")
    options = {"eval_data": c.eval_data, "split_seed": c.split_seed, "takes": TAKES, **vars(c.columns)}
    data = characters.load(c.data, length=c.context, stride=max(c.context // 2, 1), **options)
    names, known = data.class_names, data.facts["corpus_sha256"] == SHAKESPEARE
    shape = {"vocabulary": len(names), "layers": c.layers, "width": c.width, "heads": c.heads, "bias": False}
    if classic:
        model = GPT(**shape, context=c.context, activation="gelu_erf", dtype=c.dtype)
    else:  # rotary positions go on after those of training
        model = GPT(**shape, context=max(c.context, 1 + SAMPLE), position="rotary", norm="rms", dtype=c.dtype)

    def tx(steps: int) -> optax.GradientTransformation:
        if classic:
            rate = optim.schedule("warmup-cosine", 1e-3, steps=steps, warmup=100, end=0.1)
            return optim.adamw(rate, weight_decay=0.1, clip=1.0, b2=0.99)
        rates = [optim.schedule("warmup-cosine", peak, steps=steps) for peak in (c.learning_rate, c.adam_rate)]
        return optimizers.muon(rates[0], adam_rate=rates[1], weight_decay=c.weight_decay)

    def speak(ids: np.ndarray) -> str:
        return "".join(names[i] for i in ids)

    return Experiment(
        task=next_token(model),
        tx=tx,
        train=data.train,
        test=data.test,
        gallery={"sample": text_sample(model, [0], speak=speak, length=SAMPLE)},
        facts=data.facts,
        tokenizer=names,
        published=[Published("eval/loss", 1.88, NANOGPT, better="lower")] if known else [],
    )


if __name__ == "__main__":
    cli.main(Config, build)
