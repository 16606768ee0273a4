"""What people look at: one self-contained HTML page a run, written only from the files of its working directory.

Letters: N pictures, H height, W width, C channels of a picture or classes of a confusion matrix.
"""

import base64
import io
import json
import re
import shlex
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any, NamedTuple
from urllib.parse import quote, unquote

import numpy as np
from etils import epath

from bigjax import UsageError, place

# Curves are drawn in stand-in colours that become CSS variables, so that one drawing is readable in light and in dark.
SPLITS = {"train": "#030303", "eval": "#040404", "validation": "#050505"}
CSS = {"#010101": "currentColor", "#020202": "var(--line)"} | {v: f"var(--{k})" for k, v in SPLITS.items()}


class SavedPictures(NamedTuple):
    images: np.ndarray  # (N,H,W) or (N,H,W,C) uint8
    captions: Sequence[str] | None
    columns: int  # of the grid


def save_gallery(workdir: epath.PathLike, step: int, *, name: str, item: Any) -> epath.Path:
    """Writes gallery/{step}-{name}.npz or, where item is a str, .txt, and returns its path.

    Pictures: an object with `images` (N,H,W[,C]), float in [0,1] or uint8, C of 1, 3 or 4; `captions`, one an image, or
    None; `columns`. Raises UsageError where they are not.
    """
    (folder := epath.Path(workdir) / "gallery").mkdir(parents=True, exist_ok=True)
    path = folder / f"{step:08d}-{quote(name, safe=' ')}.{'txt' if isinstance(item, str) else 'npz'}"
    if isinstance(item, str):
        path.write_bytes(item.encode())
        return path
    images = np.asarray(item.images)
    if images.ndim not in (3, 4) or images.shape[3:] not in ((), (1,), (3,), (4,)):
        raise UsageError(f"gallery {name!r} has images {images.shape}: give (N,H,W) or (N,H,W,C), C of 1, 3 or 4")
    captions = [""] * len(images) if item.captions is None else [str(c) for c in item.captions]
    if len(captions) != len(images):
        raise UsageError(f"gallery {name!r}: {len(captions)} captions for {len(images)} images: give one each, or None")
    if images.dtype != np.uint8:
        images = np.clip(np.round(np.nan_to_num(images.astype(np.float32)) * 255), 0, 255).astype(np.uint8)
    np.savez_compressed(buffer := io.BytesIO(), images=images, captions=np.array(captions, str), columns=item.columns)
    path.write_bytes(buffer.getvalue())
    return path


def load_gallery(workdir: epath.PathLike) -> dict[str, dict[int, SavedPictures | str]]:
    """What `save_gallery` wrote: {name: {step: item}}, sorted. Raises UsageError naming a file that can't be read."""
    folder, gallery = epath.Path(workdir) / "gallery", {}
    for path in folder.iterdir() if folder.exists() else ():
        if match := re.fullmatch(r"(\d+)-(.+)\.(npz|txt)", path.name):
            try:
                item = path.read_bytes()
                if match[3] == "npz":
                    with np.load(io.BytesIO(item), allow_pickle=False) as file:
                        captions = [str(c) for c in file["captions"]]
                        item = SavedPictures(file["images"], captions if any(captions) else None, int(file["columns"]))
                gallery.setdefault(unquote(match[2]), {})[int(match[1])] = item if match[3] == "npz" else item.decode()
            except Exception as error:  # zip, key, dtype and text errors alike: not what save_gallery writes
                raise UsageError(f"{path} can't be read ({type(error).__name__}): delete it, then try again") from error
    return {name: dict(sorted(gallery[name].items())) for name in sorted(gallery)}


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
    body = f"<h1>{title}</h1>{_headline(result, log, steps=record.get('steps') or config.get('steps'))}"
    body += _facts(result, record, seed=config.get("seed"), edited=edited) + _curves(log)
    body += _confusion(result) + _gallery(load_gallery(workdir))
    for heading in ("metrics", "configuration", "versions"):
        rows = config if heading == "configuration" else (result | record).get(heading) or {}
        cells = (f"<tr><th>{escape(k)}</th><td>{_show(v, exact=rows is config)}</td></tr>" for k, v in rows.items())
        body += f'<h2>{heading.capitalize()}</h2><table class="pairs">{"".join(cells)}</table>' if rows else ""
    (workdir / "report.html").write_bytes(PAGE.replace("BODY", body, 1).replace("TITLE", title, 1).encode())
    return workdir / "report.html"


def _json(content: bytes, where: str) -> dict[str, Any]:
    try:
        return dict(json.loads(content))
    except (ValueError, TypeError) as error:
        raise UsageError(f"{where} is no JSON object ({error}): put it right or delete it, then try again") from error


def _show(value: object, *, exact: bool = False) -> str:
    """A value as people read it, escaped: 93,322 · 0.984 · 1.2e-05 · –; exact: as a configuration was given."""
    if exact or not isinstance(value, (int, float)):
        text = value if isinstance(value, str) else json.dumps(value) if exact else "–" if value is None else str(value)
        return escape(text)
    return f"{value:,.0f}" if isinstance(value, int) or not abs(value) < 1000 else f"{value:.4g}"


MARKS = {
    True: '<b class="yes">✓ reached</b>',
    False: '<b class="no">✗ not reached</b>',
    None: "<b>not measured</b>",
}


def _headline(result: Mapping[str, Any], log: Sequence[Mapping[str, Any]], *, steps: object) -> str:
    tiles, page, metrics, note = {}, "", result.get("metrics", {}), "at the last step"
    if not result:
        newest = {line["split"]: line for line in log}
        line = newest.get("eval") or newest.get("validation") or newest.get("train") or {"step": 0, "split": ""}
        metrics, note = {f"{line['split']}/{k}": v for k, v in line.items()}, f"at step {_show(line['step'])}"
        at = f"{log[-1]['step'] if log else 0:,} of {_show(steps)}"
        page = f'<p class="notice"><b>Unfinished</b>: step {at}. The same command again resumes it.</p>'
    for p in result.get("published") or ():
        mark = MARKS[p["reached"]]
        note_p = f"<p>published {_show(p['value'])} · {mark}<br><small>{escape(p['source'])}</small></p>"
        tiles[p["metric"]] = tiles.get(p["metric"], "") + note_p
    names = [k for k in metrics if not re.search("/(step|split|skipped)$|_norm", k)]
    judged = [k for k in names if not k.startswith("train/")] or names  # without an evaluation there is only training
    wanted = {k for k in judged if k.endswith(("/accuracy", "/loss"))} or set(judged)
    tiles |= {k: f"<p>{note}</p>" for k in sorted(wanted - set(tiles))[:3]}
    cells = [f"<div><span>{escape(k)}</span><strong>{_show(metrics.get(k))}</strong>{tiles[k]}</div>" for k in tiles]
    return f'{page}<div class="tiles">{"".join(cells)}</div>'


def _facts(result: Mapping[str, Any], record: Mapping[str, Any], *, seed: object, edited: bool) -> str:
    devices, command, commit = (record | result).get("devices") or {}, record.get("command"), record.get("git_commit")
    facts = {
        "parameters": result.get("parameters"),
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
    legend = _legend({k: (c, f"{_show(seconds[k])} s") for k, c in zip(seconds, colors, strict=False)})
    bar = f'<h3>{_show(total)} seconds</h3><div class="bar">{bar}</div>{legend}' if total else ""
    return f"<h2>Key facts</h2><dl>{page}</dl>{bar}"


def _legend(entries: Mapping[str, tuple[str, str]]) -> str:
    items = [f'<li><i style="background:{c}"></i>{escape(k)} <b>{text}</b></li>' for k, (c, text) in entries.items()]
    return f"<ul>{''.join(items)}</ul>"


def _curves(log: Sequence[Mapping[str, Any]]) -> str:
    groups: dict[str, dict[str, dict[str, list]]] = {"Curves": {}, "Norms": {}, "Norms by layer": {}}
    for line in log:
        for key, value in line.items():
            if key != "step" and (value is None or isinstance(value, (int, float))):  # null is strict JSON's NaN
                kind, player, layer = (*key.split("/", 2), "", "")[:3]
                by_layer = kind.endswith("_norm") and player != ""
                title, name = (f"{kind}, {player}", layer or player) if by_layer else (key, line["split"])
                group = groups["Norms by layer" if by_layer else "Norms" if kind.endswith("_norm") else "Curves"]
                points = group.setdefault(title, {}).setdefault(name, [])
                points.append((line["step"], np.nan if value is None else value))
    rank, page = {"loss": 0, "accuracy": 1, "examples_per_second": 3}, ""  # the others between, as they came
    for group, panels in groups.items():
        drawn = "".join(_panel(title, panels[title]) for title in sorted(panels, key=lambda title: rank.get(title, 2)))
        page += f'<h2>{group}</h2><div class="panels">{drawn}</div>' if drawn else ""
    return page


def _panel(title: str, lines: Mapping[str, Sequence[tuple[int, float]]]) -> str:
    """One metric against the step: a line a split, or a line a layer, coloured from the first layer to the last."""
    from matplotlib import rc_context, ticker
    from matplotlib.colors import hsv_to_rgb, to_hex
    from matplotlib.figure import Figure

    hues = np.linspace(0.6, 0.05, len(lines))
    colors = {k: SPLITS.get(k) or to_hex(hsv_to_rgb((hue, 0.7, 0.78))) for k, hue in zip(lines, hues, strict=True)}
    arrays = {k: np.array(v, np.float64) for k, v in lines.items()}
    values = np.concatenate([a[:, 1] for a in arrays.values()])
    finite = values[np.isfinite(values)]
    log = bool(re.search("loss|norm|perplex", title) and 0 < 30 * finite.min(initial=np.inf) < finite.max(initial=0))
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": title, "font.size": 8}):
        axes = (figure := Figure(figsize=(3.5, 2.0))).add_axes((0.15, 0.12, 0.83, 0.84))
        axes.set_yscale("log", subs=[]) if log else None  # no minor ticks
        for key, a in arrays.items():
            dots = "o" if len(a) <= 20 else ""
            axes.plot(*np.where(np.isfinite(a), a, np.nan).T, color=colors[key], lw=1.3, marker=dots, ms=2.5)
        axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 3), numticks=7) if log else ticker.MaxNLocator(5))
        axes.xaxis.set_major_locator(ticker.MaxNLocator(5, integer=True))
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(lambda v, _: f"{v / 1000:,g}k" if abs(v) >= 10000 else f"{v:.4g}")
        axes.grid(color="#020202", lw=0.6)
        axes.tick_params(length=0, labelcolor="#010101")
        axes.spines[:].set_visible(False)
        figure.savefig(buffer := io.StringIO(), format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue()  # of which the document type, metadata and name spaces name addresses: cut
    svg = re.sub(r"<metadata>.*?</metadata>|\sxmlns(:\w+)?=\"[^\"]*\"", "", svg[svg.index("<svg") :], flags=re.S)
    svg = re.sub(r"font: ([\d.]+px)[^;\"]*", r"font: \1 system-ui, sans-serif", svg)
    note = "log scale " * log + f"{len(values) - len(finite)} non-finite not drawn" * (len(finite) < len(values))
    legend = _legend({k: (colors[k], _show(a[-1, 1]) if len(arrays) < 9 else "") for k, a in arrays.items()})
    page = f"<figure><figcaption><b>{escape(title)}</b> <small>{note}</small></figcaption>{svg}{legend}</figure>"
    return re.sub("#0[1-5]0[1-5]0[1-5]", lambda m: CSS.get(m[0], m[0]), page)


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


def _png(image: np.ndarray, *, width: float, caption: str) -> str:
    from PIL import Image

    Image.fromarray(image[..., 0] if image.shape[2:] == (1,) else image).save(buffer := io.BytesIO(), "png")
    data, caption = base64.b64encode(buffer.getvalue()).decode(), escape(caption)
    picture = f'<img style="width:{width:.0f}px" alt="{caption}" src="data:image/png;base64,{data}">'
    return f"<figure>{picture}<figcaption>{caption}</figcaption></figure>"


def _show_item(item: SavedPictures | str, *, width: int, caption: str) -> str:
    if isinstance(item, str) or not len(item.images):
        return f"<small>{caption}</small><pre>{escape(item) if isinstance(item, str) else 'none'}</pre>"
    if item.captions and width > 200:
        cells = [_png(x, width=84, caption=c) for x, c in zip(item.images, item.captions, strict=True)]
        return f'<small>{caption}</small><div class="wide grid" style="--n:{item.columns}">{"".join(cells)}</div>'
    columns = min(max(1, item.columns), len(item.images))
    pad = [(0, -len(item.images) % columns), (0, 1), (0, 1), (0, 0)]  # full rows, the pictures a grey pixel apart
    images = np.pad(item.images, pad[: item.images.ndim], constant_values=127)
    rows = images.reshape(-1, columns, *images.shape[1:]).swapaxes(1, 2)  # rows, H, columns, W[, C]
    tile = rows.reshape(-1, columns * images.shape[2], *images.shape[3:])
    return _png(tile, width=width if width <= 200 else tile.shape[1] * max(1, width // tile.shape[1]), caption=caption)


def _gallery(gallery: Mapping[str, Mapping[int, SavedPictures | str]]) -> str:
    """The newest of each name large; under it at most eight earlier ones small in a row, as it came about."""
    page = ""
    for name, items in gallery.items():
        *earlier, newest = items
        chosen = [earlier[round(i)] for i in np.linspace(0, len(earlier) - 1, min(8, len(earlier)))]
        row = "".join(f"<div>{_show_item(items[step], width=110, caption=f'step {step:,}')}</div>" for step in chosen)
        page += f"<h2>{escape(name)}</h2>{_show_item(items[newest], width=600, caption=f'step {newest:,}')}"
        page += f'<h3>Before</h3><div class="row">{row}</div>' if row else ""
    return page


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
.pairs th{text-align:left;width:40%}.pairs tr{border-bottom:1px solid var(--line)}.wide{overflow-x:auto}.matrix *{
text-align:right;overflow-wrap:normal}pre{white-space:pre-wrap;margin:0}.row,.grid{display:flex;gap:10px;flex-wrap:wrap}
img{max-width:100%;image-rendering:pixelated;display:block}.grid{display:grid;grid-template-columns:repeat(var(--n),
minmax(54px,96px))}</style></head><body>BODY</body></html>
"""
