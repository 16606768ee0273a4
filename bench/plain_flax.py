"""Plain Flax and Optax: the same modules under one jitted step, by hand, as a notebook has it."""

import time

import jax
import jax.numpy as jnp
import optax

from bench.ours import experiment
from bench.works import ADAM, TOLD, Work, data


def run(work: Work) -> tuple[float, list[float]]:
    model = experiment(work).task.models["model"]
    given, tx = data(work), optax.adam(ADAM)
    x_all, y_all = given["x"], given["y"]
    if work.kind == "autoencoder":
        x_all = y_all = x_all.reshape(-1, 28, 28, 1)
    params = jax.jit(model.init)(jax.random.key(0), jnp.asarray(x_all[:2]))["params"]
    state = tx.init(params)

    @jax.jit
    def step(params, state, x, y):  # noqa: ANN001, ANN202 (as in a notebook)
        def loss(params):  # noqa: ANN001, ANN202
            logits = model.apply({"params": params}, x)
            if work.kind == "autoencoder":
                return optax.sigmoid_binary_cross_entropy(logits, y).mean()
            return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

        value, grads = jax.value_and_grad(loss)(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    def train(updates: int, params, state):  # noqa: ANN001, ANN202
        told, begin = [], time.perf_counter()
        for n in range(updates):
            rows = slice((n * work.batch) % (len(x_all) - work.batch + 1), None)
            x, y = x_all[rows][: work.batch], y_all[rows][: work.batch]
            params, state, value = step(params, state, x, y)
            told.append(value)
        jax.block_until_ready(params)
        return params, state, told, updates * work.batch / (time.perf_counter() - begin)

    params, state, told, _ = train(TOLD, params, state)
    loss, speeds = float(jnp.mean(jnp.stack(told[-10:]))), []
    for _ in range(4):
        params, state, _, speed = train(max(work.updates // 4, 1), params, state)
        speeds.append(speed)
    return loss, speeds


SIDES = {"plain Flax": run}
