"""Proof that the tests bite: each patch of `mutants/` breaks the code on purpose, and the test that it names turns red.

A patch begins with a line that says what is broken and one, `test: tests/test_x.py::test_name`, that names the quickest
test that must see it; the diff against `bigjax/` follows, with one line of context.

Applied are twelve, drawn by the commit's hash, and those whose files changed since the last tag; all of them where
there is no git, and with BIGJAX_MUTANTS=all, as `make mutants` sets it.
"""

import ast
import os
import random
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

import pytest
from conftest import REPOSITORY

MUTANTS = sorted((REPOSITORY / "tests" / "mutants").glob("*.patch"))
COPIED = ("bigjax", "tests", "experiments", "pyproject.toml")  # what the named tests need
BROKEN = re.compile(r"\b(SyntaxError|IndentationError|NameError|UnboundLocalError|ImportError|ModuleNotFoundError)\b")
DRAWN = 12

# Loaded by pytest in the copy: what it tests must be the copy, not what is installed.
GUARD = """
from pathlib import Path
import pytest

def pytest_configure(config):
    import bigjax
    if not Path(bigjax.__file__).is_relative_to(Path(__file__).parent):
        raise pytest.UsageError(f"{bigjax.__file__} is tested, not the copy")
"""


def named_test(patch: Path) -> str:
    """The pytest id in a patch's second line."""
    says, test, *_ = patch.read_text().splitlines()
    assert re.fullmatch(r"[A-Z].*[.]", says), f"{patch.name}: the first line says what is broken"
    assert test.startswith("test: tests/test_"), f"{patch.name}: the second line is `test: tests/test_x.py::test_name`"
    return test.removeprefix("test: ")


def git(*arguments: str, root: Path) -> str | None:
    """What git says of the repository in `root`; None where it fails."""
    try:
        done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True)
    except FileNotFoundError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def files_of(patch: Path) -> set[str]:
    """The patch itself, the test that it names and the files that it breaks."""
    broken = re.findall(r"^--- a/(.+)$", patch.read_text(), re.M)
    return {f"tests/mutants/{patch.name}", named_test(patch).partition("::")[0], *broken}


def selected(mutants: list[Path], *, root: Path) -> list[Path]:
    """Those to apply, in order: the same for every process that looks at this checkout."""
    tag, commit = git("describe", "--tags", "--abbrev=0", root=root), git("rev-parse", "HEAD", root=root)
    if os.environ.get("BIGJAX_MUTANTS") == "all" or commit is None:
        return mutants
    changed = set(git("diff", "--name-only", tag, root=root).splitlines()) if tag else set()
    drawn = random.Random(commit).sample(mutants, min(DRAWN, len(mutants)))
    return [p for p in mutants if p in drawn or files_of(p) & changed]


APPLIED = selected(MUTANTS, root=REPOSITORY)


def git_apply(patch: Path, *flags: str, root: Path) -> None:
    """Applies a patch in a folder as if no repository were around it, where git would skip what lies outside."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("GIT_")}
    environment["GIT_CEILING_DIRECTORIES"] = str(root.resolve().parent)
    done = subprocess.run(
        ["git", "apply", *flags, str(patch)], cwd=root, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{patch.name} no longer applies, make it anew: {done.stderr}"


class Outcome(NamedTuple):
    """passed, failed, error, skipped: how many tests; messages: of the failures, one a test."""

    status: int
    counts: Counter[str]
    messages: list[str]
    output: str


def run_tests(root: Path, *tests: str) -> Outcome:
    """Runs tests of a copy, with the copy's bigjax, in a process of its own."""
    (root / "copy_guard.py").write_text(GUARD)
    report = root / "report.xml"
    flags = ["-n", "0", "-p", "copy_guard", "-p", "no:cacheprovider", "--junit-xml", str(report), "--tb=short"]
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST_", "COV_"))}
    environment |= {"PYTHONPATH": str(root), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *flags, "--basetemp", str(root / "temporary"), *tests],
        cwd=root,
        env=environment,
        capture_output=True,
        text=True,
        timeout=1800,
    )
    counts, messages = Counter[str](), []
    for case in ElementTree.parse(report).iter("testcase") if report.exists() else ():
        kinds = [part for part in case if part.tag in ("failure", "error", "skipped")]
        counts.update([part.tag for part in kinds] or ["passed"])
        messages += [part.get("message", "") for part in kinds]
    return Outcome(done.returncode, counts, messages, done.stdout[-4000:] + done.stderr[-2000:])


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A copy of the library and its tests."""
    root = tmp_path / "copy"
    root.mkdir()
    unneeded = shutil.ignore_patterns("__pycache__", "runs", "results", "mutants")
    for name in COPIED:
        whole = REPOSITORY / name
        if whole.is_dir():
            shutil.copytree(whole, root / name, ignore=unneeded)
        else:
            shutil.copy(whole, root / name)
    return root


def test_there_are_at_least_20() -> None:
    assert len(MUTANTS) >= 20
    diffs = {p.read_text().partition("\n---")[2] for p in MUTANTS}
    assert len(diffs) == len(MUTANTS)


@pytest.mark.parametrize("patch", MUTANTS, ids=lambda p: p.stem)
def test_it_applies_and_names_a_test(patch: Path) -> None:
    file, _, name = named_test(patch).partition("::")
    functions = [f.name for f in ast.parse((REPOSITORY / file).read_text()).body if isinstance(f, ast.FunctionDef)]
    assert name.partition("[")[0] in functions, f"{patch.name}: {file} has no test {name}"
    assert set(re.findall(r"^(?:---|\+\+\+) [ab]/(\w+)/", patch.read_text(), re.M)) == {"bigjax"}
    git_apply(patch, "--check", root=REPOSITORY)


def test_selection(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All without git; else twelve that only the commit decides, and what changed since a tag, committed or not."""
    monkeypatch.delenv("BIGJAX_MUTANTS", raising=False)
    for name in [n for n in os.environ if n.startswith("GIT_")]:
        monkeypatch.delenv(name)

    def do(*arguments: str) -> None:
        assert git("-c", "user.name=A", "-c", "user.email=a@b.c", *arguments, root=tmp_path) is not None

    shutil.copytree(REPOSITORY / "bigjax", tmp_path / "bigjax", ignore=shutil.ignore_patterns("__pycache__"))
    assert selected(MUTANTS, root=tmp_path) == MUTANTS  # no repository
    do("init", "-q")
    do("add", ".")
    do("commit", "-qm", "a")
    assert len(first := selected(MUTANTS, root=tmp_path)) == DRAWN
    do("tag", "v1")
    assert selected(MUTANTS, root=tmp_path) == first
    do("commit", "-q", "--allow-empty", "-m", "b")
    assert len(second := selected(MUTANTS, root=tmp_path)) == DRAWN and second != first
    with (tmp_path / "bigjax" / "optim.py").open("a") as f:
        f.write("# changed\n")
    broken = {p for p in MUTANTS if "--- a/bigjax/optim.py" in p.read_text()}
    assert broken and set(selected(MUTANTS, root=tmp_path)) == broken | set(second)
    monkeypatch.setenv("BIGJAX_MUTANTS", "all")
    assert selected(MUTANTS, root=tmp_path) == MUTANTS


@pytest.mark.slow
def test_unbroken_all_named_tests_are_green(copy: Path) -> None:
    """Of those to apply, in one run, and none is skipped: what turns red below does so by its patch."""
    tests = sorted({named_test(p) for p in APPLIED})
    done = run_tests(copy, *tests)
    assert done.status == 0 and set(done.counts) == {"passed"} and done.counts["passed"] >= len(tests), done.output


@pytest.mark.slow
@pytest.mark.parametrize("patch", APPLIED, ids=lambda p: p.stem)
def test_it_turns_its_test_red(patch: Path, copy: Path) -> None:
    """By a failure of the test: an error in collection or a fixture, or code that cannot run, proves nothing."""
    before = {p: p.read_bytes() for p in (copy / "bigjax").rglob("*.py")}
    git_apply(patch, root=copy)
    changed = [p for p, content in before.items() if p.read_bytes() != content]
    assert changed, f"{patch.name} changed nothing"
    for path in changed:
        compile(path.read_bytes(), path, "exec")
    test = named_test(patch)
    done = run_tests(copy, test)
    says = patch.read_text().splitlines()[0]
    assert done.status != 0, f"STILL GREEN: {test} does not see this: {says}\n{done.output}"
    assert done.status == 1, f"pytest could not run {test} (exit status {done.status})\n{done.output}"
    assert done.counts["failure"] and not done.counts["error"], f"no failure of {test} itself\n{done.output}"
    broken = [m for m in done.messages if BROKEN.search(m)]
    assert not broken, f"{patch.name} is code that cannot run: {broken[0]}"
