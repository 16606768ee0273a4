"""Texts from texts, and the verb sample. B prompts, L tokens, V vocabulary."""

import json
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_pretrained import CHAT

from bigjax import UsageError, cli, pretrained, train
from bigjax.data.text import byte_windows, train_tokenizer
from bigjax.experiment import Experiment, RunConfig
from bigjax.models import GPT, MLP, t5
from bigjax.pretrained import tokens
from bigjax.run import spoken
from bigjax.tasks import next_token
from bigjax.tools import commands
from bigjax.tools import sample as module
from bigjax.tools.sample import Options, record_of, sample
from bigjax.use.generate import generate
from bigjax.use.text import Letters, complete, held, stream


class Says(nn.Module):
    """A model of bytes that writes this text from its position on, over and over, whatever was before."""

    text: str
    vocabulary: int = 256
    context: int = 128

    def empty_cache(self, batch, size):
        return {"rows": jnp.zeros((batch,), jnp.int32)}

    def pick(self, cache, rows):
        return {"rows": cache["rows"][rows]}

    def decode(self, tokens_BL, cache, position, at_B=None):
        said = jnp.asarray(np.frombuffer(self.text.encode(), np.uint8).astype(np.int32))
        at = position if at_B is None else at_B
        next_B = said[jnp.broadcast_to((at + 1) % len(said), (len(tokens_BL),))]
        return 9.0 * jax.nn.one_hot(next_B, 256)[:, None], cache


def says(text, *, prompt="", **options):
    """(what `complete` gives, the pieces of `stream`)."""
    how = {"length": 40, "temperature": 0} | options
    given = (Says(text), {}, Letters())
    prompt = prompt or text[:1]
    return complete(*given, [prompt], **how)[0], list(stream(*given, prompt, **how))


def test_a_character_comes_whole_and_a_half_one_at_the_end_as_it_is():
    text = "naïve ✓ 𝄞 é. "
    whole, pieces = says(text, length=len(text.encode()) - 1)
    assert whole == text[1:] == "".join(pieces) and len(pieces) > 5
    assert all("\ufffd" not in piece and piece for piece in pieces)
    whole, pieces = says(text, length=3)
    assert whole == "".join(pieces) == "aï"
    whole, pieces = says(text, length=2)
    assert whole == "".join(pieces) == "a\ufffd"
    assert held("ab\ufffd\ufffd", ()) == "ab" and held("a\ufffdb", ()) == "a\ufffdb"


def test_stop_strings_cut_and_nothing_of_them_is_shown():
    text = "one two; stopping now, and then a good deal more of it. "
    for stops, expected in (((" now", "zzz"), "ne two; stopping"), (("two; stop", "e t"), "n"), (("q",), text[1:41])):
        whole, pieces = says(text, stop_strings=stops)
        assert whole == "".join(pieces) == expected
    assert held("and no", (" now", "other")) == "and" and held("and no", ("x",)) == "and no"
    both = complete(Says(text), {}, Letters(), ["o", text[:30]], stop_strings=["now"], temperature=0, length=40)
    assert both[0] == "ne two; stopping " and both[1] == (text * 2)[30:70]  # each row by itself
    assert says(text, stop=ord(";"))[0] == "ne two;"


CORPUS = ["the cat sat on the mat and the dog ran to the hat", "a cat and a dog"] * 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model of the hub's form, with a tokenizer and a chat template."""
    path = tmp_path_factory.mktemp("folder")
    coder = train_tokenizer(CORPUS, kind="bpe", vocabulary=280)
    coder.add_special_tokens(["</s>", "<user>", "<assistant>"])
    coder.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>", "chat_template": CHAT}))
    model = GPT(vocabulary=coder.get_vocab_size(), layers=1, width=8, heads=2, context=64)
    shapes, random = (
        jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32)),
        np.random.default_rng(4),
    )
    variables = jax.tree.map(lambda x: jnp.asarray(random.normal(size=x.shape), jnp.float32), shapes)
    pretrained.save(path, model, variables)
    return path


@pytest.fixture(scope="module")
def loaded(folder):
    return *pretrained.load(folder), pretrained.tokenizer(folder)


def test_texts_are_those_of_their_tokens(loaded):
    model, variables, coder = loaded
    prompts = ["the cat", "a dog and the mat ran"]
    made = complete(*loaded, prompts, length=12, temperature=0)
    for prompt, text in zip(prompts, made):
        before = coder.encode(prompt)
        new = generate(model, variables, np.array([before]), length=12, temperature=0, stop=coder.id("eos_token"))
        new = new.tokens_RN[0, : new.length_R[0]].tolist()
        assert coder.decode(before + new) == prompt + text
        assert "".join(stream(*loaded, prompt, length=12, temperature=0)) == text
    key = jax.random.key(3)
    drawn = complete(*loaded, prompts, length=12, key=key, returned=2)
    assert len(drawn) == 4 and drawn[0] != drawn[1]
    assert (
        "".join(stream(*loaded, prompts[0], length=12, key=key))
        == complete(*loaded, prompts[:1], length=12, key=key)[0]
    )
    assert len(complete(*loaded, prompts, length=5, beams=3, returned=2)) == 4
    assert complete(*loaded, []) == []


def test_letters_are_bytes_or_characters():
    assert Letters().encode("é") == [195, 169] and Letters().decode([195, 169, 300]) == "é"
    some = Letters(["\n", "a", "✓"])
    assert some.encode("a✓") == [1, 2] and some.decode([2, 0, 7]) == "✓\n"
    with pytest.raises(UsageError, match="the model knows no 'b', only the 3 characters of its text: leave it out"):
        some.encode("ab")
    with pytest.raises(UsageError, match="a model of letters has no chat template"):
        some.chat([])


# ---- the verb


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of a model of bytes."""
    home = tmp_path_factory.mktemp("runs") / "bytes"
    model = GPT(vocabulary=256, layers=1, width=8, heads=2, context=32)
    train_on = byte_windows(b"abc" * 40, length=8)
    experiment = Experiment(next_token(model), optax.sgd(0.1), train_on, None, tokenizer="bytes")
    train.fit(experiment, RunConfig(workdir=str(home), steps=1, batch_size=4), quiet=True)
    return home


def verb(capsys, monkeypatch, *arguments, typed=()):
    """What `python -m bigjax sample` prints."""
    lines = iter(typed)

    def answer(shown=""):
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", answer)
    monkeypatch.setattr(sys, "argv", ["bigjax", "sample", *map(str, arguments)])
    commands.main()
    return capsys.readouterr().out


def test_the_verb_writes_on(folder, run, loaded, capsys, monkeypatch):
    greedy = ("--length", "9", "--temperature", "0")
    expected = complete(*loaded, ["the cat", "a"], length=9, temperature=0)
    got = verb(capsys, monkeypatch, folder, "--prompt", "the cat", "--prompt", "a", *greedy)
    assert got == f"the cat{expected[0]}\na{expected[1]}\n"
    assert verb(capsys, monkeypatch, folder, "--prompt", "the cat", *greedy) == f"the cat{expected[0]}\n"
    same = ("--length", "5", "--seed", "3", "--top-k", "5", "--top-p", "0.9", "--min-p", "0.01")
    got = [verb(capsys, monkeypatch, run, "--prompt", "ab", *same, *more) for more in ((), (), ("--seed", "4"))]
    assert got[0] == got[1] != got[2] and got[0].startswith("ab")
    best = complete(*loaded, ["the"], length=4, beams=2)[0]
    assert verb(capsys, monkeypatch, folder, "--prompt", "the", "--length", "4", "--beams", "2") == f"the{best}\n"


def test_what_an_encoder_reads_is_not_printed(tmp_path, capsys, monkeypatch):
    """A T5 does not go on with the prompt: it writes another text."""
    inputs = [jnp.zeros(x.shape, x.dtype) for x in t5.TINY_INPUTS]
    coder, variables = Letters("abcdefghijk"), jax.jit(t5.TINY.init)(jax.random.key(0), *inputs)
    monkeypatch.setattr(module, "opened", lambda *given: (t5.TINY, variables, coder))
    expected = complete(t5.TINY, variables, coder, ["cab", "cab"], length=3, temperature=0)[0]
    for prompts in (("cab",), ("cab", "cab")):
        sample(str(tmp_path), Options(prompt=prompts, length=3, temperature=0.0))
        assert capsys.readouterr().out == f"{expected}\n" * len(prompts)


def test_the_verb_talks(folder, loaded, capsys, monkeypatch):
    pytest.importorskip("jinja2", reason='chat templates need the extra: pip install -e ".[hub]"')
    greedy = ("--length", "7", "--temperature", "0")
    first = verb(capsys, monkeypatch, folder, "--chat", *greedy, typed=["hi", " ", "and?"])
    coder = loaded[2]
    messages = [{"role": "user", "content": "hi"}]
    answer = complete(*loaded, [coder.chat(messages)], length=7, temperature=0, special=False)[0]
    messages += [{"role": "assistant", "content": answer}, {"role": "user", "content": "and?"}]
    second = complete(*loaded, [coder.chat(messages)], length=7, temperature=0, special=False)[0]
    assert first == f"{answer}\n{second}\n"
    assert verb(capsys, monkeypatch, folder, "--chat", "--prompt", "hi", *greedy) == f"{answer}\n"


def test_the_verb_of_a_script_takes_its_run(run, capsys, monkeypatch):
    def build(config):
        raise AssertionError("nothing is built")

    cli.main(RunConfig, build, ["sample", "--workdir", str(run), "--prompt", "ab", "--length", "3"])
    assert capsys.readouterr().out.startswith("ab")
    with pytest.raises(SystemExit) as end:
        cli.main(RunConfig, build, ["sample", "--workdir", str(run.parent / "none"), "--prompt", "ab"])
    assert end.value.code == 2 and "is no folder here and no hub id" in capsys.readouterr().err


def test_a_run_keeps_its_tokenizer(folder, run, tmp_path):
    assert record_of(str(run))["tokenizer"] == "bytes"
    assert spoken.described(None) is None and spoken.described(("a", "b")) == ["a", "b"]
    for given in (folder, folder / "tokenizer.json"):
        assert spoken.described(str(given)) == "tokenizer"
        spoken.keep(str(given), tmp_path)
        assert isinstance(kept := pretrained.tokenizer(tmp_path / "tokenizer"), tokens.Tokenizer)
        assert kept.template == CHAT and kept.decode(kept.encode("the cat")) == "the cat"
    trained = tokens.Tokenizer(pretrained.tokenizer(folder).coder, {"eos_token": "the"})
    assert spoken.described(trained) == "tokenizer"
    spoken.keep(trained, tmp_path / "trained")
    kept = pretrained.tokenizer(tmp_path / "trained" / "tokenizer")
    assert kept.encode("the cat") == trained.encode("the cat") and kept.id("eos_token") == trained.id("eos_token")
    with pytest.raises(UsageError, match="the tokenizer .*nothing has no tokenizer.json: give the folder that has it"):
        spoken.keep(str(tmp_path / "nothing"), tmp_path)


def test_mistakes_are_named(folder, run, loaded, tmp_path, capsys):
    (bare := tmp_path / "bare").mkdir()
    for name in ("config.json", "model.safetensors"):
        (bare / name).write_bytes((folder / name).read_bytes())
    (images := tmp_path / "images").mkdir()
    record = json.loads((run / "config.json").read_text())
    from bigjax.run.modules import module_spec

    (images / "config.json").write_text(json.dumps(record | {"models": {"model": module_spec(MLP(outputs=3))}}))
    (silent := tmp_path / "silent").mkdir()
    (silent / "config.json").write_text(json.dumps({k: v for k, v in record.items() if k != "tokenizer"}))
    for where, how, said in (
        (folder, {"prompt": ("",)}, "prompt 1 of 1 is empty: give it at least a character"),
        (folder, {}, 'there is nothing to go on with: give --prompt "…", or --chat'),
        ("", {"prompt": ("a",)}, "no folder is given: name that of a run, or of a pretrained model"),
        ("nowhere", {"prompt": ("a",)}, "nowhere is no folder here and no hub id: give a folder, or owner/name"),
        (bare, {"prompt": ("a",)}, "bare has no tokenizer.json: let transformers write it"),
        (
            run,
            {"prompt": ("a",), "tokenizer": str(folder)},
            "tokens, and the model a vocabulary of 256: use the tokeniz",
        ),
        (silent, {"prompt": ("a",)}, "silent does not say what its tokens are: give --tokenizer bytes, or a folder"),
        (
            images,
            {"prompt": ("a",)},
            "images holds MLP, which writes no text: name a run of a GPT, Gemma, Mixtral or T5",
        ),
        (
            run,
            {"prompt": ("a" * 30,), "length": 5},
            "a prompt of 30 tokens and length 5 are more than the model's conte",
        ),
        (
            run,
            {"prompt": ("a",), "beams": 2, "temperature": 0.5},
            "2 beams draw nothing, and temperature 0.5 is of draws",
        ),
        (run, {"prompt": ("a",), "beams": 2, "seed": 1}, "--beams 2 draw nothing, and --seed is of draws: leave one"),
        (run, {"chat": True}, "a model of letters has no chat template: write the prompt by hand"),
        (run, {"chat": True, "beams": 2}, "--beams 2 have no text before they end, and --chat shows it: leave one out"),
    ):
        with pytest.raises(UsageError) as caught:
            sample(str(where), Options(**how))
        assert said in str(caught.value), str(caught.value)
        assert "\n" not in str(caught.value)
    for call, said in (
        (lambda: complete(*loaded, "the"), "the prompts are one text, 'the': give a list of them"),
        (lambda: complete(*loaded, ["a"], stop_strings=[""]), "a stop string is empty: leave it out"),
        (lambda: stream(*loaded, "a", beams=2), "2 beams have no text before they end: use complete, or no beams"),
        (
            lambda: complete(*loaded[:2], Letters("abc"), ["a"]),
            "the tokenizer has 3 tokens, and the model a vocabulary",
        ),
        (lambda: complete(MLP(), {}, Letters(), ["a"]), "MLP writes no text: give a model of the next token"),
    ):
        with pytest.raises(UsageError, match=said):
            call()
