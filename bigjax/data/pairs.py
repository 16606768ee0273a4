"""Pairs of texts, one to read and one to write, as tokens of one tokenizer.

N pairs, L tokens that are read, M that are written. Token 0 is padding, always at the end; every text ends with the
tokenizer's own end.
"""

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from bigjax import UsageError
from bigjax.data import text
from bigjax.data.lengths import ByLength
from bigjax.data.pipeline import Dataset

if TYPE_CHECKING:
    from tokenizers import Tokenizer

END = "[END]"
ENDS = (END, "</s>", "<eos>", "<|endoftext|>", "[SEP]")  # what tokenizers call it
COVERED, MULTIPLE, MOST = (
    0.98,
    8,
    128,
)  # a length that isn't told holds this share of the training texts, up to the most


def train_coder(data: Dataset, *, vocabulary: int, lower_case: bool = False) -> "Tokenizer":
    """A byte-level BPE of at most `vocabulary` tokens for both sides, learned from the training split alone."""
    import tokenizers as library

    texts = [both for side in ("source", "target") for both in data.train[side]]
    texts = [f" {both.lower() if lower_case else both}" for both in texts]
    coder = text.train_tokenizer(texts, kind="bpe", vocabulary=vocabulary - 1)
    coder.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=True)  # a word is one wherever it stands
    coder.add_special_tokens([END])
    return coder


def lowered(coder: "Tokenizer") -> "Tokenizer":
    """The tokenizer, which takes all texts in lower case from now on."""
    import tokenizers as library

    first = [library.normalizers.Lowercase(), *([coder.normalizer] if coder.normalizer else [])]
    coder.normalizer = library.normalizers.Sequence(first)
    return coder


def ended(coder: "Tokenizer", *, where: object) -> int:
    """The token that ends every text of this tokenizer, which is made to add it if it doesn't yet."""
    import tokenizers as library

    known = [(name, i) for name in ENDS if (i := coder.token_to_id(name)) is not None]
    if not known:
        raise UsageError(
            f"the tokenizer of {where} has no token that ends a text ({', '.join(ENDS)}): give another, or none to "
            "have one trained"
        )
    name, end = known[0]
    if coder.encode("a").ids[-1] != end:
        coder.post_processor = library.processors.TemplateProcessing(single=f"$A {name}", special_tokens=[(name, end)])
    return end


class Encoded(NamedTuple):
    """train, test: `tokens` (N, L), `target` (N, M), `length` (N,) and `target_length` (N,), all int32.

    sources, references: the texts of the test split, as they were. end: the token that ends each text.
    """

    train: dict[str, np.ndarray]
    test: dict[str, np.ndarray]
    sources: list[str]
    references: list[str]
    end: int


def encode(
    coder: "Tokenizer", data: Dataset, *, length: int | None = None, target_length: int | None = None, prefix: str = ""
) -> Encoded:
    """The pairs of both splits as tokens; what is cut or left out is said on stderr, once a split.

    length, target_length: of tokens, at most; None for what holds nearly all of the training split, up to MOST. A
    longer source is cut; a pair with a longer target is not trained on, and in the test split that target is cut for
    the loss alone. A pair with an empty text is left out of either split. prefix: goes before each source.
    """
    end, sizes, out = ended(coder, where=data.name), (length, target_length), {}
    for split, rows in (("train", data.train), ("test", data.test)):
        texts = [[prefix + source for source in rows["source"]], list(rows["target"])]
        ids = [[e.ids for e in coder.encode_batch(side)] for side in texts]
        length_2N = np.array([[len(row) for row in side] for side in ids], np.int32)
        if split == "train":
            sizes = [size or _covering(lengths) for size, lengths in zip(sizes, length_2N)]
            if min(sizes) < 2:
                raise UsageError(f"texts cannot be cut to {min(sizes)} token, their end: use a length of at least 2")
        empty_N = np.array([not both[0].strip() or not both[1].strip() for both in zip(rows["source"], rows["target"])])
        long_N = ~empty_N & (length_2N[1] > sizes[1]) & (split == "train")
        keep = np.flatnonzero(~empty_N & ~long_N)
        if not len(keep):
            raise UsageError(
                f"{data.name}: no pair of the {split} split has two texts and a target of {sizes[1]} tokens at most: "
                "give a longer --target-length, or other data"
            )
        told = {
            "left out, as a text is empty": empty_N.sum(),
            f"left out, as the target has more than {sizes[1]} tokens (--target-length)": long_N.sum(),
            f"cut to the {sizes[0]} tokens of --length that are read": (length_2N[0][keep] > sizes[0]).sum(),
        }
        said = "; ".join(f"{count:,} {what}" for what, count in told.items() if count)
        if said:
            print(f"{data.name}: of {len(long_N):,} pairs of the {split} split {said}", file=sys.stderr)
        (tokens, read), (target, written) = (
            _filled([side[n] for n in keep], size, end) for side, size in zip(ids, sizes, strict=True)
        )
        fields = {"tokens": tokens, "length": read, "target": target, "target_length": written}
        out[split] = fields, [rows["source"][n] for n in keep], [rows["target"][n] for n in keep]
    return Encoded(out["train"][0], *out["test"], end)


def by_length(fields: dict[str, np.ndarray]) -> ByLength:
    """Pairs in batches of like length, that of the longer side, to which both are cut."""
    longer_N = np.maximum(fields["length"], fields["target_length"])
    return ByLength(fields, cut=("tokens", "target"), lengths=longer_N)


def _covering(length_N: np.ndarray) -> int:
    return min(int(-(-np.quantile(length_N, COVERED, method="higher") // MULTIPLE) * MULTIPLE), MOST)


def _filled(rows: Sequence[list[int]], length: int, end: int) -> tuple[np.ndarray, np.ndarray]:
    """(N, length) and (N,); what is longer is cut and ended."""
    tokens_NL = np.zeros((len(rows), length), np.int32)
    length_N = np.array([min(len(row), length) for row in rows], np.int32)
    for n, row in enumerate(rows):
        tokens_NL[n, : length_N[n]] = row if len(row) <= length else [*row[: length - 1], end]
    return tokens_NL, length_N
