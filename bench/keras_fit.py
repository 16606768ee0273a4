"""Keras 3 on JAX: `fit` of a compiled model, several steps an execution, on arrays in memory."""

import os
import time

from bench.works import ADAM, TOLD, Work, data


def network(work: Work):  # noqa: ANN201
    import keras
    from keras import layers

    s = work.sizes
    if work.kind == "mlp":
        hidden = [layers.Dense(n, activation="relu") for n in s["hidden"]]
        return keras.Sequential([layers.Input((s["inputs"],)), *hidden, layers.Dense(s["outputs"])])
    if work.kind == "autoencoder":
        encoder, code, *decoder = s["hidden"]
        first = [layers.Dense(encoder, activation="relu"), layers.Dense(code)]
        rest = [layers.Dense(n, activation="relu") for n in decoder]
        return keras.Sequential([layers.Input((s["inputs"],)), *first, *rest, layers.Dense(s["inputs"])])
    if work.kind == "cnn":
        a, b, c = (layers.Conv2D(n, 3, activation="relu") for n in s["features"])
        pooled = [a, layers.MaxPooling2D(), b, layers.MaxPooling2D(), c, layers.Flatten()]
        head = [layers.Dense(s["dense"], activation="relu"), layers.Dense(s["outputs"])]
        return keras.Sequential([layers.Input((s["side"], s["side"], 1)), *pooled, *head])
    if work.kind == "lstm":
        a, b = s["hidden"]
        recurrent = [layers.LSTM(a, return_sequences=True), layers.LSTM(b)]
        return keras.Sequential([layers.Input((s["steps"], s["inputs"])), *recurrent, layers.Dense(s["outputs"])])
    if work.kind == "lstm_tokens":
        embed = layers.Embedding(s["vocabulary"], s["width"])
        last = [layers.LSTM(s["hidden"][0]), layers.Dense(s["outputs"])]
        return keras.Sequential([layers.Input((s["steps"],), dtype="int32"), embed, *last])
    causal, D, L = work.kind == "gpt", s["width"], s["context"]
    tokens = layers.Input((L,), dtype="int32")
    places = layers.Embedding(L, D)(keras.ops.arange(L)[None])
    x = layers.Embedding(s["vocabulary"], D)(tokens) + places
    x = x if causal else layers.LayerNormalization()(x)
    for _ in range(s["layers"]):
        attend = layers.MultiHeadAttention(s["heads"], D // s["heads"])
        up, down = layers.Dense(s.get("mlp", 4 * D), activation="gelu"), layers.Dense(D)
        if causal:
            h = layers.LayerNormalization()(x)
            x = x + attend(h, h, use_causal_mask=True)
            x = x + down(up(layers.LayerNormalization()(x)))
        else:
            x = layers.LayerNormalization()(x + attend(x, x))
            x = layers.LayerNormalization()(x + down(up(x)))
    if causal:
        return keras.Model(tokens, layers.Dense(s["vocabulary"], use_bias=False)(layers.LayerNormalization()(x)))
    pooled = layers.Dense(D, activation="tanh")(x[:, 0])
    return keras.Model(tokens, layers.Dense(s["outputs"])(pooled))


def run(work: Work, together: int) -> tuple[float, list[float]]:
    os.environ["KERAS_BACKEND"] = "jax"
    import keras
    import numpy as np

    given = data(work)
    model = network(work)
    kind = "binary_crossentropy" if work.kind == "autoencoder" else "sparse_categorical_crossentropy"
    loss = keras.losses.get(
        {"class_name": "".join(w.title() for w in kind.split("_")), "config": {"from_logits": True}}
    )
    model.compile(keras.optimizers.Adam(ADAM), loss, steps_per_execution=together)

    def fit(updates: int) -> tuple[float, float]:
        rows = np.arange(updates * work.batch) % len(given["x"])
        x, y, begin = given["x"][rows], given["y"][rows], time.perf_counter()
        history = model.fit(x, y, batch_size=work.batch, epochs=1, shuffle=False, verbose=0)
        return history.history["loss"][-1], len(rows) / (time.perf_counter() - begin)

    fit(TOLD - 10)
    told, _ = fit(10)
    part = max(work.updates // 4 // together, 1) * together
    fit(part)  # compiles what a part needs
    return told, [fit(part)[1] for _ in range(4)]


SIDES = {
    "Keras on JAX": lambda work: run(work, 1),
    "Keras on JAX, 10 steps an execution": lambda work: run(work, 10),
}
