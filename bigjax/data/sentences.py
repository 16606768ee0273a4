"""Texts for a classifier: which tokenizer, cut to how many tokens, in which batches."""

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

from bigjax.data import text
from bigjax.data.lengths import ByLength
from bigjax.data.pipeline import Dataset
from bigjax.experiment import Positive, Split

if TYPE_CHECKING:
    from tokenizers import Tokenizer


@dataclass(frozen=True)
class Words:
    """How texts become tokens: a group of flags."""

    tokenizer: Literal["words", "bpe", "wordpiece"] = "words"  # trained on the training texts
    tokenizer_file: str | None = None  # any tokenizer.json instead
    vocabulary: Annotated[int, Positive] = 8000  # tokens at most
    length: Annotated[int, Positive] = 280  # tokens at most
    by_length: bool = True  # batches of texts about as long, cut to them; --no-by-length: any, all as long as --length

    def coder(self, data: Dataset) -> "Tokenizer":
        """The tokenizer that is asked for."""
        if self.tokenizer_file:
            return text.load_tokenizer(self.tokenizer_file)
        return text.train_tokenizer(data.train["text"], kind=self.tokenizer, vocabulary=self.vocabulary)

    def splits(self, coder: "Tokenizer", data: Dataset, *, context: int | None = None) -> tuple[Split, Split]:
        """(train, test) with `tokens` and `length` in place of `text`, at most `context` tokens.

        A line on stderr says of how many texts the end may be missing.
        """
        length = min(self.length, context or self.length)
        splits = text.encode_splits(coder, data, length=length)
        full, count = (sum(f(s["length"]) for s in splits) for f in (lambda n: int((n == length).sum()), len))
        if full:
            why = f"--length {length}" if length == self.length else f"the model's context of {length}"
            print(f"{data.name}: {full:,} of {count:,} texts fill {why} tokens: what is longer is cut", file=sys.stderr)
        return tuple(map(ByLength, splits)) if self.by_length else splits


def between_marks(coder: "Tokenizer") -> "Tokenizer":
    """A tokenizer that was just trained, with [CLS] before each text, of which a BERT judges it, and [SEP] behind."""
    import tokenizers

    coder.add_special_tokens(["[CLS]", "[SEP]"])
    marks = [(name, coder.token_to_id(name)) for name in ("[SEP]", "[CLS]")]
    coder.post_processor = tokenizers.processors.BertProcessing(*marks)
    return coder
