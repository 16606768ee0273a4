"""How a mistake is told: with flags to who gave flags, in Python to who wrote Python; one line, without a traceback."""

import ast
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
from conftest import REPOSITORY

from bigjax import Interrupted, SaveError, UsageError
from bigjax.experiment import RunConfig
from bigjax.run import words


@pytest.fixture
def python(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a notebook, or a script that calls `train.fit`."""
    monkeypatch.setattr(words, "flags", False)


@pytest.mark.parametrize("flags, expected", [
    ("--no-resume to start over there", "RunConfig(resume=False) to start over there"),
    ("--log-every 5: give a number", "RunConfig(log_every=5): give a number"),
    ("use another --workdir, or --accept-changes to go on",
     "use another RunConfig(workdir=...), or RunConfig(accept_changes=True) to go on"),
    ("--workdir runs/x belongs to a run", 'RunConfig(workdir="runs/x") belongs to a run'),
    ("--workdir 's3://a b' cannot be read", "RunConfig(workdir='s3://a b') cannot be read"),
    ("the --workdir of a run", "the RunConfig(workdir=...) of a run"),
    ("give --steps, --epochs or --minutes",
     "give RunConfig(steps=...), RunConfig(epochs=...) or RunConfig(minutes=...)"),
    ("pass --batch-size with a number from 1 to 60", "pass RunConfig(batch_size=...) with a number from 1 to 60"),
    ("lower --learning-rate, or pass --nonfinite skip to drop",
     'lower learning_rate=..., or pass RunConfig(nonfinite="skip") to drop'),
    ("train with --validation 0.1 --best max:accuracy, or give step=",
     'train with RunConfig(validation=0.1, best="max:accuracy"), or give step='),
    ("(it has --steps 6, not --minutes 5.0): add --extend to go on",
     "(it has RunConfig(steps=6), not RunConfig(minutes=5.0)): add RunConfig(extend=True) to go on"),
    ("use --mesh.data 8", "use RunConfig(mesh=MeshConfig(data=8))"),
    ("--mesh.fsdp 1, and --mesh.data -1",
     "RunConfig(mesh=MeshConfig(fsdp=1)), and RunConfig(mesh=MeshConfig(data=-1))"),
    ("--distributed.index 3: there are", "RunConfig(distributed=DistributedConfig(index=3)): there are"),
    ("pictures of one size (--resize N), or --no-augment", "pictures of one size (resize=N), or augment=False"),
    ("try python -m bigjax doctor --workdir gs://x, then --data tokens:DIR",
     'try python -m bigjax doctor --workdir gs://x, then RunConfig(data="tokens:DIR")'),
    ("a well-known word -- and 3--4", "a well-known word -- and 3--4"),
    ("the same command goes on", "the same call goes on"),
])  # fmt: skip
def test_a_flag_is_what_it_is_in_python(flags: str, expected: str, python: None) -> None:
    assert str(UsageError(flags)) == expected == words.spoken(expected)
    with words.by_flags():
        assert str(UsageError(flags)) == flags
    assert str(Interrupted(signal.SIGINT, "at step 3")) == "stopped by SIGINT at step 3: the same call goes on"


def sources() -> list[Path]:
    return [p for p in (REPOSITORY / "bigjax").rglob("*.py") if p.parent.name != "tools"]


def messages(path: Path) -> list[str]:
    """The texts of a file with what f-strings fill in as {}: those that are no docstring."""
    tree = ast.parse(path.read_text())
    inner = {id(part) for n in ast.walk(tree) if isinstance(n, ast.JoinedStr) for part in ast.walk(n) if part is not n}
    told = {id(n.value) for n in ast.walk(tree) if isinstance(n, ast.Expr)}
    out = []
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            out.append("".join(v.value if isinstance(v, ast.Constant) else "{}" for v in node.values))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and not {id(node)} & (inner | told):
            out.append(node.value)
    return out


def test_what_stands_behind_a_flag_in_a_message_is_a_value_of_it_or_known_prose() -> None:
    """Else a sentence would be torn: --workdir of a run is not RunConfig(workdir="of")."""
    kinds, found = get_type_hints(RunConfig), set()
    for path in sources():
        for message in messages(path):
            for no, flag, word in words.FLAG.findall(words.COMMAND.sub("", message)):
                kind = kinds.get(flag.replace("-", "_"), str)
                if word and not no and str in (kind, *get_args(kind)) and re.fullmatch(r"[a-z]+", word):
                    found.add((flag, word))
    assert len(found) > 5
    values = {("data", "mnist5k"), ("tokenizer", "bpe"), ("split", "train")}
    torn = {pair for pair in found - values if pair[1] not in words.PROSE}
    assert not torn, f"add these words to PROSE, or say it otherwise: {torn}"


def test_in_ipython_it_is_one_line() -> None:
    assert UsageError("no")._render_traceback_() == ["UsageError: no"]
    assert Interrupted(signal.SIGINT, "now")._render_traceback_()[0].startswith("Interrupted: stopped by SIGINT now:")


def test_what_nobody_catches_ends_a_script_as_its_flags_would(capsys: pytest.CaptureFixture) -> None:
    """The hook is there once an error is made; what is no error of ours stays a traceback."""
    for error, status in [(UsageError("no"), 2), (Interrupted(signal.SIGTERM, "now"), 143)]:
        with pytest.raises(SystemExit) as e:
            words.at_the_top(type(error), error, None)
        assert e.value.code == status
        assert capsys.readouterr().err in ("error: no\n", "stopped by SIGTERM now: the same command goes on\n")
    words.at_the_top(KeyError, KeyError("x"), None)
    assert "KeyError: 'x'" in capsys.readouterr().err


@pytest.mark.parametrize(
    "before, shown", [("", "error: give RunConfig(steps=...)\n"), ("sys.excepthook = mine", "mine")]
)
def test_a_script_of_its_own(before: str, shown: str) -> None:
    code = (
        f"import sys, bigjax\ndef mine(*_): sys.stderr.write('mine')\n{before}\nraise bigjax.UsageError('give --steps')"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (1 if before else 2, shown)


def test_an_interrupt_before_training_is_one_line_too(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as e, words.leaving():
        raise KeyboardInterrupt
    assert e.value.code == 130 and capsys.readouterr().err == "stopped by SIGINT\n"


def test_errors_keep_their_kind() -> None:
    assert issubclass(SaveError, UsageError) and issubclass(UsageError, Exception)
    assert issubclass(Interrupted, KeyboardInterrupt) and not issubclass(Interrupted, Exception)
