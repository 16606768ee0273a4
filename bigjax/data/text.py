"""Text: the source of Python's standard library as a corpus and as ten topics, byte windows, tokenizers.

Shapes: N rows, L tokens. Token 0 is padding, always at the end; `length` (N,) says how many tokens of a row are real.
Tokenizers made here have [PAD] as 0 and [UNK] as 1.
"""

import hashlib
import lzma
import sys
import sysconfig
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from bigjax import UsageError, place
from bigjax.data.files import stray
from bigjax.data.pipeline import Dataset
from bigjax.experiment import Split, size_of

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# Packages of at least three files and 48 kB that are not about the same thing (urllib and http are).
TOPICS = ("asyncio", "email", "http", "importlib", "json", "logging", "multiprocessing", "re", "unittest", "xml")


def python_corpus() -> Dataset:
    """The running Python's standard library as bytes: 266 files, 6.8 MB, 9 % held out, by file.

    Results can be compared only where the fact `corpus_sha256` is the same. `UsageError` names a missing module.
    """
    train, test = (b"".join(read_modules(listed(held_out=held_out))) for held_out in (False, True))
    digest = hashlib.sha256(hashlib.sha256(train).digest() + hashlib.sha256(test).digest()).hexdigest()
    return Dataset(train, test, name="python", facts={"corpus_sha256": digest})


def listed(*, held_out: bool) -> tuple[str, ...]:
    lines = Path(__file__).with_name("python_corpus.txt").read_text("utf-8").splitlines()
    return tuple(m.removesuffix("*") for m in lines if not m.startswith("#") and m.endswith("*") == held_out)


def read_modules(modules: Iterable[str]) -> list[bytes]:
    root, files = Path(sysconfig.get_paths()["stdlib"]), []
    for module in modules:
        stem = root.joinpath(*module.split("."))
        path = next((p for p in (stem.with_name(stem.name + ".py"), stem / "__init__.py") if p.is_file()), None)
        if path is None:
            raise UsageError(
                f"the module {module} is not in {root}, but the corpus is the whole standard library of CPython 3.11 "
                "to 3.14: install Python in full, or use another one"
            )
        files.append(path.read_bytes())
    return files


def python_topics(*, length: int = 1600, train_size: int = 1000, test_size: int = 50) -> Dataset:
    """Which of ten packages is a piece of source from? At most `length` characters, from the start of a line.

    Every class has `train_size` pieces of its training files and `test_size` of its held-out files (those of
    `python_corpus`), evenly spaced over all of its text, so in small packages they overlap. No file is on both sides.
    """
    if min(length, train_size, test_size) < 1:
        raise UsageError("length, train_size and test_size of the topics must be at least 1: give larger ones")
    splits = []
    for held_out, size in ((False, train_size), (True, test_size)):
        modules = listed(held_out=held_out)
        files = [read_modules(m for m in modules if m.split(".")[0] == topic) for topic in TOPICS]
        text = np.array([piece for topic in files for piece in _pieces(topic, length, size)], object)
        splits.append({"text": text, "label": np.repeat(np.arange(len(TOPICS), dtype=np.int32), size)})
    return Dataset(*splits, len(TOPICS), TOPICS)


def _pieces(files: Iterable[bytes], length: int, count: int) -> list[str]:
    texts = [file.decode("utf-8", "replace") for file in files]
    ends = np.cumsum([len(text) for text in texts])
    pieces = []
    for position in np.linspace(0, ends[-1], count, endpoint=False).astype(int):
        file = int(np.searchsorted(ends, position, side="right"))
        text, behind = texts[file], ends[file] - position
        start = int(max(0, len(text) - length) * (1 - behind / len(text)))
        start = text.rfind("\n", 0, start) + 1
        pieces.append(text[start : start + length])
    return pieces


def byte_windows(data: bytes, *, length: int, stride: int | None = None, once: bool = True) -> dict[str, np.ndarray]:
    """Windows for next-byte prediction: `tokens` (N, length + 1) int32, the bytes themselves, and `length` (N,) int32.

    Inputs are `tokens[:, :-1]`, targets `tokens[:, 1:]`, the vocabulary is 256. A newline is put before the data, so
    that its first byte is a target as well. With stride = length (the default) every byte is a target exactly once,
    its context being what is before it in its window (1 to `length` bytes). The last window is padded with 0 behind
    `length` tokens.

    With a smaller stride windows overlap. For evaluation (`once`) a field `start` (N,) int32 is added: only the
    targets `tokens[n, t]` with start[n] <= t < length[n] count, which again is every byte once, each but those of the
    first window with more than length − stride bytes of context. For training, `once=False` leaves it out. `tokens`
    is a read-only view: overlap costs no memory.
    """
    if not data:
        raise UsageError("no bytes to make windows of: give a text that is not empty")
    stride = length if stride is None else stride
    rows = window_count(len(data), length=length, stride=stride)
    padded = np.zeros(max((rows - 1) * stride + length + 1, len(data) + 1), np.int32)
    padded[0], padded[1 : len(data) + 1] = ord("\n"), np.frombuffer(data, np.uint8)
    windows = np.lib.stride_tricks.sliding_window_view(padded, length + 1)[::stride][:rows]
    return {"tokens": windows, **window_fields(np.arange(rows), len(data), length=length, stride=stride, once=once)}


def window_count(size: int, *, length: int, stride: int) -> int:
    """How many windows hold every one of `size` tokens as a target, as `byte_windows` describes them."""
    if not 1 <= stride <= length:
        raise UsageError(f"stride {stride} does not fit windows of length {length}: use a stride from 1 to the length")
    return 1 + max(0, -(-(size - length) // stride))


def window_fields(
    row: int | np.ndarray, size: int, *, length: int, stride: int, once: bool
) -> dict[str, np.ndarray | np.integer]:
    """`length`, and with overlap, if each target is to count once, `start`, of a window or of windows (N,)."""
    fields = {"length": np.minimum(length + 1, size + 1 - row * stride).astype(np.int32)}
    if once and stride < length:
        fields["start"] = np.where(row == 0, 1, length - stride + 1).astype(np.int32)
    return fields


class Passages:
    """Texts, by index, as windows for next-byte prediction: row n is what `byte_windows` makes of text n and as many of
    those behind it as fill `length` bytes, each with a newline at its end. A reader: nothing is kept in memory."""

    def __init__(self, split: Split, *, length: int) -> None:
        self.split, self.length = split, length

    def __len__(self) -> int:
        return size_of(self.split)

    def __getitem__(self, row: int) -> dict[str, np.ndarray]:
        data = b""
        while len(data) < self.length:
            n = row % len(self)
            data += lines([self.split["text"][n] if isinstance(self.split, Mapping) else self.split[n]["text"]])
            row += 1
        return {k: v[0] for k, v in byte_windows(data[: self.length], length=self.length).items()}


def lines(texts: Iterable[str]) -> bytes:
    """The texts in UTF-8, each with a newline at its end."""
    return "".join(text + "\n" for text in texts).encode()


def xz_bits_per_byte(data: bytes, *, after: bytes = b"") -> float:
    """What `xz -9` needs for `data`, in bits a byte: alone, or (`after`) as a continuation of the training text."""
    if not data:
        raise UsageError("no bytes to compress: give a text that is not empty")
    before = len(lzma.compress(after, preset=9)) if after else 0
    return 8 * (len(lzma.compress(after + data, preset=9)) - before) / len(data)


# ---- tokenizers

# Chinese and Japanese, which put no spaces between words: Han, its signs of repetition, Hiragana and Katakana.
NO_SPACES = r"[\p{Han}\p{Hiragana}\p{Katakana}\x{30FC}\x{FF70}]"
UNKNOWN = 0.2  # of the tokens of held-out text: with more, a warning


def train_tokenizer(texts: Iterable[str], *, kind: str = "bpe", vocabulary: int = 8000) -> "Tokenizer":
    """A tokenizer of at most `vocabulary` tokens learned from training text; the same text gives the same tokenizer.

    `bpe`: on bytes, as GPT-2 (Radford et al. 2019), any text comes back as it was. `wordpiece`: lower case, as BERT
    (Devlin et al. 2018). `words`: lower case, the most frequent words and runs of punctuation; Chinese and Japanese
    by character.
    """
    import tokenizers as library

    models, pre, trainers = library.models, library.pre_tokenizers, library.trainers
    texts = _strings(texts)
    if not any(text.strip() for text in texts):
        raise UsageError("no text to train a tokenizer on: give texts that are not empty")
    least = 258 if kind == "bpe" else 3
    if vocabulary < least:
        raise UsageError(f"a vocabulary of {vocabulary} is too small for a {kind} tokenizer: use at least {least}")
    common = {"vocab_size": vocabulary, "special_tokens": ["[PAD]", "[UNK]"], "show_progress": False}
    if kind == "bpe":
        tokenizer = library.Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = library.decoders.ByteLevel()
        trainer = trainers.BpeTrainer(initial_alphabet=sorted(pre.ByteLevel.alphabet()), **common)
    elif kind == "wordpiece":
        tokenizer = library.Tokenizer(models.WordPiece(unk_token="[UNK]"))
        tokenizer.normalizer, tokenizer.pre_tokenizer = library.normalizers.BertNormalizer(), pre.BertPreTokenizer()
        tokenizer.decoder = library.decoders.WordPiece()
        counts = Counter(c for text in texts for c in tokenizer.normalizer.normalize_str(text) if not c.isspace())
        chars = sorted(counts, key=lambda c: (-counts[c], c))[: vocabulary // 4]
        # The library numbers ##a, ##b, ... at random and breaks ties by number: special tokens are numbered in order.
        common["special_tokens"] += [f"##{c}" for c in chars]
        trainer = trainers.WordPieceTrainer(initial_alphabet=chars, limit_alphabet=len(chars), **common)
    elif kind == "words":
        tokenizer = library.Tokenizer(models.WordLevel(unk_token="[UNK]"))
        tokenizer.normalizer = library.normalizers.Lowercase()
        characters = pre.Split(library.Regex(NO_SPACES), "isolated")
        tokenizer.pre_tokenizer = pre.Sequence([pre.Whitespace(), characters])
        trainer = trainers.WordLevelTrainer(**common)
    else:
        raise UsageError(f"there is no tokenizer {kind!r}: use bpe, wordpiece or words, or byte_tokenizer()")
    tokenizer.train_from_iterator(texts, trainer)
    if kind == "wordpiece":  # the same vocabulary, where ##a is not special
        trained, tokenizer = tokenizer, library.Tokenizer(models.WordPiece(tokenizer.get_vocab(), unk_token="[UNK]"))
        tokenizer.normalizer, tokenizer.pre_tokenizer = trained.normalizer, trained.pre_tokenizer
        tokenizer.decoder = trained.decoder
        tokenizer.add_special_tokens(["[PAD]", "[UNK]"])
    return tokenizer


def byte_tokenizer() -> "Tokenizer":
    """Bytes as tokens, with no training: byte b of the text in UTF-8 is token b + 2; vocabulary 258."""
    import tokenizers as library

    tokens = {"[PAD]": 0, "[UNK]": 1} | {f"<0x{b:02X}>": b + 2 for b in range(256)}
    tokenizer = library.Tokenizer(library.models.BPE(tokens, [], byte_fallback=True, unk_token="[UNK]"))
    tokenizer.decoder = library.decoders.ByteFallback()
    return tokenizer


def load_tokenizer(path: str) -> "Tokenizer":
    """Any `tokenizer.json`, or the folder with one. Ids stay as they are: where 0 isn't its padding, go by `length`."""
    import tokenizers as library

    file = place(path)
    file = file / "tokenizer.json" if file.is_dir() else file
    try:
        text = file.read_text()
    except (OSError, UnicodeDecodeError) as e:
        raise UsageError(f"{file} cannot be read ({type(e).__name__}): give the path of a tokenizer.json") from e
    try:
        tokenizer = library.Tokenizer.from_str(text)
    except Exception as e:  # the library raises plain Exception
        raise UsageError(f"{file} is not a tokenizer.json of the tokenizers library ({e}): give one that is") from e
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def encode(tokenizer: "Tokenizer", texts: Iterable[str], *, length: int) -> dict[str, np.ndarray]:
    """`tokens` (N, length) int32, cut off or filled with 0 at the end, and `length` (N,) int32.

    `UsageError` for a text that has no tokens.
    """
    texts = _strings(texts)
    if not texts:
        raise UsageError("there are no texts to encode: give at least one")
    if length < 1:
        raise UsageError(f"texts cannot be cut to {length} tokens: use a length of at least 1")
    tokenizer.enable_truncation(length)  # by the tokenizer, since cutting afterwards would lose a closing [SEP]
    encoded = [e.ids for e in tokenizer.encode_batch(texts)]
    tokenizer.no_truncation()
    length_N = np.array([len(ids) for ids in encoded], np.int32)
    if (length_N == 0).any():
        raise UsageError(f"text {int(np.argmin(length_N))} (counted from 0) has no tokens: remove that row")
    tokens_NL = np.zeros((len(texts), length), np.int32)
    tokens_NL[np.arange(length) < length_N[:, None]] = np.concatenate(encoded)
    return {"tokens": tokens_NL, "length": length_N}


def encode_splits(
    tokenizer: "Tokenizer", data: Dataset, *, length: int
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """(train, test) of data with `text`, as `encode` and with the other fields as they are.

    A line on stderr gives the share of unknown tokens in the held-out text, where the tokenizer has one for them; with
    more than UNKNOWN, which says little of the text, it warns.
    """
    train, test = (
        {k: v for k, v in split.items() if k != "text"} | encode(tokenizer, split["text"], length=length)
        for split in (data.train, data.test)
    )
    names = (getattr(tokenizer.model, "unk_token", None) or "[UNK]", "<unk>")
    unknown = next((i for i in map(tokenizer.token_to_id, names) if i is not None), None)
    if unknown is not None:
        share = (test["tokens"] == unknown).sum() / test["length"].sum()
        much = share > UNKNOWN
        said = f"{data.name}: {share:.1%} of the tokens of the held-out text are unknown, [UNK]"
        print(f"warning: {said}: use --tokenizer bpe, which knows all text" if much else said, file=sys.stderr)
    return train, test


def _strings(texts: Iterable[str]) -> list[str]:
    texts = [texts] if isinstance(texts, str) else list(texts)
    bad = next((n for n, text in enumerate(texts) if not isinstance(text, str)), None)
    if bad is not None:
        raise UsageError(f"text {bad} (counted from 0) is a {type(texts[bad]).__name__}, not a string: give strings")
    wrong = next((n for n, text in enumerate(texts) if stray(text)), None)
    if wrong is not None:
        raise UsageError(
            f"text {wrong} (counted from 0) has {stray(texts[wrong])}, half of a surrogate pair, which is no "
            "character: repair or remove it"
        )
    return texts
