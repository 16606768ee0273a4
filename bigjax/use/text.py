"""Texts for texts: prompts go through a tokenizer into `generate`, and what is written comes back as text.

A tokenizer has `encode(text, special=) -> tokens`, `decode(tokens) -> text`, `id(name)` of special tokens and `size`,
as `bigjax.pretrained.tokenizer` gives it; `Letters` is one for models of bytes and of characters.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from flax import linen as nn

from bigjax import UsageError
from bigjax.use import generate as writing
from bigjax.use.asked import asked, put

CHUNK = 16  # tokens between two looks for a stop string


class Letters:
    """The tokenizer of a model whose tokens are bytes, or the characters that are given, by number."""

    def __init__(self, characters: Sequence[str] | None = None) -> None:
        self.characters, self.size = characters, 256 if characters is None else len(characters)
        self.numbers = None if characters is None else {c: n for n, c in enumerate(characters)}

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        if self.numbers is None:
            return list(text.encode())
        if odd := sorted({*text} - self.numbers.keys()):
            raise UsageError(
                f"the model knows no {odd[0]!r}, only the {self.size} characters of its text: leave it out"
            )
        return [self.numbers[c] for c in text]

    def decode(self, tokens: Sequence[int], *, special: bool = False) -> str:
        if self.characters is None:
            return bytes(int(t) for t in tokens if t < self.size).decode("utf-8", "replace")
        return "".join(self.characters[int(t)] for t in tokens if t < self.size)

    def id(self, name: str) -> None:
        return None

    def chat(self, messages: Any, **values: Any) -> str:
        raise UsageError(
            "a model of letters has no chat template: write the prompt by hand, or use an instruct model's"
        )


def complete(
    model: nn.Module,
    variables: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    length: int | None = None,
    stop_strings: Sequence[str] = (),
    special: bool = True,
    **options: Any,
) -> list[str]:
    """What a model writes after each prompt (of `returned` rows one after the other), without the prompt.

    A text ends before the first of the stop strings, at a stop token (the tokenizer's end of a text, unless options
    have `stop`), or after `length` tokens: None for 100, or for which the context has room. special: whether prompts
    are given the tokens that the model was trained to see around a text. options: of `generate`.

        complete(model, variables, tokenizer, ["The capital of France is"], temperature=0)
    """
    if not prompts:
        return []
    before, options = _prepared(model, tokenizer, prompts, stop_strings, special, options)
    prompt_BL, length_B = _rows(before)
    length = fitting(model, length_B) if length is None else length
    options |= {"length": length, "length_B": length_B}
    before = [row for row in _begun(model, before) for _ in range(options.get("returned", 1))]

    def texts(tokens_RN: Any, length_R: Any) -> list[str]:
        found = zip(before, *jax.device_get((tokens_RN, length_R)), strict=True)
        return [said(tokenizer, row, new[:size].tolist()) for row, new, size in found]

    if options.get("beams", 1) > 1 or not stop_strings:
        made = writing.generate(model, variables, prompt_BL, **options)
        return [cut(text, stop_strings)[0] for text in texts(made.tokens_RN, made.length_R)]
    job = asked(model, variables, prompt_BL, **options)
    state = writing.begin(job)
    for until in range(CHUNK, length + CHUNK, CHUNK):
        state = writing.go_on(job, state, min(until, length))
        found = [cut(text, stop_strings) for text in texts(state.tokens_RN, state.length_R)]
        done_R = jax.device_get(state.done_R) | np.array([ended for _, ended in found])
        if done_R.all():
            break
        state = state._replace(done_R=put(done_R))
    return [text for text, _ in found]


def stream(
    model: nn.Module,
    variables: Any,
    tokenizer: Any,
    prompt: str,
    *,
    length: int | None = None,
    stop_strings: Sequence[str] = (),
    special: bool = True,
    **options: Any,
) -> Iterator[str]:
    """What `complete` gives for one prompt, piece by piece while it is written.

    A piece is given once it can't change: no half character, and nothing that may become a stop string.
    """
    if options.get("beams", 1) > 1:
        raise UsageError(f"{options['beams']} beams have no text before they end: use complete, or no beams")
    if options.get("returned", 1) > 1:
        raise UsageError(f"returned {options['returned']}: one text is streamed, so use complete for more")
    before, options = _prepared(model, tokenizer, [prompt], stop_strings, special, options)
    prompt_BL, length_B = _rows(before)
    length = fitting(model, length_B) if length is None else length
    job, [begun] = asked(model, variables, prompt_BL, length=length, **options), _begun(model, before)

    def pieces() -> Iterator[str]:
        shown, new = 0, []
        state, count = writing.begin(job), 1
        while True:
            token_R, done_R = jax.device_get((state.token_R, state.done_R))
            new.append(int(token_R[0]))
            over = bool(done_R[0]) or count == length
            if not over:
                count += 1
                state = writing.go_on(job, state, count)
            text, ended = cut(said(tokenizer, begun, new), stop_strings)
            settled = text if ended or over else held(text, stop_strings)
            if len(settled) > shown:
                yield settled[shown:]
                shown = len(settled)
            if ended or over:
                return

    return pieces()


def said(tokenizer: Any, before: Sequence[int], new: Sequence[int]) -> str:
    """New tokens as text: what they add to that of a few before, since a token's text may depend on its neighbours."""
    head, whole = (tokenizer.decode([*before[-8:], *more]) for more in ((), new))
    return whole[len(head) :] if before and whole.startswith(head) else tokenizer.decode(new)


def cut(text: str, stop_strings: Sequence[str]) -> tuple[str, bool]:
    """A text up to the first stop string, and whether there is one."""
    places = [at for stop in stop_strings if (at := text.find(stop)) >= 0]
    return (text[: min(places)], True) if places else (text, False)


def held(text: str, stop_strings: Sequence[str]) -> str:
    """A text without its last characters, as far as they may be half a character, or the beginning of a stop string."""
    text = text.rstrip("\ufffd")
    sizes = [n for stop in stop_strings for n in range(1, len(stop)) if text.endswith(stop[:n])]
    return text[: len(text) - max(sizes, default=0)]


def fits(size: int, vocabulary: int, *, where: object = None) -> None:
    """UsageError where a tokenizer, of the folder or file `where`, has not as many tokens as a model, whose vocabulary
    may be filled up a little."""
    if size > vocabulary or size < min(0.9 * vocabulary, vocabulary - 128):
        of = f" of {where}" if where else ""
        raise UsageError(
            f"the tokenizer{of} has {size:,} tokens, and the model a vocabulary of {vocabulary:,}: use the tokenizer "
            "that the model was trained with"
        )


def _prepared(
    model: nn.Module, tokenizer: Any, prompts: Sequence[str], stop_strings: Sequence[str], special: bool, options: Any
) -> tuple[list[list[int]], dict[str, Any]]:
    """(the tokens of each prompt, the options of `generate`)."""
    if isinstance(prompts, str):
        raise UsageError(f"the prompts are one text, {prompts[:20]!r}: give a list of them")
    if "" in stop_strings:
        raise UsageError("a stop string is empty: leave it out")
    if not hasattr(model, "empty_cache"):
        name = type(model).__name__
        raise UsageError(f"{name} writes no text: give a model of the next token (GPT, Gemma, Mixtral), or T5")
    fits(tokenizer.size, model.vocabulary)
    rows = [tokenizer.encode(prompt, special=special) for prompt in prompts]
    if empty := [n for n, row in enumerate(rows, 1) if not row]:
        raise UsageError(f"prompt {empty[0]} of {len(rows)} is empty: give it at least a character")
    return rows, {"stop": tokenizer.id("eos_token"), **options}


def fitting(model: nn.Module, length_B: np.ndarray, most: int = 100) -> int:
    """So many new tokens, or fewer, where the context has room for no more; 1 where it has none."""
    context = None if hasattr(model, "encode") else getattr(model, "context", None)
    return most if context is None else max(1, min(most, context - int(length_B.max())))


def _begun(model: nn.Module, rows: list[list[int]]) -> list[list[int]]:
    """The tokens that each new text goes on with: none where an encoder reads the prompt."""
    return [[] for _ in rows] if hasattr(model, "encode") else rows


def _rows(rows: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Rows padded behind their tokens, and how many each has."""
    length_B = np.array([len(row) for row in rows], np.int32)
    tokens_BL = np.zeros((len(rows), length_B.max()), np.int32)
    for n, row in enumerate(rows):
        tokens_BL[n, : len(row)] = row
    return tokens_BL, length_B
