"""The tokenizer that a run keeps, so that what its model writes can be read."""

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


def keep(tokenizer: Any, workdir: epath.Path) -> None:
    """Copies the files of a tokenizer into a working directory: of its folder, or its tokenizer.json; or of a
    `pretrained.tokens.Tokenizer`, as one that was trained.
    """
    if described(tokenizer) != FOLDER:
        return
    (workdir / FOLDER).mkdir(parents=True, exist_ok=True)
    if hasattr(tokenizer, "coder"):
        (workdir / FOLDER / FILES[0]).write_text(tokenizer.coder.to_str())
        (workdir / FOLDER / FILES[1]).write_text(json.dumps(dict(tokenizer.special)))
        return
    source = place(tokenizer)
    folder = source if source.is_dir() else source.parent
    if not (folder / FILES[0]).exists():
        raise UsageError(f"the tokenizer {tokenizer} has no {FILES[0]}: give the folder that has it")
    for name in FILES:
        if (folder / name).exists():
            (workdir / FOLDER / name).write_bytes((folder / name).read_bytes())
