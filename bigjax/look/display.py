"""What people see in the terminal: the table of layers, one live line while a run goes on, the result at its end."""

import contextlib
import math
import re
import sys
import textwrap
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from bigjax.look.cell import Cell
from bigjax.run.words import spoken


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


def _steps(step: int, steps: int | None) -> str:
    return f"{step:,}" + (f"/{steps:,}" if steps else "")


def _clock(seconds: float | None) -> str:
    if seconds is None or not math.isfinite(seconds):
        return "-"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}" if minutes >= 60 else f"{minutes}:{rest:02d}"


def plain(text: str, console: Console) -> dict[str, Any]:
    """How `text` is printed: on a terminal broken at words; elsewhere, or where a word is too long, as it is."""
    return {"soft_wrap": not console.is_terminal or any(len(word) > console.width for word in text.split())}


class Display:
    """One live line on a terminal or in a notebook; where there is neither, plain lines without colours or control
    characters.

    Called at log windows and changes of phase, never a step. The live line is drawn by a thread of rich's, so that its
    seconds are counted while the program waits. Prints nothing where not `enabled`.
    """

    def __init__(self, console: Console | None = None, *, enabled: bool = True) -> None:
        self.console = (console or Console()) if enabled else Console(quiet=True)
        self._phase, self._since, self._seen = "", time.monotonic(), set()
        self._words: list[tuple[int, str]] = []  # of the line, each with its rank: what doesn't fit is left out
        self._done: float | None = None
        self._start: tuple[float, int] | None = None  # time and step of the first update: the rate behind ETA
        self._live: Live | Cell | None = None
        if enabled and self.console.is_jupyter:
            self.console = Console(
                force_jupyter=False, force_terminal=False
            )  # whose prints would each be an output of its own
            self._live = Cell(self._render)
            self._live.start()
        elif enabled and self.console.is_terminal and not self.console.is_dumb_terminal:
            options = {"refresh_per_second": 2, "transient": True, "redirect_stderr": sys.stderr.isatty()}
            self._live = Live(console=self.console, get_renderable=self._render, **options)
            self._live.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def phase(self, name: str) -> contextlib.AbstractContextManager[None]:
        """Names what goes on: reading data, compiling, training, evaluating, saving. A plain display prints each once.

        As a context, `with display.phase("saving"):`, it gives back the name before.
        """
        before = self._phase
        if name != before:  # an update a call is nothing new
            self._phase, self._since = name, time.monotonic()
            if self._live is None and name not in self._seen:
                self.line(f"{name} ...")
            self._seen.add(name)
            self._refresh()
        stack = contextlib.ExitStack()
        stack.callback(lambda: before and self.phase(before))
        return stack

    def table(self, model_name: str, rows: Sequence[tuple[str, str, int]], *, total: int) -> None:
        """Prints `layer_table`."""
        self.console.print(layer_table(model_name, rows, total=total))

    def begin(self, step: int, steps: int | None) -> None:
        """The first update is behind: from here on there is a bar, and the time left is known."""
        self._start = (time.monotonic(), step)
        self._words, self._done = [(0, _steps(step, steps))], step / steps if steps else None
        self._refresh()

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
        """One log window: of the metrics, as they come, the first four are shown, and one learning rate; norms never.

        ETA (seconds) comes from the mean time a step since `begin`, or the first update, unless given.
        """
        now = time.monotonic()
        first, step_0 = self._start = self._start or (now, step)
        if eta is None and steps is not None and step > step_0:
            eta = (now - first) / (step - step_0) * (steps - step)
        rates = [k for k in metrics if k.partition("/")[0] == "learning_rate"]
        told = [k for k in metrics if k != "skipped" and not k.partition("/")[0].endswith("_norm") and k not in rates]
        live, rank = self._live is not None, (1, 3, 6, 7)
        self._words = [
            (0, _steps(step, steps) if live else "step " + _steps(step, steps)),
            *((r, f"{k} {_number(metrics[k])}") for r, k in zip(rank, told, strict=False)),
            *((4, f"{'lr' if live else k.replace('_', ' ')} {_number(metrics[k])}") for k in rates[:1]),
            (5, f"{_number(examples_per_second)} {'ex/s' if live else 'examples/s'}"),
            (8, f"data wait {100 * data_wait_fraction:.0f}%"),
            (2, f"ETA {_clock(eta)}"),
        ]
        self._done = step / steps if steps else None
        if not live:
            self.line("  ".join(word for _, word in self._words))
        self._refresh()

    def _render(self) -> Text:
        """The live line, never wider than the console: what matters most, in its usual order, and a bar in the rest."""
        line, waits = Text(no_wrap=True, overflow="ellipsis"), self._phase != "training"
        if waits:
            line.append(self._phase, style="bold cyan")
            seconds = int(time.monotonic() - self._since)
            line.append(f" {_clock(seconds) if seconds >= 60 else f'{seconds} s'}" if seconds else "")
        bar = 6 * (self._done is not None)  # at its shortest, with what is between it and the words
        room, fit = self.console.width - 1 - len(line) - (2 if waits else 0) - bar, set()
        for rank, word in sorted(self._words):
            if len(word) <= room:
                room -= len(word) + 2
                fit.add(rank)
        words = [word for rank, word in self._words if rank in fit]
        if waits and words:
            line.append("  ")
        if bar and words:
            width = 4 + max(0, min(room + 2, 16))
            full = round(width * min(1.0, self._done))
            line.append("━" * full, style="cyan").append("╌" * (width - full), style="bright_black").append("  ")
        return line.append("  ".join(words))

    def _refresh(self) -> None:
        if self._live is not None:
            self._live.refresh()

    def line(self, text: str) -> None:
        """Prints a line that stays, above the live one: results of an evaluation, warnings."""
        text = spoken(text)
        self.console.print(Text(text), **plain(text, self.console))

    def numbers(self, before: str, values: Mapping[str, float]) -> None:
        """Prints a line that stays with the numbers, which goes on indented where a terminal ends; norms never."""
        words = [f"{k} {_number(v)}" for k, v in values.items() if not k.partition("/")[0].endswith("_norm")]
        text = f"{before} {words[0] if words else ''}".rstrip()
        for word in words[1:]:
            room = self.console.width - len(text.rpartition("\n")[2]) - 3  # a comma and a space, and a comma behind
            text += f", {word}" if self._live is None or len(word) <= room else f",\n  {word}"
        self.line(text)

    def close(self) -> None:
        """Takes the live line away; harmless twice."""
        if self._live is not None:
            self._phase = "training" if self._words else ""  # a notebook keeps the line as it is last
            self._live.stop()
            self._live = None


def telling(what: str) -> Callable[[int, str, Mapping[str, float]], None]:
    """Says on stderr that `what` is trained, inside another run; gives an `on_log` that says how far it is."""
    from bigjax.run import processes

    def say(text: str) -> None:
        if processes.first():
            print(text, file=sys.stderr, flush=True)

    say(f"training {what}")

    def on_log(step: int, split: str, values: Mapping[str, float]) -> None:
        if split == "eval":
            numbers = ", ".join(f"{k} {_number(v)}" for k, v in list(values.items())[:2])
            say(f"  step {step:,}: {numbers}")

    return on_log


def summary(result: Mapping[str, Any], *, report: str | None = None, console: Console | None = None) -> None:
    """Prints a result.json at the end of a run: metrics beside the published ones, seconds, and where the report is."""
    console = console or Console()
    published = {p["metric"]: p for p in result.get("published") or ()}
    metrics, own = result.get("metrics", {}), result.get("metric")
    table = Table(
        box=None,
        title=Text(f"{result.get('experiment', '')}, step {result.get('step', 0):,}"),
        title_justify="left",
        pad_edge=False,
    )
    columns = [("metric", "left"), ("measured", "right"), ("published", "right"), ("", "left")]
    for heading, justify in columns[: 4 if published else 2]:
        table.add_column(heading, justify=justify, overflow="fold")
    told = sorted((k for k in metrics if not re.search("_norm|/skipped$", k)), key=lambda k: k.startswith("train/"))
    for name in dict.fromkeys([*([own] if own in metrics else []), *published, *told]):
        measured, aim = metrics.get(name), published.get(name)
        reached = {True: "reached", False: "NOT reached", None: "not measured"}[aim["reached"]] if aim else ""
        cells = [Text(name), "-" if measured is None else _number(measured), _number(aim["value"]) if aim else ""]
        table.add_row(*[*cells, reached][: len(table.columns)], style="bold" if aim or name == own else None)
    console.print(table)
    words = [f"{k.replace('_', ' ')} {_number(v)} s" for k, v in (result.get("seconds") or {}).items()]
    if result.get("examples_per_second"):
        words.append(f"{_number(result['examples_per_second'])} examples/s")
    together = ", ".join(word.replace(" ", "\0") for word in words)  # a line ends after a comma
    for text in textwrap.wrap(together, console.width if console.is_terminal else 10**6):
        console.print(Text(text.replace("\0", " ")), soft_wrap=True)
    if report:
        console.print(Text(f"report: {report}"), soft_wrap=True)
