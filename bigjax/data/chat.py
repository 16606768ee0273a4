"""Chats: lines of `messages`, each with `role` and `content`, as tokens of which only the answers are learnt.

L tokens of a chat.
"""

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from etils import epath

from bigjax import UsageError
from bigjax.data.files import located
from bigjax.data.packing import Document

if TYPE_CHECKING:
    from bigjax.pretrained.tokens import Tokenizer

ROLES = ("system", "user", "assistant", "tool")
Messages = list[dict[str, str]]


def is_chat(name: str) -> bool:
    """Whether this is a .jsonl whose first line has `messages`."""
    if not name.lower().endswith(".jsonl"):
        return False
    try:
        with located(name).open("rb") as file:
            first = json.loads(file.readline())
    except (OSError, ValueError):
        return False
    return isinstance(first, dict) and "messages" in first


def read(name: str) -> list[Messages]:
    """The chats of a .jsonl. UsageError, with file and line: no messages, another role, nothing that is answered."""
    path, chats = located(name), []
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as e:
            raise UsageError(f"{path} line {number} is no JSON ({e}): repair or remove it") from None
        chats.append(_checked(row.get("messages") if isinstance(row, dict) else None, path, number))
    return chats


def _checked(messages: Any, path: epath.Path, number: int) -> Messages:
    where = f"{path} line {number}"
    if not isinstance(messages, list) or not messages:
        raise UsageError(f"{where} has no list `messages`: give each chat one, of objects with role and content")
    for message in messages:
        if not isinstance(message, dict) or not all(isinstance(message.get(k), str) for k in ("role", "content")):
            raise UsageError(f"{where} has a message without role and content as text: give it both")
        if message["role"] not in ROLES:
            raise UsageError(f"{where} has the role {message['role']!r}: use {', '.join(ROLES[:-1])} or {ROLES[-1]}")
    if not any(m["role"] == "assistant" and m["content"].strip() for m in messages):
        raise UsageError(f"{where} has no answer, a message of the role assistant: add one, or remove the line")
    return [{"role": m["role"], "content": m["content"]} for m in messages]


def encode(messages: Sequence[Mapping[str, str]], tokenizer: "Tokenizer") -> Document:
    """(tokens_L, counts_L) of a chat in the form of the folder's template; the targets are what the assistant says.

    An answer is all between what the template gives where the model is to speak and where it has spoken, its end token
    included. UsageError: a template that does not give the same text for what went before.
    """
    text, spans = tokenizer.chat(messages, answer=False), []
    for n, message in enumerate(messages):
        if message["role"] == "assistant":
            asked = tokenizer.chat(messages[:n], answer=True) if n else ""
            said = tokenizer.chat(messages[: n + 1], answer=False).rstrip()
            if not (text.startswith(said) and said.startswith(asked)):
                raise UsageError(
                    "the chat template writes earlier messages otherwise once more follow, so that its answers can't "
                    "be told apart: use the template of another folder"
                )
            spans.append((len(asked), len(said)))
    coded = tokenizer.coder.encode(text, add_special_tokens=False)
    starts_L = np.array([start for start, _ in coded.offsets], np.int64)
    counts_L = np.zeros(len(starts_L), bool)
    for start, end in spans:
        counts_L |= (starts_L >= start) & (starts_L < end)
    return np.array(coded.ids, np.int32), counts_L


def prompt(messages: Sequence[Mapping[str, str]], tokenizer: "Tokenizer") -> list[int]:
    """The tokens of a chat up to where its first answer begins."""
    first = next(n for n, message in enumerate(messages) if message["role"] == "assistant")
    return tokenizer.encode(tokenizer.chat(messages[:first], answer=True), special=False)
