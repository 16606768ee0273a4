"""Spans of tokens that were hidden, written by a decoder: T5's task (Raffel et al. 2020, section 3.1.4).

B batch, L positions of a row, I of what is read of it, M of what is written, K spans.
"""

import math
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from bigjax import UsageError
from bigjax.task import Batch, Key, Task, row_keys
from bigjax.tasks.masked import Corrupt, fields_there, real_tokens, restored
from bigjax.tasks.sequences import shifted

SHARE, MEAN = 0.15, 3.0


def span_corruption(
    model: nn.Module, *, sentinels: Sequence[int], end: int, share: float = SHARE, mean: float = MEAN
) -> Task:
    """Cross-entropy of what `hide_spans` has taken out of `tokens` (B, L), in nats a token of the target.

    model: (tokens_BI, decoder_tokens_BM, mask_BI) -> logits_BMV.
    """
    size, largest = getattr(model, "vocabulary", math.inf), max(end, *sentinels)
    if largest >= size:
        raise UsageError(f"token {largest} is not in the model's vocabulary of {size}: give others, or a larger one")
    corrupt = hide_spans(sentinels=sentinels, end=end, share=share, mean=mean)
    return restored(model, corrupt, inputs=fields_there("tokens", "decoder_tokens", "real"))


def hidden_spans(length: int, *, share: float = SHARE, mean: float = MEAN) -> tuple[int, int]:
    """(tokens that are hidden, in how many spans) of a row; none of less than two tokens."""
    hidden = min(max(round(length * share), 1), length - 1)
    return (hidden, min(max(round(hidden / mean), 1), length - hidden)) if length > 1 else (0, 0)


def corrupted_lengths(length: int, *, share: float = SHARE, mean: float = MEAN) -> tuple[int, int]:
    """(tokens that are read, tokens that are written) of a row, the end of each among them."""
    hidden, spans = hidden_spans(length, share=share, mean=mean)
    return length - hidden + spans + 1, hidden + spans + 1


def longest_row(read: int, *, share: float = SHARE, mean: float = MEAN) -> int:
    """How many tokens a row has at most if so many are read of it once it is corrupted."""
    length = 2
    while corrupted_lengths(length + 1, share=share, mean=mean)[0] <= read:
        length += 1
    return length


def hide_spans(*, sentinels: Sequence[int], end: int, share: float = SHARE, mean: float = MEAN) -> Corrupt:
    """A function (batch, key) -> batch that takes spans of such a mean length out of each row, this share of it.

    The first span that is hidden is replaced by the first sentinel, and so on. A row begins with what is not hidden, as
    T5's do; the last span may be anywhere, as in the paper, where T5's code has it at the end of every row.
    The result has `tokens` (B, I), with `end` behind them; `target` (B, M), each sentinel and what it stands for, then
    `end`; `decoder_tokens` (B, M), the target one later behind a 0; `weight` (B, M), 1 where the target is no padding,
    and where the batch has the `length` (B,) of rows also `real` (B, I). I and M follow from L alone. All ways to
    split are equally likely; each row's draws are keyed by its `index`.
    """
    if not (0 < share < 1 and mean >= 1):
        raise UsageError(f"share {share}, mean {mean}: give a share between 0 and 1, and a mean length of 1 or more")

    def parts(key: Key, total: Array, count: Array, *, size: int, most: int) -> Array:
        """(K,): a total of at most `size` cut into so many parts, none of them 0."""
        place_L = jnp.arange(size)
        drawn_L = jnp.where(place_L < total - 1, jax.random.permutation(key, size), size + place_L)
        cut_L = drawn_L < jnp.sort(drawn_L)[count - 1]  # behind which tokens
        part_L = jnp.cumsum(cut_L.astype(jnp.int32)) - cut_L.astype(jnp.int32)
        return jnp.zeros(most, jnp.int32).at[part_L].add((place_L < total).astype(jnp.int32))

    def packed(values_L: Array, keep_L: Array, size: int) -> tuple[Array, Array]:
        """(the values to keep and the end, filled up with 0; how many they are)."""
        values_L, drop_L = jnp.append(values_L, end), ~jnp.append(keep_L, True)
        count = (~drop_L).sum()
        return jnp.where(jnp.arange(size) < count, values_L[jnp.argsort(drop_L, stable=True)[:size]], 0), count

    def corrupt(batch: Batch, key: Key) -> Batch:
        L = batch["tokens"].shape[1]
        sizes = np.array([hidden_spans(n, share=share, mean=mean) for n in range(L + 1)], np.int32)
        most, (read, written) = int(sizes[:, 1].max()), corrupted_lengths(L, share=share, mean=mean)
        if L < 2 or most > len(sentinels):
            instead = "longer rows" if L < 2 else "shorter rows, or a larger vocabulary"
            has = f"rows of {L} tokens have {most} spans to hide, for {len(sentinels)} sentinels"
            raise UsageError(f"{has}: give {instead}")

        def one(tokens_L: Array, real_L: Array, key: Key) -> tuple[Array, ...]:
            length, place_L, (first, second) = real_L.sum(), jnp.arange(L), jax.random.split(key)
            hidden, spans = jnp.asarray(sizes)[length]
            seen_K = parts(first, length - hidden + 1, spans + 1, size=L, most=most)  # one more, if empty, is last
            hidden_K = parts(second, hidden, spans, size=L, most=most)
            ends_K = jnp.cumsum(seen_K + hidden_K)
            begins_K, opens_K = ends_K - hidden_K, ends_K - hidden_K - seen_K
            span_L = jnp.searchsorted(ends_K, place_L, side="right")  # what is seen, then what is hidden
            there_L, span_L = span_L < spans, jnp.minimum(span_L, most - 1)
            hidden_L = there_L & (place_L >= begins_K[span_L])
            marked_L = jnp.asarray(sentinels, tokens_L.dtype)[span_L]
            kept_L = (real_L & ~hidden_L) | (there_L & (place_L == begins_K[span_L]))
            read_I, count = packed(jnp.where(hidden_L, marked_L, tokens_L), kept_L, read)
            opens_L = there_L & (place_L == opens_K[span_L])  # where a target has its sentinel
            target_M, aim = packed(jnp.where(opens_L, marked_L, tokens_L), hidden_L | opens_L, written)
            return read_I, jnp.arange(read) < count, target_M, (jnp.arange(written) < aim) & (spans > 0)

        read_BI, real_BI, target_BM, counts_BM = jax.vmap(one)(
            batch["tokens"], real_tokens(batch), row_keys(key, batch["index"])
        )
        out = {**batch, "tokens": read_BI, "target": target_BM, "weight": counts_BM.astype(jnp.float32)}
        out["decoder_tokens"] = shifted(target_BM)
        return out | {"real": real_BI} if "length" in batch else out

    return corrupt
