"""tpu_setup.sh against a stand-in gcloud: a cloud of two workers, each a home folder on this machine."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import REPOSITORY

SCRIPT = REPOSITORY / "tpu_setup.sh"
VARIABLES = {"PROJECT": "my-project", "ZONE": "us-central2-b", "TPU_NAME": "my-tpu", "ACCELERATOR": "v4-8"}
NEEDED = {"create": [*VARIABLES], "until": [*VARIABLES], "list": ["PROJECT", "ZONE"], "pull gs": ["PROJECT"]}
VERBS = {
    "create": ["create"],
    "install": ["install"],
    "run": ["run", "true"],
    "until": ["run", "--until-done", "true"],
    "status": ["status"],
    "logs": ["logs"],
    "ssh": ["ssh"],
    "pull": ["pull", "runs/r"],
    "pull gs": ["pull", "gs://bucket/r"],
    "list": ["list"],
    "delete": ["delete"],
}

# Everything this cloud knows is files in $CLOUD: calls, queue (its state; none: nothing created), coming (the states
# that the next requests will pass through), lost (how many connections are still to fail), worker0/ and worker1/.
GCLOUD = """
import json, os, re, shutil, subprocess, sys
from pathlib import Path
cloud, arguments = Path(os.environ["CLOUD"]), sys.argv[1:]
with open(cloud / "calls", "a") as f:
    f.write(json.dumps(arguments) + "\\n")
def read(name):
    return (cloud / name).read_text() if (cloud / name).exists() else ""
kind, verb = arguments[2:4]
what = {a.partition("=")[0]: a.partition("=")[2] for a in arguments if a.startswith("--")}
workers = [cloud / "worker0", cloud / "worker1"]
if arguments[1] == "rsync":  # a bucket is a folder; what --exclude means is gcloud's
    for path in (cloud / "bucket").glob("r/**/*"):
        to = Path(verb) / path.relative_to(cloud / "bucket/r")
        if path.is_file() and not re.match(what["--exclude"], str(path.relative_to(cloud / "bucket/r"))):
            to.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, to)
    sys.exit()
if what.get("--worker", "all") != "all":
    workers = [workers[int(what["--worker"])]]
def next_state():
    first, *rest = read("coming").splitlines() or ["ACTIVE"]
    (cloud / "coming").write_text("\\n".join(rest))
    (cloud / "queue").write_text(first)
if verb == "list":
    print(kind, read("queue") and "my-tpu")
elif verb == "create":
    next_state()
    for worker in workers:  # new machines
        shutil.rmtree(worker, ignore_errors=True)
        worker.mkdir()
elif read("broken"):
    sys.exit("ERROR: (gcloud) " + read("broken"))
elif not read("queue"):
    sys.exit("ERROR: (gcloud) NOT_FOUND: Resource was not found")
elif verb == "describe" and kind == "queued-resources":
    print(read("queue"))
    if read("coming"):
        next_state()
elif verb == "describe":
    print("READY" if read("queue").startswith("ACTIVE") else "PREEMPTED")
elif verb == "delete" and read("queue") == "SUSPENDING":
    (cloud / "queue").write_text("SUSPENDED")
    sys.exit("ERROR: (gcloud) it is SUSPENDING")
elif verb == "delete":
    (cloud / "queue").unlink()
elif not read("queue").startswith("ACTIVE"):
    sys.exit("ERROR: (gcloud) the TPU is not READY")
elif int(read("lost") or 0):
    (cloud / "lost").write_text(str(int(read("lost")) - 1))
    sys.exit(255)
elif verb == "scp" and ":" in arguments[4]:
    shutil.copy(workers[0] / arguments[4].partition(":")[2], arguments[5])
elif verb == "scp":
    for worker in workers:
        shutil.copy(arguments[4], worker / arguments[5].partition(":")[2])
elif verb == "ssh":
    statuses = []
    for worker in workers:
        env = os.environ | {"HOME": str(worker), "PATH": f"{cloud}/remote:/usr/bin:/bin"}
        command = ["bash", "-c", what["--command"]] if "--command" in what else ["bash"]
        statuses.append(subprocess.run(command, env=env, cwd=worker, start_new_session=True).returncode)
    if not read("queue").startswith("ACTIVE"):
        sys.exit(255)  # pre-empted meanwhile
    sys.exit(next((s for s in statuses if s), 0))
"""

# The workers' own python3: notes what install asks of it, and makes a venv by a link.
PYTHON3 = f"""#!/bin/sh
echo "$@" >>"$HOME/python3.log"
case "$*" in *venv*) mkdir -p "$HOME/bigjax-venv/bin" && ln -sf {sys.executable} "$HOME/bigjax-venv/bin/python" ;; esac
"""


def executable(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


class Setup:
    """A checkout with tpu_setup.sh, and a cloud to try it on."""

    def __init__(self, root: Path):
        self.cloud, self.tree = root / "cloud", root / "tree"
        executable(root / "bin" / "gcloud", f"#!{sys.executable} -IS\n{GCLOUD}")
        executable(self.cloud / "remote" / "python3", PYTHON3)
        self.tree.mkdir()
        shutil.copy(SCRIPT, self.tree)
        for name in ("kept", "edited", "removed"):
            (self.tree / f"{name}.py").write_text(f"print('{name}')\n")
        (self.tree / ".gitignore").write_text("runs/\n")
        self.env = {k: v for k, v in os.environ.items() if not k.startswith("GIT_")}
        self.env |= VARIABLES | {"PATH": f"{root}/bin:/usr/bin:/bin", "CLOUD": str(self.cloud), "POLL": "0"}
        self.env |= {"TMPDIR": str(root / "tmp"), "HOME": str(root)}
        (root / "tmp").mkdir()
        self.git("init", "-q")
        self.git("add", ".")
        self.git("-c", "user.name=A", "-c", "user.email=a@b.c", "commit", "-q", "-m", "all")

    def git(self, *arguments: str, cwd: Path | None = None) -> str:
        return subprocess.check_output(["git", *arguments], cwd=cwd or self.tree, env=self.env, text=True)

    def __call__(self, *arguments: str, status: int = 0, typed: str = "", **env: str) -> subprocess.CompletedProcess:
        command = [str(self.tree / "tpu_setup.sh"), *arguments]
        # run from elsewhere: the script finds its own checkout
        how = {"cwd": self.cloud, "env": self.env | env, "capture_output": True, "text": True, "timeout": 100}
        done = subprocess.run(command, input=typed, **how)
        assert done.returncode == status, (done.returncode, done.stdout, done.stderr)
        return done

    def calls(self, *verbs: str) -> list[list[str]]:
        path = self.cloud / "calls"
        calls = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        return [call for call in calls if not verbs or call[3] in verbs]

    def forget(self) -> None:
        (self.cloud / "calls").unlink()

    def workers(self) -> list[Path]:
        return [self.cloud / "worker0", self.cloud / "worker1"]

    def will(self, **files: str) -> None:
        for name, text in files.items():
            (self.cloud / name).write_text(text)

    def standing(self) -> None:
        self("create")
        self("install")
        self.forget()

    def a_run(self, folder: Path) -> None:
        for name in ("config.json", "gallery/0.png", "checkpoints/2/state", "profile/trace"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(f"{name} in {folder}")

    def path(self, *tools: str) -> str:
        """A PATH with nothing but these."""
        folder = self.tree.parent / "tools"
        folder.mkdir()
        for tool in tools:
            (folder / tool).symlink_to(shutil.which(tool))
        return str(folder)


@pytest.fixture
def tpu(tmp_path: Path) -> Setup:
    return Setup(tmp_path)


def one_error(done: subprocess.CompletedProcess) -> str:
    """The one line that says what is wrong."""
    (line,) = [line for line in done.stderr.splitlines() if not line.startswith("tpu_setup.sh: ")]
    assert line.startswith("error: ")
    return line


def test_shellcheck() -> None:
    assert SCRIPT.read_text().splitlines()[0] == "#!/usr/bin/env bash" and os.access(SCRIPT, os.X_OK)
    where = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    if not (shellcheck := shutil.which("shellcheck", path=where)):
        pytest.skip("shellcheck is not installed: pip install -e '.[dev]'")
    done = subprocess.run([shellcheck, SCRIPT], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("verb", VERBS)
def test_each_missing_variable_is_one_line(tpu: Setup, verb: str) -> None:
    needed = NEEDED.get(verb, ["PROJECT", "ZONE", "TPU_NAME"])
    for name in needed:
        message = one_error(tpu(*VERBS[verb], status=2, **{name: ""}))
        assert name in message and f"{name}=" in message
    errors = tpu(*VERBS[verb], status=2, **dict.fromkeys(VARIABLES, "")).stderr.splitlines()
    assert [line.split()[1] for line in errors] == needed
    assert tpu.calls() == []


@pytest.mark.parametrize("verb", VERBS)
def test_a_dry_run_prints_the_calls_and_touches_nothing(tpu: Setup, verb: str) -> None:
    no_gcloud = tpu.path("bash", "dirname", "git", "sed")
    before = sorted(tpu.tree.parent.rglob("*"))
    for arguments in (["--dry-run", *VERBS[verb]], [VERBS[verb][0], "--dry-run", *VERBS[verb][1:]]):
        done = tpu(*arguments, PATH=no_gcloud)
        printed = done.stdout.splitlines()
        begin = ("gcloud compute tpus ", "gcloud storage ", "git clone", "tar ", "rm ", "mkdir ")
        assert all(line.startswith(begin) for line in printed)
    assert "error" not in done.stderr
    assert sorted(tpu.tree.parent.rglob("*")) == before

    def calls() -> list[list[str]]:
        return [[a.rpartition("/")[2] if a.endswith("bigjax.tar") else a for a in call] for call in tpu.calls()]

    if verb != "create":
        tpu.standing()
        tpu("run", "true")
        tpu.a_run(tpu.workers()[0] / "bigjax/runs/r")
        tpu.a_run(tpu.cloud / "bucket/r")
        tpu.forget()
    tpu(*VERBS[verb])
    made = calls()
    tpu.forget()
    commands = "\n".join(line for line in printed if line.startswith("gcloud"))
    subprocess.run(["bash", "-c", commands], env=tpu.env, cwd=tpu.cloud, capture_output=True)
    assert calls() == made and made


@pytest.mark.parametrize(
    "accelerator, runtime",
    [
        ("v3-8", "tpu-ubuntu2204-base"),
        ("v4-8", "tpu-ubuntu2204-base"),
        ("v5litepod-16", "v2-alpha-tpuv5-lite"),
        ("v5p-8", "v2-alpha-tpuv5"),
        ("v6e-8", "v2-alpha-tpuv6e"),
    ],
)
def test_create(tpu: Setup, accelerator: str, runtime: str) -> None:
    tpu("create", ACCELERATOR=accelerator)
    (call,) = tpu.calls("create")
    assert call[:5] == ["compute", "tpus", "queued-resources", "create", "my-tpu"]
    assert {
        "--node-id=my-tpu",
        "--project=my-project",
        "--zone=us-central2-b",
        f"--accelerator-type={accelerator}",
        f"--runtime-version={runtime}",
    } < set(call)
    assert "--spot" not in call


def test_spot_0_is_no_spot(tpu: Setup) -> None:
    tpu("create", SPOT="0")
    assert "--spot" not in tpu.calls("create")[0]


def test_create_takes_spot_and_another_runtime(tpu: Setup) -> None:
    for arguments, env in ((["--spot"], {}), ([], {"SPOT": "1"})):
        tpu("create", *arguments, RUNTIME="mine", ACCELERATOR="v9-8", **env)
        assert {"--spot", "--runtime-version=mine"} < set(tpu.calls("create")[-1])
        tpu("delete")
    assert "set RUNTIME" in one_error(tpu("create", ACCELERATOR="v9-8", status=2))


def test_create_waits_until_the_slice_stands(tpu: Setup) -> None:
    tpu.will(coming="WAITING_FOR_RESOURCES\nWAITING_FOR_RESOURCES\nPROVISIONING\nACTIVE")
    done = tpu("create")
    states = ["WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"]
    assert done.stderr.splitlines() == [f"tpu_setup.sh: my-tpu is {state}" for state in states]


def test_create_gives_up_at_its_deadline_and_can_wait_on(tpu: Setup) -> None:
    tpu.will(coming="PROVISIONING")
    message = one_error(tpu("create", CREATE_TIMEOUT="0", status=1))
    assert "still PROVISIONING after 0 s" in message
    tpu.will(queue="PROVISIONING", coming="ACTIVE")
    tpu("create")
    assert len(tpu.calls("create")) == 1


@pytest.mark.parametrize("state", ["FAILED: no more capacity in the zone", "SUSPENDED"])
def test_a_request_that_cannot_be_served_is_one_line(tpu: Setup, state: str) -> None:
    tpu.will(coming=state)
    message = one_error(tpu("create", status=1))
    assert state in message and "./tpu_setup.sh delete" in message


def test_an_unreadable_state_is_no_reason_to_create(tpu: Setup) -> None:
    tpu.will(broken="You do not currently have an active account selected.")
    for verb in ("create", "status"):
        assert "active account" in one_error(tpu(verb, status=1))
    assert not tpu.calls("create")


def test_install_runs_on_every_worker(tpu: Setup) -> None:
    tpu("create")
    tpu("install", EXTRAS="tpu")
    for worker in tpu.workers():
        pip, venv, packages = (worker / "python3.log").read_text().splitlines()
        assert pip.startswith("-m pip install") and pip.endswith("uv")
        assert "--python 3.11" in venv and f"{worker}/bigjax-venv" in venv
        assert packages.endswith("-c constraints.txt -e .[tpu]") and "bigjax-venv/bin/python" in packages
        assert (worker / "bigjax" / "kept.py").exists()


def test_run_syncs_the_working_tree_as_it_is(tpu: Setup) -> None:
    tpu.standing()
    (tpu.tree / "edited.py").write_text("print('new')\n")
    (tpu.tree / "removed.py").unlink()
    (tpu.tree / "folder").mkdir()
    (tpu.tree / "folder" / "über all\n.py").write_text("print('untracked')\n")
    (tpu.tree / "runs").mkdir()
    (tpu.tree / "runs" / "large").touch()
    for worker in tpu.workers():
        (worker / "bigjax" / "runs").mkdir()
        (worker / "bigjax" / "runs" / "checkpoint").touch()
    done = tpu("run", "python", "edited.py")
    assert done.stdout.split() == ["new", "new"]
    assert len(tpu.calls("scp")) == 1 and all("--worker=all" in call for call in tpu.calls("scp", "ssh"))
    for worker in tpu.workers():
        there = {str(p.relative_to(worker / "bigjax")) for p in (worker / "bigjax").rglob("*.py")}
        assert there == {"kept.py", "edited.py", "folder/über all\n.py"}
        assert (worker / "bigjax" / "runs" / "checkpoint").exists()  # what ran there without a gs:// --workdir
        assert not (worker / "bigjax" / "runs" / "large").exists()
        for question in (["rev-parse", "HEAD"], ["diff", "HEAD"]):  # what a run records about its source
            assert tpu.git(*question, cwd=worker / "bigjax") == tpu.git(*question)
    (tpu.tree / "folder" / "über all\n.py").unlink()
    tpu("run", "true")
    assert not list((tpu.cloud / "worker1").rglob("über*"))
    assert not list((tpu.tree.parent / "tmp").iterdir())


def test_arguments_arrive_as_they_were_given(tpu: Setup) -> None:
    tpu.standing()
    show = "import json, sys; print(json.dumps(sys.argv[1:]))"
    arguments = ["two words", "it's", 'a "b"', "$HOME `id` $(id) \\", "line\nline", "", "*", "A=b", "--spot", "é"]
    done = tpu("run", "python", "-c", show, *arguments)
    assert [json.loads(line) for line in done.stdout.splitlines()] == [arguments] * 2


def test_run_in_the_environment_passes_the_status_and_logs_it(tpu: Setup) -> None:
    tpu.standing()
    assert "no run yet" in tpu("logs", status=1).stderr
    code = "import os, sys; print(os.getcwd()); print('warned', file=sys.stderr); sys.exit(7)"
    done = tpu("run", "python", "-c", code, status=7)
    expected = [line for worker in tpu.workers() for line in (f"{worker}/bigjax", "warned")]
    assert done.stdout.split() == expected
    logged = [line.partition(": ") for line in tpu("logs").stdout.splitlines()]
    assert [line for _, _, line in logged] == expected
    assert {name for name, _, _ in logged} == {os.uname().nodename}
    tpu("run", "python", "-c", "import os; assert os.getcwd().endswith('worker0/bigjax')", status=1)  # on one of two


def test_run_before_install_says_so(tpu: Setup) -> None:
    tpu("create")
    assert "./tpu_setup.sh install" in tpu("run", "true", status=2).stderr


def test_what_a_lost_connection_left_behind_is_ended(tpu: Setup) -> None:
    tpu.standing()
    left = subprocess.Popen(["sleep", "100"], start_new_session=True)
    (tpu.cloud / "worker0" / "bigjax.pid").write_text(str(left.pid))
    tpu("run", "true")
    assert left.wait(timeout=10) == -9
    assert not (tpu.cloud / "worker0" / "bigjax.pid").exists()


def test_a_lost_connection_is_tried_again_a_few_times(tpu: Setup) -> None:
    tpu.standing()
    tpu.will(lost="2")
    done = tpu("run", "python", "kept.py")
    assert done.stdout.split() == ["kept"] * 2 and done.stderr.count("gcloud failed (status 255)") == 2
    for verb in (["install"], ["logs"]):
        tpu.will(lost="1")
        tpu(*verb)
    tpu.will(lost="9")
    tpu("run", "python", "kept.py", status=255, TRIES="4")
    assert (tpu.cloud / "lost").read_text() == "5"


@pytest.mark.parametrize("status, seen", [(1, 1), (3, 3), (255, 1)])
@pytest.mark.parametrize("until_done", [[], ["--until-done"]])
def test_a_failing_command_is_not_run_again(tpu: Setup, until_done: list[str], status: int, seen: int) -> None:
    tpu.standing()
    tpu("run", *until_done, "python", "-c", f"open('../ran', 'a').write('x'); exit({status})", status=seen)
    assert [(worker / "ran").read_text() for worker in tpu.workers()] == ["x", "x"]
    assert not tpu.calls("create", "delete")


PREEMPTED = """
import os, pathlib, sys
cloud = pathlib.Path(os.environ["CLOUD"])
seen = cloud / "seen"
count = len(seen.read_text()) if seen.exists() else 0
seen.write_text("x" * (count + 1))
print("started")
if count < int(sys.argv[1]):
    (cloud / "queue").write_text(sys.argv[2])
    sys.exit(1)
"""


@pytest.mark.parametrize("state", ["SUSPENDED", "SUSPENDING", "FAILED: out of capacity"])
def test_a_preempted_slice_is_created_again_and_goes_on(tpu: Setup, state: str) -> None:
    tpu.standing()
    done = tpu("run", "--until-done", "python", "-c", PREEMPTED, "1", state, "gs://bucket/run")
    verbs = [call[3] for call in tpu.calls("create", "delete", "scp")]
    deletes = ["delete"] * (1 + (state == "SUSPENDING"))
    assert verbs == ["scp", *deletes, "create", "scp", "scp"]  # one sync by install, one by run
    (create,) = tpu.calls("create")
    assert "--spot" in create and "--accelerator-type=v4-8" in create
    assert (tpu.cloud / "worker1" / "python3.log").exists()  # on the new machines
    assert done.stderr.count("was pre-empted") == 1 and "gs://" not in done.stderr
    assert "--force" in tpu.calls("delete")[0]


def test_preemption_while_installing_counts_too(tpu: Setup) -> None:
    tpu.standing()
    # pre-empted; the second stands when create looks, and is gone by the time of install; the third is never ACTIVE
    tpu.will(queue="SUSPENDED", coming="SUSPENDED\nACTIVE\nSUSPENDED\nSUSPENDED\nSUSPENDED\nSUSPENDED\nACTIVE")
    done = tpu("run", "--until-done", "python", "kept.py")
    assert len(tpu.calls("create")) == 3 and done.stdout.split() == ["kept"] * 2


def test_preemptions_are_limited_and_without_until_done_not_mended(tpu: Setup) -> None:
    tpu.standing()
    command = ["python", "-c", PREEMPTED, "9", "SUSPENDED"]
    tpu("run", *command, status=1, TRIES="2")  # gcloud itself refuses the second try
    assert not tpu.calls("create", "delete")
    done = tpu("run", "--until-done", *command, status=1, MAX_PREEMPTIONS="2")
    assert "pre-empted 3 times: raise MAX_PREEMPTIONS" in done.stderr.splitlines()[-1]
    assert len(tpu.calls("create")) == 2 and "without a gs:// --workdir" in done.stderr


def test_a_deleted_slice_is_not_created_again(tpu: Setup) -> None:
    done = tpu("run", "--until-done", "true", status=1)
    assert done.stderr.splitlines()[-1] == "error: there is no my-tpu in us-central2-b: ./tpu_setup.sh create"
    assert not tpu.calls("create")


def test_status_and_delete(tpu: Setup) -> None:
    assert tpu("status").stdout.splitlines() == ["queued resource my-tpu: NOT_FOUND", "slice my-tpu: NOT_FOUND"]
    tpu("create")
    assert tpu("status").stdout.splitlines() == ["queued resource my-tpu: ACTIVE", "slice my-tpu: READY"]
    tpu("delete")
    (call,) = tpu.calls("delete")
    assert call[2:5] == ["queued-resources", "delete", "my-tpu"] and {"--force", "--quiet"} < set(call)
    tpu("delete", status=1)


def test_a_shell_on_one_worker(tpu: Setup) -> None:
    tpu.standing()
    assert tpu("ssh", typed="pwd; exit 3\n", status=3).stdout.split() == [str(tpu.workers()[0])]
    assert tpu("ssh", "--worker", "1", typed="pwd\n").stdout.split() == [str(tpu.workers()[1])]


def test_list(tpu: Setup) -> None:
    tpu("create")
    tpu.forget()
    assert tpu("list", TPU_NAME="").stdout.splitlines() == ["queued-resources my-tpu", "tpu-vm my-tpu"]
    assert all({"--project=my-project", "--zone=us-central2-b"} < set(call) for call in tpu.calls())
    tpu("list", ZONE="-")
    assert "--zone=-" in tpu.calls()[-1]


def files(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def test_pull_a_run_from_a_worker(tpu: Setup) -> None:
    tpu.standing()
    source = tpu.workers()[1] / "bigjax/runs/it's mine"
    tpu.a_run(source)
    pulled = tpu.tree / "runs/pulled/it's mine"
    arguments = ["pull", "--worker", "1", "runs/it's mine/"]
    assert f"runs/it's mine is in {pulled}" in tpu(*arguments).stderr
    assert files(pulled) == [".pulled", "config.json", "gallery/0.png"]
    assert (pulled / "config.json").read_text() == f"config.json in {source}"
    assert not list(tpu.cloud.glob("worker?/*pulled*"))
    (source / "config.json").write_text("newer")
    tpu(*arguments, "--all")
    assert (pulled / "config.json").read_text() == "newer" and (pulled / "checkpoints/2/state").exists()
    (tpu.cloud / "other").mkdir()
    (tpu.cloud / "other/precious").write_text("")
    for folder in ("other", str(pulled)):  # the caller's folder is the cloud
        message = one_error(tpu("pull", "--worker", "1", str(source), folder, status=2))
        assert message.endswith(f"holds other things than {source} of my-tpu in us-central2-b: name another FOLDER")
    tpu("pull", "--worker", "1", str(source), "new/folder")
    assert files(tpu.cloud / "new/folder") == files(pulled)[:1] + ["config.json", "gallery/0.png"]
    message = one_error(tpu("pull", "runs/it's mine", "elsewhere", status=2))  # not on worker 0
    assert message.startswith("error: there is no run in runs/it\\'s\\ mine on worker 0: ./tpu_setup.sh ssh")
    assert not (tpu.cloud / "elsewhere").exists()


def test_pull_a_run_from_a_bucket(tpu: Setup) -> None:
    tpu.a_run(tpu.cloud / "bucket/r")
    tpu("pull", "gs://bucket/r/", "r", TPU_NAME="", ZONE="")
    assert files(tpu.cloud / "r") == [".pulled", "config.json", "gallery/0.png"]
    (call,) = tpu.calls()
    assert call[:2] == ["storage", "rsync"] and call[2:4] == ["gs://bucket/r", str(tpu.cloud / "r")]
    assert {"--recursive", "--project=my-project"} < set(call)
    tpu("pull", "--all", "gs://bucket/r", "r")
    assert "profile/trace" in files(tpu.cloud / "r") and "checkpoints/2/state" in files(tpu.cloud / "r")


@pytest.mark.parametrize(
    "arguments, text",
    [
        (["pull"], "pull needs a run"),
        (["pull", "a", "b", "c"], "pull takes a RUN and a FOLDER, not c too"),
        (["pull", "--every", "a"], "pull does not know --every"),
        (["ssh", "--worker"], "--worker needs a number"),
        (["ssh", "--worker", "all"], "--worker needs a number"),
        (["ssh", "1"], "ssh does not know 1"),
        ([], "no verb"),
        (["start"], "does not know start"),
        (["delete", "--spot"], "delete does not know --spot"),
        (["create", "me"], "create does not know me"),
        (["run"], "needs a command"),
        (["run", "--until"], "run does not know --until"),
    ],
)
def test_a_mistake_in_the_command_is_one_line(tpu: Setup, arguments: list[str], text: str) -> None:
    assert text in one_error(tpu(*arguments, status=2))


def test_help_needs_nothing_and_names_every_verb_and_variable(tpu: Setup) -> None:
    words = {arguments[0] for arguments in VERBS.values()} | {*VARIABLES, "RUNTIME", "--until-done", "--dry-run"}
    for ask in ("help", "--help", "-h"):
        text = tpu(ask, **dict.fromkeys(VARIABLES, "")).stdout
        assert all(word in text for word in words)


def test_what_is_missing_on_this_machine_is_one_line(tpu: Setup) -> None:
    assert "gcloud is not on the PATH" in one_error(tpu("status", status=2, PATH=tpu.path("bash")))
    shutil.rmtree(tpu.tree / ".git")
    tpu("create")
    assert "no git checkout" in one_error(tpu("run", "true", status=1))
