"""Training speed beside Keras 3 on JAX, PyTorch and plain Flax: the same work, both sides in turn, ratios of medians.

    make bench                                                  # all works and sides: an hour on two cores
    python -m bench.speed --works mlp_32 cnn_128 --times 3      # prints a table, writes runs/bench.json

Each side runs in a process of its own on the same cores, while the others wait; `times` rounds, each side once a round.
Examples a second are of whole updates after the first 50, of which the loss is told: where two sides' losses are
further apart than a fifth, they don't do the same, and the row is void. A peer of several forms counts by its fastest.
The peers are the extra `[bench]`; one that is not installed is left out, with a line.
"""

import argparse
import importlib
import importlib.metadata
import importlib.util
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from bench.works import WORKS, smaller

FILES = {"ours": "jax", "plain_flax": "flax", "keras_fit": "keras", "pytorch": "torch"}  # and the package it needs
PACKAGES = ("bigjax", "jax", "flax", "keras", "torch")
PEERS = {"Keras on JAX": "Keras", "PyTorch": "PyTorch", "plain Flax": "plain Flax"}  # how its sides' names begin
APART = 0.2


def sides(work: str) -> list[tuple[str, str]]:
    """(file, side) of those that are installed and have something of their own for this work."""
    found = []
    for file, package in FILES.items():
        if importlib.util.find_spec(package) is None:
            print(f"{package} is not installed: its sides are left out", file=sys.stderr)
            continue
        if WORKS[work].kind == "dcgan" and file in ("keras_fit", "plain_flax"):  # which have no step of two players
            continue
        names = importlib.import_module(f"bench.{file}").SIDES
        found += [(file, n) for n in names if WORKS[work].kind in ("cnn", "dcgan") or "channels last" not in n]
    return found


def once(work: str, file: str, side: str, *, smoke: bool) -> dict[str, Any]:
    command = [sys.executable, "-m", "bench.speed", "--side", f"{file}:{side}", "--works", work]
    env = os.environ | {"TF_CPP_MIN_LOG_LEVEL": "3"}
    done = subprocess.run([*command, *["--smoke"] * smoke], capture_output=True, text=True, env=env)
    if done.returncode:
        return {"failed": (done.stderr.strip().splitlines() or ["no word"])[-1]}
    return json.loads(done.stdout.strip().splitlines()[-1])


def compared(work: str, *, times: int, smoke: bool) -> list[dict[str, Any]]:
    """The rows of one work, each of our two sides beside each peer."""
    told: dict[str, list[dict[str, Any]]] = {}
    for _ in range(times):
        for file, side in sides(work):
            told.setdefault(side, []).append(found := once(work, file, side, smoke=smoke))
            print(f"{work} {side}: {found}", file=sys.stderr, flush=True)
    speeds = {s: [v for r in rs for v in r.get("examples_per_second", ())] for s, rs in told.items()}
    speeds = {s: v for s, v in speeds.items() if v}
    medians = {s: statistics.median(v) for s, v in speeds.items()}
    losses = {s: statistics.median(r["loss"] for r in told[s] if "loss" in r) for s in speeds}
    rows = []
    for own in (s for s in medians if s.startswith("bigjax")):
        for start, peer in PEERS.items():
            if not (those := [s for s in medians if s.startswith(start)]):
                continue
            best = max(those, key=medians.get)
            apart = abs(losses[own] - losses[best]) / max(losses[own], losses[best])
            row = {"work": work, "batch": WORKS[work].batch, "device": device(), "side": own, "peer_name": peer}
            row |= {"bigjax": medians[own], "peer": medians[best], "peer_form": best, "unit": "examples/s"}
            row |= {"ratio": medians[own] / medians[best] if apart <= APART else None}
            row |= {"losses": [losses[own], losses[best]]}
            row |= {"spread": [[min(speeds[s]), max(speeds[s])] for s in (own, best)]}
            rows.append(row)
    return rows


def device() -> str:
    return f"{len(os.sched_getaffinity(0))} CPU cores"


def show(rows: list[dict[str, Any]]) -> None:
    form = "{:<16} {:<30} {:>10} {:>10} {:>6}  {}"
    print(form.format("work", "side", "bigjax", "peer", "ratio", "peer"))
    for r in rows:
        ratio = "void" if r["ratio"] is None else f"{r['ratio']:.2f}"
        numbers = (f"{r['bigjax']:,.0f}", f"{r['peer']:,.0f}", ratio, r["peer_form"])
        print(form.format(r["work"], r["side"], *numbers))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--works", nargs="+", choices=WORKS, default=list(WORKS))
    parser.add_argument("--times", type=int, default=3)
    parser.add_argument("--smoke", action="store_true", help="a few updates each: does it run?")
    parser.add_argument("--out", type=Path, default=Path("runs/bench.json"))
    parser.add_argument("--side", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.side:
        file, _, side = asked.side.partition(":")
        work = WORKS[asked.works[0]]
        loss, speeds = importlib.import_module(f"bench.{file}").SIDES[side](smaller(work) if asked.smoke else work)
        return print(json.dumps({"loss": loss, "examples_per_second": speeds}))
    rows = [row for work in asked.works for row in compared(work, times=asked.times, smoke=asked.smoke)]
    show(rows)
    versions = {p: importlib.metadata.version(p) for p in PACKAGES if importlib.util.find_spec(p)}
    print(", ".join(f"{k} {v}" for k, v in versions.items()))
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    asked.out.write_text(json.dumps({"rows": rows, "versions": versions}, indent=1) + "\n")
    return None


if __name__ == "__main__":
    main()
