"""What is done alike on all sides: architectures by their sizes, batches, data in memory, Adam at 1e-3, float32.

Every side trains the same model by the same data in the same order, from weights of its own: rows (N, …) are taken in
order, again from the first at the end. `data` gives what goes in and what is to be told.
"""

from typing import Any, NamedTuple

import numpy as np

ADAM, TOLD = 1e-3, 50  # learning rate; updates after which losses are compared


class Work(NamedTuple):
    """kind: which architecture, in each side's file; sizes: of it; batch: examples an update; updates: timed."""

    kind: str
    sizes: dict[str, Any]
    batch: int
    updates: int


MLP = {"inputs": 784, "hidden": (128, 64), "outputs": 10}
CNN = {"side": 28, "features": (32, 64, 64), "dense": 64, "outputs": 10}
LSTM = {"steps": 100, "inputs": 10, "hidden": (64, 64), "outputs": 10}
TOKENS = {"steps": 200, "vocabulary": 20_000, "width": 200, "hidden": (200,), "outputs": 2}
AUTOENCODER = {"inputs": 784, "hidden": (64, 32, 64, 64)}
GPT = {"vocabulary": 256, "context": 256}
BERT = {"vocabulary": 30_522, "context": 128, "layers": 6, "width": 384, "heads": 12, "mlp": 1536, "outputs": 2}
DCGAN = {"side": 28, "latent": 100, "generator": (256, 128, 128), "discriminator": (64, 128)}
WORKS = {
    "mlp_32": Work("mlp", MLP, 32, 4000),
    "mlp_128": Work("mlp", MLP, 128, 3000),
    "cnn_32": Work("cnn", CNN, 32, 200),
    "cnn_128": Work("cnn", CNN, 128, 100),
    "cnn_512": Work("cnn", CNN, 512, 30),
    "lstm_32": Work("lstm", LSTM, 32, 300),
    "lstm_128": Work("lstm", LSTM, 128, 100),
    "lstm_tokens_32": Work("lstm_tokens", TOKENS, 32, 30),
    "autoencoder_32": Work("autoencoder", AUTOENCODER, 32, 3000),
    "autoencoder_128": Work("autoencoder", AUTOENCODER, 128, 2000),
    "gpt_192_16": Work("gpt", GPT | {"layers": 4, "width": 192, "heads": 4}, 16, 20),
    "gpt_384_8": Work("gpt", GPT | {"layers": 6, "width": 384, "heads": 6}, 8, 12),
    "bert_16": Work("bert", BERT, 16, 12),
    "dcgan_64": Work("dcgan", DCGAN, 64, 40),
}


def smaller(work: Work) -> Work:
    """To see whether all of it runs."""
    return work._replace(batch=4, updates=4)


def data(work: Work) -> dict[str, np.ndarray]:
    """`x` and `y`, some batches of them; labels follow from the inputs, so that there is something to learn."""
    random, s, N = np.random.default_rng(0), work.sizes, min(max(8 * work.batch, 1024), 8192)
    if work.kind in ("mlp", "autoencoder"):
        x = random.random((N, s["inputs"]), np.float32)
    elif work.kind in ("cnn", "dcgan"):
        x = random.random((N, s["side"], s["side"], 1), np.float32)
    elif work.kind == "lstm":
        x = random.standard_normal((N, s["steps"], s["inputs"]), np.float32)
    else:
        length = s.get("steps") or s["context"]
        skew = np.arange(1, s["vocabulary"] + 1) ** -1.0  # as words are
        x = random.choice(s["vocabulary"], (N, length + 1), p=skew / skew.sum()).astype(np.int32)
        if work.kind == "gpt":
            return {"x": x[:, :-1], "y": x[:, 1:]}
        return {"x": x[:, :-1], "y": (x[:, 0] % s["outputs"]).astype(np.int32)}
    if work.kind in ("autoencoder", "dcgan"):
        return {"x": x, "y": x}
    flat = x.reshape(N, -1) - x.mean()
    return {"x": x, "y": (flat @ random.standard_normal((flat.shape[1], s["outputs"]))).argmax(1).astype(np.int32)}
