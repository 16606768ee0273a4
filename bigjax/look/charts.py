"""What changed while a run went on, drawn: a panel a metric, a line a split; what did not change is a number."""

import io
import re
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import numpy as np

# Curves are drawn in stand-in colours that become CSS variables, so that one drawing is readable in light and in dark.
SPLITS = {"train": "#030303", "eval": "#040404", "validation": "#050505"}
CSS = {"#010101": "currentColor", "#020202": "var(--line)"} | {v: f"var(--{k})" for k, v in SPLITS.items()}
UNITS = {"examples_per_second": "examples / s", "accuracy": "share", "mfu": "share", "bits_per_byte": "bits a byte"}
Line = Sequence[tuple[int, float]]  # (step, value)


def show(value: Any) -> str:
    """A number as people read it: 93,322 · 0.984 · 1.2e-05 · –."""
    if value is None:
        return "–"
    return f"{value:,.0f}" if isinstance(value, int) or not abs(value) < 1000 else f"{value:.4g}"


def tick(value: float) -> str:
    """A number beside an axis: 500 · 6,000 · 25k · 10M."""
    scale, unit = next(((n, u) for n, u in ((1e9, "G"), (1e6, "M"), (1e3, "k")) if abs(value) >= max(n, 1e4)), (1, ""))
    return f"{value / scale:,.4g}{unit}"


def legend(entries: Mapping[str, tuple[str, str]]) -> str:
    items = [f'<li><i style="background:{c}"></i>{escape(k)} <b>{text}</b></li>' for k, (c, text) in entries.items()]
    return f"<ul>{''.join(items)}</ul>"


def curves(log: Sequence[Mapping[str, Any]]) -> str:
    groups: dict[str, dict[str, dict[str, list]]] = {"Curves": {}, "Norms": {}, "Norms by layer": {}}
    for line in log:
        for key, value in line.items():
            if key != "step" and (value is None or isinstance(value, (int, float))):  # null is strict JSON's NaN
                kind, player, layer = (*key.split("/", 2), "", "")[:3]
                norm, parts = kind.endswith("_norm"), player != ""
                title, name = (f"{kind}, {player}", layer or player) if norm and parts else (key, line["split"])
                if kind == "learning_rate" and parts:
                    title, name = kind, player
                group = groups["Norms by layer" if norm and parts else "Norms" if norm else "Curves"]
                points = group.setdefault(title, {}).setdefault(name, [])
                points.append((line["step"], np.nan if value is None else value))
    rank, page = {"loss": 0, "accuracy": 1, "learning_rate": 3, "examples_per_second": 4}, ""  # as they came: the rest
    for group, panels in groups.items():
        drawn, numbers = "", ""
        for title in sorted(panels, key=lambda title: rank.get(title, 2)):
            if moves(panels[title]):
                drawn += _panel(title, panels[title])
            elif title != "skipped":  # which the key facts tell
                numbers += _number(title, panels[title])
        drawn = f'<div class="panels">{drawn}</div>' * bool(drawn) + f'<dl class="once">{numbers}</dl>' * bool(numbers)
        page += f"<h2>{group}</h2>{drawn}" if drawn else ""
    return page


def moves(lines: Mapping[str, Line]) -> bool:
    """Whether there is something to draw: a line with two points that differ."""
    return any(len({v for _, v in line if np.isfinite(v)}) > 1 for line in lines.values())


def _number(title: str, lines: Mapping[str, Line]) -> str:
    """What was measured once, or was always the same."""
    values = []
    for name, line in lines.items():
        finite = [(step, value) for step, value in line if np.isfinite(value)]
        step, value = finite[-1] if finite else (line[-1][0], None)
        when = "throughout" if len(finite) > 1 else f"step {step:,}"
        values.append(f"{escape(name)} {show(value)} <small>{when}</small>")
    return f"<div><dt>{escape(title)}</dt><dd>{' · '.join(values)}</dd></div>"


def _panel(title: str, lines: Mapping[str, Line]) -> str:
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
        axes = (figure := Figure(figsize=(3.5, 2.2))).add_axes((0.21, 0.18, 0.73, 0.78))  # labels have room around it
        axes.set_yscale("log", subs=[]) if log else None  # no minor ticks
        for key, a in arrays.items():
            dots = "o" if len(a) <= 20 else ""
            axes.plot(*np.where(np.isfinite(a), a, np.nan).T, color=colors[key], lw=1.3, marker=dots, ms=2.5)
        axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 3), numticks=7) if log else ticker.MaxNLocator(5))
        axes.xaxis.set_major_locator(ticker.MaxNLocator(5, integer=True))
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(lambda v, _: tick(v))
        axes.set_xlabel("step (updates)", color="#010101")
        unit = UNITS.get(title, title.rpartition("/")[2].partition(",")[0].replace("_", " "))
        axes.set_ylabel(f"{unit}, log scale" if log else unit, color="#010101")
        axes.yaxis.set_label_coords(-0.23, 0.5)
        axes.grid(color="#020202", lw=0.6)
        axes.tick_params(length=0, labelcolor="#010101")
        axes.spines[:].set_visible(False)
        figure.savefig(buffer := io.StringIO(), format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue()  # of which the document type, metadata and name spaces name addresses: cut
    svg = re.sub(r"<metadata>.*?</metadata>|\sxmlns(:\w+)?=\"[^\"]*\"", "", svg[svg.index("<svg") :], flags=re.S)
    svg = re.sub(r"font-family: [^;\"]*", "font-family: system-ui, sans-serif", svg)
    note = f"{len(values) - len(finite)} non-finite not drawn" * (len(finite) < len(values))
    words = legend({k: (colors[k], show(a[-1, 1]) if len(arrays) < 9 else "") for k, a in arrays.items()})
    page = f"<figure><figcaption><b>{escape(title)}</b> <small>{note}</small></figcaption>{svg}{words}</figure>"
    return re.sub("#0[1-5]0[1-5]0[1-5]", lambda m: CSS.get(m[0], m[0]), page)
