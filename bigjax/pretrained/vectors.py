"""What a pretrained model makes of texts or images: features for a linear probe, or for nearest neighbours."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from bigjax import UsageError
from bigjax.models.bert import BERT
from bigjax.pretrained.begin import weights
from bigjax.pretrained.reading import load
from bigjax.pretrained.tokens import tokenizer

LEAST = 16  # tokens that texts are padded to at least, then the powers of two


def features(source: Any, inputs: Sequence[str] | np.ndarray, *, batch_size: int = 64) -> np.ndarray:
    """(N, D) float32, each row of length 1: what the model of a folder or hub id sees in N texts or images.

    inputs: texts, whose features are the mean over their tokens, as sentence-transformers takes it, of what the last
    layer gives, and what is longer than the context is cut; or images (N, H, W, C), uint8 or in [0, 1], of the size
    that the model was trained on, whose features are what the head sees.

    UsageError: no inputs; texts for a model of images, or the other way; a model that reads and writes (T5).
    """
    texts = not isinstance(inputs, np.ndarray) or inputs.dtype.kind in "UO"
    if isinstance(inputs, str) or not len(inputs):
        raise UsageError(f"features are of a list of texts or images, not of {inputs!r}: give at least one in a list")
    begun = weights(source)
    model, name = begun.model, type(begun.model).__name__
    if hasattr(model, "encode"):
        raise UsageError(f"{begun.folder} holds a {name}, which has no features of a whole text: give a BERT or a GPT")
    if texts == hasattr(model, "mean"):
        raise UsageError(f"{begun.folder} holds a {name}, which takes {'images' if texts else 'texts'}: give such")
    variables = load(begun.folder)[1]

    @jax.jit
    def seen(variables: Any, *batch: jax.Array) -> jax.Array:
        _, state = model.apply(variables, *batch, mutable="intermediates")
        return state["intermediates"]["features"][0]

    if not texts:
        scale, parts = np.float32(255 if inputs.dtype == np.uint8 else 1), range(0, len(inputs), batch_size)
        images = (inputs[i : i + batch_size].astype(np.float32) / scale for i in parts)
        return _unit(np.concatenate([np.asarray(seen(variables, image)) for image in images]))
    coder, found = tokenizer(begun.folder), {}
    rows = [coder.encode(text)[: model.context] for text in inputs]
    order = sorted(range(len(rows)), key=lambda n: len(rows[n]))
    for i in range(0, len(rows), batch_size):
        some = order[i : i + batch_size]
        length_B = np.array([len(rows[n]) for n in some])
        longest = min(max(LEAST, 1 << int(length_B.max() - 1).bit_length()), model.context)
        tokens_BL = np.zeros((len(some), longest), np.int32)
        for tokens_L, n in zip(tokens_BL, some):
            tokens_L[: len(rows[n])] = rows[n]
        real_BL = np.arange(longest) < length_B[:, None]
        extra = (real_BL,) if isinstance(model, BERT) else ()  # a GPT doesn't look at what comes after
        mean_BD = (np.asarray(seen(variables, tokens_BL, *extra)) * real_BL[..., None]).sum(1) / length_B[:, None]
        found |= dict(zip(some, mean_BD))
    return _unit(np.stack([found[n] for n in range(len(rows))]))


def _unit(x_ND: np.ndarray) -> np.ndarray:
    x_ND = x_ND.astype(np.float32)
    return x_ND / np.maximum(np.linalg.norm(x_ND, axis=1, keepdims=True), 1e-12)
