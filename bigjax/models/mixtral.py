"""Mixtral: a decoder of which each token takes the path through two of eight experts.

B batch, L positions, D width, V vocabulary, E experts, F hidden units of one. Sources: Jiang et al. 2024 (Mixtral);
Shazeer et al. 2017 (the router).
"""

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from bigjax import UsageError
from bigjax.models.cache import Cache, Caches
from bigjax.models.decoder import Decoder
from bigjax.models.layers import fields_of
from bigjax.models.transformer import Attention, norm
from bigjax.sharding import constrain


class Spec(nn.Module):
    """The fields of a `Mixtral`, which says what they mean, and of its blocks."""

    vocabulary: int = 32_000
    layers: int = 32
    width: int = 4096
    heads: int = 32
    kv_heads: int = 8
    head: int | None = None
    experts: int = 8
    chosen: int = 2
    mlp: int = 14_336
    context: int = 32_768
    window: int | None = None
    rope_base: float = 1_000_000.0
    epsilon: float = 1e-5
    tied: bool = False
    scan: bool = False
    remat: str = "none"
    dtype: str = "float32"


class Experts(nn.Module):
    """x_BLD, weight_BLE -> Σₑ weight · expert(x), each a gated unit (SwiGLU, Shazeer 2020) of its own.

    Every expert is given every token, also where its weight is 0, so that none is dropped, and any mesh splits the work
    as it splits a plain mlp's. That is experts / chosen times the products that the chosen ones alone would take.
    """

    experts: int
    width: int
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x_BLD: Array, weight_BLE: Array) -> Array:
        E, D, F = self.experts, x_BLD.shape[-1], self.width

        def kernel(name: str, *shape: int) -> Array:
            return Kernel((E, *shape), name=name)().astype(self.dtype)

        gate_EDF, up_EDF, down_EFD = kernel("gate", D, F), kernel("up", D, F), kernel("down", F, D)
        h_BLEF = nn.silu(jnp.einsum("bld,edf->blef", x_BLD, gate_EDF)) * jnp.einsum("bld,edf->blef", x_BLD, up_EDF)
        return jnp.einsum("blef,efd->bld", h_BLEF * weight_BLE[..., None].astype(self.dtype), down_EFD)


class Kernel(nn.Module):
    """One kernel for each expert, under the name that a single one has."""

    shape: tuple[int, ...]

    @nn.compact
    def __call__(self) -> Array:
        return self.param("kernel", nn.initializers.normal(0.02), self.shape)


class Block(Spec):
    """Pre-norm: x + attention(norm(x)), then x + experts(norm(x)); returns (x_BLD, cache) as `nn.scan` wants it."""

    @nn.compact
    def __call__(self, x_BLD: Array, position: Array, own: tuple[Cache | None, None]) -> tuple[Array, Cache | None]:
        cache, _ = own
        norms = {"bias": False, "dtype": self.dtype, "epsilon": self.epsilon}
        fields = {"rotary": True, "bias": False, "window": self.window, "rope_base": self.rope_base}
        attend = Attention(self.heads, self.kv_heads, self.head, dtype=self.dtype, **fields, name="attention")
        y_BLD, cache = attend(norm("rms", **norms, name="attention_norm")(x_BLD), cache, position=position)
        x_BLD = x_BLD + y_BLD
        y_BLD = norm("rms", **norms, name="mlp_norm")(x_BLD)
        router = nn.Dense(self.experts, use_bias=False, kernel_init=nn.initializers.normal(0.02), name="router")
        p_BLE = nn.softmax(router(y_BLD.astype(jnp.float32)))
        self.sow("intermediates", "routed", p_BLE)
        chosen_BLE = jax.nn.one_hot(jax.lax.top_k(p_BLE, self.chosen)[1], self.experts).sum(-2)
        weight_BLE = p_BLE * chosen_BLE / (p_BLE * chosen_BLE).sum(-1, keepdims=True)
        return x_BLD + Experts(self.experts, self.mlp, self.dtype, name="experts")(y_BLD, weight_BLE), cache


class Mixtral(Spec, Decoder):
    """tokens_BL int32 -> logits_BLV float32, where position l sees tokens 0…l (Jiang et al. 2024).

    `length_B` says how many tokens of a row are real, as of `GPT`. The defaults are Mixtral 8x7B.

    experts: how many there are in a layer; chosen: how many of them a token takes the path through, those that its
        router finds likeliest, weighted by its probabilities. All are computed: see `Experts`.
    mlp: hidden units of an expert. head: size of one; None for width / heads.
    window: how many positions, itself among them, one looks at; None for all before it.
    rope_base: how fast rotary positions turn. epsilon: of the norms. tied: the output kernel is the embedding.
    scan, remat: as of `GPT`.
    Sown: intermediates/features, (B, L, D), what the output kernel sees; in each layer `routed`, (B, L, E), its
        router's probabilities, of which `next_token(model, balance=0.02)` makes the loss that keeps experts in balance.
    Mistakes raise `UsageError`.

        model = Mixtral()
        variables = model.init(jax.random.key(0), jnp.zeros((1, 1024), "int32"))
        logits_BLV = model.apply(variables, tokens_BL)
    """

    @nn.compact
    def _run(
        self, tokens_BL: Array, cache: Caches | None, position: Array, *, train: bool, at_B: Array | None = None
    ) -> tuple:
        self._check(tokens_BL)
        self._check_rotary()
        if not 1 <= self.chosen <= self.experts:
            raise UsageError(f"chosen {self.chosen} of {self.experts} experts: choose at least 1, and no more than all")
        embed = self._embedding()
        x_BLD = constrain(embed(tokens_BL), "batch")
        x_BLD, cache = self._stack(Block, fields_of(self, Spec), x_BLD, cache, position)
        x_BLD = norm("rms", bias=False, dtype=self.dtype, epsilon=self.epsilon, name="norm")(x_BLD)
        self.sow("intermediates", "features", x_BLD)
        return self._logits(x_BLD, embed, at_B), cache


TINY = Mixtral(vocabulary=11, layers=2, width=8, heads=2, kv_heads=1, experts=3, mlp=12, context=6)
TINY_INPUTS = (jax.ShapeDtypeStruct((2, 4), "int32"),)
