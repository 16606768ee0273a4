"""What people look at: one self-contained HTML page a run, written only from the files of its working directory.

Letters: N pictures, H height, W width, C channels of a picture or classes of a confusion matrix.
"""

import base64
import contextlib
import html
import io
import json
import math
import re
import shlex
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple
from urllib.parse import quote, unquote

import numpy as np
from etils import epath

from bigjax import UsageError

NORMS = ("grad_norm", "param_norm", "update_norm")
# Curves are drawn in stand-in colours that become CSS variables, so that one drawing is readable in light and in dark.
SPLITS = {"train": "#030303", "eval": "#040404", "validation": "#050505"}
CSS = {"#010101": "currentColor", "#020202": "var(--line)"} | {v: f"var(--{k})" for k, v in SPLITS.items()}


class SavedPictures(NamedTuple):
    """Pictures read back: images (N,H,W) or (N,H,W,C) uint8; N captions or None; columns of the grid."""

    images: np.ndarray
    captions: Sequence[str] | None
    columns: int


def save_gallery(workdir: epath.PathLike, step: int, *, name: str, item: Any) -> epath.Path:
    """Writes gallery/{step}-{name}.npz (pictures) or .txt (item is a str) and returns its path.

    Pictures are any object with `images` (N,H,W) or (N,H,W,C), float in [0,1] or uint8, C of 1, 3 or 4; `captions`, one
    an image, or None; `columns`. Raises UsageError where they are not.
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
    buffer = io.BytesIO()
    np.savez_compressed(buffer, images=images, captions=np.array(captions, dtype=str), columns=np.int32(item.columns))
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
    workdir = epath.Path(workdir)
    files = {name: workdir / name for name in ("config.json", "result.json", "metrics.jsonl", "source.patch")}
    content = {name: path.read_bytes() if path.exists() else b"" for name, path in files.items()}
    if not files["config.json"].exists():
        raise UsageError(f"{workdir} has no config.json: give the working directory of a run (runs/NAME)")
    record = _json(content["config.json"], str(files["config.json"]))
    result = _json(content["result.json"], str(files["result.json"])) if files["result.json"].exists() else {}
    *lines, torn = content["metrics.jsonl"].split(b"\n")  # what follows the last newline may be torn
    log = [_json(line, f"{files['metrics.jsonl']} line {n}") for n, line in enumerate(lines, 1)]
    with contextlib.suppress(UsageError):
        log.append(_json(torn, ""))
    config, edited = record.get("config", record), content["source.patch"].strip() != b""
    title = _show(result.get("experiment") or record.get("experiment") or workdir.resolve().name)
    body = f"<h1>{title}</h1>{_headline(result, log, steps=config.get('steps'))}"
    body += _facts(result, record, seed=config.get("seed"), edited=edited) + _curves(log) + _confusion(result)
    body += _gallery(load_gallery(workdir))
    body += _table("All metrics at the end", {k: _show(v) for k, v in result.get("metrics", {}).items()})
    body += _table("Configuration", {k: _e(v if isinstance(v, str) else json.dumps(v)) for k, v in config.items()})
    body += _table("Package versions", {k: _e(v) for k, v in record.get("versions", {}).items()})
    (workdir / "report.html").write_bytes(PAGE.replace("BODY", body, 1).replace("TITLE", title, 1).encode())
    return workdir / "report.html"


def _json(content: bytes, where: str) -> dict[str, Any]:
    try:
        return dict(json.loads(content))
    except (ValueError, TypeError) as error:
        raise UsageError(f"{where} is no JSON object ({error}): put it right or delete it, then try again") from error


def _e(value: object) -> str:
    return html.escape(str(value))


def _show(value: object) -> str:
    """A value as people read it, escaped: 93,322 · 0.984 · 1.2e-05 · –"""
    if not isinstance(value, (int, float)):
        return "–" if value is None else _e(value)
    whole = isinstance(value, int) or not math.isfinite(value) or abs(value) >= 1000
    return f"{value:,.0f}" if whole else f"{value:.4g}"


def _table(title: str, rows: Mapping[str, str]) -> str:
    cells = "".join(f"<tr><th>{_e(key)}</th><td>{value}</td></tr>" for key, value in rows.items())
    return f'<h2>{title}</h2><table class="pairs">{cells}</table>' if rows else ""


def _headline(result: Mapping[str, Any], log: Sequence[Mapping[str, Any]], *, steps: object) -> str:
    tiles, page, metrics, note = {}, "", result.get("metrics", {}), "at the last step"
    if not result:
        newest = {line["split"]: line for line in log}
        line = newest.get("eval") or newest.get("validation") or newest.get("train") or {"step": 0, "split": ""}
        metrics, note = {f"{line['split']}/{k}": v for k, v in line.items()}, f"at step {_show(line['step'])}"
        last = f"{max((line['step'] for line in log), default=0):,} of {_show(steps)}"
        page = f'<p class="notice"><b>Unfinished</b>: step {last}. The same command again resumes it.</p>'
    for p in result.get("published") or ():
        mark = '<b class="yes">✓ reached</b>' if p.get("reached") else '<b class="no">✗ not reached</b>'
        source = f"<br><small>{_e(p.get('source', ''))}</small>"
        tiles[p["metric"]] = f"{tiles.get(p['metric'], '')}<p>published {_show(p['value'])} · {mark}{source}</p>"
    wanted = [k for k in metrics if k.endswith(("/accuracy", "/loss")) and not (result and k.startswith("train/"))]
    tiles |= {k: f"<p>{note}</p>" for k in wanted[:3] if k not in tiles}
    cells = [f"<div><span>{_e(k)}</span><strong>{_show(metrics.get(k))}</strong>{tiles[k]}</div>" for k in tiles]
    return f'{page}<div class="tiles">{"".join(cells)}</div>'


def _facts(result: Mapping[str, Any], record: Mapping[str, Any], *, seed: object, edited: bool) -> str:
    devices, command, commit = (record | result).get("devices"), record.get("command"), record.get("commit")
    if isinstance(devices, dict):
        devices = ", ".join(f"{key} {value}" for key, value in devices.items())
    facts = {"parameters": result.get("parameters"), "updates": result.get("step"), "seed": result.get("seed", seed),
             "dropped as non-finite": result.get("skipped") or None, "examples/s": result.get("examples_per_second"),
             "model FLOPs utilization": result.get("mfu"), "devices": devices,
             "commit": f"{commit} + edits in source.patch" if edited else commit,
             "command": shlex.join(map(str, command)) if isinstance(command, list) else command}
    page = "".join(f"<div><dt>{k}</dt><dd>{_show(v)}</dd></div>" for k, v in facts.items() if v is not None)
    seconds = dict(result.get("seconds", {}))
    total = seconds.pop("total", sum(seconds.values()))
    seconds["other"] = max(0.0, total - sum(seconds.values()))
    colors = ("#d39a4a", "#4f7fb8", "#8a6fb0", "#c8605a", "#5aa38a", *["#8b93a1"] * len(seconds))
    bar = "".join(f'<i style="flex:{v};background:{c}"></i>' for v, c in zip(seconds.values(), colors, strict=False))
    legend = _legend({k.replace("_", " "): (c, f"{_show(seconds[k])} s") for k, c in zip(seconds, colors, strict=False)})
    time = f'<h3>{_show(total)} seconds</h3><div class="bar">{bar}</div>{legend}' if total else ""
    return f"<h2>Key facts</h2><dl>{page}</dl>{time}"


def _legend(entries: Mapping[str, tuple[str, str]]) -> str:
    items = (f'<li><i style="background:{color}"></i>{_e(k)} <b>{text}</b></li>' for k, (color, text) in entries.items())
    return f"<ul>{''.join(items)}</ul>"


def _curves(log: Sequence[Mapping[str, Any]]) -> str:
    groups: dict[str, dict[str, dict[str, list]]] = {"Curves": {}, "Norms": {}, "Norms by layer": {}}
    for line in log:
        for key, value in line.items():
            if key != "step" and (value is None or isinstance(value, (int, float))):  # null is strict JSON's NaN
                kind, player, layer = (*key.split("/", 2), "", "")[:3]
                by_layer = kind in NORMS and player != ""
                title, name = (f"{kind}, {player}", layer or player) if by_layer else (key, line["split"])
                group = groups["Norms by layer" if by_layer else "Norms" if kind in NORMS else "Curves"]
                lines = group.setdefault(title, {}).setdefault(name, [])
                lines.append((line["step"], math.nan if value is None else value))
    rank = {"loss": 0, "accuracy": 1, "examples_per_second": 3}  # the others between, as they came
    page = ""
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
    wide = bool(0 < 30 * finite.min(initial=np.inf) < finite.max(initial=0))
    log = wide and re.search("loss|norm|perplexity", title) is not None
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": title, "font.size": 8}):
        axes = (figure := Figure(figsize=(3.5, 2.0))).add_axes((0.15, 0.12, 0.83, 0.84))
        axes.set_yscale("log" if log else "linear")
        for key, a in arrays.items():
            axes.plot(*np.where(np.isfinite(a), a, np.nan).T, color=colors[key], lw=1.3, marker="o" if len(a) <= 20 else "", ms=2.5)
        axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 3), numticks=7) if log else ticker.MaxNLocator(5))
        axes.yaxis.set_minor_locator(ticker.NullLocator())
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
    legend = _legend({k: (colors[k], _show(a[-1, 1])) for k, a in arrays.items()})
    page = f"<figure><figcaption><b>{_e(title)}</b> <small>{note}</small>{legend}</figcaption>{svg}</figure>"
    return re.sub("#0[1-5]0[1-5]0[1-5]", lambda m: CSS.get(m[0], m[0]), page)


def _confusion(result: Mapping[str, Any]) -> str:
    """Rows are the true classes, columns what was said; above 30 classes only the per-class columns are shown."""
    if not result.get("confusion"):
        return ""
    counts_CC, per_class = np.array(result["confusion"], np.int64), result.get("per_class") or {}
    names = [_e(name) for name in result.get("class_names") or range(len(counts_CC))]
    shown = len(names) if len(names) <= 30 else 0
    page = "".join(f"<th>{title}</th>" for title in ("true \\ said", *names[:shown], "examples", *map(_e, per_class)))
    for i, (name, row) in enumerate(zip(names, counts_CC, strict=True)):
        page += f"<tr><th>{name}</th>"
        for j, count in enumerate(row[:shown]):
            alpha = 0.75 * (count / max(row.sum(), 1)) ** 0.5  # the root shows rare mistakes beside the diagonal
            color = f"rgb({'46 140 90' if i == j else '215 70 50'} / {alpha:.2f})"
            page += f'<td style="background:{color}">{count or "·"}</td>'
        page += f"<td>{row.sum()}</td>" + "".join(f"<td>{values[i]:.3f}</td>" for values in per_class.values()) + "</tr>"
    return f'<h2>Confusion matrix</h2><div class="wide"><table class="matrix">{page}</table></div>'


def _png(image: np.ndarray, *, width: float, caption: str) -> str:
    from PIL import Image

    Image.fromarray(image[..., 0] if image.shape[2:] == (1,) else image).save(buffer := io.BytesIO(), "png")
    source = f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    picture = f'<img style="width:{width:.0f}px" alt="{_e(caption)}" src="{source}">'
    return f"<figure>{picture}<figcaption>{_e(caption)}</figcaption></figure>"


def _show_item(item: SavedPictures | str, *, width: int, caption: str) -> str:
    if isinstance(item, str) or not len(item.images):
        return f"<small>{caption}</small><pre>{_e(item) if isinstance(item, str) else 'none'}</pre>"
    if item.captions and width > 200:
        cells = "".join(_png(x, width=84, caption=c) for x, c in zip(item.images, item.captions, strict=True))
        return f'<small>{caption}</small><div class="wide grid" style="--n:{item.columns}">{cells}</div>'
    columns = min(max(1, item.columns), len(item.images))
    pad = [(0, -len(item.images) % columns), (0, 1), (0, 1), (0, 0)]  # full rows, the pictures a grey pixel apart
    images = np.pad(item.images, pad[: item.images.ndim], constant_values=127)
    rows = images.reshape(-1, columns, *images.shape[1:]).swapaxes(1, 2)  # rows, H, columns, W[, C]
    tile = rows.reshape(rows.shape[0] * rows.shape[1], rows.shape[2] * rows.shape[3], *rows.shape[4:])
    return _png(tile, width=width if width <= 200 else tile.shape[1] * max(1, width // tile.shape[1]), caption=caption)


def _gallery(gallery: Mapping[str, Mapping[int, SavedPictures | str]]) -> str:
    """The newest of each name large; under it at most eight earlier ones small in a row, as it came about."""
    page = ""
    for name, items in gallery.items():
        *earlier, newest = items
        chosen = [earlier[round(i)] for i in np.linspace(0, len(earlier) - 1, min(8, len(earlier)))]
        row = "".join(f"<div>{_show_item(items[step], width=110, caption=f'step {step:,}')}</div>" for step in chosen)
        page += f"<h2>{_e(name)}</h2>{_show_item(items[newest], width=600, caption=f'step {newest:,}')}"
        page += f'<h3>Before</h3><div class="row">{row}</div>' if row else ""
    return page


PAGE = """<!doctype html><html lang="en"><head><meta charset="utf-8"><title>TITLE</title>
<meta name="viewport" content="width=device-width,initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<style>:root{color-scheme:light dark;--ink:#1d2430;--soft:#667085;--line:#e1e5eb;--card:#f6f7f9;--page:#fff;
--train:#4a6fa5;--eval:#d1662f;--validation:#2f8f6b}@media (prefers-color-scheme:dark){:root{--ink:#dfe3ea;
--soft:#98a2b3;--line:#2f3744;--card:#1b2029;--page:#12161c;--train:#82a8df;--eval:#ec9a63;--validation:#62c39c}}
*{box-sizing:border-box}body{margin:auto;padding:28px 20px;max-width:1040px;background:var(--page);color:var(--ink);
font:15px/1.5 system-ui,sans-serif}h1,h2,td,th,dd,pre{overflow-wrap:anywhere}h1{font-size:26px;margin:0 0 16px}
h2{font-size:17px;margin:38px 0 12px;padding-bottom:5px;border-bottom:1px solid var(--line)}figure,p,dd,dl{margin:0}
h3{font-size:14px;margin:16px 0 8px}small,dt,figcaption,th,h3,span{color:var(--soft);font-weight:500}b{color:var(--ink)}
small,figcaption,ul,dt{font-size:12px}.notice{margin-bottom:12px}b.yes{color:var(--validation)}b.no{color:var(--eval)}
.tiles,dl,.panels{display:grid;gap:12px;grid-template-columns:repeat(auto-fill,minmax(min(100%,300px),1fr))}
dl{grid-template-columns:repeat(auto-fill,minmax(150px,1fr))}dl>:last-child{grid-column:1/-1}.tiles>*,.panels>*,pre,
.notice{background:var(--card);border-radius:8px;padding:12px 14px}strong{display:block;font-size:34px;line-height:1.25}
svg{width:100%;height:auto}ul{list-style:none;display:flex;flex-wrap:wrap;gap:2px 14px;margin:4px 0;padding:0}
li i{display:inline-block;width:9px;height:9px;border-radius:2px;margin-right:5px}.bar{display:flex;height:12px}
table{border-collapse:collapse;font-size:13px;font-variant-numeric:tabular-nums}td,th{padding:3px 8px}.pairs{width:100%}
.pairs th{text-align:left;width:40%}.pairs tr{border-bottom:1px solid var(--line)}.wide{overflow-x:auto}.matrix *{
text-align:right;overflow-wrap:normal}pre{white-space:pre-wrap;margin:0}.row{display:flex;gap:10px;flex-wrap:wrap}
img{max-width:100%;image-rendering:pixelated;display:block}.grid{display:grid;gap:10px;
grid-template-columns:repeat(var(--n),minmax(54px,96px))}</style></head><body>BODY</body></html>
"""
