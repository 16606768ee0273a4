"""Data written once, to be read by name afterwards: TFDS sets as array_record, text as flat files of tokens.

Shapes: T tokens.
"""

import hashlib
import json
import tempfile
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import numpy as np
from etils import epath

from bigjax import UsageError
from bigjax.data import corpus, text, tfds
from bigjax.data.files import located
from bigjax.run.atomic import write_whole

if TYPE_CHECKING:
    from tokenizers import Tokenizer

PIECE = 2**16  # characters that are tokenized together, to the end of a line


def prepare(name: str, to: str, *, tokenizer: str | None = None, vocabulary: int = 8000, separator: str = "\n") -> str:
    """Builds what `name` says in the folder `to` (local or gs://...), and gives back how to use it, in one line.

    `python` (the standard library), a .txt or a .jsonl with `text` in each line become token files, with `tokenizer`
    as `write_tokens` takes it ("bytes" if None); any other name is a TFDS set. Raises UsageError.
    """
    path = located(name)
    if name == "python" or path.suffix in (".txt", ".jsonl"):
        return write_tokens(name, to, tokenizer=tokenizer or "bytes", vocabulary=vocabulary, separator=separator)
    if path.is_file() or "/" in name.removeprefix("tfds:").partition(":")[0]:
        raise UsageError(f"{name} is neither text nor a TFDS set: give a .txt, a .jsonl, python, or the set's name")
    if tokenizer:
        raise UsageError(f"--tokenizer is for text, and {name} is a TFDS set: leave it out")
    return build_tfds(tfds.NAMES.get(name, name.removeprefix("tfds:")), to)


def build_tfds(name: str, to: str) -> str:
    """Builds the TFDS set `name` as array_record files in the TFDS folder `to`. Raises UsageError."""
    remote = "://" in to
    with tempfile.TemporaryDirectory() as scratch:  # array_record writes to local disks only
        folder = scratch if remote else str(epath.Path(to).expanduser())
        builder = tfds.builder(name, folder, file_format="array_record")
        if builder.info.splits:
            raise UsageError(f"{folder} has the TFDS set {name} already: delete it there, or name another --to")
        _download_and_prepare(builder, name, to)
        if remote:
            _copy(epath.Path(scratch) / builder.name, epath.Path(to) / builder.name)
            return f"copy it to each machine (gcloud storage cp -r {to}/{builder.name} DIR) and set TFDS_DATA_DIR=DIR"
        return f"read it by --data tfds:{name}, with TFDS_DATA_DIR={folder}"


def _download_and_prepare(builder: Any, name: str, to: str) -> None:
    import requests  # comes with TFDS

    try:
        builder.download_and_prepare()
    except ImportError as e:
        package = e.name or "tensorflow"  # TFDS's own error names none
        install = 'pip install -e ".[prepare]"' if package.startswith("tensorflow") else f"pip install {package}"
        raise UsageError(f"building {name} needs {package}: {install} and run this again") from e
    except PermissionError as e:
        raise UsageError(f"{to} cannot be written ({e.strerror}): name another --to") from e
    except requests.exceptions.RequestException as e:
        host = urlsplit(e.request.url).hostname if e.request is not None else "its server"
        raise UsageError(
            f"{name} cannot be downloaded, for {host} cannot be reached ({type(e).__name__}): run this on a machine "
            f"with a network, and copy {to}"
        ) from e
    except Exception as e:  # whatever the builder of the set raises
        raise UsageError(f"{name} cannot be built ({type(e).__name__}: {str(e).strip().partition(chr(10))[0]})") from e


def _copy(source: epath.Path, target: epath.Path) -> None:
    for path in source.iterdir():
        if path.is_dir():
            _copy(path, target / path.name)
        else:
            target.mkdir(parents=True, exist_ok=True)
            path.copy(target / path.name)


# ---- token files


def write_tokens(name: str, to: str, *, tokenizer: str = "bytes", vocabulary: int = 8000, separator: str = "\n") -> str:
    """Writes `train.bin`, `test.bin`, `tokens.json` (and `tokenizer.json`) of a text, which must fit into memory.

    The test split is what `text.python_corpus` holds out, or the last tenth of the lines of a file. `tokenizer`:
    "bytes" (token = byte, vocabulary 256); "bpe", learned from the training part, of `vocabulary` tokens; or the path
    of a tokenizer.json. `separator` ends each text of a .jsonl; a tokenizer may know it as one token
    (`<|endoftext|>`). Raises UsageError.
    """
    folder = epath.Path(to).expanduser()
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
    path = located(name)
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
