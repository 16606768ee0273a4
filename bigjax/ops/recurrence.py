"""The loop of a recurrent layer over time: LSTM, GRU and plain RNN, with a gradient of its own.

B batch, L steps, H hidden units, G gates (LSTM 4: input, forget, candidate, output; GRU 3: reset, update, candidate;
RNN 1). Kernels keep gates and units on separate axes, (H, G, H), so that sharding the last axis splits units and never
mixes gates.
"""

import functools

import jax
import jax.numpy as jnp
from jax import Array, lax

from bigjax.sharding import constrain

# What the weights of each gate are scaled by: sigmoid(x) = (1 + tanh(x/2)) / 2, so one tanh serves all gates of a step.
SCALES = {"lstm": (0.5, 0.5, 1.0, 0.5), "gru": (0.5, 0.5, 1.0), "rnn": (1.0,)}


def _merge(cell: str, z_BGH: Array, r_BGH: Array) -> Array:
    """What the cell needs of its input part z and recurrent part r: their sum; the GRU's two candidates stay apart."""
    if cell != "gru":
        return z_BGH + r_BGH
    return jnp.concatenate([z_BGH[:, :2] + r_BGH[:, :2], z_BGH[:, 2:], r_BGH[:, 2:]], axis=1)


def _step(cell: str, a_BGH: Array, state_BH: Array) -> tuple[Array, Array]:
    """Elementwise part of one step -> (h in a's dtype, state in float32); the state is c for the LSTM, else h."""
    a = a_BGH.astype(jnp.float32)
    if cell == "lstm":
        t = jnp.tanh(a)
        i, f, o = (0.5 * t[:, k] + 0.5 for k in (0, 1, 3))
        state = f * state_BH + i * t[:, 2]
        h = o * jnp.tanh(state)
    elif cell == "gru":
        t = 0.5 * jnp.tanh(a[:, :2]) + 0.5
        candidate = jnp.tanh(a[:, 2] + t[:, 0] * a[:, 3])
        h = state = candidate + t[:, 1] * (state_BH - candidate)
    else:
        h = state = jnp.tanh(a[:, 0])
    return h.astype(a_BGH.dtype), state


def _loop(cell: str, z_LBGH: Array, kernel_HGH: Array, bias_GH: Array | None, *, residuals: bool) -> Array | tuple:
    _, B, _, H = z_LBGH.shape

    def step(carry: tuple[Array, Array], z_BGH: Array) -> tuple:
        h, state = carry
        r = jnp.einsum("bh,hgk->bgk", h, kernel_HGH)
        a = _merge(cell, z_BGH, r if bias_GH is None else r + bias_GH[None])
        carry = _step(cell, a, state)
        return carry, (carry[0], a, state) if residuals else carry[0]

    return lax.scan(step, (jnp.zeros((B, H), z_LBGH.dtype), jnp.zeros((B, H), jnp.float32)), z_LBGH)[1]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def recur(cell: str, z_LBGH: Array, kernel_HGH: Array, bias_GH: Array | None = None) -> Array:
    """All hidden states h_LBH from the projected inputs z (gates pre-scaled by `SCALES`), from a zero state.

    It has its own gradient: the backward loop yields only those of the pre-activations, so the recurrent kernel's is
    one matrix product over all steps, not one accumulated in every step, which is faster on CPU.
    """
    return _loop(cell, z_LBGH, kernel_HGH, bias_GH, residuals=False)


def _recur_forward(cell: str, z_LBGH: Array, kernel_HGH: Array, bias_GH: Array | None) -> tuple:
    h, a, state = _loop(cell, z_LBGH, kernel_HGH, bias_GH, residuals=True)
    return h, (h, a, state, kernel_HGH, bias_GH)


def _recur_backward(cell: str, residuals: tuple, dh_LBH: Array) -> tuple:
    h_LBH, a_LBGH, state_LBH, kernel_HGH, bias_GH = residuals

    def recurrent(da: Array) -> Array:  # the transpose of _merge in r
        return da if cell != "gru" else jnp.concatenate([da[..., :2, :], da[..., 3:, :]], axis=-2)

    def step(carry: tuple[Array, Array], at: tuple) -> tuple:
        dh, a, state = at
        da, dstate = jax.vjp(functools.partial(_step, cell), a, state)[1]((dh + carry[0], carry[1]))
        # without the constraint XLA's partitioner gives wrong gradients where fsdp and tensor split the kernel
        return (constrain(jnp.einsum("bgk,hgk->bh", recurrent(da), kernel_HGH), "batch"), dstate), da

    zeros = jnp.zeros_like(dh_LBH[0]), jnp.zeros(dh_LBH.shape[1:], jnp.float32)
    da_LBGH = lax.scan(step, zeros, (dh_LBH, a_LBGH, state_LBH), reverse=True)[1]
    before_LBH = jnp.concatenate([jnp.zeros_like(h_LBH[:1]), h_LBH[:-1]])
    dr_LBGH = recurrent(da_LBGH)
    dz_LBGH = da_LBGH if cell != "gru" else da_LBGH[..., :3, :]
    dbias = None if bias_GH is None else dr_LBGH.sum((0, 1))
    return dz_LBGH, jnp.einsum("lbh,lbgk->hgk", before_LBH, dr_LBGH), dbias


recur.defvjp(_recur_forward, _recur_backward)
