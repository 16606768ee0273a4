"""Fine-tuning: which tokens of a chat are learnt, what is refused, and the script on a small folder."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_experiments import load, run
from test_user_files import said_by, written

import bigjax
from bigjax import pretrained
from bigjax.data import chat, documents
from bigjax.data.text import train_tokenizer
from bigjax.models import GPT
from bigjax.pretrained import adapters
from bigjax.use.text import Letters

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CHAT = [
    {"role": "user", "content": "What is two and two?"},
    {"role": "assistant", "content": "Four, I say."},
    {"role": "user", "content": "And three?"},
    {"role": "assistant", "content": "Five."},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Llama, with a tokenizer and a chat template."""
    path = tmp_path_factory.mktemp("folder")
    model = GPT(
        vocabulary=304, layers=2, width=16, heads=2, kv_heads=1, context=64, position="rotary", norm="rms", bias=False,
        activation="swiglu", mlp=24,
    )  # fmt: skip
    pretrained.save(path, model, jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 4), "int32")))
    coder = train_tokenizer([m["content"] for m in CHAT] * 9, vocabulary=300)
    coder.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    coder.save(str(path / "tokenizer.json"))
    about = {"eos_token": "<|im_end|>", "chat_template": TEMPLATE}
    (path / "tokenizer_config.json").write_text(json.dumps(about))
    return path


def chats(path: Path, *rows: Any) -> str:
    return str(written(path, "".join(json.dumps({"messages": row}) + "\n" for row in rows)))


def test_only_answers_are_learnt(folder: Path) -> None:
    """To their end token."""
    tokenizer = pretrained.tokenizer(folder)
    tokens, counts = chat.encode(CHAT, tokenizer)
    assert tokenizer.decode(tokens, special=True) == tokenizer.chat(CHAT, answer=False)
    parts = np.split(np.arange(len(tokens)), np.flatnonzero(np.diff(counts)) + 1)
    learnt = [tokenizer.decode(tokens[part], special=True) for part in parts if counts[part[0]]]
    assert learnt == ["Four, I say.<|im_end|>", "Five.<|im_end|>"]
    asked = tokenizer.decode(chat.prompt(CHAT, tokenizer), special=True)
    assert asked == "<|im_start|>user\nWhat is two and two?<|im_end|>\n<|im_start|>assistant\n"


def test_what_is_no_chat_is_refused(tmp_path: Path, folder: Path) -> None:
    name, user = str(tmp_path / "c.jsonl"), {"role": "user", "content": "a"}
    for row, said in (
        ([user], "line 2 has no answer, a message of the role assistant: add one, or remove the line"),
        ([user, {"role": "assistant", "content": " "}], "line 2 has no answer"),
        ([{"role": "human", "content": "a"}], "line 2 has the role 'human': use system, user, assistant or tool"),
        ([{"role": "user"}], "line 2 has a message without role and content as text: give it both"),
        ([], "line 2 has no list `messages`: give each chat one, of objects with role and content"),
    ):
        chats(tmp_path / "c.jsonl", CHAT, row)
        assert said_by(chat.read, name).startswith(f"{name} {said}")
    written(tmp_path / "c.jsonl", json.dumps({"messages": CHAT}) + "\n{")
    assert "c.jsonl line 2 is no JSON (" in said_by(chat.read, name)
    two = chats(tmp_path / "two.jsonl", CHAT, CHAT[:2])
    text = str(written(tmp_path / "a.txt", "a\nb\n"))
    assert said_by(documents.load, two, eval_data=text) == (
        f"{two} holds chats, {text} does not: give one to evaluate on that holds chats too"
    )
    assert "holds one document: give another as --eval-data" in said_by(
        documents.load, chats(tmp_path / "one.jsonl", CHAT)
    )
    tokenizer = pretrained.tokenizer(folder)
    forgetful = pretrained.tokens.Tokenizer(tokenizer.coder, {}, "{{ messages[-1].content }}")
    assert "the chat template writes earlier messages otherwise once more follow" in said_by(
        chat.encode, CHAT, forgetful
    )
    assert "has no chat template" in said_by(chat.encode, CHAT, pretrained.tokens.Tokenizer(tokenizer.coder, {}))
    assert "a model of letters has no chat template: write" in said_by(chat.encode, CHAT, Letters())
    assert said_by(documents.rows, [CHAT], Letters(), length=8, name="c") == (
        "c holds chats, which need a chat template: name an instruct model's folder by --pretrained"
    )


def test_long_chats_are_cut_and_that_is_said_once(folder: Path, capsys: pytest.CaptureFixture) -> None:
    tokenizer = pretrained.tokenizer(folder)
    whole = documents.rows([CHAT], tokenizer, length=63, name="c")
    first = len(chat.prompt(CHAT, tokenizer))
    assert capsys.readouterr().err == ""
    rows = documents.rows([CHAT, CHAT, CHAT[:2]], tokenizer, length=first + 2, name="c")
    assert capsys.readouterr().err == f"c: 3 of 3 chats cut to --context {first + 2}\n"
    assert rows["weight"].sum() == 9 and whole["weight"].sum() > 3
    assert said_by(documents.rows, [CHAT, CHAT], tokenizer, length=5, name="c") == (
        "c: no chat has an answer within --context 5: raise it"
    )
    assert capsys.readouterr().err == "c: 2 of 2 chats cut to --context 5, 2 of them before their first answer\n"


def test_documents(tmp_path: Path) -> None:
    """A .txt in two parts of lines, a folder by its files, data with text by their rows."""
    text = str(written(tmp_path / "a.txt", "".join(f"line {n}\n" for n in range(20))))
    data = documents.load(text)
    assert [len(part) for part in (data.train, data.test)] == [1, 1] and data.test[0] == "line 18\nline 19\n"
    for n in range(8):
        written(tmp_path / "many" / f"{n}.txt", f"text {n}")
    data = documents.load(str(tmp_path / "many"))
    assert sorted(data.train + data.test) == [f"text {n}" for n in range(8)] and data.test
    rows = str(written(tmp_path / "a.jsonl", "".join(json.dumps({"text": f"row {n}"}) + "\n" for n in range(20))))
    data = documents.load(rows, takes=("text",))
    assert sorted([*data.train, *data.test]) == sorted(f"row {n}" for n in range(20))


@pytest.mark.slow
def test_the_script(tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Adapters on chats; what was before training is recorded beside; they are saved apart, and merged for others."""
    monkeypatch.chdir(tmp_path)
    data = chats(tmp_path / "c.jsonl", *([*CHAT[:2], {**CHAT[2], "content": f"{n}?"}, CHAT[3]] for n in range(24)))
    words = ["--pretrained", str(folder), "--data", data, "--context", "64", "--steps", "8", "--batch-size", "4"]
    run("gpt_finetune", *words, "--lora-rank", "2", "--learning-rate", "1e-2")
    result = json.loads((tmp_path / "runs" / "gpt_finetune" / "result.json").read_text())
    assert result["metrics"]["eval/loss"] < result["metrics"]["eval/loss_before"] - 0.01
    assert result["trained_parameters"] < result["parameters"] / 2 and 0 < result["padding_share"] < 1
    model, variables = bigjax.load("runs/gpt_finetune")
    adapters.save(tmp_path / "own", model, variables)
    _, loaded = adapters.load(tmp_path / "own", folder)
    pretrained.save(tmp_path / "merged", *model.merged(variables))
    other, merged = pretrained.load(tmp_path / "merged")
    tokens = jnp.arange(12)[None]
    logits = jax.jit(model.apply)(variables, tokens)
    np.testing.assert_allclose(jax.jit(model.apply)(loaded, tokens), logits, atol=1e-6)
    np.testing.assert_allclose(jax.jit(other.apply)(merged, tokens), logits, atol=1e-5)


def test_what_does_not_fit_the_folder_is_refused(tmp_path: Path, folder: Path) -> None:
    module = load("gpt_finetune")
    text = str(written(tmp_path / "a.txt", "one line\n" * 40))
    small = GPT(vocabulary=100, layers=1, width=8, heads=2, context=8)
    pretrained.save(tmp_path / "small", small, jax.jit(small.init)(jax.random.key(0), jnp.zeros((1, 4), "int32")))
    config = {"data": text, "pretrained": str(tmp_path / "small")}
    assert "small has no tokenizer.json: let transformers write it" in said_by(module.build, module.Config(**config))
    (tmp_path / "small" / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    size, small = pretrained.tokenizer(folder).coder.get_vocab_size(), tmp_path / "small"
    assert said_by(module.build, module.Config(**config)) == (
        f"the tokenizer of {small} has {size} tokens, and the model a vocabulary of 100: use the tokenizer that the "
        "model was trained with"
    )
    asked = module.Config(data=text, pretrained=str(folder), adapt=adapters.Adapt(lora_on="q"))
    assert "--lora-on is where adapters go" in said_by(module.build, asked)
