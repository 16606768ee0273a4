"""Text for a model of bytes: Python's standard library, a user's own, or the texts of other data; in windows."""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from bigjax import UsageError
from bigjax.data import sources, text
from bigjax.data.files import located
from bigjax.data.pipeline import Dataset
from bigjax.experiment import Split, size_of

XZ = 2**24  # bytes: a longer test split isn't compressed, which takes a second a megabyte


def load(name: str, *, length: int, batch_size: int, eval_data: str | None = None, **options: Any) -> Dataset:
    """Windows of `length` bytes to train on, and the bytes of the test split.

    name: `python`, the standard library; a .txt, or a folder with some, of which `eval_data` or else the last tenth of
    the lines is the test split; or data with `text` (`sources.load`, which takes the options). Facts: `corpus_sha256`
    and `xz_bits_per_byte`, where the text is in one piece. UsageError: no text, or too little.
    """
    alike(name, eval_data)
    if not in_one_piece(name):
        data = sources.load(name, eval_data=eval_data, **options)
        return Dataset(text.Passages(data.train, length=length), text.lines(texts(data.test)), name=name)
    if eval_data is None:
        train, test = parts(name)
    else:
        train, test = whole(name), whole(eval_data)
    windows = text.byte_windows(train, length=length, stride=max(length // 2, 1), once=False)
    if (count := size_of(windows)) < batch_size:
        raise UsageError(
            f"{name} has {len(train)} bytes to train on, too few windows of --context {length} ({count}) for "
            f"--batch-size {batch_size}: give more text, or lower one of these"
        )
    digest = hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in (train, test))).hexdigest()
    xz = {"xz_bits_per_byte": text.xz_bits_per_byte(test)} if len(test) <= XZ else {}
    return Dataset(windows, test, name=name, facts={"corpus_sha256": digest, **xz})


def alike(name: str, eval_data: str | None) -> None:
    """UsageError where one of them is text in one piece, and the other is not."""
    if eval_data is not None and in_one_piece(name) != in_one_piece(eval_data):
        whole, other = (name, eval_data) if in_one_piece(name) else (eval_data, name)
        raise UsageError(f"{whole} is text in one piece, and {other} is no .txt or folder of them: give two of a kind")


def parts(name: str) -> tuple[bytes, bytes]:
    """(train, test) of text in one piece."""
    if name == "python":
        corpus = text.python_corpus()
        return corpus.train, corpus.test
    return last_tenth(name, whole(name).splitlines(keepends=True))


def whole(name: str) -> bytes:
    """All of a text in one piece; of a folder the files in the order of their names, each with a newline at its end."""
    if name == "python":
        return b"".join(parts(name))
    if not located(name).is_dir():
        return read(located(name))
    return b"".join(content if content.endswith(b"\n") else content + b"\n" for content in files(name))


def files(name: str) -> list[bytes]:
    """The texts of a folder, in the order of their names."""
    return [read(path) for path in _files(located(name))]


def last_tenth(name: str, lines: Sequence[bytes]) -> tuple[bytes, bytes]:
    """Lines as (train, test); UsageError where there are no two."""
    if len(lines) < 2:
        raise UsageError(f"{name} has {len(lines)} lines of text: at least two are needed, one of them to test on")
    cut = min(int(0.9 * len(lines)), len(lines) - 1)
    return b"".join(lines[:cut]), b"".join(lines[cut:])


def read(path: epath.Path) -> bytes:
    """A file of text in UTF-8, without a mark at its beginning."""
    try:
        content = path.read_bytes()
        content.decode()
    except UnicodeDecodeError as e:
        raise UsageError(f"{path} is not UTF-8 text (byte {e.start}): convert it") from e
    except OSError as e:
        raise UsageError(f"{path} cannot be read ({e.strerror or e}): check the path and its permissions") from e
    return content.removeprefix(b"\xef\xbb\xbf")


def in_one_piece(name: str) -> bool:
    """Whether this is `python`, a .txt, or a folder with some."""
    if name == "python":
        return True
    if not name.strip() or name.startswith(("tfds:", "tokens:")):
        return False
    path = located(name)
    return path.suffix.lower() == ".txt" or bool(path.is_dir() and _files(path))


def _files(folder: epath.Path) -> list[epath.Path]:
    return sorted((p for p in folder.iterdir() if p.suffix.lower() == ".txt"), key=lambda p: p.name)


def texts(split: Split) -> Sequence[str]:
    """Those of data with `text`, read now."""
    return split["text"] if isinstance(split, Mapping) else [split[row]["text"] for row in range(len(split))]
