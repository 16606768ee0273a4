"""Notebooks: cells in a real kernel, as Jupyter runs them."""

import json
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import flax.linen as nn
import pytest
from conftest import REPOSITORY, blobs

import bigjax
from bigjax import UsageError

manager = pytest.importorskip("jupyter_client.manager", reason="needs the extra notebook")
pytest.importorskip("ipykernel", reason="needs the extra notebook")

SECONDS = 120  # that a cell may take


@dataclass
class Said:
    """What a cell leaves in a notebook. outputs: as there, streams that follow each other as one."""

    status: str
    outputs: list[dict[str, Any]] = field(default_factory=list)

    @property
    def text(self) -> str:
        return "\n".join(str(o.get("text") or o.get("data", {}).get("text/plain", "")) for o in self.outputs)

    @property
    def error(self) -> str:
        """Of a cell that failed: what is shown of it, line by line."""
        (shown,) = [o["traceback"] for o in self.outputs if "traceback" in o]
        return re.sub("\x1b\\[[0-9;]*m", "", "\n".join(shown))


@pytest.fixture(scope="module")
def cell(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Said]]:
    """cell(code, interrupt="words") runs a cell, and interrupts it when it prints these words."""
    folder = tmp_path_factory.mktemp("notebook")
    paths = {"PYTHONPATH": str(REPOSITORY), "IPYTHONDIR": str(folder), "JUPYTER_RUNTIME_DIR": str(folder)}
    kernel = manager.KernelManager(transport="tcp")
    kernel.start_kernel(cwd=str(folder), env=os.environ | paths, stderr=-3)
    client = kernel.client()
    client.start_channels()
    client.wait_for_ready(timeout=SECONDS)

    def run(code: str, *, interrupt: str | None = None) -> Said:
        said, displays, left = Said(""), {}, [interrupt]

        def hear(message: dict[str, Any]) -> None:
            kind, content = message["msg_type"], message["content"]
            known = content.get("transient", {}).get("display_id")
            if kind == "update_display_data":
                displays[known] |= content
            elif kind == "stream" and said.outputs and said.outputs[-1].get("name") == content["name"]:
                said.outputs[-1]["text"] += content["text"]
            elif kind in ("stream", "display_data", "execute_result", "error"):
                said.outputs.append(dict(content))
                displays[known] = said.outputs[-1]
            if kind == "stream" and left[0] and left[0] in content["text"]:
                left[0] = None
                kernel.interrupt_kernel()

        said.status = client.execute_interactive(code, timeout=SECONDS, output_hook=hear)["content"]["status"]
        return said

    try:
        yield run
    finally:
        client.stop_channels()
        kernel.shutdown_kernel(now=True)


SETUP = """
import json, time
from dataclasses import dataclass
import flax.linen as nn, jax, numpy as np, optax
from bigjax import cli, load, train
from bigjax.experiment import Experiment, RunConfig
from bigjax.tasks import classify
data = {"image": np.array(%s, np.uint8), "label": np.array(%s, np.int32)}

class Net(nn.Module):
    width: int

    @nn.compact
    def __call__(self, x, train=False):
        return nn.Dense(3)(nn.relu(nn.Dense(self.width)(x.reshape(len(x), -1))))

def experiment(**more):
    parts = dict(task=classify(Net(8), classes=3), tx=optax.adam(1e-2), train=data, test=data)
    return Experiment(**(parts | more))

def config(workdir, **more):
    return RunConfig(**(dict(workdir=workdir, steps=6, batch_size=8, log_every=2, eval_every=2) | more))
"""


FIRST = "run = train.fit(experiment(), config('first', steps=300, log_every=1, eval_every=100))"


@pytest.fixture(scope="module")
def first(cell: Callable[..., Said]) -> Said:
    """The notebook's first run: of 300 steps, each of which is logged."""
    data = blobs(24, seed=0)
    assert cell(SETUP % (data["image"].tolist(), data["label"].tolist())).status == "ok"
    said = cell(FIRST)
    assert said.status == "ok", said.outputs
    return said


def test_progress_is_one_output_that_is_updated(first: Said) -> None:
    """And all that is printed is another."""
    assert [o.get("name", "display") for o in first.outputs] == ["display", "stdout"]
    live, printed = first.outputs
    assert re.match(r"━+  300/300  loss [0-9.e-]+ .* lr 0.01 .*ETA 0:00$", live["data"]["text/plain"])
    assert printed["text"].count("step 200 eval: loss") == 1 and "report: first/report.html" in printed["text"]
    assert "\x1b" not in printed["text"] and "step 7" not in printed["text"]


def test_a_class_of_the_notebook_is_told_once_and_asked_for_elsewhere(first: Said, cell: Callable[..., Said]) -> None:
    line = "Net is defined in a notebook: elsewhere only bigjax.load(..., model=...) can bring the model back\n"
    assert first.text.count(line) == 1
    cell("import os; folder = os.path.abspath('first')")
    folder = cell("print(folder)").text.strip()
    wanted = r"^Net was defined in a notebook: define it here as its cell does, and give it: "
    with pytest.raises(UsageError, match=wanted + r"bigjax\.load\(\.\.\., model=Net\(width=8\)\)$"):
        bigjax.load(folder)
    _, variables = bigjax.load(folder, model=nn.Dense(3))
    assert variables["params"]["Dense_1"]["kernel"].shape == (16, 8)
    assert cell("load('first')[0] == Net(8)").text == "True"  # here it is


def test_cells_run_a_second_time(first: Said, cell: Callable[..., Said]) -> None:
    """The finished run gives its state, as it gave it when it was trained; another display stays empty."""
    said = cell(FIRST.replace("run =", "again =") + "; again.result == run.result")
    assert "first is finished; this is its result (RunConfig(resume=False) starts over)" in said.text
    assert said.outputs[-1]["data"]["text/plain"] == "True" and "defined in a notebook" not in said.text
    same = "jax.tree.all(jax.tree.map(np.array_equal, {0}, {1}))"
    assert cell(same.format("again.state", "run.state")).text == "True"
    assert cell(same.format("again.variables", "run.variables") + " and again.model == run.model").text == "True"


def test_a_mistake_is_one_line_that_names_the_argument(first: Said, cell: Callable[..., Said]) -> None:
    said = cell("train.fit(experiment(), config('first', batch_size=6))")
    assert said.error.splitlines()[0].startswith(
        'UsageError: RunConfig(workdir="first") belongs to a run with other settings: use another '
        "RunConfig(workdir=...), or RunConfig(resume=False) to start over there; to begin"
    )
    assert "Traceback" not in said.error and "--" not in said.error
    said = cell("train.fit(experiment(), config('none', log_every=0))")
    assert said.error == "UsageError: RunConfig(log_every=0): give a whole number from 1 up to, but below, 2147483648"


SLOW = """
def slowly(params, state, key):
    if {armed}:
        print("it is slow", flush=True)
        time.sleep(1000)
    return {{"spread": 1.0}}

class Reader:
    label = data["label"]

    def __len__(self):
        return 24

    def __getitem__(self, row):
        if {reads} and reads.pop() is not None:
            print("it is slow", flush=True)
            time.sleep(1000)
        return {{k: v[row] for k, v in data.items()}}
"""


def test_an_interrupt_of_what_is_slow_is_obeyed_any_number_of_times(first: Said, cell: Callable[..., Said]) -> None:
    """An evaluator, twice; a reader; and the cell that is run again goes on, to what it is in peace."""
    cell(SLOW.format(armed="slow.pop()", reads="reads"))
    fit = "train.fit(experiment(train=Reader(), evaluators={'slowly': slowly}, on_log=hook), config('NAME', steps=40))"
    cell("slow, reads, hook = [False] * 50 + [True, True], [], None")
    for _ in range(2):
        said = cell(fit.replace("NAME", "slow"), interrupt="it is slow")
        assert said.error == "Interrupted: stopped by SIGINT at step 2, which is saved: the same call goes on"
        assert "\nSIGINT: stopping now\n" in said.text
    cell("hook = lambda step, split, values: reads.append(1) if step == 4 and split == 'train' else None")
    said = cell(fit.replace("NAME", "slow"), interrupt="it is slow")
    assert re.fullmatch(
        r"Interrupted: stopped by SIGINT at step \d+, which is saved: the same call goes on", said.error
    )
    cell("hook = None; reads.clear()")
    for name in ("slow", "peace"):
        assert cell(fit.replace("NAME", name)).status == "ok"
    log = (
        "[{k: v for k, v in json.loads(line).items() if 'per_second' not in k} for line in open(f'NAME/metrics.jsonl')]"
    )
    assert cell(f"{log.replace('NAME', 'slow')} == {log.replace('NAME', 'peace')}").text == "True"


def test_a_script_in_cells_ignores_the_arguments_of_the_kernel(first: Said, cell: Callable[..., Said]) -> None:
    """What is wrong there is said with flags, since that is how it is told; and the kernel lives on."""
    code = """
@dataclass(frozen=True)
class Config(RunConfig):
    steps: int | None = 4
    batch_size: int = 8
    width: int = 8

def build(c):
    return experiment(task=classify(Net(c.width), classes=3))

cli.main(Config, build)
"""
    said = cell(code)
    assert said.status == "ok" and "report: runs/notebook/report.html" in said.text, said.outputs
    assert "notebook, step 4" in said.text and len(said.outputs) == 2
    said = cell("cli.main(Config, build, ['--width', '4'])")
    assert said.error.startswith("UsageError: --workdir runs/notebook belongs to a run with other settings: ")
    assert "or --no-resume to start over there" in said.error
    assert (
        cell("cli.main(Config, build, ['evalute'])").error
        == "UsageError: notebook.py has no verb 'evalute': did you mean evaluate?"
    )
    said = cell("cli.main(Config, build, ['--stpes', '3'])")
    assert "--steps INT" in said.text and said.error.startswith("UsageError: these flags are not understood")
    told = cell("cli.main(Config, build, ['evaluate'])").text
    assert json.loads(told[told.index("{") :])["step"] == 4
