"""The families of models, tiny, each with its task and data: what must hold of every one is in test_families.py.

Scripts that tests start import this file, and no test.
"""

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import flax.linen as nn
import numpy as np
import optax
from strict import blobs  # its settings are every test's

from bigjax import optim
from bigjax.models import (
    BERT,
    CNN,
    GPT,
    LSTM,
    T5,
    VAE,
    Autoencoder,
    Discriminator,
    Generator,
    Inception,
    Mixtral,
    ResNet,
    TextCNN,
    ViT,
)
from bigjax.models.convnext import ConvNeXt
from bigjax.models.efficientnet import EfficientNet
from bigjax.task import Task, fields
from bigjax.tasks import classify, masked_token, next_token, span_corruption
from bigjax.tasks.gan import adversarial
from bigjax.tasks.images import reconstruct, variational
from bigjax.tasks.spans import hidden_spans

BATCH, TEST = 8, 13
Models = nn.Module | Mapping[str, nn.Module]


def drawings(size: int, *, seed: int) -> dict[str, np.ndarray]:
    """Blobs in black and white, which can be given back without any loss."""
    split = blobs(size, seed=seed)
    return split | {"image": np.where(split["image"] > 90, 255, 0).astype(np.uint8)}


def texts(size: int, *, seed: int) -> dict[str, np.ndarray]:
    """Tokens (size, 6) of 1 to 6 real ones; the label is whether the first is above 5."""
    random = np.random.default_rng(seed)
    length = random.integers(1, 7, size).astype(np.int32)
    tokens = random.integers(1, 11, (size, 6)).astype(np.int32) * (np.arange(6) < length[:, None])
    return {"tokens": tokens, "length": length, "label": (tokens[:, 0] > 5).astype(np.int32)}


def windows(size: int, *, seed: int) -> dict[str, np.ndarray]:
    """Tokens (size, 7) of which the targets from `start` to `length` count, at least one a row."""
    random = np.random.default_rng(seed)
    start = random.integers(1, 4, size).astype(np.int32)
    length = random.integers(start + 1, 8).astype(np.int32)
    return {"tokens": random.integers(0, 11, (size, 7)).astype(np.int32), "start": start, "length": length}


def chants(size: int, *, seed: int) -> dict[str, np.ndarray]:
    """Tokens (size, 6) of 2 to 6 real ones, in each row the same again and again."""
    random = np.random.default_rng(seed)
    length = random.integers(2, 7, size).astype(np.int32)
    tokens = random.integers(2, 5, (size, 1)).astype(np.int32) * (np.arange(6) < length[:, None])
    return {"tokens": tokens, "length": length}


def posters(size: int, *, seed: int) -> dict[str, np.ndarray]:
    """Blobs of 28 pixels a side."""
    split = blobs(size, seed=seed)
    return split | {"image": split["image"].repeat(7, axis=1).repeat(7, axis=2)}


@dataclasses.dataclass(frozen=True)
class Family:
    """task: of the models. falls: the metric that training lowers. counts: of the test split -> how much is counted."""

    models: Models
    task: Callable[[Any], Task]
    data: Callable[..., dict[str, np.ndarray]] = blobs
    falls: str = "loss"
    counts: Callable[[Mapping[str, np.ndarray]], int] = lambda split: TEST
    tx: Callable[[int], Mapping[str, optax.GradientTransformation]] = lambda steps: {"model": optax.adam(0.02)}
    ema: float = 0.0
    by_row: bool = True  # no statistics of the batch, so parts of it add up to the whole


def gan(models: Mapping[str, nn.Module]) -> Task:
    return adversarial(models["generator"], models["discriminator"], loss="hinge")


AUTO = {"image": (4, 4, 1), "code": 3, "encoder_features": (8,), "decoder_features": (8,)}
FAMILIES = {
    "cnn": Family(
        CNN(features=(4,), dense=(6,), pools=1, padding="SAME", outputs=3, batch_norm=True, dropout=0.1),
        partial(classify, classes=3, top_k=2),
        ema=0.8,
        by_row=False,
    ),
    "lstm_images": Family(LSTM(hidden=(6,), outputs=3, dropout=0.1), partial(classify, classes=3)),
    "lstm_tokens": Family(
        LSTM(vocabulary=11, embedding=4, hidden=(6,), pool="mean", outputs=1, dropout=0.1),
        partial(classify, classes=2, inputs=fields("tokens", "length")),
        data=texts,
    ),
    "text_cnn": Family(
        TextCNN(vocabulary=11, embedding=4, widths=(2, 3), maps=4, outputs=2, dropout=0.1),
        partial(classify, classes=2, inputs=fields("tokens", "length")),
        data=texts,
    ),
    "gpt": Family(
        GPT(vocabulary=11, layers=2, width=8, heads=2, context=6, dropout=0.1, scan=True),
        partial(next_token, bytes_a_token=1),
        data=windows,
        counts=lambda split: int((split["length"] - split["start"]).sum()),
        tx=lambda steps: {"model": optax.adam(optim.schedule("cosine", 0.03, steps=steps))},
    ),
    "mixtral": Family(
        Mixtral(vocabulary=11, layers=2, width=8, heads=2, kv_heads=1, experts=3, mlp=12, context=6, scan=True),
        partial(next_token, balance=0.05),
        data=windows,
        counts=lambda split: int((split["length"] - split["start"]).sum()),
    ),
    "bert": Family(
        BERT(vocabulary=11, layers=1, width=8, heads=2, context=6, head="masked"),
        partial(masked_token, mask=1, vocabulary=11, special=(0,), share=0.4),
        data=chants,
        counts=lambda split: int(np.maximum(np.round(0.4 * split["length"]), 1).sum()),
    ),
    "t5": Family(
        T5(vocabulary=11, layers=1, width=8, heads=2, head=4, mlp=12, buckets=4, distance=6),
        partial(span_corruption, sentinels=(10, 9), end=1, share=0.5, mean=1.5),
        data=chants,
        counts=lambda split: sum(sum(hidden_spans(int(n), share=0.5, mean=1.5)) + 1 for n in split["length"]),
    ),
    "vit": Family(
        ViT(image=4, patch=2, layers=1, width=8, heads=2, outputs=3, dropout=0.1), partial(classify, classes=3)
    ),
    "resnet": Family(
        ResNet(stages=(1,), block="basic", width=4, stem="cifar", outputs=3),
        partial(classify, classes=3),
        ema=0.8,
        by_row=False,
    ),
    "inception": Family(
        Inception(outputs=3, blocks=("5b A 32",), shrink=16, dropout=0.1),
        partial(classify, classes=3),
        data=posters,
        ema=0.8,
        by_row=False,
    ),
    "gan": Family(
        {
            "generator": Generator((4, 4, 1), latent=3, features=(6,), batch_norm=True, classes=3),
            "discriminator": Discriminator(features=(4,), pool="flatten", spectral_norm=True, classes=3, dropout=0.1),
        },
        gan,
        falls="discriminator_loss",
        tx=lambda steps: {"discriminator": optax.adam(0.03), "generator": optax.adam(0.001)},
        ema=0.8,
        by_row=False,
    ),
    "autoencoder": Family(Autoencoder(**AUTO, dropout=0.1), reconstruct, data=drawings),
    "vae": Family(VAE(**AUTO), partial(variational, beta=0.1), data=drawings, ema=0.8),
    "convnext": Family(
        ConvNeXt(stages=(2,), widths=(6,), patch=2, layer_scale=0.5, stochastic_depth=0.1, outputs=3),
        partial(classify, classes=3),
    ),
    "efficientnet": Family(
        EfficientNet(stages=((1, 3, 1, 2, 4),), stem=4, top=6, divisor=2, momentum=0.9, dropout=0.1, outputs=3),
        partial(classify, classes=3),
        by_row=False,
    ),
}
