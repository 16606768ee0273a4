"""A pretrained GPT on your own text or chats: all of it, adapters beside its matrices (LoRA), or some of it.

Measured: loss 3.521 in 946 s on 1 CPU cores, commit 0ac7a4e.

    python experiments/text/gpt_finetune.py --pretrained FOLDER --data book.txt       # GPT-2, Llama, SmolLM2, Qwen, ...
    python experiments/text/gpt_finetune.py --pretrained FOLDER --data chats.jsonl --lora-rank 8 --learning-rate 5e-4
    python experiments/text/gpt_finetune.py --pretrained FOLDER --data texts/ --train "norm/scale$"
"""

import sys
from dataclasses import dataclass
from typing import Annotated, Literal

from bigjax import cli, optim, pretrained
from bigjax.data import documents, packing, reading
from bigjax.experiment import Experiment, Positive, RunConfig
from bigjax.look.gallery import text_sample
from bigjax.models import GPT
from bigjax.pretrained import begin
from bigjax.pretrained.adapters import Adapt
from bigjax.pretrained.before import before
from bigjax.tasks import next_token
from bigjax.use.text import Letters, fits

METRIC = "eval/loss"  # in nats a token; of chats a token of the answers
TAKES = ("text",)
ROWS = {  # docs/lora.md says of which files
    "gpt_finetune": {
        "arguments": "--pretrained HuggingFaceTB/SmolLM2-135M --data tinyshakespeare.txt --context 128 --batch-size 4 "
        "--steps 60 --learning-rate 1e-4",
        "data": "Tiny Shakespeare, own .txt", "metric": "eval/loss",
    },
    "gpt_finetune_lora": {
        "arguments": "--pretrained HuggingFaceTB/SmolLM2-135M --data tinyshakespeare.txt --context 128 --batch-size 4 "
        "--steps 60 --learning-rate 1e-3 --lora-rank 16",
        "data": "Tiny Shakespeare, own .txt", "metric": "eval/loss",
    },
}  # fmt: skip
SMALL = {"vocabulary": 256, "layers": 2, "width": 64, "heads": 4, "context": 1024}  # to try a command
LLAMA = {"position": "rotary", "norm": "rms", "activation": "swiglu", "bias": False}
SAMPLE = 200  # tokens


@dataclass(frozen=True)
class Config(RunConfig):
    data: str = "python"  # your own .txt, folder of them, .jsonl or .csv with text; or .jsonl with messages: chats
    columns: cli.Flat[reading.Text] = reading.Text()
    pretrained: str | None = None  # a folder or hub id with weights of a GPT; without it a small one of bytes
    adapt: cli.Flat[Adapt] = Adapt()
    epochs: float | None = 3.0
    batch_size: int = 8
    context: Annotated[int, Positive] = 256  # tokens of a row, into which documents are packed
    adamw: cli.Flat[optim.AdamW] = optim.AdamW(learning_rate=5e-5, weight_decay=0.01, clip=1.0)
    scan: bool = True  # over layers: compiles in the time of one
    remat: Literal["auto", "none", "dots", "full"] = "none"  # what is computed again; auto: as little as fits
    save_every: int = 10**6  # a checkpoint is as large as the model


def build(c: Config) -> Experiment:
    options = {"eval_data": c.eval_data, "split_seed": c.split_seed, "takes": TAKES, **vars(c.columns)}
    data = documents.load(c.data, **options)
    begun = begin.weights(c.pretrained, GPT)
    if begun is None:
        print("no --pretrained: this is a small model of bytes that knows nothing", file=sys.stderr)
    model = begun.model if begun else GPT(**SMALL, **LLAMA)
    tokenizer = pretrained.tokenizer(begun.folder) if begun else Letters()
    fits(tokenizer.size, model.vocabulary, where=c.pretrained)
    how = {"scan": c.scan, "remat": c.remat, "dtype": c.dtype}
    plain, length = model.clone(**how), min(c.context, model.context)
    train, test = (documents.rows(part, tokenizer, length=length, name=c.data) for part in (data.train, data.test))
    model, prompt = c.adapt(plain), documents.prompt(data.test[0], tokenizer, tokens=16)
    evaluators = {"before": before(begun, next_token, test, batch_size=c.batch_size, **how)} if begun else {}
    return Experiment(
        task=next_token(model),
        tx=c.adamw,
        train=train,
        test=test,
        initial=begun,
        evaluators=evaluators,
        gallery={"sample": text_sample(model, prompt, speak=tokenizer.decode, length=SAMPLE)},
        tokenizer=begun.folder if begun else "bytes",
        facts={"padding_share": packing.padding_share(train)},
    )


if __name__ == "__main__":
    cli.main(Config, build)
