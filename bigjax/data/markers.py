"""Which tokens of a vocabulary mean no text, and which begin a word, as its tokenizer says. V vocabulary."""

import json
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from bigjax import UsageError
from bigjax.data.text import load_tokenizer

MASK, FIRST, LAST, OTHERS = (
    ("[MASK]", "<mask>"),
    ("[CLS]", "<s>"),
    ("</s>", "[SEP]"),
    ("[PAD]", "[UNK]", "<pad>", "<unk>"),
)
SENTINELS = 100  # at most, as T5 has them


class Vocabulary(NamedTuple):
    """size: of the tokens that there are. ids: by their names. special: those that mean no text. model: their kind."""

    size: int
    ids: dict[str, int]
    special: frozenset[int]
    model: dict[str, Any]

    def find(self, names: tuple[str, ...]) -> int | None:
        return next((self.ids[name] for name in names if name in self.ids), None)


def read(tokenizer: str | None) -> Vocabulary:
    """Of the tokenizer.json at a path; None: bytes."""
    if tokenizer is None:
        return Vocabulary(256, {f"<0x{b:02X}>": b for b in range(256)}, frozenset(), {})
    coder = load_tokenizer(tokenizer)
    ids = coder.get_vocab(with_added_tokens=True)
    special = {i for i, token in coder.get_added_tokens_decoder().items() if token.special}
    special |= {ids[name] for name in (*MASK, *FIRST, *LAST, *OTHERS) if name in ids}
    return Vocabulary(max(ids.values()) + 1, ids, frozenset(special), json.loads(coder.to_str())["model"])


def of_masks(tokenizer: str | None, *, vocabulary: int) -> tuple[dict[str, Any], dict[str, int | None]]:
    """(`mask`, `special` and `starts` of `masked_token`, `first` and `last` of rows), for a model of such a vocabulary.

    tokenizer: the path of a tokenizer.json; None: bytes. A tokenizer without a mask leaves it the next token behind its
    own; one without a token for both ends has rows without them. starts: (V,), which tokens begin a word.
    """
    known = read(tokenizer)
    mask, first, last = (known.find(names) for names in (MASK, FIRST, LAST))
    _room(known.size + (mask is None), vocabulary, "a mask")
    mask = known.size if mask is None else mask
    around = {"first": first, "last": last} if None not in (first, last) else {"first": None, "last": None}
    special, begins, starts = known.special | {mask}, begins_word(known.model), np.ones(vocabulary, bool)
    for token, i in known.ids.items():
        starts[i] = i in special or begins(token)
    return {"mask": mask, "special": tuple(sorted(special)), "starts": starts}, around


def of_spans(tokenizer: str | None, *, vocabulary: int) -> dict[str, Any]:
    """`sentinels` and `end` of `span_corruption`, for a model of such a vocabulary; tokenizer: as of `of_masks`.

    A tokenizer without an end leaves it the next token behind its own, and one without sentinels the last ones of the
    vocabulary, downwards, as many as there are and at most 100.
    """
    known = read(tokenizer)
    end = known.find(LAST)
    free = known.size + (end is None)
    sentinels = [known.ids[name] for n in range(SENTINELS) if (name := f"<extra_id_{n}>") in known.ids]
    _room(free + (not sentinels), vocabulary, "an end and sentinels", SENTINELS)
    sentinels = sentinels or range(vocabulary - 1, max(vocabulary - SENTINELS, free) - 1, -1)
    return {"sentinels": tuple(sentinels), "end": known.size if end is None else end}


def _room(least: int, vocabulary: int, what: str, more: int = 0) -> None:
    if vocabulary < least:
        use = -(-(least + more) // 128) * 128
        raise UsageError(f"a vocabulary of {vocabulary} has no room for the tokens and {what}: give --vocabulary {use}")


def begins_word(model: dict[str, Any]) -> Callable[[str], bool]:
    """Whether a token begins a word, by the kind of a tokenizer's model: not if letters go on in it."""
    if model.get("type") == "WordLevel":
        return lambda token: True
    if model.get("type") == "WordPiece":
        return lambda token: not token.startswith(model["continuing_subword_prefix"])
    pieces = model.get("vocab", {})
    if any((piece if isinstance(piece, str) else piece[0]).startswith("▁") for piece in pieces):
        return lambda token: token.startswith("▁")

    def begins(token: str) -> bool:  # bytes: above 127 they are parts of letters; Ā to Ġ are white space
        byte = re.fullmatch("<0x(..)>", token)
        letter = chr(int(byte[1], 16)) if byte else token[:1]
        return (letter < "\x80" and not letter.isalnum()) or "Ā" <= letter <= "Ġ"

    return begins
