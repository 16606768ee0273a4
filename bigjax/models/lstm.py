"""Recurrent networks over vectors or tokens: LSTM, GRU and plain RNN, stacked, optionally bidirectional.

B batch, L steps, D input features, H hidden units, C outputs, G gates (LSTM 4: input, forget, candidate, output;
GRU 3: reset, update, candidate; RNN 1). Kernels keep gates and units on separate axes, (D, G, H) and (H, G, H), so
that sharding the last axis splits units and never mixes gates.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import Array

from bigjax import UsageError
from bigjax.models.layers import normalize
from bigjax.ops.recurrence import SCALES, recur
from bigjax.sharding import constrain

_POOLS = ("last", "mean", "max", "flatten")


def _orthogonal(key: Array, shape: tuple[int, int, int], dtype: jnp.dtype) -> Array:
    """An orthogonal (H, H) matrix for each of G gates: (H, G, H)."""
    H, G, _ = shape
    return jnp.stack([nn.initializers.orthogonal()(k, (H, H), dtype) for k in jax.random.split(key, G)], axis=1)


def _forget_one(cell: str, shape: tuple[int, int]) -> Array:
    bias_GH = jnp.zeros(shape)
    return bias_GH.at[1].set(1.0) if cell == "lstm" else bias_GH


class Recurrence(nn.Module):
    """One layer, one direction: x_BLD -> h_BLH.

    lstm: Hochreiter & Schmidhuber 1997, with forget gates (Gers et al. 2000) whose bias starts at 1 (Jozefowicz et al.
        2015).
    gru: Cho et al. 2014 in the form of cuDNN, PyTorch and Keras (`reset_after=True`): the reset gate multiplies the
        recurrent product, which has a bias of its own, so there are two bias vectors a gate.
    rnn: h = tanh(W x + U h + b).
    """

    hidden: int
    cell: str = "lstm"
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x_BLD: Array) -> Array:
        D, G, H = x_BLD.shape[-1], len(SCALES[self.cell]), self.hidden
        glorot = nn.initializers.variance_scaling(1.0, "fan_avg", "uniform", in_axis=0, out_axis=2, batch_axis=1)
        kernel = self.param("input_kernel", glorot, (D, G, H), jnp.float32)
        recurrent_kernel = self.param("recurrent_kernel", _orthogonal, (H, G, H), jnp.float32)
        bias = self.param("bias", lambda _: _forget_one(self.cell, (G, H)))
        recurrent_bias = self.param("recurrent_bias", nn.initializers.zeros, (G, H)) if self.cell == "gru" else None

        def scaled(w: Array | None) -> Array | None:
            scale = jnp.asarray(SCALES[self.cell])[:, None]
            return None if w is None else (w * scale.reshape((1,) * (w.ndim - 2) + (G, 1))).astype(self.dtype)

        x_LBD = jnp.swapaxes(x_BLD, 0, 1).astype(self.dtype)
        z_LBGH = jnp.einsum("lbd,dgh->lbgh", x_LBD, scaled(kernel)) + scaled(bias)[None, None]  # all steps at once
        return jnp.swapaxes(recur(self.cell, z_LBGH, scaled(recurrent_kernel), scaled(recurrent_bias)), 0, 1)


def reverse(x_BLD: Array, length_B: Array | None) -> Array:
    """Each row's real steps in reverse order; its padding stays at the end."""
    if length_B is None:
        return jnp.flip(x_BLD, axis=1)
    t_1L, length_B1 = jnp.arange(x_BLD.shape[1])[None], length_B[:, None]
    return jnp.take_along_axis(x_BLD, jnp.where(t_1L < length_B1, length_B1 - 1 - t_1L, t_1L)[..., None], axis=1)


class LSTM(nn.Module):
    """Stacked recurrent layers (Hochreiter & Schmidhuber 1997; GRU: Cho et al. 2014) with an optional linear head.

    Called with x, float (B, L, D), an image (B, H, W, C) read as H rows, or (B, L) as L steps of one number; with
    `vocabulary` set, with tokens_BL int32 instead. `length_B` says how many steps of each row are real: padding comes
    after them and changes nothing, and a row of length 0 has zero features. Returns float32: (B, C), or with `sequence`
    (B, L, C), where steps of padding hold the head's value of zero features; without `outputs` the features themselves,
    of size hidden[-1], twice that when bidirectional. Mistakes in fields or shapes raise `UsageError`.

    pool: what the head sees without `sequence`: "last" (each direction's state after its last real step), "mean" or
        "max" over the real steps, or "flatten" (all steps side by side, padding zero, as in MNIST-1D's GRU).
    dropout: on the embedding and on every layer's output.
    mean, std: of the inputs, one number, one a feature or, of images, one a channel; not used for tokens.
    Sown: intermediates/features, what the head sees.

        model = LSTM(vocabulary=8000, hidden=(200,))
        variables = model.init(jax.random.key(0), jnp.zeros((1, 280), "int32"))
        logits_BC = model.apply(variables, tokens_BL, length_B)
    """

    vocabulary: int | None = None
    embedding: int = 100
    hidden: tuple[int, ...] = (64, 64)
    cell: str = "lstm"
    bidirectional: bool = False
    sequence: bool = False
    pool: str = "last"
    outputs: int | None = 10
    dropout: float = 0.0
    mean: float | tuple[float, ...] = 0.0
    std: float | tuple[float, ...] = 1.0
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x: Array, length_B: Array | None = None, *, train: bool = False) -> Array:
        if not self.hidden:
            raise UsageError("an LSTM needs at least one layer: hidden=(64,)")
        if self.cell not in SCALES:
            raise UsageError(f"cell {self.cell!r} is unknown: use one of {', '.join(SCALES)}")
        if self.pool not in _POOLS:
            raise UsageError(f"pool {self.pool!r} is unknown: use one of {', '.join(_POOLS)}")
        x_BLD = self._inputs(x)
        B, L, _ = x_BLD.shape
        real_BL1 = None if length_B is None else (jnp.arange(L)[None] < length_B[:, None])[..., None]
        if real_BL1 is not None:  # so that no value of the padding, NaN included, can reach a result or a gradient
            x_BLD = jnp.where(real_BL1, x_BLD, 0)
        x_BLD = constrain(x_BLD, "batch")
        if self.vocabulary is not None:
            x_BLD = nn.Dropout(self.dropout)(x_BLD, deterministic=not train)
        for n, H in enumerate(self.hidden):
            # Padding comes last in both reading orders, so the loop needs no mask: real steps never see it.
            directions = [Recurrence(H, self.cell, self.dtype, name=f"layer_{n}")(x_BLD)]
            if self.bidirectional:
                backward = Recurrence(H, self.cell, self.dtype, name=f"layer_{n}_reverse")
                directions.append(backward(reverse(x_BLD, length_B)))
            if n == len(self.hidden) - 1 and self.pool == "last" and not self.sequence:
                x = jnp.concatenate([_last(h, length_B) for h in directions], axis=-1)
            else:
                directions[1:] = [reverse(h, length_B) for h in directions[1:]]
                x = jnp.concatenate(directions, axis=-1)
                x = x if real_BL1 is None else jnp.where(real_BL1, x, 0)
            x = x_BLD = nn.Dropout(self.dropout)(x, deterministic=not train)
        features = x if self.sequence or self.pool == "last" else self._pooled(x, length_B, real_BL1)
        self.sow("intermediates", "features", features)
        if self.outputs is None:
            return features.astype(jnp.float32)
        return nn.Dense(self.outputs, dtype=self.dtype, name="head")(features).astype(jnp.float32)

    def _inputs(self, x: Array) -> Array:
        if self.vocabulary is not None:
            if x.ndim != 2 or not jnp.issubdtype(x.dtype, jnp.integer):
                got = f"{x.dtype}{list(x.shape)}"
                raise UsageError(f"an LSTM with a vocabulary takes integer tokens (batch, steps), not {got}")
            return nn.Embed(self.vocabulary, self.embedding, dtype=self.dtype, name="embedding")(x)
        if x.ndim not in (2, 3, 4):
            got = list(x.shape)
            raise UsageError(f"an LSTM takes x (batch, steps, features), not {got}; for tokens give it a vocabulary")
        x = x[..., None] if x.ndim == 2 else x
        if not all(np.size(v) in (1, x.shape[-1]) for v in (self.mean, self.std)):
            x = jax.lax.collapse(x, 2)
        return jax.lax.collapse(normalize(x, self.mean, self.std, dtype=self.dtype), 2)

    def _pooled(self, x_BLD: Array, length_B: Array | None, real_BL1: Array | None) -> Array:
        if self.pool == "flatten":
            return jax.lax.collapse(x_BLD, 1)
        if self.pool == "mean":
            count = x_BLD.shape[1] if length_B is None else jnp.maximum(length_B, 1)[:, None].astype(x_BLD.dtype)
            return x_BLD.sum(1) / count
        if real_BL1 is None:
            return x_BLD.max(1)
        x_BD = jnp.where(real_BL1, x_BLD, -jnp.inf).max(1)
        return jnp.where(length_B[:, None] > 0, x_BD, 0)


def _last(h_BLH: Array, length_B: Array | None) -> Array:
    if length_B is None:
        return h_BLH[:, -1]
    h_BH = jnp.take_along_axis(h_BLH, jnp.maximum(length_B - 1, 0)[:, None, None], axis=1)[:, 0]
    return jnp.where(length_B[:, None] > 0, h_BH, 0)


TINY = LSTM(hidden=(6,), dropout=0.1)
TINY_INPUTS = (jax.ShapeDtypeStruct((2, 8, 8), "float32"),)
