"""The pages of README and docs/: links lead somewhere, commands are those that there are, tables are as made."""

import functools
import os
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import tyro
from conftest import REPOSITORY
from test_experiments import SCRIPTS, load

from bigjax import cli
from bigjax.look import flags
from bigjax.models import MLP, Discriminator
from bigjax.tools import commands as module
from bigjax.tools import models
from bigjax.tools.sample import OfScript

PAGES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]
SHELL = {"export", "gcloud", "ssh-add"}  # of others: not looked at
LAUNCHERS = {"srun": 5}  # words before the command


def blocks(page: Path) -> list[tuple[str, str]]:
    """(language, text) of a page's code blocks."""
    return re.findall(r"^```(\w*)\n(.*?)^```", page.read_text(), flags=re.M | re.S)


def commands(page: Path, kind: str) -> list[list[str]]:
    """The words of each command in a page's blocks of one kind: `sh`, or `console`, where `$` begins one."""
    text = "".join(text for k, text in blocks(page) if k == kind).replace("\\\n", " ")
    lines = [line for line in text.splitlines() if kind == "sh" or line.startswith("$ ")]
    return [shlex.split(line.removeprefix("$ "), comments=True) for line in lines]


def test_blocks_say_what_they_are() -> None:
    for page in PAGES:
        for kind, text in blocks(page):
            assert kind in ("sh", "console", "python", ""), page
            assert kind or not re.search(r"^\$? ?(python|\./|make|export|srun)", text, flags=re.M), f"{page}: {text}"
            assert kind != "console" or all(line.startswith(("$ ", "    ")) for line in text.splitlines()), text


class Parsed(Exception):
    """In place of what a command does."""


def parse(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether a command's words are among those that there are; what is wrong exits, or fails."""
    words = words[LAUNCHERS.get(words[0], 0) :]
    words = words[:-1] if words[-1] == "&" else words
    if words[0] == "make":
        assert f"\n{words[1]}:" in (REPOSITORY / "Makefile").read_text(), words
    elif words[0] == "./tpu_setup.sh":
        command = " ".join(words[words.index("python") :]) if "python" in words else ""
        example = {"PROJECT": "p", "ZONE": "z", "TPU_NAME": "t", "ACCELERATOR": "v4-8"}
        dry = ["./tpu_setup.sh", "--dry-run", *words[1:]]
        done = subprocess.run(dry, cwd=REPOSITORY, env=os.environ | example, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        if command:
            parse(shlex.split(command), monkeypatch)
    elif words[:3] == ["python", "-m", "bigjax"]:

        def parsed(*given: Any, **options: Any) -> None:
            raise Parsed(tyro_cli(*given, args=words[3:], **options))

        tyro_cli = tyro.cli
        with monkeypatch.context() as patch, pytest.raises(Parsed):
            patch.setattr(module.tyro, "cli", parsed)
            module.main()
    elif words[0] == "python":
        path = Path(words[1])
        if not path.parts[:1] == ("experiments",):
            return  # the reader's own file: it runs
        assert SCRIPTS[path.stem] == REPOSITORY / path
        Config, arguments = load(path.stem).Config, [word for word in words[2:] if word != "--help"]
        verb = flags.take_verb(arguments, Config, cli.VERBS)
        assert verb in cli.VERBS
        if verb == "sample":
            tyro.cli(OfScript, args=arguments)
            return
        cli.parse(Config, verb, args=arguments)
    else:
        assert words[0] in SHELL or "=" in words[0], words


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_commands_are_those_that_there_are(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for words in commands(page, "sh") + commands(page, "console"):
        parse(words, monkeypatch)


@pytest.mark.parametrize(
    "line",
    ["python experiments/vision/mnist_cnn.py --stesp 3", "python -m bigjax reprodcue", "./tpu_setup.sh creat", "mak x"],
)
def test_a_command_that_is_none_is_found(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises((SystemExit, AssertionError)):
        parse(line.split(), monkeypatch)


def test_the_table_of_models_is_made_of_the_models() -> None:
    text = (REPOSITORY / "docs" / "models.md").read_text()
    assert text == models.page(), "write it anew: python -m bigjax.tools.models > docs/models.md"


def test_a_model_without_an_example_is_counted_as_its_tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MLP, "__doc__", "Nothing.")
    assert models.facts(MLP) == ("TINY", "float32 (2, 8, 8, 1)", "float32 (2, 10)", "672")
    monkeypatch.setattr(Discriminator, "__doc__", "Nothing.")
    made, inputs, outputs, _ = models.facts(Discriminator)
    assert (made, inputs, outputs) == ("TINY", "float32 (2, 8, 8, 1), int32 (2,)", "float32 (2,)")


@functools.cache
def anchors(page: Path) -> set[str]:
    """As GitHub makes them of headings."""
    heads = re.findall(r"^#+ (.*)$", page.read_text(), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert "://" in link or target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_the_readme_is_short_and_each_page_is_linked_from_it() -> None:
    text = (REPOSITORY / "README.md").read_text()
    assert text.count("\n") <= 150
    assert all(f"](docs/{page.name})" in text for page in PAGES[1:])
