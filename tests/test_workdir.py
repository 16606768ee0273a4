"""The working directory: what is refused, what is recorded, and a model given back."""

import dataclasses
import json
import shutil
import subprocess
import sys
import types
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import REPOSITORY, blobs, tiny_experiment
from etils import epath
from flax import nnx
from flax.nnx import bridge

import bigjax
from bigjax import UsageError, train
from bigjax.experiment import RunConfig
from bigjax.models import CNN, MLP
from bigjax.run import modules, source, workdir
from bigjax.run.places import one_place
from bigjax.task import Task
from bigjax.tasks import classify

FLAGS = {"steps": 2, "batch_size": 8, "log_every": 1, "eval_every": 2, "save_every": 1}


def opened(folder: Path, *, resume: bool = True, name: str = "tiny", **changes: Any) -> Any:
    config = RunConfig(resume=resume, **(FLAGS | changes))
    return workdir.open_workdir(epath.Path(folder), tiny_experiment(name=name), config)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> train.Run:
    config = RunConfig(workdir=str(tmp_path_factory.mktemp("workdir") / "run"), ema=0.5, **FLAGS)
    model = MLP(features=(8,), outputs=3, batch_norm=True, mean=(0.5,), std=(0.25,))
    return train.fit(tiny_experiment(model=model, task=classify(model, classes=3)), config, quiet=True)


# ---- what is refused


def refused(folder: Path, **how: Any) -> str:
    with pytest.raises(UsageError) as error:
        opened(folder, **how)
    return str(error.value)


def test_a_file_is_no_working_directory(tmp_path):
    (tmp_path / "file").write_text("precious")
    assert refused(tmp_path / "file") == f"--workdir {tmp_path}/file is a file: name a folder"
    assert refused(tmp_path / "file", resume=False).endswith("is a file: name a folder")
    assert (tmp_path / "file").read_text() == "precious"


@pytest.mark.parametrize("where", ["file/below", "/proc/bigjax"])
def test_a_folder_that_cannot_be_written(tmp_path, where):
    (tmp_path / "file").write_text("")
    said = refused(tmp_path / where)
    assert said.startswith(f"--workdir {tmp_path / where} cannot be written (") and "\n" not in said
    assert said.endswith("): choose another")


@pytest.mark.parametrize("resume", [True, False])
def test_a_folder_with_other_things_is_left_as_it_is(tmp_path, resume):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "mine").write_text("precious")
    said = refused(tmp_path, resume=resume)
    assert "holds no run, but other things (checkpoints): name an empty or new folder" in said
    assert [p.name for p in tmp_path.rglob("*")] == ["checkpoints", "mine"]


def test_what_a_kill_in_the_first_moment_leaves_is_no_obstacle(tmp_path):
    for name in (".writable", "source.patch", "config.json.part"):
        (tmp_path / name).write_text("x")
    assert opened(tmp_path) is None
    assert json.loads((tmp_path / "config.json").read_text())["experiment"] == "tiny"


def test_other_settings_are_listed_one_a_line(tmp_path):
    opened(tmp_path)
    head, *lines = refused(tmp_path, name="other", batch_size=16, seed=3, data="digits").splitlines()
    assert "belongs to a run with other settings: use another --workdir, or --no-resume to start over" in head
    assert [line.strip() for line in lines] == [
        "experiment: tiny -> other",
        "batch_size: 8 -> 16",
        "data: mnist5k -> digits",
        "seed: 0 -> 3",
    ]


def test_settings_that_change_no_number_may_differ(tmp_path):
    opened(tmp_path)
    assert (
        opened(
            tmp_path,
            save_every=9,
            keep=7,
            tensorboard=True,
            nonfinite="skip",
            save_minutes=1,
            hang_seconds=9,
            workdir=str(tmp_path),
        )
        is None
    )


def test_a_flag_that_came_or_went_counts_as_its_default(tmp_path):
    opened(tmp_path)
    record = json.loads((tmp_path / "config.json").read_text())
    del record["config"]["accumulate"], record["config"]["mesh"]["tensor"]
    record["config"]["flag_of_old"] = 3
    (tmp_path / "config.json").write_text(json.dumps(record))
    assert opened(tmp_path) is None
    assert "accumulate: 1 -> 2" in refused(tmp_path, accumulate=2)
    assert "batch_size: 8 -> 16" in refused(tmp_path, batch_size=16)


@dataclasses.dataclass(frozen=True)
class Group:
    rate: float = 0.1
    decay: float = 0.0


@dataclasses.dataclass(frozen=True)
class Grouped(RunConfig):
    optimizer: Group = Group()


def test_flags_that_became_a_group_are_found_where_they_were():
    """A run of release 0.1 has them flat."""
    config = Grouped(optimizer=Group(rate=0.2), seed=3)
    record = workdir.settings(RunConfig(seed=3)) | {"rate": 0.2}
    defaults = workdir.settings(Grouped())
    assert workdir.difference(record, workdir.settings(config), defaults) == []
    other = workdir.settings(dataclasses.replace(config, optimizer=Group(rate=0.3, decay=0.1)))
    lines = ["optimizer.decay: 0.0 -> 0.1", "optimizer.rate: 0.2 -> 0.3"]
    assert workdir.difference(record, other, defaults) == lines
    assert workdir.restored(Grouped(), record) == config


def test_damaged_config_is_named(tmp_path):
    (tmp_path / "config.json").write_text('{"experiment": "ti')
    assert f"{tmp_path}/config.json is not readable as JSON" in refused(tmp_path)


def test_no_resume_drops_the_run_and_nothing_else(tmp_path):
    opened(tmp_path)
    (tmp_path / "checkpoints" / "3").mkdir(parents=True)
    (tmp_path / "metrics.jsonl").write_text("{}")
    assert opened(tmp_path, resume=False, seed=3) is None
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "source.patch"]
    assert json.loads((tmp_path / "config.json").read_text())["config"]["seed"] == 3


def test_finished_run_is_recognized(tmp_path):
    opened(tmp_path)
    (tmp_path / "result.json").write_text('{"step": 2}')
    assert opened(tmp_path) == {"step": 2}


# ---- what is recorded


def test_config_json(run):
    record = workdir.read_config(run.workdir)
    assert record["experiment"] == "tiny" and record["steps"] == 2
    assert record["config"]["batch_size"] == 8 and record["config"]["mesh"] == {"data": -1, "fsdp": 1, "tensor": 1}
    assert record["versions"]["jax"] == jax.__version__ and record["versions"]["python"] == sys.version.split()[0]
    assert record["devices"]["platform"] == "cpu" and record["command"] == sys.argv
    assert record["models"]["model"]["class"] == "bigjax.models.mlp.MLP"
    assert record["models"]["model"]["fields"]["features"] == [8]


def git(folder: Path, *arguments: str) -> str:
    who = ["-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "init.defaultBranch=main"]
    return subprocess.run(["git", *who, *arguments], cwd=folder, check=True, capture_output=True, text=True).stdout


def test_commit_and_edits_are_recorded(tmp_path, monkeypatch):
    (folder := tmp_path / "source").mkdir()
    git(folder, "init")
    (folder / "model.py").write_text("width = 8\n")
    (folder / "latin.txt").write_bytes(b"caf\xe9\n")
    git(folder, "add", ".")
    git(folder, "commit", "-m", "first")
    (folder / "model.py").write_text("width = 9\n")
    (folder / "latin.txt").write_bytes(b"th\xe9\n")
    monkeypatch.chdir(folder)
    opened(tmp_path / "run")
    record = json.loads((tmp_path / "run/config.json").read_text())
    assert record["git_commit"] == git(folder, "rev-parse", "HEAD").strip()
    assert record["git_repository"] == str(folder)
    patch = (tmp_path / "run/source.patch").read_text()
    assert "-width = 8\n+width = 9\n" in patch


def test_scripts_in_folders_that_git_tracks_are_no_edits(tmp_path, monkeypatch):
    git(tmp_path, "init")
    scripts = [tmp_path / f"folder_{n}" / "train.py" for n in range(8)]
    for path in scripts:
        path.parent.mkdir()
        path.write_text("width = 8\n")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-m", "first")
    for path in scripts:
        monkeypatch.setattr(sys.modules["__main__"], "__file__", str(path), raising=False)
        assert source.edits() == ""


def test_the_commit_is_that_of_the_script_or_of_bigjax(tmp_path, monkeypatch):
    """And not of another repository that happens to be the current folder."""
    for name in ("source", "elsewhere"):
        (tmp_path / name).mkdir()
        git(tmp_path / name, "init")
        (tmp_path / name / "train.py").write_text("")
        git(tmp_path / name, "add", ".")
        git(tmp_path / name, "commit", "-m", name)
    monkeypatch.chdir(tmp_path / "elsewhere")
    monkeypatch.setattr(sys.modules["__main__"], "__file__", str(tmp_path / "source/train.py"), raising=False)
    assert source.repository() == tmp_path / "source"
    assert source.commit() == git(tmp_path / "source", "rev-parse", "HEAD").strip()
    (tmp_path / "alone.py").write_text("")
    monkeypatch.setattr(sys.modules["__main__"], "__file__", str(tmp_path / "alone.py"), raising=False)
    bare = tmp_path / "site-packages/bigjax/__init__.py"  # as pip installs it: a file that git doesn't know
    for library, expected in ((REPOSITORY / "bigjax/__init__.py", REPOSITORY), (bare, None)):
        monkeypatch.setattr(bigjax, "__file__", str(library))
        bare.parent.mkdir(parents=True, exist_ok=True)
        assert source.repository() == expected
        assert (source.commit() is None) == (expected is None)
    monkeypatch.setattr(sys.modules["__main__"], "__file__", pytest.__file__)  # an installed command is no script
    assert source.script() is None and source.repository() == tmp_path / "elsewhere"


@pytest.mark.parametrize("within", [True, False], ids=["in a repository", "in none"])
def test_what_git_does_not_track_is_in_the_patch_whole(within, tmp_path, monkeypatch):
    """The script and the modules beside it, so that the patch makes them again; no large ones, none of libraries."""
    (home := tmp_path / "home").mkdir()
    files = {"mine.py": "x = 'é'\n", "helper.py": "y = 1", "latin.py": "z = '\xe9'", "large.py": "#" * 2**21}
    for name, text in files.items():
        (home / name).write_text(text, encoding="latin-1" if name == "latin.py" else "utf-8")
    (home / "notes.txt").write_text("not loaded")
    (home / "tracked.py").write_text("a = 1\n")
    if within:
        git(home, "init")
        git(home, "add", "tracked.py")
        git(home, "commit", "-m", "first")
        (home / "tracked.py").write_text("a = 2\n")
    else:
        monkeypatch.setattr(source, "repository", lambda: None)
    monkeypatch.setattr(sys.modules["__main__"], "__file__", str(home / "mine.py"), raising=False)
    for name in ("helper", "latin", "large", "tracked"):
        module = types.ModuleType(name)
        module.__file__ = str(home / f"{name}.py")
        monkeypatch.setitem(sys.modules, name, module)
    opened(tmp_path / "run")
    (again := tmp_path / "again").mkdir()
    git(again, "init")
    (again / "tracked.py").write_text("a = 1\n")
    if not within:
        (again / "tracked.py").unlink()
    git(again, "apply", str(tmp_path / "run/source.patch"))
    expected = {"mine.py": files["mine.py"], "helper.py": files["helper.py"]}
    expected["tracked.py"] = "a = 2\n" if within else "a = 1\n"
    assert {p.name: p.read_text() for p in again.glob("*.py")} == expected


def test_from_a_mere_checkout_the_version_says_so(monkeypatch):
    def known(name):
        if name in ("bigjax", "grain"):
            raise metadata.PackageNotFoundError(name)
        return "1.0"

    monkeypatch.setattr(metadata, "version", known)
    found = source.versions()
    assert found["bigjax"] == f"{bigjax.__version__}+source" and found["grain"] == "unknown" and found["jax"] == "1.0"


def test_one_file_by_two_spellings_is_the_same_setting(tmp_path, monkeypatch):
    home = tmp_path / "home"
    (home / "data").mkdir(parents=True)
    for name in ("x.npz", "y.npz"):
        (home / "data" / name).write_text(name)
    (home / "link.npz").symlink_to(home / "data/x.npz")
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(home)
    opened(tmp_path / "run", data="data/x.npz", init_from="tokens:data")
    for spelling in ("./data/x.npz", "~/data/x.npz", f"{home}/data/../data/x.npz", f"file://{home}/link.npz"):
        opened(tmp_path / "run", data=spelling, init_from="tokens:./data/")
    monkeypatch.chdir(home / "data")
    opened(tmp_path / "run", data="x.npz", init_from=f"tokens:{home}/data")
    assert "data: data/x.npz -> y.npz" in refused(tmp_path / "run", data="y.npz", init_from="tokens:.")
    assert "init_from: tokens:data -> ." in refused(tmp_path / "run", data="x.npz", init_from=".")
    for old, new in (("none", "./none"), ("", "."), (" ", "."), ("s3://a/b", "s3://a/b/"), ("x\0", "./x\0")):
        assert not one_place(old, new)
    assert one_place("gs://a/b", "gs://a/b/") and not one_place("gs://a/b", "gs://a/c")


def test_json_is_written_whole_or_not_at_all(tmp_path):
    path = epath.Path(tmp_path / "a.json")
    workdir.write_json(path, {"old": 1})
    with pytest.raises(TypeError):
        workdir.write_json(path, {"new": object()})
    assert json.loads(path.read_text()) == {"old": 1}
    workdir.write_json(path, {"loss": float("nan")})
    assert json.loads(path.read_text()) == {"loss": None}


# ---- a model given back


def test_load_gives_the_averages_and_the_same_module(run):
    module, variables = bigjax.load(run.workdir)
    assert module == MLP(features=(8,), outputs=3, batch_norm=True, mean=(0.5,), std=(0.25,))
    assert variables.keys() == {"params", "batch_stats"}
    chex.assert_trees_all_equal(variables, run.state.ema["model"])
    live = run.state.model_state["model"]["batch_stats"]
    assert not np.array_equal(variables["batch_stats"]["norm_0"]["mean"], live["norm_0"]["mean"])
    assert not np.array_equal(variables["params"]["logits"]["kernel"], run.state.params["model"]["logits"]["kernel"])


def test_loaded_model_gives_the_evaluated_accuracy(run):
    module, variables = bigjax.load(str(run.workdir))
    test = blobs(20, seed=1)
    logits = module.apply(variables, jnp.asarray(test["image"] / np.float32(255)))
    assert np.mean(logits.argmax(-1) == test["label"]) == pytest.approx(run.result["metrics"]["eval/accuracy"])


def test_loaded_model_serves_nnx(run):
    module, variables = bigjax.load(run.workdir)
    image = jnp.asarray(blobs(4, seed=1)["image"] / np.float32(255))
    wrapped = bridge.ToNNX(module, rngs=nnx.Rngs(0)).lazy_init(image)
    assert not np.allclose(wrapped(image), module.apply(variables, image))
    for collection in variables.values():
        for layer, leaves in collection.items():
            for name, value in leaves.items():
                getattr(wrapped, layer)[name][...] = value
    chex.assert_trees_all_close(wrapped(image), module.apply(variables, image))


def test_load_without_a_run_or_checkpoint_or_player(run, tmp_path):
    with pytest.raises(UsageError, match=r"holds no run \(no config.json\): train first"):
        bigjax.load(tmp_path)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(UsageError, match="has the players model: name one, as load.*player='model'"):
        bigjax.load(run.workdir, player="generator")
    shutil.copy(run.workdir / "config.json", tmp_path)
    with pytest.raises(UsageError, match="holds no checkpoint yet"):
        bigjax.load(tmp_path)


def two_players(models: dict[str, nn.Module]) -> Task:
    """Each fits its own constant."""

    def init(key: Any, batch: Any) -> Any:
        return {"teacher": {"w": jnp.zeros(())}, "student": {"w": jnp.ones((2,))}}, {"teacher": {}, "student": {}}

    def loss(player: str) -> Any:
        def f(params: Any, state: Any, batch: Any, key: Any) -> Any:
            count = batch["mask"].sum()
            return (jnp.square(params[player]["w"] - 3).sum() * count, count), (state[player], {})

        return f

    return Task(
        models,
        init,
        {p: loss(p) for p in ("teacher", "student")},
        lambda p, s, batch, key: {"loss": (batch["mask"].sum(), batch["mask"].sum())},
    )


def test_load_one_of_several_players(tmp_path):
    models = {"teacher": MLP(features=(1,)), "student": CNN(features=(2,))}
    experiment = tiny_experiment(task=two_players(models), tx=optax.sgd(0.1))
    state = train.fit(experiment, RunConfig(workdir=str(tmp_path / "run"), **FLAGS), quiet=True).state
    with pytest.raises(UsageError, match="has the players teacher, student: name one"):
        bigjax.load(tmp_path / "run")
    module, variables = bigjax.load(tmp_path / "run", player="student")
    assert module == models["student"]
    chex.assert_trees_all_equal(variables, {"params": state.params["student"]})


class Pair(nn.Module):
    parts: tuple[nn.Module, ...] = ()
    head: nn.Module | None = None


def test_modules_within_modules_round_trip():
    module = Pair(parts=(MLP(features=()), CNN(features=(1, 2))), head=MLP(outputs=2))
    text = json.dumps(modules.module_spec(module))
    assert modules.module_from(json.loads(text)) == module


class Free(nn.Module):
    """Fields of any kind: a function, an array, a mapping, a module."""

    act: Any = nn.relu
    scale: Any = None
    head: nn.Module | None = None

    @nn.compact
    def __call__(self, x: Any) -> Any:
        x = self.act(nn.Dense(4)(x.reshape(x.shape[0], -1)))
        x = x if self.scale is None else x * jnp.asarray(self.scale["by"] if isinstance(self.scale, Mapping) else 1.0)
        return (self.head or nn.Dense(3))(x)


@pytest.mark.parametrize(
    ("model", "missing"),
    [
        (Free(), None),
        (Free(head=MLP(features=(), outputs=3)), None),
        (Free(act=nn.gelu), r"act .(PjitFunction|function|CustomJVP|jit)"),
        (Free(scale={"by": np.ones((1, 4))}), r"scale .dict"),
        (Free(head=Free(act=jnp.tanh)), r"head .Free"),
        (Free(scale=float("inf")), r"scale .float"),
    ],
    ids=["defaults", "module", "function", "array", "nested", "infinite"],
)
def test_fields_of_any_kind_train_and_only_load_may_ask_for_the_module(model, missing, tmp_path):
    config = RunConfig(workdir=str(tmp_path / "run"), **FLAGS)
    run = train.fit(tiny_experiment(task=classify(model, classes=3)), config, quiet=True)
    if missing:
        with pytest.raises(UsageError, match=rf"Free has fields that a run cannot record \({missing}.*model=") as error:
            bigjax.load(run.workdir)
        assert "\n" not in str(error.value)
    module, variables = bigjax.load(run.workdir, model=model) if missing else bigjax.load(run.workdir)
    chex.assert_trees_all_equal(variables["params"], run.state.params["model"])
    assert module.apply(variables, np.zeros((2, 4, 4, 1), np.float32)).shape == (2, 3)


@pytest.mark.parametrize(
    "spec",
    [
        {"class": "os.system", "fields": {"command": "touch ran"}},
        {"class": "bigjax.run.workdir.clear", "fields": {"workdir": "precious"}},
        {"class": "collections.OrderedDict", "fields": {}},
        {"class": "antigravity.Net", "fields": {}},  # would open a browser on import
        {"class": "__main__.Net", "file": "evil.py", "fields": {}},
        {"class": "__main__.Plain", "file": "evil.py", "fields": {}},
        {"class": "evil.Plain", "fields": {}},
        {"class": "this.inner.Net", "fields": {}},  # would print on import
        {"class": "flax.linen.Module", "fields": {}},
        {"class": "mine.build.<locals>.Net", "fields": {}},
    ],
)
def test_load_calls_nothing_but_a_module_class(spec, run, tmp_path, monkeypatch):
    shutil.copytree(run.workdir, tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "precious").mkdir()
    (tmp_path / "evil.py").write_text(
        "import pathlib\npathlib.Path('ran').touch()\nNet = print\nclass Plain:\n    pass\n"
    )
    record = json.loads((tmp_path / "run/config.json").read_text())
    (tmp_path / "run/config.json").write_text(json.dumps(record | {"models": {"model": spec}}))
    with pytest.raises(UsageError, match="model="):
        bigjax.load(tmp_path / "run")
    assert (
        not (tmp_path / "ran").exists()
        and (tmp_path / "precious").exists()
        and not {"antigravity", "this", "evil"} & sys.modules.keys()
    )


SCRIPT = """
from __future__ import annotations
import sys
sys.path.insert(0, TESTS)
from dataclasses import dataclass
import flax.linen as nn
from conftest import tiny_experiment
import bigjax
from bigjax import train
from bigjax.experiment import RunConfig
from bigjax.tasks import classify

print("script runs as", __name__)

@dataclass(frozen=True)
class Config(RunConfig):
    width: int = 4

class Net(nn.Module):
    width: int = 3

    @nn.compact
    def __call__(self, x, *, train: bool = False):
        return nn.Dense(3)(nn.relu(nn.Dense(self.width)(x.reshape(x.shape[0], -1))))

model = Net(width=5)  # without a guard: to load it must not train
config = Config(workdir="run", steps=1, batch_size=8)
train.fit(tiny_experiment(model=model, task=classify(model, classes=3)), config, quiet=True)
again, variables = bigjax.load("run")
assert again == model and type(again) is Net
"""


def test_what_a_script_makes_by_a_call_is_not_made_by_load(tmp_path):
    source = "from flax import linen as nn\nSCALE = abs(-2.0)\nclass Net(nn.Module):\n"
    source += "    def __call__(self, x): return SCALE * x\n"
    (tmp_path / "mine.py").write_text(source)
    spec = {"class": "__main__.Net", "file": str(tmp_path / "mine.py"), "fields": {}}
    with pytest.raises(UsageError, match="line 2 makes SCALE by more than a definition, which loading must not run"):
        modules.module_from(spec)
    (tmp_path / "mine.py").write_text(source.replace("abs(-2.0)", "2.0"))
    assert modules.module_from(spec).apply({}, 3.0) == 6.0


def test_load_a_module_defined_in_the_script_itself(tmp_path, capsys):
    script = tmp_path / "mine.py"
    script.write_text(SCRIPT.replace("TESTS", repr(str(REPOSITORY / "tests"))))
    done = subprocess.run([sys.executable, "mine.py"], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["script runs as __main__"]
    module, variables = bigjax.load(tmp_path / "run")
    assert type(module).__name__ == "Net" and module.width == 5
    assert module.apply(variables, jnp.zeros((2, 4, 4, 1))).shape == (2, 3)
    script.unlink()
    with pytest.raises(UsageError, match="mine.py that defines Net is gone"):
        bigjax.load(tmp_path / "run")
