"""Texts of any length side by side in rows of one length, none seeing another; and what texts are cut into.

N rows, L positions. A document is (tokens, counts), two arrays of one length: its tokens, and which of them are
targets. All here is a pure function of the documents, in their order, and L.
"""

from collections.abc import Iterable, Sequence

import numpy as np

from bigjax import UsageError

Document = tuple[np.ndarray, np.ndarray]
OPEN = 64  # rows that are looked at for room


def pieces(document: Document, *, length: int) -> list[Document]:
    """A document in pieces of at most `length` + 1 tokens, the last of one being the first of the next.

    So each token but the first is a target once. What is left without a target is left out.
    """
    tokens, counts = document
    starts = range(0, max(len(tokens) - 1, 1), length)
    cut = [(tokens[n : n + length + 1], counts[n : n + length + 1]) for n in starts]
    return [(t, c) for t, c in cut if c[1:].any()]


def pack(documents: Iterable[Document], *, length: int) -> dict[str, np.ndarray]:
    """Rows for `tasks.next_token`: `tokens`, `segments` and `weight`, each (N, length + 1).

    segments: 1, 2, … for the documents of a row, 0 for padding, which comes last. weight: which tokens are targets, of
    a document's first never, as nothing of it comes before. A document is put into the first of the last OPEN rows
    with room for it. UsageError: there is none with a target, or one has more than length + 1 tokens.
    """
    rows: list[list[Document]] = []
    room: list[int] = []
    for tokens, counts in documents:
        if len(tokens) > length + 1:
            raise UsageError(f"a document has {len(tokens)} tokens, rows have {length + 1}: cut it by `pieces`")
        if not counts[1:].any():
            continue
        first = max(0, len(rows) - OPEN)
        at = next((n for n in range(first, len(rows)) if room[n] >= len(tokens)), len(rows))
        if at == len(rows):
            rows.append([])
            room.append(length + 1)
        rows[at].append((tokens, counts))
        room[at] -= len(tokens)
    if not rows:
        raise UsageError("no document has a token to learn: give texts of at least two tokens")
    out = {
        "tokens": np.zeros((len(rows), length + 1), np.int32),
        "segments": np.zeros((len(rows), length + 1), np.int32),
        "weight": np.zeros((len(rows), length + 1), bool),
    }
    for n, row in enumerate(rows):
        at = 0
        for segment, (tokens, counts) in enumerate(row, 1):
            here = np.s_[n, at : at + len(tokens)]
            out["tokens"][here], out["segments"][here], out["weight"][here] = tokens, segment, counts
            out["weight"][n, at] = False
            at += len(tokens)
    return out


def padding_share(split: dict[str, np.ndarray]) -> float:
    """Which share of the rows of `pack` is padding."""
    return float((split["segments"] == 0).mean())


def of_text(tokens: Sequence[int]) -> Document:
    """A document all of whose tokens are targets."""
    return np.asarray(tokens, np.int32), np.ones(len(tokens), bool)
