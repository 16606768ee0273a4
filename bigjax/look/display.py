"""What people see in the terminal: the table of layers, one live line while a run goes on, the result at its end."""

import math
import time
from collections.abc import Mapping, Sequence
from typing import Any, Self

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text


def layer_table(model_name: str, rows: Sequence[tuple[str, str, int]], *, total: int) -> Table:
    """A table of (layer path, output shape, parameters), with the model's name above and its parameters below."""
    table = Table(box=None, title=Text(model_name), title_justify="left", pad_edge=False)
    for heading, justify in (("layer", "left"), ("output", "left"), ("parameters", "right")):
        table.add_column(heading, justify=justify, overflow="fold")
    for path, shape, count in rows:
        table.add_row(Text(str(path)), Text(str(shape)), f"{count:,}" if count else "-")
    table.add_row("total", "", f"{total:,}", style="bold")
    return table


def _number(value: float) -> str:
    value = float(value)
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}" if math.isfinite(value) else str(value)


def _clock(seconds: float | None) -> str:
    if seconds is None or not math.isfinite(seconds):
        return "-"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}" if minutes >= 60 else f"{minutes}:{rest:02d}"


class Display:
    """One live line on a terminal; plain lines, without colours or control characters, where there is none.

    Called at log windows and changes of phase, never a step; no thread. Prints nothing where not `enabled`.
    """

    def __init__(self, console: Console | None = None, *, enabled: bool = True) -> None:
        self.console = (console or Console()) if enabled else Console(quiet=True)
        self._phase, self._status, self._seen, self._done = "", "", set(), None
        self._start: tuple[float, int] | None = None  # time and step of the first update: the rate behind ETA
        self._live: Live | None = None
        if enabled and self.console.is_terminal and not self.console.is_dumb_terminal:
            self._live = Live(console=self.console, auto_refresh=False, transient=True)
            self._live.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def phase(self, name: str) -> None:
        """Names what goes on: data, compiling, training, evaluating, saving. A plain display prints each name once."""
        self._phase = name
        if self._live is None and name not in self._seen:
            self.line(f"{name} ...")
        self._seen.add(name)
        self._refresh()

    def table(self, model_name: str, rows: Sequence[tuple[str, str, int]], *, total: int) -> None:
        """Prints `layer_table`."""
        self.console.print(layer_table(model_name, rows, total=total))

    def update(
        self,
        step: int,
        steps: int | None,
        *,
        metrics: Mapping[str, float],
        examples_per_second: float,
        data_wait_fraction: float,
        eta: float | None = None,
    ) -> None:
        """One log window: of the metrics four at most are shown, losses and accuracies before others, norms never.

        ETA (seconds) comes from the mean time a step since the first update, unless given.
        """
        now = time.monotonic()
        first, step_0 = self._start = self._start or (now, step)
        if eta is None and steps is not None and step > step_0:
            eta = (now - first) / (step - step_0) * (steps - step)
        told = [k for k in metrics if k != "skipped" and not k.partition("/")[0].endswith("_norm")]
        shown = sorted(told, key=lambda k: k.split("/")[-1] not in ("loss", "accuracy"))[:4]
        words = [
            f"step {step:,}" + (f"/{steps:,}" if steps else ""),
            *(f"{k} {_number(metrics[k])}" for k in shown),
            f"{_number(examples_per_second)} examples/s",
            f"data wait {100 * data_wait_fraction:.0f}%",
        ]
        self._status, self._done = "  ".join([*words, f"ETA {_clock(eta)}"]), step / steps if steps else None
        if self._live is None:
            self.line(self._status)
        self._refresh()

    def _refresh(self) -> None:
        if self._live is not None:
            width = 20 if self.console.width >= 120 else 8
            line = Text(no_wrap=True, overflow="ellipsis")
            line.append(f"{self._phase:<11}", style="bold cyan")
            if self._status and self._done is not None:
                full = round(width * min(1.0, self._done))
                line.append("━" * full, style="cyan").append("╌" * (width - full), style="bright_black").append("  ")
            self._live.update(line.append(self._status), refresh=True)

    def line(self, text: str) -> None:
        """Prints a line that stays, above the live one: results of an evaluation, warnings."""
        self.console.print(Text(text), soft_wrap=True)

    def close(self) -> None:
        """Takes the live line away; harmless twice."""
        if self._live is not None:
            self._live.stop()
            self._live = None


def summary(result: Mapping[str, Any], *, report: str | None = None, console: Console | None = None) -> None:
    """Prints a result.json at the end of a run: metrics beside the published ones, seconds, and where the report is."""
    console = console or Console()
    published = {p["metric"]: p for p in result.get("published") or ()}
    metrics = result.get("metrics", {})
    table = Table(
        box=None,
        title=Text(f"{result.get('experiment', '')}, step {result.get('step', 0):,}"),
        title_justify="left",
        pad_edge=False,
    )
    for heading, justify in (("metric", "left"), ("measured", "right"), ("published", "right"), ("", "left")):
        table.add_column(heading, justify=justify, overflow="fold")
    for name in [*published, *(k for k in metrics if k not in published)]:
        measured, aim = metrics.get(name), published.get(name)
        reached = {True: "reached", False: "NOT reached", None: "not measured"}[aim["reached"]] if aim else ""
        table.add_row(
            Text(name),
            "-" if measured is None else _number(measured),
            _number(aim["value"]) if aim else "",
            reached,
            style="bold" if aim else None,
        )
    console.print(table)
    words = [f"{k.replace('_', ' ')} {_number(v)} s" for k, v in (result.get("seconds") or {}).items()]
    if result.get("examples_per_second"):
        words.append(f"{_number(result['examples_per_second'])} examples/s")
    console.print(Text(", ".join(words)), soft_wrap=True)
    if report:
        console.print(Text(f"report: {report}"), soft_wrap=True)
