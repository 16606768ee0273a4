"""The code blocks of README and docs/ run, in their order, in a folder with the data that they speak of.

```sh runs, ```python runs (a block that begins with `# NAME.py` is written there instead), ```console is only parsed:
tests/test_docs.py.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import REPOSITORY, tiny_experiment
from PIL import Image
from test_docs import PAGES, blocks, commands
from test_pretrained import unpacked
from tfds_fixture import build_mnist

from bigjax import train
from bigjax.data.text import train_tokenizer
from bigjax.experiment import RunConfig

LONG = {"README.md", "data.md"}


def having(language: str) -> pytest.MarkDecorator:
    """For each page with blocks of a language; what takes long is slow."""
    pages = [p for p in PAGES if any(kind == language for kind, _ in blocks(p))]
    marks = [pytest.mark.slow if p.name in LONG or language == "sh" else () for p in pages]
    return pytest.mark.parametrize("page", [pytest.param(p, id=p.name, marks=m) for p, m in zip(pages, marks)])


def written(page: Path, folder: Path) -> list[str]:
    """Puts the blocks that are files into a folder; the others."""
    rest = []
    for text in (text for kind, text in blocks(page) if kind == "python"):
        if name := re.match(r"# (\w+\.py)\n", text):
            (folder / name[1]).write_text(text)
        else:
            rest.append(text)
    return rest


def hub_folder(folder: Path, model: str = "gpt2") -> None:
    """As from the hub: weights, and a tokenizer."""
    folder.mkdir()
    unpacked(model, folder)
    train_tokenizer([" ".join(map(chr, range(97, 123)))], kind="words", vocabulary=23).save(
        str(folder / "tokenizer.json")
    )


@having("python")
def test_python_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In this process, one after the other, with what a finished run left."""
    monkeypatch.chdir(tmp_path)
    config = RunConfig(workdir="runs/mnist_cnn", steps=2, batch_size=8, compilation_cache=False)
    train.fit(tiny_experiment(), config, quiet=True)
    hub_folder(tmp_path / "folder")
    hub_folder(tmp_path / "sentences", "bert")
    (tmp_path / "sentence-transformers").mkdir()
    hub_folder(tmp_path / "sentence-transformers" / "all-MiniLM-L6-v2", "bert")
    names = {"__name__": page.stem}
    for text in written(page, tmp_path):
        for much, little in (("steps=200", "steps=4"), ("length=50", "length=3"), ("length=100", "length=3")):
            text = text.replace(much, little)
        exec(compile(text, str(page), "exec"), names)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout to run in, with a user's own data beside it."""
    root = tmp_path_factory.mktemp("readme")
    shutil.copytree(REPOSITORY / "experiments", root / "experiments", ignore=shutil.ignore_patterns("__pycache__"))
    random = np.random.default_rng(0)
    image, label = random.integers(0, 255, (200, 28, 28), dtype=np.uint8), np.arange(200) % 2
    np.savez(root / "digits.npz", image=image, label=label)
    for name in ("cat", "dog"):
        (root / "photos" / name).mkdir(parents=True)
        for i in range(100):
            Image.fromarray(image[i]).save(root / "photos" / name / f"{i}.png")
    lines = (f'{{"text": "word{i % 7} word{i % 3}", "label": {i % 2}}}\n' for i in range(200))
    (root / "reviews.jsonl").write_text("".join(lines))
    (root / "book.txt").write_text("".join(f"line {i} of a book that is long enough\n" for i in range(2000)))
    rows = (f"{i},{i * i % 17},{i % 5}\n" for i in range(400))
    (root / "flats.csv").write_text("rooms,age,target\n" + "".join(rows))
    build_mnist(root / "tfds", image, label, test=50)
    hub_folder(root / "folder")
    return root


@having("sh")
def test_commands_run(page: Path, place: Path) -> None:
    env = os.environ | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "TFDS_DATA_DIR": str(place / "tfds")}
    written(page, place)
    for number, words in enumerate(commands(page, "sh")):
        if words[0] == "make":  # installs, or runs these very tests
            continue
        if len(words) == 2:  # the one-minute run itself, which later blocks load: shortened
            words += ["--steps", "2"]
        elif "--data" in words:
            words += ["--steps", "2", "--workdir", f"runs/{page.stem}{number}"]
        words = [{"300": "2"}.get(word, word) for word in words]
        done = subprocess.run([sys.executable, *words[1:]], cwd=place, env=env, capture_output=True, text=True)
        assert done.returncode == 0, " ".join(words) + done.stdout + done.stderr
