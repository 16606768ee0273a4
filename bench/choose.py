"""Which settings a script should have: candidates trained on the same validation splits, the test split not looked at.

    python bench/choose.py vision/mnist_cnn --splits 0 1 2 3 4 -- "" "--ema 0.995" "--batch-norm --dropout 0.3"

A candidate is a string of flags; the first is what the others are compared with. Each is trained once a split s with
`--validation 0.2 --split-seed s --seed s`: a fifth of the training split is held out, another fifth each time, and
measured at the last step. `--fixed "--validation 0.5 --steps 1500"` compares at half the data and half the length: less
like the real run, but cheaper, with more errors to count. What was measured is kept in experiments/results/choices.json
with the settings in full, and not measured again.
"""

import argparse
import importlib.util
import json
import math
import os
import queue
import shlex
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from pathlib import Path
from typing import Any

from bigjax import cli
from bigjax.experiment import RunConfig
from bigjax.look.flags import settle
from bigjax.run import workdir

ROOT = Path(__file__).parents[1]
KEPT = ROOT / "experiments" / "results" / "choices.json"
NOT_CHOSEN = {f.name for f in fields(RunConfig)} - {"steps", "epochs", "batch_size", "data", "ema", "validation"}
Record = dict[str, Any]  # a candidate: flags, settings, circumstances; numbers: split -> metric -> value


def settings(path: Path, flags: str) -> dict[str, Any]:
    """What a script's flags come to, but for what isn't chosen: seeds, devices, how often something is logged."""
    spec = importlib.util.spec_from_file_location(f"experiment_{path.stem}", path)
    sys.modules[spec.name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    Config = module.Config
    config, _ = cli.parse(Config, "train", prog=path.name, description="", args=shlex.split(flags))
    return {k: v for k, v in workdir.settings(settle(config, Config())).items() if k not in NOT_CHOSEN}


def alike(old: dict[str, Any], new: dict[str, Any], usual: dict[str, Any]) -> bool:
    """Whether settings are the same; a flag that a script has gained since counts as its default, of `usual`."""
    return not workdir.difference(old, new, usual)


def train(path: Path, flags: str, split: int, cores: set[int]) -> dict[str, Any]:
    """The result.json of one run, on those cores."""
    with tempfile.TemporaryDirectory() as home:
        more = f"--split-seed {split} --seed {split} --eval-every 1000000 --save-every 1000000 --workdir {home}"
        command = [sys.executable, str(path), *shlex.split(flags), *more.split()]
        pin = lambda: os.sched_setaffinity(0, cores)  # noqa: E731
        done = subprocess.run(command, stdout=subprocess.PIPE, preexec_fn=pin)
        if done.returncode:
            raise SystemExit(f"{path} {flags}: exit status {done.returncode}, see above")
        return json.loads((Path(home) / "result.json").read_text())


def compared(first: Record, other: Record, metric: str) -> tuple[float, float, float, float]:
    """(mean, its standard error, mean difference to `first` on the splits that both have, its standard error)."""

    def mean(values: list[float]) -> tuple[float, float]:
        error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
        return statistics.mean(values) if values else math.nan, error

    a, b = first["numbers"], other["numbers"]
    return *mean([b[s][metric] for s in b]), *mean([b[s][metric] - a[s][metric] for s in b if s in a])


def table(candidates: list[Record], metrics: list[str]) -> str:
    """A line a candidate and metric; the first candidate is what the others are compared with."""
    lines = []
    for record in candidates:
        for metric in metrics:
            mean, error, more, unsure = compared(candidates[0], record, metric)
            told = f"{metric} {mean:.5f} ± {error:.5f}, to the first {more:+.5f} ± {unsure:.5f}"
            lines.append(f"{told} ({len(record['numbers'])} splits): {record['flags']}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("script", help="as vision/mnist_cnn")
    parser.add_argument("--fixed", default="--validation 0.2", help="flags of all candidates")
    parser.add_argument("--splits", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--metrics", nargs="+", default=["accuracy", "loss"])
    parser.add_argument("--at-once", type=int, default=1, help="runs side by side, each on its share of the cores")
    parser.add_argument("candidates", nargs="+")
    asked, cores = parser.parse_args(), sorted(os.sched_getaffinity(0))
    path = ROOT / "experiments" / f"{asked.script}.py"
    everything = json.loads(KEPT.read_text()) if KEPT.exists() else {}
    mine: list[Record] = everything.setdefault(asked.script, [])
    candidates: list[Record] = []
    for flags in (f"{asked.fixed} {c}".strip() for c in asked.candidates):
        wanted = {"flags": flags, "settings": settings(path, flags), "numbers": {}}
        usual = settings(path, "")
        candidates.append(next((r for r in mine if alike(r["settings"], wanted["settings"], usual)), wanted))
    free: queue.Queue[set[int]] = queue.Queue()
    for i in range(asked.at_once):
        free.put(set(cores[i :: asked.at_once]))

    def one(job: tuple[int, Record]) -> None:
        split, record = job
        share = free.get()
        result = train(path, record["flags"], split, share)
        free.put(share)
        held = {k.removeprefix("validation/"): v for k, v in result["metrics"].items() if k.startswith("validation/")}
        record["numbers"][str(split)] = held
        record |= {k: result[k] for k in ("git_commit", "devices", "versions", "step", "parameters")}
        if record not in mine:
            mine.append(record)
        workdir.write_json(KEPT, everything)
        print(table([c for c in candidates if c["numbers"]], asked.metrics) + "\n", flush=True)

    jobs = [(s, c) for s in asked.splits for c in candidates if str(s) not in c["numbers"]]
    with ThreadPoolExecutor(asked.at_once) as pool:
        list(pool.map(one, jobs))


if __name__ == "__main__":
    main()
