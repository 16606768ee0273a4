"""Flat files of tokens, read by index: as `python -m bigjax prepare`, nanoGPT and llm.c write them.

A folder holds the files `train.bin` and `test.bin` (or `val.bin`), or llm.c's names (`fineweb_train_000001.bin`, ...,
`fineweb_val_000000.bin`). Tokens are little-endian: uint16 or uint32 with nothing around them, or behind llm.c's
header. Beside ours lies `tokens.json`, and the `tokenizer.json` that it speaks of. Shapes: T tokens.
"""

import json
import re
from collections.abc import Sequence

import numpy as np
from etils import epath

from bigjax import UsageError
from bigjax.data.files import located
from bigjax.data.pipeline import Dataset
from bigjax.data.takes import check
from bigjax.data.text import window_count, window_fields

HEADER = 1024  # bytes: 256 int32, of which three are used: magic, version, number of tokens
HEADERS = {(20240520, 1): "<u2", (20240801, 7): "<u4"}  # llm.c's, of GPT-2's and of Llama 3's tokens
VOCABULARY = {"<u2": 50257, "<u4": 128256}  # GPT-2's and Llama 3's, where nothing says another
DTYPES = {"uint16": "<u2", "uint32": "<u4"}
LOOKED_AT = 2**20  # tokens of each file that are checked at once; the others are when they are read


class Tokens:
    """A sequence of T tokens in one or several files, memory-mapped; nothing is read before it is asked for."""

    def __init__(self, names: Sequence[str], parts: Sequence[np.ndarray], *, vocabulary: int) -> None:
        self.names, self.parts, self.vocabulary = names, parts, vocabulary
        self.ends = np.cumsum([len(part) for part in parts])
        for name, part in zip(names, parts, strict=True):
            start = part[:LOOKED_AT]
            if part.dtype == "<u2" and len(start) >= 64 and start[::2].any() and not start[1::2].any():
                raise UsageError(
                    f"every second token of {name} is 0, as in uint32 read as uint16: name the dtype uint32"
                )
            self._check(name, start)

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, span: slice) -> np.ndarray:
        """Tokens `start` to `stop`, int32; UsageError for one that the vocabulary has not."""
        start, stop, _ = span.indices(len(self))
        pieces = []
        for name, part, end in zip(self.names, self.parts, self.ends, strict=True):
            first = end - len(part)
            piece = part[max(start - first, 0) : max(stop - first, 0)]
            self._check(name, piece)
            pieces.append(piece.astype(np.int32))
        return np.concatenate(pieces)

    def _check(self, name: str, piece: np.ndarray) -> None:
        if piece.max(initial=0) >= self.vocabulary:
            raise UsageError(
                f"{name} holds token {piece.max()}, but the vocabulary is {self.vocabulary}: give the vocabulary of "
                "its tokenizer, or check whether its tokens are uint16 or uint32"
            )


class Windows:
    """Windows of `length` + 1 tokens as a reader by index: what `text.byte_windows` gives for bytes, with the token
    `before` in place of the newline put in front. Every token is a target, and with `once` exactly once.

    An example has `tokens` (length + 1,) int32 and `length` () int32; and `start` where the windows overlap (stride <
    length) and `once` is set, as it must be for evaluation.
    """

    def __init__(
        self, tokens: Tokens, *, length: int, stride: int | None = None, once: bool = True, before: int = 0
    ) -> None:
        self.tokens, self.length, self.once, self.before = tokens, length, once, before
        self.stride = length if stride is None else stride
        self.rows = window_count(len(tokens), length=length, stride=self.stride)

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, row: int) -> dict[str, np.ndarray]:
        size, stop = len(self.tokens), row * self.stride + self.length
        fields = window_fields(row, size, length=self.length, stride=self.stride, once=self.once)
        read = self.tokens[max(row * self.stride - 1, 0) : stop]
        front = [self.before] if row == 0 else []
        padding = self.length + 1 - len(front) - len(read)
        return {
            "tokens": np.concatenate([np.int32(front), read, np.zeros(padding, np.int32)], dtype=np.int32),
            **fields,
        }


class Rows:
    """Rows of `length` tokens as a reader by index, each token in one of them: `tokens` (length,) int32, and `length`
    (), how many are real; 0 is behind them. first, last: tokens around what each row has of the text.
    """

    def __init__(self, tokens: Tokens, *, length: int, first: int | None = None, last: int | None = None) -> None:
        self.tokens, self.length = tokens, length
        self.around = [np.array([] if token is None else [token], np.int32) for token in (first, last)]
        self.own = length - sum(map(len, self.around))
        if self.own < 1:
            raise UsageError(f"rows of {length} tokens hold none of the text: make them longer")

    def __len__(self) -> int:
        return -(-len(self.tokens) // self.own)

    def __getitem__(self, row: int) -> dict[str, np.ndarray]:
        first, last = self.around
        row_L = np.concatenate([first, self.tokens[row * self.own : (row + 1) * self.own], last])
        return {"tokens": np.pad(row_L, (0, self.length - len(row_L))), "length": np.int32(len(row_L))}


def load(name: str, *, vocabulary: int | None = None, dtype: str | None = None) -> Dataset:
    """The token files of `tokens:DIR` as splits of `Tokens`; DIR may be gs://..., whose files are read into memory.

    Facts: `vocabulary`; `before`, the token in front of the first (the end of a line or document, where that is known);
    `tokenizer`, the path of a tokenizer.json (None: bytes, or not known); `bytes_a_token` of the test split, for bits
    per byte, and `corpus_sha256` of the text (None: not known).

    What `tokens.json` says holds. Without it: `dtype` ("uint16", the default, or "uint32") of files without llm.c's
    header, and a vocabulary of GPT-2's 50,257 (uint16) or Llama 3's 128,256 (uint32) unless `vocabulary`, of the
    model, is given; it may be larger than the tokenizer's. Of `test` and `val` files `test` is the test split.
    UsageError: a missing folder or file; a torn file; a token outside the vocabulary.
    """
    shown, folder = name.strip() or "(an empty name)", located(name.removeprefix("tokens:").strip() or ".")
    if name.strip() in ("", "tokens:") or not folder.is_dir():
        _other(name)
        raise UsageError(f"{shown} is not a folder: give tokens:DIR with train.bin and test.bin (or val.bin) in DIR")
    about = _about(folder / "tokens.json")
    if about and vocabulary and vocabulary < about["vocabulary"]:
        raise UsageError(f"{folder} has a vocabulary of {about['vocabulary']}: {vocabulary} is too small, give as many")
    names = sorted(p.name for p in folder.iterdir() if p.name.endswith(".bin"))
    splits = {}
    for split, kinds in (("train", ("train",)), ("test", ("test", "val"))):
        found = [[n for n in names if re.fullmatch(rf"(.*_)?{kind}(_\d+)?\.bin", n)] for kind in kinds]
        files = next((files for files in found if files), None)
        if files is None:
            _other(name)
            wanted = " or ".join(f"{kind}.bin" for kind in kinds)
            raise UsageError(f"{folder} has no {wanted}: prepare it by python -m bigjax prepare TEXT --to {folder}")
        declared = DTYPES[about["dtype"] if about else dtype or "uint16"]
        parts, types = zip(*(_open(folder / n, declared) for n in files), strict=True)
        size = vocabulary or (about["vocabulary"] if about else VOCABULARY[types[0]])
        splits[split] = tokens = Tokens([str(folder / n) for n in files], parts, vocabulary=size)
        if about and len(tokens) != about["splits"][split]["tokens"]:
            raise UsageError(
                f"{folder / files[0]} holds {len(tokens)} tokens, but tokens.json says "
                f"{about['splits'][split]['tokens']}: prepare the folder again"
            )
    facts = {
        "vocabulary": splits["train"].vocabulary,
        "before": about["before"] if about else 0,
        "tokenizer": str(folder / "tokenizer.json") if about and about["tokenizer"] != "bytes" else None,
        "bytes_a_token": about["splits"]["test"]["bytes"] / about["splits"]["test"]["tokens"] if about else None,
        "corpus_sha256": about["sha256"] if about else None,
    }
    return Dataset(**splits, name=name, facts=facts)


def _other(name: str) -> None:
    """UsageError for what is no folder of tokens, but text to make them of, or other data."""
    from bigjax.data import sources

    if name.startswith("tokens:") or not name.strip():
        return
    plain = name == "python" or name.lower().endswith(".txt")
    try:
        held = ("text",) if plain else sources.fields_of(name)
    except UsageError:  # which would say what other data there are
        return
    if plain or ("text" in held and name.lower().endswith(".jsonl")):
        raise UsageError(
            f"{name} is text, not yet in tokens: python -m bigjax prepare {name} --to DIR, then --data tokens:DIR"
        )
    check(held, ("tokens",), name=name)


def _about(path: epath.Path) -> dict | None:
    """What tokens.json says, or None where there is none."""
    if not path.exists():
        return None
    try:
        about = json.loads(path.read_text())
        {about[k] for k in ("tokenizer", "vocabulary", "before", "sha256")}, DTYPES[about["dtype"]]
        {about["splits"][split][k] for split in ("train", "test") for k in ("tokens", "bytes")}
        return about
    except (ValueError, KeyError, TypeError, RecursionError) as e:  # RecursionError: nested too deep
        raise UsageError(f"{path} is damaged ({type(e).__name__}: {e}): prepare the folder again") from e


def _open(path: epath.Path, dtype: str) -> tuple[np.ndarray, str]:
    """(tokens (T,), their type) of one file, which is checked as far as that costs little."""
    try:
        raw = np.frombuffer(path.read_bytes(), np.uint8) if "://" in str(path) else np.memmap(path, np.uint8, "r")
    except OSError as e:
        raise UsageError(f"{path} cannot be read ({e.strerror or e}): check the file and its permissions") from e
    except ValueError:  # what memmap says of an empty file
        raise UsageError(f"{path} is empty: write it again") from None
    head = np.frombuffer(bytes(raw[:12]).ljust(12, b"\0"), "<i4")
    if int(head[0]) in {magic for magic, _ in HEADERS}:
        version, count = int(head[1]), int(head[2])
        if len(raw) < HEADER:
            raise UsageError(f"{path} ends within llm.c's header ({len(raw)} of {HEADER} bytes): write it again")
        if (int(head[0]), version) not in HEADERS:
            raise UsageError(f"{path} has llm.c's header of version {version}, which is not read: write it again")
        dtype, raw = HEADERS[int(head[0]), version], raw[HEADER:]
        if len(raw) != count * np.dtype(dtype).itemsize:
            raise UsageError(f"{path} says it has {count} tokens, but holds {len(raw)} bytes of them: write it again")
    if len(raw) == 0 or len(raw) % np.dtype(dtype).itemsize:
        raise UsageError(
            f"{path} holds {len(raw)} bytes, which is no number of {np.dtype(dtype).name} tokens: write it again, or "
            "name its dtype"
        )
    return raw.view(dtype), dtype
