"""Tokenizers of the hub's folders: tokenizer.json, its special tokens, its chat template.

B batch, L positions.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from bigjax import UsageError
from bigjax.pretrained.store import folder_of, read_json

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Coder

SPECIAL = tuple(f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """Text to tokens and back. coder: the `tokenizers.Tokenizer` itself. special: "eos_token" -> its text.

    template: of chats, in Jinja; None where the folder has none.
    """

    coder: "Coder"
    special: Mapping[str, str]
    template: str | None = None

    @property
    def size(self) -> int:
        """How many tokens there are, special ones too."""
        return self.coder.get_vocab_size()

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """The tokens of a text; `special`: with those that the model was trained to see around it."""
        return self.coder.encode(text, add_special_tokens=special).ids

    def batch(self, texts: Sequence[str], *, length: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """(tokens_BL int32, length_B int32), padded after the tokens; `length` cuts longer ones, not special tokens."""
        if length is not None:
            self.coder.enable_truncation(length)
        rows = [self.encode(text) for text in texts]
        self.coder.no_truncation()
        length_B = np.array([len(row) for row in rows], np.int32)
        pad = self.id("pad_token") or 0
        tokens_BL = np.full((len(rows), max(length_B, default=0)), pad, np.int32)
        for n, row in enumerate(rows):
            tokens_BL[n, : len(row)] = row
        return tokens_BL, length_B

    def decode(self, tokens: Sequence[int], *, special: bool = False) -> str:
        """The text of tokens; `special`: with special tokens shown."""
        return self.coder.decode([int(t) for t in tokens], skip_special_tokens=not special)

    def id(self, name: str) -> int | None:
        """The number of a special token, as "eos_token"; None where there is none."""
        return self.coder.token_to_id(self.special[name]) if name in self.special else None

    def chat(self, messages: Sequence[Mapping[str, str]], *, answer: bool = True, **values: Any) -> str:
        """Messages, each with `role` and `content`, as the text that the model was trained on.

        answer: ends where the model is to speak. The template is a stranger's: it runs in Jinja's sandbox.
        """
        if self.template is None:
            raise UsageError(
                "this tokenizer has no chat template: write the prompt by hand, or use an instruct model's"
            )
        try:
            from jinja2 import TemplateError
            from jinja2.sandbox import ImmutableSandboxedEnvironment
        except ImportError:
            raise UsageError('a chat template needs jinja2: pip install -e ".[hub]"') from None
        sandbox = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        try:

            def refuse(said: str) -> None:
                raise TemplateError(said)

            sandbox.globals["raise_exception"] = refuse
            values = {"messages": list(messages), "add_generation_prompt": answer, **self.special, **values}
            return sandbox.from_string(self.template).render(values)
        except TemplateError as e:
            raise UsageError(f"the chat template does not take these messages ({e}): change them") from None


def tokenizer(source: Any) -> Tokenizer:
    """The tokenizer of a folder with tokenizer.json, or of a hub id.

    tokenizer = bigjax.pretrained.tokenizer("folder")
    tokens_BL, length_B = tokenizer.batch(["Hello", "a longer text"])
    """
    import tokenizers

    folder = folder_of(source)
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise UsageError(
            f"{folder} has no tokenizer.json: let transformers write it, "
            "AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)"
        )
    try:
        coder = tokenizers.Tokenizer.from_str(path.read_text("utf-8"))
    except Exception as e:  # the library raises bare ones
        raise UsageError(f"{path} cannot be read ({str(e).splitlines()[0][:200]}): fetch it again") from None
    coder.no_padding()
    coder.no_truncation()
    said = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        said |= read_json(folder / name) if (folder / name).is_file() else {}
    special = {k: said[k]["content"] if isinstance(said[k], dict) else said[k] for k in SPECIAL if said.get(k)}
    template = said.get("chat_template")
    if isinstance(template, list):  # several by name
        template = {t["name"]: t["template"] for t in template}.get("default")
    if template is None and (folder / "chat_template.jinja").is_file():
        template = (folder / "chat_template.jinja").read_text("utf-8")
    return Tokenizer(coder, special, template)
