"""The table of results: rows are run by `reproduce`, recorded as JSON, and every number that a reader sees comes from
there.

A script's `ROWS` names its rows, experiments/results/ROW.json holds what was measured, experiments/README.md is the
table made of them, and the line "Measured: …" in a script's docstring is `headline` of its first row.
"""

import json
import math
import os
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bigjax import UsageError
from bigjax.data.takes import declared, scripts

PERCENT = ("accuracy", "f1", "share")
FRESH = 110  # the first of the seeds that rows are recorded over: no recipe was chosen by what these gave
Row = Mapping[str, Any]


def experiments() -> Path:
    """The folder of scripts: ./experiments, or the one beside the installed package's source."""
    if folder := scripts():
        return folder
    raise UsageError("there is no experiments/SUBJECT/NAME.py here: run this in a checkout of bigjax")


def rows(folder: Path) -> dict[str, Row]:
    """The rows of all scripts: name -> script, arguments, data, metric, seeds, as `ROWS` of the script gives them.

    ROWS = {name: {"data": ..., "metric": ..., "arguments": "" unless given, "seeds": 1 unless given}} is read without
    running the script, so it holds plain literals.
    """
    found: dict[str, Row] = {}
    for script, mine in declared(folder, "ROWS").items():
        for name, row in mine.items():
            if name in found:
                raise UsageError(
                    f"{folder / script}: row {name!r} is {found[name]['script']}'s too: give it another name"
                )
            if missing := [k for k in ("data", "metric") if k not in row]:
                raise UsageError(f"{folder / script}: row {name!r} has no {missing[0]!r}: add it in ROWS")
            found[name] = {"arguments": "", "seeds": 1} | row | {"script": script}
    return found


def recorded(folder: Path) -> dict[str, Row]:
    """What was measured, by row, in the order of `rows`; a row that was not measured is left out."""
    paths = {name: folder / "results" / f"{name}.json" for name in rows(folder)}
    return {name: json.loads(path.read_text()) for name, path in paths.items() if path.exists()}


def number(metric: str, value: float) -> str:
    """A value as the table shows it: percent for shares, else three significant digits (four from 1 up)."""
    if metric.endswith(PERCENT):
        return f"{100 * value:.1f} %"
    return f"{value:.4g}" if abs(value) >= 1 else f"{value:.3g}"


def aim(published: Row, metric: str) -> str:
    """`94.0 % (source)`, with the metric's name where it is not the row's."""
    name = "" if published["metric"] == metric else published["metric"].removeprefix("eval/") + " "
    return f"{name}{number(published['metric'], published['value'])} ({published['source']})"


def measured(record: Row) -> str:
    """`99.1 ± 0.1 % (5 seeds)`."""
    metric, values = record["metric"], record["values"]
    mean = number(metric, statistics.mean(values))
    if len(values) == 1:
        return mean
    spread = number(metric, statistics.stdev(values))
    if metric.endswith(PERCENT):
        return f"{mean[:-2]} ± {spread} ({len(values)} seeds)"
    return f"{mean} ± {spread} ({len(values)} seeds)"


def headline(record: Row) -> str:
    """The line of a script's docstring."""
    name = record["metric"].removeprefix("eval/").replace("_", " ")
    where = f"{record['seconds']:.0f} s on {record['device']}, commit {record['commit']}"
    return f"Measured: {name} {measured(record)} in {where}."


def table(folder: Path) -> str:
    """experiments/README.md."""
    lines = [
        "# Results",
        "",
        "Made by `python -m bigjax reproduce --record` from `results/*.json`; run a row again with "
        "`python -m bigjax reproduce ROW`. Values are of the test split at the last step, mean ± standard deviation "
        "over the seeds that the row's JSON names. Seconds are the median run's, compilation included, on machines "
        "that others use too: the same commit may take twice as long an hour later.",
        "",
        f"Rows of several seeds are recorded over fresh ones, {FRESH}, {FRESH + 1}, …, that no recipe was chosen by; "
        "a row of one seed is seed 0's, which was in view. Recipes are chosen by `bench/choose.py`, on parts of the "
        "training split that are held out in turn: `results/choices.json` holds what was compared.",
        "",
        "| row | script | data | device | seconds | metric | measured | published | commit |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    records = recorded(folder)
    for name, row in rows(folder).items():
        command = f"`{row['script']} {row['arguments']}".rstrip() + "`"
        metric = row["metric"].removeprefix("eval/")
        if r := records.get(name):
            aims = "; ".join(aim(p, r["metric"]) for p in r["published"])
            cells = [r["device"], f"{r['seconds']:.0f}", metric, measured(r), aims or "none", r["commit"]]
        else:
            cells = ["", "", metric, "not measured", "", ""]
        lines.append("| " + " | ".join([name, command, row["data"], *cells]) + " |")
    return "\n".join(lines) + "\n"


def device_name(result: Row) -> str:
    kind, count = result["devices"]["kind"], result["devices"]["count"]
    if result["devices"]["platform"] == "cpu":
        return f"{len(os.sched_getaffinity(0))} CPU cores"
    return kind if count == 1 else f"{count} × {kind}"


def verdict(old: Row, new: Row) -> str:
    """Whether a new mean is the recorded one, by the standard error of their difference.

    Where a row has one seed, the spread of the other counts for both; where both have one, only equal values hold.
    """
    means = [statistics.mean(r["values"]) for r in (old, new)]
    spreads = [statistics.stdev(r["values"]) for r in (old, new) if len(r["values"]) > 1]
    variance = statistics.mean(s**2 for s in spreads) if spreads else 0.0
    error = math.sqrt(sum((statistics.variance(r["values"]) if len(r["values"]) > 1 else variance) / len(r["values"])
                          for r in (old, new)))  # fmt: skip
    apart, unit = means[1] - means[0], number(old["metric"], error)
    if not spreads:
        return "the same" if apart == 0 else f"differs by {difference(old['metric'], apart)} (one seed each)"
    if abs(apart) <= error:
        return f"holds within its standard error ({unit})"
    times = f"{abs(apart) / error:.1f} standard errors" if error else "no spread to compare it with"
    return f"differs by {difference(old['metric'], apart)} ({times})"


def difference(metric: str, value: float) -> str:
    return ("+" if value > 0 else "") + number(metric, value)


def recording_seeds(count: int) -> list[int]:
    """Those that a row is recorded over: fresh ones, or 0 where one is all."""
    return list(range(FRESH, FRESH + count)) if count > 1 else [0]


def seeds_of(said: str | None, count: int) -> list[int]:
    """0 … N-1 of "N", or those of "5..14" and "0,3,7"; the `recording_seeds` of `count` where nothing is said."""
    try:
        if said is None:
            seeds = recording_seeds(count)
        elif said.isdecimal():
            seeds = list(range(int(said)))
        else:
            ends = [part.split("..") for part in said.split(",")]
            seeds = [s for end in ends for s in range(int(end[0]), int(end[-1]) + 1)]
            if any(len(end) > 2 for end in ends) or min(seeds) < 0 or len({*seeds}) < len(seeds):
                raise ValueError
    except ValueError:
        seeds = []
    if not seeds:
        raise UsageError(f"--seeds {said}: give how many, as 10, or which, as 5..14 or 0,3,7")
    return seeds


def run(folder: Path, name: str, row: Row, seeds: Sequence[int]) -> dict[str, Any]:
    """Runs a row's script once a seed, each in a new working directory; what is to be recorded."""
    results = []
    for seed in seeds:
        with tempfile.TemporaryDirectory() as home:
            command = [sys.executable, str(folder / row["script"]), *shlex.split(row["arguments"])]
            done = subprocess.run([*command, "--seed", str(seed), "--workdir", home], stdout=subprocess.PIPE, text=True)
            if done.returncode:
                raise UsageError(f"row {name}, seed {seed} ended with exit status {done.returncode}: see above")
            results.append(json.loads((Path(home) / "result.json").read_text()))
        value, seconds = results[-1]["metrics"][row["metric"]], results[-1]["seconds"]["total"]
        print(f"{name} seed {seed}: {row['metric']} {number(row['metric'], value)} in {seconds:.0f} s", flush=True)
    first = results[0]
    shared = set.intersection(*(set(r["metrics"]) for r in results))
    return {
        "row": name,
        "script": row["script"],
        "arguments": row["arguments"],
        "data": row["data"],
        "metric": row["metric"],
        "values": [r["metrics"][row["metric"]] for r in results],
        "metrics": {
            k: statistics.mean(r["metrics"][k] for r in results) for k in sorted(shared) if k.startswith("eval/")
        },
        "seeds": [r["seed"] for r in results],
        "step": first["step"],
        "parameters": first["parameters"],
        "seconds": statistics.median(r["seconds"]["total"] for r in results),
        "train_seconds": statistics.median(r["seconds"]["train"] for r in results),
        "data_wait_seconds": statistics.median(r["seconds"]["data_wait"] for r in results),
        "peak_host_bytes": max(r["peak_host_bytes"] for r in results),
        "device": device_name(first),
        "published": first["published"],
        "commit": (first["git_commit"] or "unknown")[:7],
        "versions": first["versions"],
        **{k: first[k] for k in ("corpus_sha256", "xz_bits_per_byte") if k in first},
    }


def reproduce(names: list[str], *, seeds: str | None = None, record: bool = False) -> None:
    """Runs rows again (without names all that are recorded) and prints published, recorded and new values, with whether
    the new hold beside the recorded.

    `seeds` as `seeds_of` has them, instead of the row's own; `record` keeps the new values, which must be of those.
    """
    folder = experiments()
    known = rows(folder)
    seeds_of(seeds, 1)
    if record and seeds is not None:
        raise UsageError("--record keeps what a row's own seeds give: leave --seeds out, or change `seeds` in its ROWS")
    if unknown := [n for n in names if n not in known]:
        raise UsageError(f"there is no row {unknown[0]!r}: use one of {', '.join(known)}")
    for name in names or recorded(folder):
        chosen = seeds_of(seeds, known[name]["seeds"])
        old, new = recorded(folder).get(name), run(folder, name, known[name], chosen)
        if old and old.get("corpus_sha256") != new.get("corpus_sha256"):
            raise UsageError(
                f"row {name} was recorded on another corpus (SHA-256 {old['corpus_sha256'][:12]}, here "
                f"{new['corpus_sha256'][:12]}): the numbers can't be compared; use the Python that it was recorded with"
            )
        published = "; ".join(number(p["metric"], p["value"]) for p in new["published"]) or "none"
        print(
            f"{name} {new['metric']}: published {published}, "
            f"recorded {measured(old) if old else 'none'}, now {measured(new)}"
        )
        if old:
            print(
                f"{name}: {verdict(old, new)}; {new['seconds']:.0f} s a run on {new['device']}, "
                f"{old['seconds']:.0f} s recorded on {old['device']}"
            )
        if record:
            (folder / "results").mkdir(exist_ok=True)
            (folder / "results" / f"{name}.json").write_text(json.dumps(new, indent=1) + "\n")
            write_out(folder)


def write_out(folder: Path) -> None:
    """Puts the recorded numbers where people read them: the table and the scripts' headers."""
    (folder / "README.md").write_text(table(folder))
    seen = set()
    for record in recorded(folder).values():
        if record["script"] not in seen:
            path = folder / record["script"]
            path.write_text(re.sub(r"^Measured: .*$", headline(record), path.read_text(), count=1, flags=re.M))
            seen.add(record["script"])
