"""bigjax, as its scripts run: `train.fit` with its log, its norms, its checks. Two rows: by its defaults, and bare."""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import optax

from bench.works import ADAM, TOLD, Work, data
from bigjax import train
from bigjax.experiment import Experiment, RunConfig
from bigjax.models import BERT, CNN, GPT, LSTM, MLP, Autoencoder, Discriminator, Generator
from bigjax.run.log import read_log
from bigjax.task import fields
from bigjax.tasks import classify, next_token
from bigjax.tasks.gan import adversarial
from bigjax.tasks.images import reconstruct


def experiment(work: Work) -> Experiment:
    s, given = work.sizes, data(work)
    x, y = given["x"], given["y"]
    if work.kind == "mlp":
        model, rows = MLP(features=s["hidden"], outputs=s["outputs"]), {"x": x, "label": y}
    elif work.kind == "cnn":
        model, rows = CNN(features=s["features"], dense=(s["dense"],), outputs=s["outputs"]), {"image": x, "label": y}
    elif work.kind == "lstm":
        model, rows = LSTM(hidden=s["hidden"], outputs=s["outputs"]), {"x": x, "label": y}
    elif work.kind == "lstm_tokens":
        sizes = {"vocabulary": s["vocabulary"], "embedding": s["width"], "hidden": s["hidden"]}
        model, rows = LSTM(**sizes, outputs=s["outputs"]), {"x": x, "label": y}
    elif work.kind == "bert":
        sizes = {k: s[k] for k in ("vocabulary", "context", "layers", "width", "heads", "mlp")}
        model, rows = BERT(**sizes, head="sequence", outputs=s["outputs"], dropout=0.0), {"x": x, "label": y}
    elif work.kind == "dcgan":
        players = Generator(latent=s["latent"], features=s["generator"]), Discriminator(features=s["discriminator"])
        tx = dict.fromkeys(("generator", "discriminator"), optax.adam(ADAM))
        return Experiment(adversarial(*players), tx, {"image": x}, None)
    elif work.kind == "gpt":
        model = GPT(**{k: s[k] for k in ("vocabulary", "context", "layers", "width", "heads")}, tied=False)
        tokens = np.concatenate([x, y[:, -1:]], axis=1)
        return Experiment(next_token(model), optax.adam(ADAM), {"tokens": tokens}, None)
    else:
        encoder, code, *decoder = s["hidden"]
        model = Autoencoder(encoder_features=(encoder,), code=code, decoder_features=tuple(decoder))
        return Experiment(reconstruct(model), optax.adam(ADAM), {"image": x.reshape(-1, 28, 28, 1)}, None)
    task = classify(model, classes=s["outputs"], inputs=fields("image" if work.kind == "cnn" else "x"))
    return Experiment(task, optax.adam(ADAM), rows, None)


def run(work: Work, **flags: Any) -> tuple[float, list[float]]:
    """(the loss after some updates, examples a second of each part of the rest)."""
    part = max(work.updates // 4, 1)
    with tempfile.TemporaryDirectory() as folder:
        how = {"batch_size": work.batch, "eval_every": 10**6, "save_every": 10**6, "hang_seconds": 0.0} | flags
        seconds, losses = [], []
        for steps, every in ((TOLD, 10), (TOLD + work.updates, part)):
            config = RunConfig(workdir=f"{folder}/{steps}", steps=steps, log_every=every, **how)
            train.fit(experiment(work), config, quiet=True)
            lines = [r for r in read_log(Path(folder) / str(steps) / "metrics.jsonl") if r["split"] == "train"]
            losses.append(lines[-1]["discriminator_loss" if work.kind == "dcgan" else "loss"])
            seconds = [r["examples_per_second"] for r in lines[1:] if "examples_per_second" in r]
    return losses[0], seconds


SIDES: dict[str, Callable[[Work], tuple[float, list[float]]]] = {
    "bigjax": run,
    "bigjax --fuse 1 --no-resident": lambda work: run(work, fuse=1, resident=False),
}
