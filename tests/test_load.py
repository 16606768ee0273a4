"""What bigjax.load runs of a script, which checkpoint it takes; a run's history; places."""

import os
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import chex
import flax.linen as nn
import jax
import numpy as np
import pytest
from conftest import tiny_experiment
from etils import epath

import bigjax
from bigjax import UsageError, train
from bigjax.data import sources, text, tfds, tokens
from bigjax.experiment import RunConfig
from bigjax.look import report
from bigjax.models import MLP
from bigjax.run import checkpoint, machine, modules, restore, workdir
from bigjax.tasks import classify
from bigjax.tools import prepare

FLAGS = {"steps": 2, "batch_size": 8, "log_every": 1, "eval_every": 2, "save_every": 1}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> train.Run:
    config = RunConfig(workdir=str(tmp_path_factory.mktemp("load") / "run"), **FLAGS)
    model = MLP(features=(8,), outputs=3, batch_norm=True)
    return train.fit(tiny_experiment(model=model, task=classify(model, classes=3)), config, quiet=True)


# ---- load runs no script


HEAD = "from flax import linen as nn\nimport sys\n"
NET = "class Net(nn.Module):\n    def __call__(self, x): return SCALE * x\n"


def net_of(script: Path) -> Any:
    return modules.module_from({"class": "__main__.Net", "file": str(script), "fields": {}}).apply({}, 3.0)


@pytest.mark.parametrize(
    ("lines", "value"),
    [
        ("SCALE = 2.0\nNet2 = Net\nmodel = Net()\nSEEN = model.init\nraise SystemExit('ran')\n", 6.0),
        ("SCALE = 2.0\nSCALE += 1\nimport that_is_not_there\n", 9.0),
        ("a = b = 4.0\nSCALE = a\nsys.path.append('ran')\n", 12.0),
        ("SCALES = [1.0, 2.0]\nSCALES[0] = 5.0\nSCALE = SCALES[0]\n", 15.0),
        ("if sys.version_info > (3, 0):\n    SCALE = 2.0\nelse:\n    import that_is_not_there\n", 6.0),
        ("try:\n    import that_is_not_there\n    SCALE = 1.0\nexcept ImportError:\n    SCALE = 2.0\n", 6.0),
        ("from math import *\nSCALE = e\nfor i in range(3):\n    print('ran')\n", 3 * np.e),
        ("class Config:\n    made = print('ran')\nSCALE = 2.0\nwith open('ran', 'w'): pass\n", 6.0),
    ],
)  # fmt: skip
def test_load_runs_of_a_script_what_its_class_needs(lines, value, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(HEAD + NET + lines)
    assert net_of(tmp_path / "mine.py") == pytest.approx(value)
    assert capsys.readouterr().out == "" and os.listdir(tmp_path) == ["mine.py"] and "ran" not in sys.path


@pytest.mark.parametrize(
    ("lines", "line"),
    [
        ("SCALE = abs(-2.0)\n", 5),
        ("SCALE = 2.0\nSCALE = float(3)\n", 6),
        ("SCALES = [1.0]\nSCALES.append(2.0)\nSCALE = SCALES[-1]\n", 6),
        ("for SCALE in (1.0, 2.0): pass\n", 5),
        ("SCALE = 1.0\nif abs(-1):\n    SCALE = 2.0\n", 6),
        ("if __name__ == '__main__':\n    SCALE = 2.0\n", 5),
        ("SCALE = (lambda: 1)()\n", 5),
        ("with open('ran', 'w') as SCALE: pass\n", 5),
    ],
)
def test_a_value_that_only_running_the_script_gives_is_not_guessed(lines, line, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(HEAD + NET + lines)
    with pytest.raises(UsageError, match=rf"mine.py, line {line} makes SCALES? by more than a definition.*model=") as e:
        net_of(tmp_path / "mine.py")
    assert "\n" not in str(e.value) and os.listdir(tmp_path) == ["mine.py"]


@pytest.mark.parametrize("guard", [False, True])
def test_load_imports_no_module_that_would_train(guard, tmp_path, monkeypatch):
    name = f"mine_{guard}"
    call = "print('ran')\nbigjax.train.fit(1, 2)\n"
    call = "if __name__ == '__main__':\n    " + call.replace("\n", "\n    ") + "pass\n" if guard else call
    (tmp_path / f"{name}.py").write_text("SCALE = 2.0\n" + HEAD + NET + call)
    monkeypatch.syspath_prepend(tmp_path)
    spec = {"class": f"{name}.Net", "fields": {}}
    if guard:
        assert modules.module_from(spec).apply({}, 3.0) == 6.0
        return
    with pytest.raises(
        UsageError, match=rf"{name}.py, line 7 calls bigjax.train.fit whenever it is imported: put that"
    ):
        modules.module_from(spec)
    assert name not in sys.modules


# ---- which checkpoint


def test_what_only_its_maker_can_bring_back_is_told_in_training_and_by_load(tmp_path, capsys):
    class Local(MLP):
        pass

    model = Local(features=(8,), outputs=3)
    experiment = tiny_experiment(task=classify(model, classes=3))
    run = train.fit(experiment, RunConfig(workdir=str(tmp_path / "run"), **FLAGS))
    line = "Local is defined inside a function: only bigjax.load(..., model=...) can bring the model back\n"
    assert capsys.readouterr().out.count(line) == 1
    with pytest.raises(UsageError, match=r"Local was defined inside a function: make it, and give it: .*model=Local\(.*"
                                         r"features=\(8,\), outputs=3"):  # fmt: skip
        restore.load(run.workdir)
    inner = nn.Sequential([nn.Dense(2), nn.tanh])
    missing = "Sequential has fields that a run cannot record (layers (list))"
    assert modules.only_here({"a": inner, "b": model, "c": MLP(features=(8,), outputs=3)}) == [
        line.strip().replace("Local is defined inside a function", missing),
        line.strip(),
    ]


def test_load_another_step(run):
    assert sorted(int(p.name) for p in (run.workdir / "checkpoints").iterdir() if p.name.isdigit()) == [1, 2]
    newest, second, first = (bigjax.load(run.workdir, step=step)[1] for step in (None, 2, np.int64(1)))
    chex.assert_trees_all_equal(newest, second)
    assert not np.array_equal(first["params"]["logits"]["kernel"], second["params"]["logits"]["kernel"])
    for step in (7, "2", "newest", -1):
        with pytest.raises(UsageError, match=rf"has no checkpoint of step {step!r}: give step= one of 1, 2$"):
            bigjax.load(run.workdir, step=step)
    with pytest.raises(UsageError, match="has no best checkpoint: train with --validation 0.1 --best max:accuracy, or"):
        bigjax.load(run.workdir, step="best")


@pytest.mark.parametrize("mode", ["max", "min"])
def test_load_the_best_step(mode, fit_tiny):
    run = fit_tiny(steps=6, eval_every=1, save_every=1, keep=3, validation=0.3, best=f"{mode}:loss")
    losses = run.history["validation/loss"]
    assert list(losses) == [1, 2, 3, 4, 5, 6]
    best = (max if mode == "max" else min)(losses, key=losses.get)
    chex.assert_trees_all_equal(bigjax.load(run.workdir, step="best"), bigjax.load(run.workdir, step=best))


def test_a_damaged_step_is_not_loaded(run, tmp_path):
    shutil.copytree(run.workdir, tmp_path / "run")
    damaged = max((tmp_path / "run/checkpoints/1").rglob("*"), key=lambda p: p.stat().st_size * p.is_file())
    damaged.write_bytes(b"")
    with pytest.raises(UsageError, match="the checkpoint of step 1 in .* is damaged .its file .* give another of 1, 2"):
        bigjax.load(tmp_path / "run", step=1)


def test_a_run_gives_its_history(fit_tiny):
    run = fit_tiny(steps=6)
    assert list(run.history["train/loss"]) == [2, 4, 6] and list(run.history["eval/accuracy"]) == [6]
    assert run.history["eval/accuracy"][6] == run.result["metrics"]["eval/accuracy"]
    again = fit_tiny(steps=6)
    assert again.history == run.history
    assert all(type(value) in (int, float) for values in run.history.values() for value in values.values())


def test_a_place_in_the_home_folder(run, tmp_path, monkeypatch):
    shutil.copytree(run.workdir, tmp_path / "home/run")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    chex.assert_trees_all_equal(bigjax.load("~/run")[1], bigjax.load(run.workdir)[1])
    chex.assert_trees_all_equal(bigjax.load(f"file://{tmp_path}/home/run")[1], bigjax.load(run.workdir)[1])
    assert workdir.read_config("~/run")["experiment"] == "tiny"
    assert len(checkpoint.listing("~/run")[0]) == 2
    assert report.write_report("~/run") == epath.Path(tmp_path / "home/run/report.html")
    config = RunConfig(workdir="~/new", init_from="~/run", **FLAGS)
    experiment = tiny_experiment(model=MLP(features=(8,), outputs=3, batch_norm=True))
    assert train.fit(experiment, config, quiet=True).workdir == epath.Path(tmp_path / "home/new")
    assert (tmp_path / "home/new/result.json").exists() and not (tmp_path / "~").exists()


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("~/x", "HOME/x"), ("file:///a%20b/c", "/a b/c"), ("file:/a", "/a"), ("file://localhost/a", "/a"), ("./a", "a"),
        ("gs://b/c/", "gs://b/c"), ("a:b", "a:b"), ("/a", "/a"), (epath.Path("/a"), "/a"),
    ],
)  # fmt: skip
def test_a_place_is_a_path(path, expected, monkeypatch):
    monkeypatch.setenv("HOME", "/home/of/somebody")
    assert str(bigjax.place(path)) == expected.replace("HOME", "/home/of/somebody")


NOWHERE = ["", " ", "~no-one/x", *"https://a/b s3://a/b az://a/b gs:/a/b hdfs://a file://host/a GS://a".split()]
READERS = {
    "--workdir ": lambda path: train.fit(tiny_experiment(), RunConfig(workdir=path, **FLAGS)),
    "--init-from ": lambda path: restore.transfer(None, path),
    "--to ": lambda path: prepare.prepare("python", path),
    "TFDS_DATA_DIR ": lambda path: os.environ.update(TFDS_DATA_DIR=path) or tfds.folder(),
    "load": bigjax.load,
    "checkpoints": checkpoint.listing,
    "report": report.write_report,
    "data": sources.load,
    "tokens": lambda path: tokens.load(f"tokens:{path}"),
    "tokenizer": text.load_tokenizer,
    "text": lambda path: prepare.prepare(f"{path}.txt", "to"),
}


@pytest.mark.parametrize("reader", READERS)
def test_what_is_no_place_is_one_line(reader, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TFDS_DATA_DIR", "")
    for path in NOWHERE:
        if not path.strip() and reader in ("data", "tokens", "text", "TFDS_DATA_DIR "):
            continue  # these have more to say of it
        flag = reader if reader.endswith(" ") else ""
        with pytest.raises(UsageError, match=re.escape(f"{flag}'{path}") + ".*cannot be read or written") as e:
            READERS[reader](path)
        assert "\n" not in str(e.value)
    assert os.listdir(tmp_path) == []


def test_without_gcsfs_the_extra_is_named(monkeypatch):
    for name in ("gcsfs", "tensorflow"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UsageError, match=r'--workdir gs://b/x needs gcsfs: pip install -e "\.\[gcs\]"'):
        train.fit(tiny_experiment(), RunConfig(workdir="gs://b/x", **FLAGS))


def test_readers_take_files_by_url_and_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("TFDS_DATA_DIR", "~/sets")
    np.savez(
        tmp_path / "my data.npz", image=np.arange(80, dtype=np.uint8).reshape(20, 2, 2, 1), label=np.arange(20) % 2
    )
    for name in ("~/my data.npz", f"file://{tmp_path}/my%20data.npz"):
        assert len(sources.load(name, eval_data=name).train["label"]) == 20
    assert tfds.folder() == str(tmp_path / "sets")
    (tmp_path / "a.txt").write_text("one\ntwo\nthree\n")
    assert f"--data tokens:{tmp_path}/tokens" in prepare.prepare("~/a.txt", "~/tokens")
    assert len(tokens.load(f"tokens:file://{tmp_path}/tokens").train) == 8
    before = jax.config.jax_compilation_cache_dir
    try:
        jax.config.update("jax_compilation_cache_dir", "~/compiled")
        machine.cache_compilations(True)
        assert jax.config.jax_compilation_cache_dir == str(tmp_path / "compiled")
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
