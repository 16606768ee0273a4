"""Multi-layer perceptron.

B batch, D features of a layer.
"""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from bigjax.models.layers import activation, initializer, normalize, promoting
from bigjax.sharding import constrain


class MLP(nn.Module):
    """Fully connected network (Rumelhart, Hinton & Williams 1986): 784-128-64-10, 109,386 parameters on 28×28×1.

    Input (B, ...) float, flattened to (B, D); output (B, outputs) float32: logits, or values for regression.
    `features=()` is the linear model. `mean`, `std` normalise the input: one number, or one for each entry of its
    last axis. Dropout follows each hidden activation. With `mutable="intermediates"` a call also returns `stage_0`,
    `stage_1`, ... (the activation of each hidden layer) and `features` (the last one before the logits);
    `capture_intermediates=True` adds each layer's output.

        model = MLP()
        variables = model.init(jax.random.key(0), jnp.zeros((1, 28, 28, 1)))
        logits = model.apply(variables, image_BHWC, train=False)
    """

    features: tuple[int, ...] = (128, 64)
    outputs: int = 10
    activation: str | Callable[[Array], Array] = "relu"
    kernel_init: str | Callable[..., Array] = "lecun_normal"
    dropout: float = 0.0
    batch_norm: bool = False
    mean: float | tuple[float, ...] = 0.0
    std: float | tuple[float, ...] = 1.0
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x: Array, *, train: bool = False) -> Array:
        act, init, dtype = activation(self.activation), initializer(self.kernel_init), jnp.dtype(self.dtype)
        x = normalize(x, self.mean, self.std, dtype=self.dtype)
        x = jax.lax.collapse(x, 1)
        for i, width in enumerate(self.features):
            x = nn.Dense(width, dtype=dtype, kernel_init=init, name=f"dense_{i}")(x)
            if self.batch_norm:
                x = promoting(nn.BatchNorm(not train, momentum=0.9, dtype=dtype, name=f"norm_{i}"))(x)
            x = act(constrain(x, "batch"))
            self.sow("intermediates", f"stage_{i}", x)
            if i == len(self.features) - 1:
                self.sow("intermediates", "features", x)
            x = nn.Dropout(self.dropout)(x, deterministic=not train)
        if not self.features:
            self.sow("intermediates", "features", x)
        x = nn.Dense(self.outputs, dtype=dtype, kernel_init=init, name="logits")(x)
        return x.astype(jnp.float32)


TINY = MLP(features=(8, 6), dropout=0.1, batch_norm=True)
TINY_INPUTS = (jax.ShapeDtypeStruct((2, 8, 8, 1), "float32"),)
