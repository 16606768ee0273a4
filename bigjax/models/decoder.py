"""What the models of the next token share: padding, decoding with a cache, the stack of layers, the output kernel.

B batch, L positions, D width, V vocabulary. A family composes its own block, and what is around the stack, in `_run`.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from bigjax import UsageError
from bigjax.models.cache import Caches, empty_cache
from bigjax.models.layers import REMAT, stack, unembed


def restarting(segments_BL: Array) -> Array:
    """Positions (B, L) that begin again at 0 with each text of a row; segments: its number in the row."""
    place_BL = jnp.broadcast_to(jnp.arange(segments_BL.shape[1], dtype=jnp.int32)[None], segments_BL.shape)
    new_BL = jnp.diff(segments_BL, axis=1, prepend=segments_BL[:, :1] - 1) != 0
    return place_BL - jax.lax.cummax(jnp.where(new_BL, place_BL, 0), axis=1)


class Decoder(nn.Module):
    """tokens_BL int32 -> logits_BLV float32, where position l sees tokens 0…l.

    A model that inherits from it and from its own `Spec` has the fields vocabulary, layers, width, heads, kv_heads,
    head, context, tied, scan, remat and dtype; and `_run(tokens_BL, cache, position, train=, at_B=) -> (logits_BLV,
    cache)`, whose logits are those at `at_B` alone where that is given.
    """

    def __call__(
        self, tokens_BL: Array, length_B: Array | None = None, segments_BL: Array | None = None, *, train: bool = False
    ) -> Array:
        """segments_BL: which text of its row a token belongs to; each begins at position 0 and sees only itself."""
        if length_B is not None:  # whatever the padding holds, all results are the same
            real_BL = jnp.arange(tokens_BL.shape[1])[None] < length_B[:, None]
            tokens_BL = jnp.where(real_BL, tokens_BL, 0)
        position = jnp.zeros((), jnp.int32) if segments_BL is None else restarting(segments_BL)
        return self._run(tokens_BL, None, position, train=train)[0]

    def decode(
        self, tokens_BL: Array, cache: Caches, position: Array, at_B: Array | None = None
    ) -> tuple[Array, Caches]:
        """(logits_BLV, the cache with these tokens), given what is cached before them.

        position: of the first, () or, where rows differ, (B,). at_B: the one token of each row whose logits are wanted,
        (B, 1, V).
        """
        return self._run(tokens_BL, cache, jnp.asarray(position, jnp.int32), train=False, at_B=at_B)

    def empty_cache(self, batch: int, size: int) -> Caches:
        """Room for `size` tokens: of each layer k and v, (batch, kv_heads, size, head), stacked where layers are."""
        shape = (batch, size, self.kv_heads or self.heads, self.head or self.width // self.heads, self.dtype)
        layers = tuple(empty_cache(*shape) for _ in range(self.layers))
        return jax.tree.map(lambda *x: jnp.stack(x), *layers) if self.scan else layers

    def pick(self, cache: Caches, rows_R: Array) -> Caches:
        """The cache of some rows, or of rows several times."""
        return jax.tree.map(lambda x: jnp.take(x, rows_R, axis=int(self.scan)), cache)

    def _embedding(self) -> nn.Embed:
        init = nn.initializers.normal(0.02)
        return nn.Embed(self.vocabulary, self.width, embedding_init=init, dtype=self.dtype, name="embedding")

    def _logits(self, x_BLD: Array, embed: nn.Embed, at_B: Array | None = None) -> Array:
        """By the embedding where the two are tied, else by a kernel of their own."""
        if at_B is not None:
            x_BLD = jnp.take_along_axis(x_BLD, at_B[:, None, None], axis=1)
        return unembed(self, x_BLD, embed if self.tied else None, init=nn.initializers.normal(0.02))

    def _stack(
        self,
        kind: type[nn.Module],
        fields: dict[str, Any],
        x_BLD: Array,
        cache: Caches | None,
        position: Array,
        each: np.ndarray | None = None,
    ) -> tuple[Array, Caches | None]:
        """Through the layers, whose call is (x_BLD, position, (its cache, its entry of `each`)) -> (x_BLD, cache)."""
        own = (cache, each)
        if not self.scan:
            rows = ((None,) * self.layers if x is None else x for x in own)
            own = tuple(zip(*rows, strict=True))
        x_BLD, new = stack(kind, **fields)(x_BLD, position, each=own)
        return x_BLD, None if cache is None else new

    def _check(self, tokens_BL: Array) -> None:
        name, D, H, G = type(self).__name__, self.width, self.heads, self.kv_heads or self.heads
        if tokens_BL.ndim != 2 or not jnp.issubdtype(tokens_BL.dtype, jnp.integer):
            got = f"{tokens_BL.dtype}{list(tokens_BL.shape)}"
            raise UsageError(f"a {name} takes integer tokens (batch, length), not {got}")
        if (D % H and not self.head) or H % G:
            raise UsageError(
                f"width {D} is to be a multiple of heads ({H}), and heads of kv_heads ({G}): change one of them"
            )
        if self.window is not None and self.window < 1:
            raise UsageError(f"window {self.window}: a position looks at least at itself, so give at least 1")
        if self.remat not in REMAT:
            raise UsageError(f"remat {self.remat!r} is unknown: use one of {', '.join(REMAT)}")
        if tokens_BL.shape[1] > self.context:
            got = tokens_BL.shape[1]
            raise UsageError(f"{got} tokens are more than the context ({self.context}): cut them or raise context")

    def _check_rotary(self) -> None:
        if (size := self.head or self.width // self.heads) % 2:
            raise UsageError(f"rotary positions need heads of even size, not {size}")
