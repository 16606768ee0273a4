"""Where a number stopped being finite, asked of a state that no device holds whole; on one device: `test_step`."""

from functools import partial
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from conftest import blobs, run_with_devices
from jax import Array

from bigjax import sharding
from bigjax.data import pipeline
from bigjax.look.diagnose import first_nonfinite
from bigjax.models import CNN, VAE
from bigjax.step import init_state
from bigjax.tasks import classify
from bigjax.tasks.images import variational

KEY = jax.random.key(0)
SEEN: list[jax.sharding.Sharding] = []  # how the kernel lay when it was computed with


class Deep(nn.Module):
    """Two layers; the second notes how its kernel lies."""

    @nn.compact
    def __call__(self, x_BHWC: Array, *, train: bool = False) -> Array:
        x_BF = nn.Dense(64, name="first")(sharding.constrain(x_BHWC.reshape(len(x_BHWC), -1), "batch"))
        kernel_FC = self.param("kernel", nn.initializers.normal(), (64, 3))
        if not isinstance(kernel_FC, jax.core.Tracer):
            SEEN.append(kernel_FC.sharding)
        return nn.Dense(3, name="second")(x_BF) + x_BF @ kernel_FC


CASES = {  # model, what of its parameters is huge, what is to blame
    "deep": (Deep(), "first/kernel", "the output of module 'first' of 'model' is the first that is not"),
    "cnn": (
        CNN(features=(8,), dense=(), pools=1, padding="SAME", outputs=3, batch_norm=True, dropout=0.5),
        "conv_0",
        "the output of module 'conv_0' of 'model' is the first that is not",
    ),
    "vae": (
        VAE(image=(4, 4, 1), code=3, encoder_features=(32,), decoder_features=(32,)),
        "encoder/dense_0",
        "the output of module 'encoder/dense_0' of 'model' is the first that is not",
    ),
}


def on_a_mesh() -> None:
    mesh = sharding.make_mesh(sharding.MeshConfig(data=2, fsdp=4), batch_size=8)
    batch = next(pipeline.batches(blobs(8, seed=0), seed=0, batch_size=8))
    for model, huge, blamed in CASES.values():
        task = variational(model) if isinstance(model, VAE) else classify(model, classes=3)
        begin = partial(init_state, task=task, tx={"model": optax.sgd(0.1)}, ema=0.0)
        state = jax.jit(begin)(KEY, jax.tree.map(jnp.asarray, batch))

        def spoil(path: Any, x: Array, huge: str = huge) -> np.ndarray:
            mine = huge in jax.tree_util.keystr(path, simple=True, separator="/") and x.ndim > 1
            return np.full(x.shape, 3e38, x.dtype) if mine else np.array(x)

        host = jax.tree_util.tree_map_with_path(spoil, state)
        said = first_nonfinite(task, None, jax.tree.map(jnp.asarray, host), batch, KEY)
        assert said == blamed, said
        with jax.set_mesh(mesh):
            places = jax.tree.map(lambda s: s.sharding, sharding.place(jax.eval_shape(lambda: host), mesh))  # noqa: B023
            SEEN.clear()
            placed = jax.device_put(host, places), sharding.put_batch(batch, mesh, 8)
            said = first_nonfinite(task, None, *placed, KEY)
            assert said == blamed, said
            assert not any(where.is_fully_replicated for where in SEEN)
            assert SEEN or not isinstance(model, Deep)


def test_the_state_stays_where_it_is(tmp_path: Path) -> None:
    run_with_devices("import test_diagnose; test_diagnose.on_a_mesh()", folder=tmp_path)
