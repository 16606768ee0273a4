"""Attention in the form that suits where the program runs: plain, or by a kernel that stores nothing of size L × L.

B batch, L positions that ask, M positions that are looked at, H query heads, G key/value heads, K head size.
"""

import contextlib
import functools
from collections.abc import Iterator
from contextvars import ContextVar

import jax
import jax.numpy as jnp
from jax import Array

from bigjax.ops.attention import attention, splash_attention
from bigjax.ops.counted import plainly
from bigjax.sharding import Axes, locally, our_mesh, splits_rows_and_heads

KERNELS = {"tpu": "splash", "cuda": "cudnn"}  # of which platform
FORMS = ("auto", "plain", *KERNELS.values())
_taken: ContextVar[set[str] | None] = ContextVar("taken", default=None)


@contextlib.contextmanager
def telling() -> Iterator[set[str]]:
    """Gives the forms of attention that are taken in what is traced while it is entered."""
    token = _taken.set(forms := set())
    try:
        yield forms
    finally:
        _taken.reset(token)


def attend(
    q_BLHK: Array,
    k_BMGK: Array,
    v_BMGK: Array,
    *,
    mask: Array | None = None,
    causal: bool = False,
    bias: Array | None = None,
    form: str = "auto",
) -> Array:
    """`attention` by one of FORMS: "auto" for what `chosen` says; what a kernel doesn't suit is left to "plain"."""
    shapes = {"q": q_BLHK.shape, "kv": k_BMGK.shape, "dtype": q_BLHK.dtype.name, "causal": causal}
    shapes |= {"mask": None if mask is None else mask.shape, "bias": None if bias is None else bias.shape}
    if form == "auto":
        form = chosen(platform(), **shapes)
    possible = form != "plain" and splits_rows_and_heads(q_BLHK.shape[0], k_BMGK.shape[2]) and suits(form, **shapes)
    if not possible or plainly("attention"):
        form = "plain"
    if (taken := _taken.get()) is not None:
        taken.add(form)
    if form == "plain":
        return attention(q_BLHK, k_BMGK, v_BMGK, mask=mask, causal=causal, bias=bias)
    if form == "splash":
        return splash_attention(q_BLHK, k_BMGK, v_BMGK, causal=causal)
    return cudnn_attention(q_BLHK, k_BMGK, v_BMGK, mask=mask, causal=causal, bias=bias)


def platform() -> str:
    """What the program is compiled for: "tpu", "cuda", of Ampere and later, or another, on which there are no kernels.

    By the mesh that is set, so that a plan on a laptop takes what the slice would. Without our mesh, on several
    devices, nobody says how arrays are split over them, which a kernel has to know: "several".
    """
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.empty and mesh.abstract_device is not None and our_mesh() is not None:
        name = mesh.abstract_device.platform
    else:
        name = jax.default_backend() if mesh.empty and jax.device_count() == 1 else "several"
    return "cuda" if name == "gpu" and _ampere() else name


@functools.cache
def _ampere() -> bool:
    """Whether the GPU here is one of NVIDIA's that cuDNN's attention runs on."""
    capability = getattr(jax.devices()[0], "compute_capability", "0")
    return capability.partition(".")[0].isdecimal() and int(capability.partition(".")[0]) >= 8


def chosen(
    place: str,
    *,
    q: tuple[int, ...],
    kv: tuple[int, ...],
    dtype: str,
    causal: bool,
    mask: tuple[int, ...] | None = None,
    bias: tuple[int, ...] | None = None,
) -> str:
    """The form of attention on a platform, for arrays of these shapes: its kernel where that suits, else "plain"."""
    form = KERNELS.get(place, "plain")
    how = {"q": q, "kv": kv, "dtype": dtype, "causal": causal, "mask": mask, "bias": bias}
    return form if form != "plain" and suits(form, **how) else "plain"


def suits(
    form: str,
    *,
    q: tuple[int, ...],
    kv: tuple[int, ...],
    dtype: str,
    causal: bool,
    mask: tuple[int, ...] | None,
    bias: tuple[int, ...] | None,
) -> bool:
    """Whether a kernel takes arrays of these shapes; by its own checks.

    splash: no mask but the causal one, no bias, as many positions on both sides, a multiple of 128. cudnn: bfloat16 or
    float16, heads of a multiple of 8 and at most 128; with a mask or bias even numbers of positions, and more than one.
    """
    (L, _, K), M = q[1:], kv[1]
    if form == "splash":
        return mask is bias is None and L == M and L % 128 == 0
    even = mask is bias is None or not (L % 2 or M % 2)
    return dtype in ("bfloat16", "float16") and K % 8 == 0 and K <= 128 and L > 1 and even


def cudnn_attention(
    q_BLHK: Array, k_BMGK: Array, v_BMGK: Array, *, mask: Array | None, causal: bool, bias: Array | None
) -> Array:
    """`attention` by cuDNN's FlashAttention (Dao et al. 2022). Over a mesh each device works on its own rows and heads.

    A mask is added to the scores as a bias, of the width of the queries.
    """
    L, M = q_BLHK.shape[1], k_BMGK.shape[1]
    mask = None if mask is None else jnp.broadcast_to(mask, (*mask.shape[:2], L, M))
    bias = None if bias is None else jnp.broadcast_to(bias, (*bias.shape[:2], L, M)).astype(q_BLHK.dtype)

    def local(q_BLHK: Array, k_BMGK: Array, v_BMGK: Array, mask: Array | None, bias: Array | None) -> Array:
        how = {"is_causal": causal, "implementation": "cudnn"}
        return jax.nn.dot_product_attention(q_BLHK, k_BMGK, v_BMGK, bias, mask, **how)

    def axes(x: Array | None) -> Axes:
        return () if x is None else ("rows" if x.shape[0] > 1 else None, "heads" if x.shape[1] > 1 else None)

    split = ("rows", None, "heads", None)
    own = locally(local, (split, split, split, axes(mask), axes(bias)), split)
    return own(q_BLHK, k_BMGK, v_BMGK, mask, bias)
