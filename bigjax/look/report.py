"""What people look at: one self-contained HTML page a run, written only from the files of its working directory.

C: classes of a confusion matrix.
"""

import json
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any

import numpy as np
from etils import epath

from bigjax import UsageError, place
from bigjax.look.charts import curves, legend, show
from bigjax.look.pictures import gallery_page, load_gallery


def write_report(workdir: epath.PathLike) -> epath.Path:
    """Writes report.html from config.json, metrics.jsonl, result.json and gallery/; only the first must be there.

    A run without result.json gets a page that says it is unfinished. Raises UsageError where config.json is missing or
    a file is damaged; a torn last line of metrics.jsonl is no damage, as the run may be writing it.
    """
    workdir = place(workdir)
    paths = [workdir / name for name in ("config.json", "result.json", "metrics.jsonl", "source.patch")]
    files = {path.name: path.read_bytes() for path in paths if path.exists()}
    if "config.json" not in files:
        raise UsageError(f"{workdir} has no config.json: give the working directory of a run (runs/NAME)")
    record = _json(files["config.json"], f"{workdir}/config.json")
    result = _json(files["result.json"], f"{workdir}/result.json") if "result.json" in files else {}
    *lines, _ = files.get("metrics.jsonl", b"").split(b"\n")  # a line is whole when its newline is there
    log = [_json(line, f"{workdir}/metrics.jsonl line {n}") for n, line in enumerate(lines, 1)]
    config, edited = record.get("config", record), files.get("source.patch", b"").strip() != b""
    title = _show(result.get("experiment") or record.get("experiment") or workdir.resolve().name)
    body = f"<h1>{title}</h1>{_headline(result, record, log, config=config)}"
    body += _facts(result, record, seed=config.get("seed"), edited=edited) + curves(log)
    gallery, order = load_gallery(workdir), record.get("gallery") or []
    body += _confusion(result) + gallery_page({k: gallery[k] for k in [*order, *gallery] if k in gallery})
    for heading, rows in (("metrics", (result | record).get("metrics")), ("versions", record.get("versions"))):
        cells = (f"<tr><th>{escape(k)}</th><td>{_show(v)}</td></tr>" for k, v in (rows or {}).items())
        body += f'<h2>{heading.capitalize()}</h2><table class="pairs">{"".join(cells)}</table>' if rows else ""
        body += _configuration(config, record.get("defaults") or {}) if heading == "metrics" else ""
    (workdir / "report.html").write_bytes(PAGE.replace("BODY", body, 1).replace("TITLE", title, 1).encode())
    return workdir / "report.html"


def _json(content: bytes, where: str) -> dict[str, Any]:
    try:
        return dict(json.loads(content))
    except (ValueError, TypeError) as error:
        raise UsageError(f"{where} is no JSON object ({error}): put it right or delete it, then try again") from error


def _show(value: object, *, exact: bool = False) -> str:
    """A value as people read it, escaped: 93,322 · 0.984 · 1.2e-05 · –; exact: as a configuration was given."""
    if exact:
        return escape(value if isinstance(value, str) else json.dumps(value))
    return show(value) if isinstance(value, int | float | None) else escape(str(value))


MARKS = {
    True: '<b class="yes">✓ reached</b>',
    False: '<b class="no">✗ not reached</b>',
    None: "<b>not measured</b>",
}


def _headline(
    result: Mapping[str, Any], record: Mapping[str, Any], log: Sequence[Mapping[str, Any]], *, config: Mapping[str, Any]
) -> str:
    """The run's own metric large, what is published, and beside them the loss and accuracy or what else is judged."""
    tiles, page, metrics, note = {}, "", result.get("metrics", {}), "at the last step"
    if not result:
        newest = {line["split"]: line for line in log}
        line = newest.get("eval") or newest.get("validation") or newest.get("train") or {"step": 0, "split": ""}
        metrics, note = {f"{line['split']}/{k}": v for k, v in line.items()}, f"at step {_show(line['step'])}"
        at = f"{log[-1]['step'] if log else 0:,} of {_show(record.get('steps') or config.get('steps'))}"
        page = f'<p class="notice"><b>Unfinished</b>: step {at}. The same command again resumes it.</p>'
    if (own := record.get("metric")) in metrics:
        tiles[own] = ""
    for p in result.get("published") or ():
        mark = MARKS[p["reached"]]
        note_p = f"<p>published {_show(p['value'])} · {mark}<br><small>{escape(p['source'])}</small></p>"
        tiles[p["metric"]] = tiles.get(p["metric"], "") + note_p
    names = [k for k in metrics if not re.search("/(step|split|skipped)$|_norm", k)]
    judged = [k for k in names if not k.startswith("train/")] or names  # without an evaluation there is only training
    wanted = {k for k in judged if k.endswith(("/accuracy", "/loss"))} or set(judged)
    tiles |= {k: "" for k in sorted(wanted - set(tiles))[:3]}
    tiles = {k: text or f"<p>{note}</p>" for k, text in tiles.items()}
    cells = [f"<div><span>{escape(k)}</span><strong>{_show(metrics.get(k))}</strong>{tiles[k]}</div>" for k in tiles]
    return f'{page}<div class="tiles">{"".join(cells)}</div>'


def _facts(result: Mapping[str, Any], record: Mapping[str, Any], *, seed: object, edited: bool) -> str:
    devices, command = (record | result).get("devices") or {}, record.get("command")
    commit = (record.get("git_commit") or "")[:10]
    facts = {
        "parameters": result.get("parameters"),
        "of these trained": result.get("trained_parameters"),
        "updates": result.get("step"),
        "seed": result.get("seed", seed),
        "dropped as non-finite": result.get("skipped") or None,
        "examples/s": result.get("examples_per_second"),
        "devices": ", ".join(f"{k} {v}" for k, v in devices.items()),
        "commit": f"{commit} + edits in source.patch" if edited else commit,
        "command": shlex.join(map(str, command)) if isinstance(command, list) else command,
    }
    page = "".join(f"<div><dt>{k}</dt><dd>{_show(v)}</dd></div>" for k, v in facts.items() if v not in (None, ""))
    seconds = {k.replace("_", " "): v for k, v in result.get("seconds", {}).items() if v is not None}
    total = seconds.pop("total", sum(seconds.values()))
    seconds["other"] = max(0.0, total - sum(seconds.values()))
    colors = ("#d39a4a", "#4f7fb8", "#8a6fb0", "#c8605a", "#5aa38a", *["#8b93a1"] * len(seconds))
    bar = "".join(f'<i style="flex:{v};background:{c}"></i>' for v, c in zip(seconds.values(), colors, strict=False))
    words = legend({k: (c, f"{_show(seconds[k])} s") for k, c in zip(seconds, colors, strict=False)})
    bar = f'<h3>{_show(total)} seconds</h3><div class="bar">{bar}</div>{words}' if total else ""
    return f"<h2>Key facts</h2><dl>{page}</dl>{bar}"


def _flat(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(flag, value), the groups' by their dotted names."""
    for key, value in config.items():
        yield from _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else ((prefix + key, value),)


def _configuration(config: Mapping[str, Any], defaults: Mapping[str, Any]) -> str:
    """What differs from the script's defaults comes first, marked, with the default beside it."""
    usual, rows = dict(_flat(defaults)), ["", ""]
    for key, value in _flat(config):
        note = f" <small>default {_show(usual[key], exact=True)}</small>" if key in usual else ""
        mark = ' class="given"' if note else ""
        rows[not note] += f"<tr{mark}><th>{escape(key)}</th><td>{_show(value, exact=True)}{note}</td></tr>"
    return f'<h2>Configuration</h2><table class="pairs">{rows[0]}{rows[1]}</table>' if config else ""


def _confusion(result: Mapping[str, Any]) -> str:
    """Rows are the true classes, columns what was said; above 30 classes only the per-class columns are shown."""
    counts_CC, per_class = np.array(result.get("confusion") or [], np.int64), result.get("per_class") or {}
    names = [escape(str(name)) for name in result.get("class_names") or range(len(counts_CC))][: len(counts_CC)]
    shown = len(names) if len(names) <= 30 else 0
    page = "<th>" + "</th><th>".join(["true \\ said", *names[:shown], "examples", *map(escape, per_class)]) + "</th>"
    for i, (name, row) in enumerate(zip(names, counts_CC, strict=True)):
        page += f"<tr><th>{name}</th>"
        for j, count in enumerate(row[:shown]):
            alpha = 0.75 * (count / max(row.sum(), 1)) ** 0.5  # the root shows rare mistakes beside the diagonal
            color = f"rgb({'46 140 90' if i == j else '215 70 50'} / {alpha:.2f})"
            page += f'<td style="background:{color}">{count or "·"}</td>'
        page += f"<td>{row.sum()}</td>{''.join(f'<td>{values[i]:.3f}</td>' for values in per_class.values())}</tr>"
    return f'<h2>Confusion matrix</h2><div class="wide"><table class="matrix">{page}</table></div>' if names else ""


PAGE = """<!doctype html><html lang="en"><head><meta charset="utf-8"><title>TITLE</title>
<meta name="viewport" content="width=device-width,initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<style>:root{color-scheme:light dark;--ink:#1d2430;--soft:#667085;--line:#e1e5eb;--card:#f6f7f9;--page:#fff;
--train:#4a6fa5;--eval:#d1662f;--validation:#2f8f6b}@media (prefers-color-scheme:dark){:root{--ink:#dfe3ea;
--soft:#98a2b3;--line:#2f3744;--card:#1b2029;--page:#12161c;--train:#82a8df;--eval:#ec9a63;--validation:#62c39c}}*{
box-sizing:border-box}body{margin:auto;padding:28px 20px;max-width:1040px;background:var(--page);color:var(--ink);
font:15px/1.5 system-ui,sans-serif}h1,h2,td,th,dd,li,pre{overflow-wrap:anywhere}h1{font-size:26px;margin:0 0 16px}h2{
font-size:17px;margin:38px 0 12px;padding-bottom:5px;border-bottom:1px solid var(--line)}figure,p,dd,dl{margin:0}h3{
font-size:14px;margin:16px 0 8px}small,dt,figcaption,th,h3,span{color:var(--soft);font-weight:500}b{color:var(--ink)}
small,figcaption,ul,dt{font-size:12px}.notice{margin-bottom:12px}b.yes{color:var(--validation)}b.no{color:var(--eval)}
.tiles,dl,.panels{display:grid;gap:12px;grid-template-columns:repeat(auto-fill,minmax(min(100%,300px),1fr))}dl{
grid-template-columns:repeat(auto-fill,minmax(150px,1fr))}dl>:last-child{grid-column:1/-1}.tiles>*,.panels>*,pre,
.notice{background:var(--card);border-radius:8px;padding:12px 14px}strong{display:block;font-size:34px;line-height:1.25}
svg{width:100%;height:auto}ul{list-style:none;display:flex;flex-wrap:wrap;gap:2px 14px;margin:4px 0;padding:0}li i{
display:inline-block;width:9px;height:9px;border-radius:2px;margin-right:5px}.bar{display:flex;height:12px}table{
border-collapse:collapse;font-size:13px;font-variant-numeric:tabular-nums}td,th{padding:3px 8px}.pairs{width:100%}
.pairs th{text-align:left;width:40%}.given *{
color:var(--ink);font-weight:700}.pairs tr{border-bottom:1px solid var(--line)}.wide{overflow-x:auto}.matrix *{
text-align:right;overflow-wrap:normal}pre{white-space:pre-wrap;margin:0}.row,.grid{display:flex;gap:10px;flex-wrap:wrap}
img{max-width:100%;image-rendering:pixelated;display:block}.grid{display:grid;grid-template-columns:repeat(var(--n),
minmax(54px,150px))}.tiles>:first-child strong{font-size:46px}.once{margin-top:12px;
grid-template-columns:repeat(auto-fill,minmax(220px,1fr))}.once>:last-child{grid-column:auto}.row>div{max-width:100%}</style></head><body>BODY</body></html>
"""
