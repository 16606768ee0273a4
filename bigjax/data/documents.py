"""Texts and chats to fine-tune on, by their tokenizer in rows of one length."""

import json
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from bigjax import UsageError
from bigjax.data import chat, corpus, packing, sources
from bigjax.data.files import located
from bigjax.data.pipeline import Dataset, hold_out

if TYPE_CHECKING:
    from bigjax.pretrained.tokens import Tokenizer
    from bigjax.use.text import Letters

HELD_OUT = 0.1


def load(name: str, *, eval_data: str | None = None, split_seed: int = 0, **options: Any) -> Dataset:
    """Lists of documents, each a text or a chat's messages, to train on and to test on.

    name: `python`; a .txt, of which without `eval_data` the last tenth of the lines is tested on; a folder with some,
    each a document; a .jsonl with `messages`; or data with `text` (`sources.load`, which takes the options). Of
    documents a tenth is held out by `split_seed`.
    """
    kind = _kind(name)
    if eval_data is not None and kind in ("chats", "texts") and _kind(eval_data) != kind:
        raise UsageError(f"{name} holds {kind}, {eval_data} does not: give one to evaluate on that holds {kind} too")
    if kind == "data":
        data = sources.load(name, eval_data=eval_data, split_seed=split_seed, **options)
        return Dataset(corpus.texts(data.train), corpus.texts(data.test), name=name)
    if eval_data is not None:
        return Dataset(_whole(name, kind), _whole(eval_data, kind), name=name)
    if kind == "texts" and (name == "python" or not located(name).is_dir()):
        return Dataset(*([part.decode()] for part in corpus.parts(name)), name=name)
    every = _whole(name, kind)
    if len(every) < 2:
        raise UsageError(f"{name} holds one document: give another as --eval-data")
    keys = np.array([json.dumps(document) for document in every], object)
    rows = hold_out({"document": keys}, fraction=HELD_OUT, split_seed=split_seed, purpose="test")
    return Dataset(*([json.loads(key) for key in part["document"]] for part in rows), name=name)


def _kind(name: str) -> str:
    return "chats" if chat.is_chat(name) else "texts" if corpus.in_one_piece(name) else "data"


def _whole(name: str, kind: str) -> list[Any]:
    if kind == "chats":
        return chat.read(name)
    if name != "python" and located(name).is_dir():
        return [content.decode() for content in corpus.files(name)]
    return [corpus.whole(name).decode()]


def rows(
    documents: Sequence[Any], tokenizer: "Tokenizer | Letters", *, length: int, name: str
) -> dict[str, np.ndarray]:
    """Documents packed into rows of `length` + 1 tokens.

    Texts end with the tokenizer's end of a text, if it has one, and longer ones go on in another row, without what was
    before. Of longer chats the end is cut, and said once on stderr with their number. UsageError: none is left.
    """
    coded, cut, lost = [], 0, 0
    for document in documents:
        if not isinstance(document, str):
            if getattr(tokenizer, "template", None) is None:
                raise UsageError(
                    f"{name} holds chats, which need a chat template: name an instruct model's folder by --pretrained"
                )
            tokens, counts = chat.encode(document, tokenizer)
            cut += len(tokens) > length + 1
            lost += not counts[1 : length + 1].any()
            coded.append((tokens[: length + 1], counts[: length + 1]))
            continue
        end = tokenizer.id("eos_token")
        tokens = tokenizer.encode(document) + ([] if end is None else [end])
        coded += packing.pieces(packing.of_text(tokens), length=length)
    if cut:
        gone = f", {lost} of them before their first answer" if lost else ""
        print(f"{name}: {cut} of {len(documents)} chats cut to --context {length}{gone}", file=sys.stderr)
    if lost == len(documents):
        raise UsageError(f"{name}: no chat has an answer within --context {length}: raise it")
    return packing.pack(coded, length=length)


def prompt(document: str | Sequence[Mapping[str, str]], tokenizer: "Tokenizer | Letters", *, tokens: int) -> list[int]:
    """What a model is to go on from: the first tokens of a text, or a chat up to its first answer."""
    if isinstance(document, str):
        return tokenizer.encode(document[: 20 * tokens])[:tokens]
    return chat.prompt(document, tokenizer)
