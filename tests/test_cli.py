"""The verbs, as a user types them: what is right prints and exits 0, what is wrong is one message and exits 2."""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import pytest
from conftest import REPOSITORY, tiny_experiment

from bigjax import UsageError, cli
from bigjax.experiment import Experiment, Positive, RunConfig
from bigjax.look import flags
from bigjax.models import MLP
from bigjax.tasks import classify


@dataclass(frozen=True)
class Config(RunConfig):
    steps: int | None = 2
    batch_size: int = 8
    learning_rate: Annotated[float, Positive] = 1e-2
    activation: str = "relu"
    features: Annotated[tuple[int, ...], Positive] = (8,)


def build(c: Config) -> Experiment:
    if c.data == "nowhere":
        raise UsageError("no data set is called 'nowhere': use digits")
    model = MLP(features=c.features, outputs=3, activation=c.activation)
    return tiny_experiment(model=model, task=classify(model, classes=3))


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which `python test_cli.py` was run."""
    folder = tmp_path_factory.mktemp("cli")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        cli.main(Config, build, [])
    return folder


@pytest.fixture(autouse=True)
def here(home, monkeypatch):
    monkeypatch.chdir(home)


def failed(arguments: str, capsys: Any) -> str:
    """The message of a command that must fail."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_:
        cli.main(Config, build, arguments.split())
    out, err = capsys.readouterr()
    assert exit_.value.code == 2 and {*out.splitlines()} <= {"compiling ...", "checking data ..."} and err
    assert "Traceback" not in err and "JAX has removed" not in err
    return err


# ---- what works


def test_train_is_the_default_verb_and_the_script_names_the_run(home):
    result = json.loads((home / "runs/test_cli/result.json").read_text())
    assert result["experiment"] == "test_cli" and result["step"] == 2


def test_again_shows_the_result(capsys):
    for arguments in ([], ["train"]):
        cli.main(Config, build, arguments)
        out = capsys.readouterr().out
        assert "is finished; this is its result" in out and "eval/accuracy" in out and "report.html" in out


def test_evaluate_prints_the_results_numbers(home, capsys):
    cli.main(Config, build, ["evaluate"])
    printed = json.loads(capsys.readouterr().out)
    wanted = {
        k: v
        for k, v in json.loads((home / "runs/test_cli/result.json").read_text())["metrics"].items()
        if k.startswith("eval/")
    }
    assert printed == {"step": 2} | {k: pytest.approx(v, rel=1e-6) for k, v in wanted.items()}
    assert len(wanted) > 3


def test_evaluate_of_another_script_names_both(home, capsys):
    path = home / "runs/test_cli/config.json"
    kept = path.read_text()
    path.write_text(json.dumps(json.loads(kept) | {"experiment": "mnist_cnn"}))
    with pytest.raises(SystemExit) as caught:
        cli.main(Config, build, ["evaluate"])
    path.write_text(kept)
    said = "error: runs/test_cli holds a run of mnist_cnn, not of test_cli: use that script, or its --workdir\n"
    assert caught.value.code == 2 and capsys.readouterr().err == said


def test_report_is_written_again(home, capsys):
    (page := home / "runs/test_cli/report.html").unlink()
    cli.main(Config, build, ["report"])
    assert capsys.readouterr().out.strip() == "runs/test_cli/report.html"
    assert "<h1>test_cli</h1>" in page.read_text()


@pytest.mark.parametrize("arguments", ["--help", *(f"{verb} --help" for verb in cli.VERBS if verb != "sample")])
def test_help(arguments, capsys):
    with pytest.raises(SystemExit) as exit_:
        cli.main(Config, build, arguments.split())
    out, err = capsys.readouterr()
    assert exit_.value.code == 0 and err == ""
    verb = arguments.split()[0] if " " in arguments else "train"
    assert f"test_cli.py {verb}" in out and cli.VERBS[verb].split(";")[0].split()[-1] in out
    for words in (*cli.VERBS, "--learning-rate", "--mesh.data", "--no-resume", "--batch-size", "runs/NAME"):
        assert words in out, words


def test_help_of_sample_has_its_own_flags(capsys):
    with pytest.raises(SystemExit) as exit_:
        cli.main(Config, build, ["sample", "--help"])
    out, err = capsys.readouterr()
    assert exit_.value.code == 0 and err == "" and "test_cli.py sample" in out and "--learning-rate" not in out
    for words in (*cli.VERBS, "--prompt", "--top-p", "--chat", "--workdir", "runs/NAME"):
        assert words in out, words


def test_a_limit_of_ones_own_replaces_the_scripts_steps():
    def settled(**given: Any) -> RunConfig:
        return flags.settle(Config(**given), Config())

    assert settled().steps == 2
    assert settled(epochs=3.0).steps is None and settled(epochs=3.0).epochs == 3.0
    assert settled(minutes=1.0).steps is None
    assert settled(epochs=3.0, steps=5).steps == 5  # both asked for: whichever ends first
    assert settled(steps=7).steps == 7


@pytest.mark.parametrize("arguments, verb, rest", [
    ("", "train", ""),
    ("evaluate --steps 3", "evaluate", "--steps 3"),
    ("--steps 3 evaluate", "evaluate", "--steps 3"),
    ("--steps 3 --no-resume report --seed 1", "report", "--steps 3 --no-resume --seed 1"),
    ("--data=x plan", "plan", "--data=x"),
    ("--features 8 9 evaluate", "evaluate", "--features 8 9"),
    ("--workdir plan --data evaluate", "train", "--workdir plan --data evaluate"),  # these are values
    ("--search plan", "plan", "--search"),
])  # fmt: skip
def test_the_verb_may_stand_behind_flags(arguments: str, verb: str, rest: str) -> None:
    words = arguments.split()
    assert (flags.take_verb(words, Config, cli.VERBS), " ".join(words)) == (verb, rest)


# ---- what does not


@pytest.mark.parametrize(
    "arguments, words",
    [
        ("trian", ["has no verb 'trian'", "did you mean train?"]),
        ("--steps 3 --no-resume evalute", ["error: test_cli.py has no verb 'evalute': did you mean evaluate?"]),
        ("--learning-rate 3 --features 8 9 zzz", ["has no verb 'zzz': use one of train, evaluate"]),
        ("zzz", ["has no verb 'zzz'", "use one of train, evaluate, plan, sample, report"]),
        ("--learning-rat 3", ["--learning-rat", "--learning-rate"]),
        ("--batch-size many", ["--batch-size", "many"]),
        ("--dtype float16", ["--dtype", "float16", "bfloat16"]),
        ("--steps 0", ["error: --steps 0: give a whole number from 1 up to, but below, 2147483648"]),
        ("--learning-rate -1", ["error: --learning-rate -1.0: give a number above 0"]),
        ("--learning-rate nan", ["error: --learning-rate nan: give a finite number"]),
        ("--features 8 0", ["error: --features 0: give a number above 0"]),
        ("--validation 1.5", ["error: --validation 1.5"]),
        ("--workdir new --batch-size 100", ["error: batch_size 100 does not fit 60 training examples"]),
        ("--workdir new --mesh.data 3", ["error: the mesh (data 3", "does not cover the 1 devices: use --mesh.data 1"]),
        (
            "--workdir new --mesh.fsdp 2",
            ["fsdp 2 × tensor 1 = 2) does not cover the 1 devices"],
        ),
        ("--workdir new --activation rulu", ["error: no activation is called 'rulu': use one of relu"]),
        ("--workdir new --data nowhere", ["error: no data set is called 'nowhere'"]),
        ("--workdir new --init-from nowhere", ["error: nowhere holds no run"]),
        ("--workdir /dev/null", ["error: --workdir /dev/null is a file: name a folder"]),
        ("--workdir /dev/null/below", ["error: --workdir /dev/null/below cannot be written", "choose another"]),
        ("--seed 1", ["error: --workdir runs/test_cli belongs to a run with other settings", "seed: 0 -> 1"]),
        ("evaluate --workdir new", ["error: new holds no run (no config.json): train first"]),
        ("report --workdir new", ["error: new has no config.json"]),
        ("evaluate --features 9", ["error: runs/test_cli was trained with other settings", "features: [8] -> [9]"]),
    ],
)
def test_a_mistake_is_one_message_and_exit_status_2(home, arguments, words, capsys):
    said = failed(arguments, capsys)
    for word in words:
        assert word in said, said
    if said.startswith("error: "):
        assert (
            len([line for line in said.splitlines() if not line.startswith("  ")]) == 1
        )  # then what differs, if it does
    assert not (home / "new" / "config.json").exists()  # the corrected command finds nothing in its way


SCRIPT = """
import sys
sys.path.insert(0, {tests!r})
from test_cli import Config, build
from bigjax import cli
if __name__ == "__main__":
    cli.main(Config, build)
"""


def test_a_whole_script_fails_cleanly(tmp_path):
    (tmp_path / "digit.py").write_text(SCRIPT.format(tests=str(REPOSITORY / "tests")))
    done = subprocess.run(
        [sys.executable, "digit.py", "--activation", "rulu"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stderr == "error: no activation is called 'rulu': use one of relu, sigmoid, tanh, gelu, or a function\n"


SABOTAGE = """
import dataclasses, os, shutil, sys
sys.path.insert(0, {experiments!r})
import mnist_mlp
from bigjax import cli

def build(config):
    def sabotage(params, model_state, key):  # just before the save
        shutil.rmtree("w/checkpoints")
        open("w/checkpoints", "w").close()
        return {{}}

    return dataclasses.replace(mnist_mlp.build(config), evaluators={{"sabotage": sabotage}})

if __name__ == "__main__":
    cli.main(mnist_mlp.Config, build)
"""


def test_a_save_that_fails_ends_the_run_with_one_message(tmp_path):
    """Orbax leaves a thread behind that would keep the process from ending."""
    (tmp_path / "broken.py").write_text(SABOTAGE.format(experiments=str(REPOSITORY / "experiments" / "vision")))
    command = [sys.executable, "broken.py", "--steps", "2", "--workdir", "w"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2, done.stderr
    assert "error: a checkpoint could not be saved in " in done.stderr.splitlines()[-1]
    assert not (tmp_path / "w" / "result.json").exists()
