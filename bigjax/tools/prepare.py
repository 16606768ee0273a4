"""Data written once, to be read by name afterwards: TFDS sets as array_record, text as flat files of tokens.

Shapes: T tokens.
"""

import hashlib
import json
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
from etils import epath

from bigjax import UsageError, place
from bigjax.data import corpus, text, tfds
from bigjax.run.atomic import write_whole
from bigjax.tools import sets

if TYPE_CHECKING:
    from tokenizers import Tokenizer

PIECE = 2**16  # characters that are tokenized together, to the end of a line


def prepare(name: str, to: str, *, tokenizer: str | None = None, vocabulary: int = 8000, separator: str = "\n") -> str:
    """Builds what `name` says in the folder `to` (local or gs://...), and gives back how to use it, in one line.

    `python` (the standard library), a .txt, a folder of them or a .jsonl with `text` in each line become token files,
    with `tokenizer` as `write_tokens` takes it ("bytes" if None); any other name is a TFDS set. Raises UsageError.
    """
    path = place(name)
    if path.suffix == ".jsonl" or corpus.in_one_piece(name):
        return write_tokens(name, to, tokenizer=tokenizer or "bytes", vocabulary=vocabulary, separator=separator)
    what = name.removeprefix("tfds:")
    if path.is_file() or ("/" in what and not sets.known(what, to)):
        raise UsageError(
            f"{name} is neither text nor a TFDS set: give a .txt, a folder of them, a .jsonl, python, or the set's name"
        )
    if tokenizer:
        raise UsageError(f"--tokenizer is for text, and {name} is a TFDS set: leave it out")
    return sets.build(tfds.NAMES.get(name, what), to)


# ---- token files


def write_tokens(name: str, to: str, *, tokenizer: str = "bytes", vocabulary: int = 8000, separator: str = "\n") -> str:
    """Writes `train.bin`, `test.bin`, `tokens.json` (and `tokenizer.json`) of a text, which must fit into memory.

    The test split is what `text.python_corpus` holds out, or the last tenth of the lines of a file. `tokenizer`:
    "bytes" (token = byte, vocabulary 256); "bpe", learned from the training part, of `vocabulary` tokens; or the path
    of a tokenizer.json. `separator` ends each text of a .jsonl; a tokenizer may know it as one token
    (`<|endoftext|>`). Raises UsageError.
    """
    folder = place(to, "--to ")
    for file in ("train.bin", "test.bin"):
        if (folder / file).exists():
            raise UsageError(f"{folder} holds a {file} already: name another --to, or delete it there")
    texts = dict(zip(("train", "test"), _texts(name, separator), strict=True))
    coder = _tokenizer(tokenizer, texts["train"], vocabulary)
    tokens = {split: _encode(coder, content) for split, content in texts.items()}
    if empty := [split for split in tokens if len(tokens[split]) == 0]:
        raise UsageError(f"the {empty[0]} part of {name} has no tokens: give more text, or another --tokenizer")
    size = coder.get_vocab_size() if coder else 256
    dtype = "uint16" if size <= 2**16 else "uint32"
    end = _encode(coder, separator.encode())
    about = {
        "text": name,
        "tokenizer": "tokenizer.json" if coder else "bytes",
        "vocabulary": size,
        "dtype": dtype,
        "before": int(end[-1]) if len(end) else 0,
        "sha256": hashlib.sha256(b"".join(hashlib.sha256(t).digest() for t in texts.values())).hexdigest(),
        "splits": {split: {"tokens": len(tokens[split]), "bytes": len(texts[split])} for split in texts},
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if coder:
            write_whole(folder / "tokenizer.json", coder.to_str().encode())
        write_whole(folder / "tokens.json", (json.dumps(about, indent=1) + "\n").encode())  # .bin files must match it
        for split in texts:
            write_whole(folder / f"{split}.bin", tokens[split].astype(np.dtype(dtype).newbyteorder("<")).tobytes())
    except OSError as e:
        raise UsageError(f"{folder} cannot be written ({e.strerror or e}): name another --to") from e
    counts = ", ".join(f"{len(tokens[split]):,} {split}" for split in texts)
    return f"{counts} tokens of {size:,}: read them by --data tokens:{folder}"


def _texts(name: str, separator: str) -> tuple[bytes, bytes]:
    """(train, test) in UTF-8."""
    if not name.endswith(".jsonl"):
        return corpus.parts(name)
    path = place(name)
    lines = enumerate(corpus.read(path).splitlines(keepends=True), 1)
    return corpus.last_tenth(name, [_document(path, n, line, separator) for n, line in lines if line.strip()])


def _document(path: epath.Path, number: int, line: bytes, separator: str) -> bytes:
    try:
        return (json.loads(line)["text"] + separator).encode()
    except (ValueError, KeyError, TypeError) as e:
        raise UsageError(f'{path}, line {number} is not {{"text": "..."}} ({type(e).__name__}): repair it') from e


def _tokenizer(kind: str, train: bytes, vocabulary: int) -> "Tokenizer | None":
    if kind == "bytes":
        return None
    if kind == "bpe":
        return text.train_tokenizer(_pieces(train), kind="bpe", vocabulary=vocabulary)
    return text.load_tokenizer(kind)


def _encode(coder: "Tokenizer | None", content: bytes) -> np.ndarray:
    """(T,) uint32, or uint8 of bytes."""
    if coder is None:
        return np.frombuffer(content, np.uint8)
    batches = coder.encode_batch(list(_pieces(content)), add_special_tokens=False)
    return np.concatenate([np.array(encoded.ids, np.uint32) for encoded in batches] or [np.zeros(0, np.uint32)])


def _pieces(content: bytes) -> Iterator[str]:
    """The text in pieces of whole lines, which hold all of it."""
    piece, size = [], 0
    for line in content.decode("utf-8", "replace").splitlines(keepends=True):
        piece.append(line)
        size += len(line)
        if size >= PIECE:
            yield "".join(piece)
            piece, size = [], 0
    if piece:
        yield "".join(piece)
