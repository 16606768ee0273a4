"""Every code block of the README runs, in its order, in a folder with the data that it speaks of."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import REPOSITORY
from PIL import Image
from tfds_fixture import build_mnist

BLOCKS = re.findall(r"^```(sh|python)\n(.*?)^```", (REPOSITORY / "README.md").read_text(), flags=re.M | re.S)
EAGER = {"JAX_TRANSFER_GUARD": "allow"}  # a block may write numbers as it likes: each is a transfer


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
    build_mnist(root / "tfds", image, label, test=50)
    return root


@pytest.mark.slow
def test_blocks_run(place: Path) -> None:
    env = os.environ | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "TFDS_DATA_DIR": str(place / "tfds")}
    makefile = (REPOSITORY / "Makefile").read_text()
    number = 0
    for kind, block in BLOCKS:
        if kind == "python":
            done = subprocess.run(
                [sys.executable, "-c", block], cwd=place, env=env | EAGER, capture_output=True, text=True
            )
            assert done.returncode == 0, block + done.stdout + done.stderr
            continue
        for line in block.splitlines():
            words = line.partition("#")[0].split()
            if words[0] == "make":  # installs, or runs these very tests: here only that the target is there
                assert f"\n{words[1]}:" in makefile
                continue
            number += 1
            if len(words) == 2:  # the one-minute run itself, which later blocks load: shortened
                words += ["--steps", "2"]
            elif "--data" in words:
                words += ["--steps", "2", "--workdir", f"runs/{number}"]
            words = [{"300": "2"}.get(word, word) for word in words]
            done = subprocess.run([sys.executable, *words[1:]], cwd=place, env=env, capture_output=True, text=True)
            assert done.returncode == 0, line + done.stdout + done.stderr
