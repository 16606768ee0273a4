"""GPT: a decoder-only Transformer, from GPT-2's form (the defaults) to Llama's by its fields.

B batch, L positions, D width, V vocabulary. Sources: Radford et al. 2019 (GPT-2, its initialisation included); Touvron
et al. 2023 (Llama: rotary positions, RMSNorm, SwiGLU, no biases).
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import Array

from bigjax import UsageError
from bigjax.models.cache import Cache, Caches, places
from bigjax.models.decoder import Decoder
from bigjax.models.layers import fields_of
from bigjax.models.transformer import Attention, FeedForward, Scaling, norm
from bigjax.ops.kernels import FORMS
from bigjax.sharding import constrain


class Spec(nn.Module):
    """The fields of a `GPT`, which says what they mean, and of its blocks."""

    vocabulary: int = 50257
    layers: int = 12
    width: int = 768
    heads: int = 12
    kv_heads: int | None = None
    head: int | None = None
    context: int = 1024
    mlp: int | None = None
    position: str = "learned"
    norm: str = "layer"
    activation: str | Callable[[Array], Array] = "gelu"
    tied: bool = True
    bias: bool = True
    qkv_bias: bool | None = None
    mlp_bias: bool | None = None
    qk_norm: bool = False
    window: int | None = None
    windowed: tuple[bool, ...] | None = None
    rope_base: float = 10_000.0
    rope_scaling: Scaling | None = None
    epsilon: float | None = None
    dropout: float = 0.0
    attention: str = "auto"
    split_residual: bool = False
    scan: bool = False
    remat: str = "none"
    dtype: str = "float32"


class Block(Spec):
    """Pre-norm: x + attention(norm(x)), then x + mlp(norm(x)); returns (x_BLD, cache) as `nn.scan` wants it."""

    deterministic: bool = True

    @nn.compact
    def __call__(
        self, x_BLD: Array, position: Array, own: tuple[Cache | None, Array | None]
    ) -> tuple[Array, Cache | None]:
        cache, windowed = own
        init = nn.initializers.normal(0.02)
        residual = nn.initializers.normal(0.02 / (2 * self.layers) ** 0.5)  # the sum keeps one layer's size
        shared = {"kernel_init": init, "out_init": residual, "dtype": self.dtype}
        names = ("bias", "qkv_bias", "qk_norm", "window", "rope_base", "rope_scaling", "epsilon")
        attention = {"rotary": self.position == "rotary", "kernel": self.attention, **shared}
        attention |= {name: getattr(self, name) for name in names}
        if windowed is not None:
            attention["window"] = jnp.where(windowed, self.window, self.context)
        norms = {"bias": self.bias, "dtype": self.dtype, "epsilon": self.epsilon}
        hidden = self.mlp or (-(-self.width // 3) * 8 if self.activation == "swiglu" else 4 * self.width)
        if self.split_residual:
            x_BLD = constrain(x_BLD, "residual")
        attend = Attention(self.heads, self.kv_heads or self.heads, self.head, **attention, name="attention")
        y, cache = attend(norm(self.norm, **norms, name="attention_norm")(x_BLD), cache, position=position)
        x_BLD = x_BLD + nn.Dropout(self.dropout)(y, deterministic=self.deterministic)
        biased = self.bias if self.mlp_bias is None else self.mlp_bias
        feed = FeedForward(hidden, self.activation, bias=biased, **shared, name="mlp")
        y = feed(norm(self.norm, **norms, name="mlp_norm")(x_BLD))
        return x_BLD + nn.Dropout(self.dropout)(y, deterministic=self.deterministic), cache


class GPT(Spec, Decoder):
    """tokens_BL int32 -> logits_BLV float32, where position l sees tokens 0…l (Radford et al. 2019).

    `length_B` says how many tokens of a row are real; padding comes after them, no real position sees it, and its own
    logits mean nothing (the loss leaves them out).

    width: D. kv_heads: None for as many as heads. head: size of one; None for width / heads.
    mlp: hidden units; None for 4 × width or 8/3 × width, up to a multiple of 8 (SwiGLU).
    position: "learned" or "rotary". norm: "layer" or "rms". activation: "gelu", "swiglu", or a function.
    attention: "plain"; "splash" or "cudnn", kernels for TPU and NVIDIA GPUs, where they suit; "auto" for whichever of
        these is where the program runs (`ops.kernels`).
    split_residual: splits the stream between blocks over the mesh's tensor axis too: less memory, more traffic.
    tied: the output kernel is the embedding. bias: in all kernels and LayerNorms, but never in the output.
    qkv_bias, mlp_bias: in q, k and v, and in the mlp; None for as `bias` says.
    qk_norm: an RMSNorm over each head of q and k (Qwen3).
    window: how many positions, itself among them, one looks at (Mistral, Jiang et al. 2023); None for all before it.
    windowed: of each layer, whether it has the window (Qwen2); None for all of them.
    rope_base, rope_scaling: how fast rotary positions turn; (factor,) or (factor, low, high, context), as
        `transformer.rotary` says.
    epsilon: of the norms; None for 1e-5 (layer) or 1e-6 (rms).
    dropout: on the embedding and before each addition to the residual stream.
    scan: layers by `nn.scan`, their parameters stacked on a leading axis under "layers", so that compile time doesn't
        grow with depth; else unrolled, under "layer_0", …, which is faster on CPU.
    remat: what the backward pass recomputes: "none", "full" (every block) or "dots" (all but matrix products).
    Sown: intermediates/features, (B, L, D), what the output kernel sees. Mistakes raise `UsageError`.

        model = GPT()
        variables = model.init(jax.random.key(0), jnp.zeros((1, 1024), "int32"))
        logits_BLV = model.apply(variables, tokens_BL)
    """

    @nn.compact
    def _run(
        self, tokens_BL: Array, cache: Caches | None, position: Array, *, train: bool, at_B: Array | None = None
    ) -> tuple:
        self._check(tokens_BL)
        embed = self._embedding()
        x_BLD = constrain(embed(tokens_BL), "batch")
        if self.position == "learned":
            init = nn.initializers.normal(0.02)
            positions = nn.Embed(self.context, self.width, embedding_init=init, dtype=self.dtype, name="positions")
            x_BLD = x_BLD + positions(places(position, tokens_BL.shape[1]))
        x_BLD = nn.Dropout(self.dropout)(x_BLD, deterministic=not train)
        fields = fields_of(self, Spec) | {"deterministic": not train}
        windowed = None if self.windowed is None else np.array(self.windowed, bool)
        x_BLD, cache = self._stack(Block, fields, x_BLD, cache, position, windowed)
        x_BLD = norm(self.norm, bias=self.bias, dtype=self.dtype, epsilon=self.epsilon, name="norm")(x_BLD)
        self.sow("intermediates", "features", x_BLD)
        return self._logits(x_BLD, embed, at_B), cache

    def _check(self, tokens_BL: Array) -> None:
        super()._check(tokens_BL)
        if self.position not in ("learned", "rotary"):
            raise UsageError(f"position {self.position!r} is unknown: use learned or rotary")
        if self.attention not in FORMS:
            raise UsageError(f"attention {self.attention!r} is unknown: use one of {', '.join(FORMS)}")
        if self.position == "rotary":
            self._check_rotary()
        if self.windowed is not None and (self.window is None or len(self.windowed) != self.layers):
            raise UsageError(
                f"windowed says of {len(self.windowed)} layers whether they have the window ({self.window}): give a "
                f"window, and one entry for each of the {self.layers} layers"
            )


TINY = GPT(vocabulary=11, layers=2, width=8, heads=2, context=6, dropout=0.1)
TINY_INPUTS = (jax.ShapeDtypeStruct((2, 4), "int32"),)
