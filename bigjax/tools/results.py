"""The table of results: rows are run by `reproduce`, recorded as JSON, and every number that a reader sees comes from
there.

A script's `ROWS` names its rows, experiments/results/ROW.json holds what was measured, experiments/README.md is the
table made of them, and the line "Measured: …" in a script's docstring is `headline` of its first row.
"""

import json
import os
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bigjax import UsageError
from bigjax.data.takes import declared, scripts

PERCENT = ("accuracy", "f1", "share")
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
        "over seeds 0, 1, …; seconds are the whole run's, compilation included.",
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


def run(folder: Path, name: str, row: Row) -> dict[str, Any]:
    """Runs a row's script once a seed, each in a new working directory; what is to be recorded."""
    results = []
    for seed in range(row["seeds"]):
        with tempfile.TemporaryDirectory() as home:
            command = [sys.executable, str(folder / row["script"]), *shlex.split(row["arguments"])]
            done = subprocess.run([*command, "--seed", str(seed), "--workdir", home], stdout=subprocess.PIPE, text=True)
            if done.returncode:
                raise UsageError(f"row {name}, seed {seed} ended with exit status {done.returncode}: see above")
            results.append(json.loads((Path(home) / "result.json").read_text()))
        print(
            f"{name} seed {seed}: {row['metric']} {number(row['metric'], results[-1]['metrics'][row['metric']])}",
            flush=True,
        )
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
        "seconds": statistics.mean(r["seconds"]["total"] for r in results),
        "train_seconds": statistics.mean(r["seconds"]["train"] for r in results),
        "data_wait_seconds": statistics.mean(r["seconds"]["data_wait"] for r in results),
        "peak_host_bytes": max(r["peak_host_bytes"] for r in results),
        "device": device_name(first),
        "published": first["published"],
        "commit": (first["git_commit"] or "unknown")[:7],
        "versions": first["versions"],
        **{k: first[k] for k in ("corpus_sha256", "xz_bits_per_byte") if k in first},
    }


def reproduce(names: list[str], *, record: bool = False) -> None:
    """Runs rows again (without names all that are recorded) and prints published, recorded and new values.

    `record` keeps the new ones.
    """
    folder = experiments()
    known = rows(folder)
    if unknown := [n for n in names if n not in known]:
        raise UsageError(f"there is no row {unknown[0]!r}: use one of {', '.join(known)}")
    for name in names or recorded(folder):
        old, new = recorded(folder).get(name), run(folder, name, known[name])
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
