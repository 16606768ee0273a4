"""The tokenizer that a run keeps, so that what its model writes can be read."""

import hashlib
import json
from collections.abc import Sequence
from typing import Any

from etils import epath

from bigjax import UsageError, place

FOLDER = "tokenizer"
FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")


def described(tokenizer: Any) -> str | list[str] | None:
    """What config.json says of `Experiment.tokenizer`: bytes; the characters; or that it is in the folder."""
    if tokenizer is None or tokenizer == "bytes":
        return tokenizer
    return list(tokenizer) if isinstance(tokenizer, Sequence) and not isinstance(tokenizer, str) else FOLDER


def files(tokenizer: Any) -> dict[str, bytes]:
    """name -> content, of one that is in a folder, is its tokenizer.json, or is in memory."""
    coder = getattr(tokenizer, "coder", tokenizer)
    if hasattr(coder, "to_str"):
        special = json.dumps(dict(getattr(tokenizer, "special", {})))
        return {FILES[0]: coder.to_str().encode(), FILES[1]: special.encode()}
    source = place(tokenizer)
    folder = source if source.is_dir() else source.parent
    if not (folder / FILES[0]).exists():
        raise UsageError(f"the tokenizer {tokenizer} has no {FILES[0]}: give the folder that has it")
    return {name: (folder / name).read_bytes() for name in FILES if (folder / name).exists()}


def keep(tokenizer: Any, workdir: epath.Path) -> None:
    """Writes the files of a tokenizer into a working directory."""
    if described(tokenizer) != FOLDER:
        return
    found = files(tokenizer)
    (workdir / FOLDER).mkdir(parents=True, exist_ok=True)
    for name, content in found.items():
        (workdir / FOLDER / name).write_bytes(content)


def digest(tokenizer: Any) -> str:
    """By which one is told from another."""
    said = described(tokenizer)
    content = files(tokenizer)[FILES[0]] if said == FOLDER else json.dumps(said).encode()
    return hashlib.sha256(content).hexdigest()
