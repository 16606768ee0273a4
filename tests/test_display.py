import io
import re
from types import SimpleNamespace

import pytest
from rich.console import Console

from bigjax.look import display
from bigjax.look.display import Display, layer_table, summary, telling

ROWS = [("Conv_0", "(64, 26, 26, 32)", 320), ("[red]Dense_0", "(64, 10)", 18_496)]
RESULT = {
    "experiment": "mnist_cnn",
    "step": 2500,
    "metrics": {"eval/accuracy": 0.984, "eval/loss": 0.051},
    "published": [
        {"metric": "eval/accuracy", "value": 0.975, "source": "a paper", "reached": True},
        {"metric": "eval/f1", "value": 0.5, "source": "a paper", "reached": False},
        {"metric": "eval/fid", "value": 21.7, "source": "a paper", "reached": None},
    ],
    "seconds": {"total": 41.0, "compile": 6.1, "data_wait": 0.3},
    "examples_per_second": 5100.0,
}


METRICS = {
    "loss": 0.25,
    "accuracy": 0.9123,
    "grad_norm": 7.0,
    "learning_rate": 0.00123,
    "skipped": 0.0,
    "gan/loss": float("nan"),
    "f1": 0.5,
    "recall": 0.5,
}
SPEED = {"examples_per_second": 5123.4, "data_wait_fraction": 0.017}


def run(*, terminal: bool, width: int = 140, enabled: bool = True) -> str:
    console = Console(file=io.StringIO(), force_terminal=terminal, width=width)
    with Display(console, enabled=enabled) as shown:
        shown.phase("compiling")
        shown.table("CNN", ROWS, total=18_816)
        shown.begin(1, 400)
        for step in (100, 200):
            shown.phase("training")
            shown.update(step, 400, metrics=METRICS, **SPEED)
            with shown.phase("evaluating"):
                shown.line("eval [bold]0.9[/bold]")
    return console.file.getvalue()


@pytest.fixture(autouse=True)
def clock(monkeypatch):
    """The display's, that stands still; and its thread never draws by itself."""
    now = SimpleNamespace(seconds=1000.0)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setattr(display.time, "monotonic", lambda: now.seconds)
    monkeypatch.setattr("rich.live._RefreshThread.run", lambda self: None)
    return now


def test_plain_lines_one_a_window_without_control_characters(clock):
    text = run(terminal=False)
    assert all(c == "\n" or c.isprintable() for c in text)
    lines = [line.rstrip() for line in text.splitlines()]
    shown = "loss 0.25  accuracy 0.9123  gan/loss nan  f1 0.5  learning rate 0.00123  5,123 examples/s  data wait 2%"
    assert f"step 100/400  {shown}  ETA 0:00" in lines and f"step 200/400  {shown}  ETA 0:00" in lines
    assert lines.count("training ...") == lines.count("evaluating ...") == 1
    assert lines.count("eval [bold]0.9[/bold]") == 2


def test_plain_lines_are_never_wrapped_or_cut():
    assert "data wait 2%  ETA 0:00" in run(terminal=False, width=30)


@pytest.mark.parametrize("width", [140, 40])
def test_live_line_is_one_line_and_permanent_lines_stay(width):
    text = run(terminal=True, width=width)
    assert "\x1b[" in text and "━" in text
    assert text.count("eval [bold]0.9[/bold]") == 2
    assert text.count("\x1b[1A") == 1  # the cursor goes up only to take the live line away: it is one line high
    assert "ETA 0:00" in text and "…" not in text


def live(width: int) -> Display:
    return Display(Console(file=io.StringIO(), force_terminal=True, width=width))


@pytest.mark.parametrize(("width", "expected"), [
    (40, "━━╌╌╌  1,200/2,500  loss 0.25  ETA 0:32"),
    (80, "━━╌╌  1,200/2,500  loss 0.25  accuracy 0.9123  lr 0.00123  5,123 ex/s  ETA 0:32"),
    (110, "━━━━━━╌╌╌╌╌╌  1,200/2,500  loss 0.25  accuracy 0.9123  gan/loss nan  f1 0.5  lr 0.00123  5,123 ex/s  "
     "ETA 0:32"),
    (120, "━━━━╌╌╌╌  1,200/2,500  loss 0.25  accuracy 0.9123  gan/loss nan  f1 0.5  lr 0.00123  5,123 ex/s  "
     "data wait 2%  ETA 0:32"),
])  # fmt: skip
def test_the_live_line_shows_what_matters_most_and_cuts_nothing(clock, width, expected):
    with live(width) as shown:
        shown.begin(0, 2500)
        shown.phase("training")
        clock.seconds += 30
        shown.update(1200, 2500, metrics=METRICS, **SPEED)
        assert shown._render().plain == expected and len(expected) < width


@pytest.mark.parametrize("width", range(10, 130, 7))
def test_no_width_cuts_a_word(clock, width):
    with live(width) as shown:
        shown.phase("evaluating")
        clock.seconds += 7000
        shown.begin(99_999, 100_000)
        names = {f"{player}/very_long_loss": 1.0 for player in ("discriminator", "generator")}
        shown.update(99_999, 100_000, metrics=names | {"learning_rate/generator": 1.0}, **SPEED)
        text = shown._render().plain
    assert len(text) < max(width, len("evaluating 1:56:40  "))
    whole = {"evaluating 1:56:40", "99,999/100,000", "lr 1", "5,123 ex/s", "data wait 2%", "ETA -", "ETA 0:00"}
    whole |= {f"{name} 1" for name in names}
    assert {part for part in text.split("  ") if part.strip("━╌")} <= whole


def test_a_bar_is_there_from_the_first_update_and_seconds_are_counted(clock):
    with live(80) as shown:
        shown.phase("compiling")
        assert shown._render().plain == "compiling"
        clock.seconds += 12
        assert shown._render().plain == "compiling 12 s"
        with shown.phase("planning"):
            clock.seconds += 75
            assert shown._render().plain == "planning 1:15"
        assert shown._render().plain == "compiling"  # again, from its beginning
        shown.begin(1, 2)
        shown.phase("training")
        assert shown._render().plain == "━" * 10 + "╌" * 10 + "  1/2"


def test_a_run_of_unknown_length_has_no_bar():
    with live(80) as shown:
        shown.begin(1, None)
        shown.phase("training")
        assert shown._render().plain == "1"


def test_on_a_terminal_lines_of_numbers_break_between_them_and_others_at_words():
    console = Console(file=io.StringIO(), force_terminal=True, color_system=None, width=40)
    shown = Display(console)
    shown.numbers("step 2 eval:", {"accuracy": 0.5, "grad_norm": 1.0, "a_name_too_long_here": 0.25, "f1": 0.125})
    shown.line("it takes several words to say this to you")
    shown.line("/a/path/that/is/longer/than/the/terminal/is/wide")
    shown.close()
    lines = [re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", x).strip() for x in console.file.getvalue().splitlines()]
    assert ["step 2 eval: accuracy 0.5,", "a_name_too_long_here 0.25, f1 0.125"] == lines[:2]
    assert ["it takes several words to say this to", "you"] == lines[lines.index("you") - 1 : lines.index("you") + 1]
    assert "/a/path/that/is/longer/than/the/terminal/is/wide" in lines


def test_update_without_a_number_of_steps_takes_the_eta_it_is_given():
    console = Console(file=io.StringIO(), force_terminal=False)
    Display(console).update(7, None, metrics={}, examples_per_second=9.0, data_wait_fraction=0.0, eta=3661.0)
    assert console.file.getvalue() == "step 7  9 examples/s  data wait 0%  ETA 1:01:01\n"


def test_a_run_inside_a_run_tells_how_far_it_is(capsys):
    told = telling("the classifier")
    told(20, "train", {"loss": 1.0})
    told(20, "eval", {"accuracy": 0.5, "loss": 0.25, "f1": 1.0})
    assert capsys.readouterr().err == "training the classifier\n  step 20: accuracy 0.5, loss 0.25\n"


def test_other_processes_print_nothing():
    assert run(terminal=True, enabled=False) == ""


def test_layer_table_has_every_layer_and_the_total():
    console = Console(file=io.StringIO(), force_terminal=False, width=80)
    console.print(layer_table("CNN", ROWS, total=18_816))
    lines = [line.split() for line in console.file.getvalue().splitlines()]
    assert lines == [
        ["CNN"],
        ["layer", "output", "parameters"],
        ["Conv_0", "(64,", "26,", "26,", "32)", "320"],
        ["[red]Dense_0", "(64,", "10)", "18,496"],
        ["total", "18,816"],
    ]


def test_summary_puts_measured_beside_published():
    console = Console(file=io.StringIO(), force_terminal=False, width=80)
    summary(RESULT, report="runs/mnist_cnn/report.html", console=console)
    text = console.file.getvalue()
    lines = [line.split() for line in text.splitlines()]
    assert ["eval/accuracy", "0.984", "0.975", "reached"] in lines
    assert ["eval/f1", "-", "0.5", "NOT", "reached"] in lines
    assert ["eval/fid", "-", "21.7", "not", "measured"] in lines
    assert ["eval/loss", "0.051"] in lines
    assert "total 41 s, compile 6.1 s, data wait 0.3 s, 5,100 examples/s" in text
    assert text.endswith("report: runs/mnist_cnn/report.html\n")


def test_summary_names_its_own_metric_first_and_breaks_between_numbers():
    console = Console(file=io.StringIO(), force_terminal=True, color_system=None, width=40)
    metrics = {"train/grad_norm": 1.0, "train/loss": 2.0, "train/skipped": 0.0, "eval/loss": 3.0, "eval/ratio": 4.0}
    seconds = dict.fromkeys(("total", "compile", "train", "eval", "data_wait"), 12.345)
    summary({"metric": "eval/ratio", "metrics": metrics, "seconds": seconds}, console=console)
    lines = [line.split() for line in console.file.getvalue().splitlines()]
    assert lines[1:5] == [["metric", "measured"], ["eval/ratio", "4"], ["eval/loss", "3"], ["train/loss", "2"]]
    assert [" ".join(line) for line in lines[5:]] == [
        "total 12.35 s, compile 12.35 s,", "train 12.35 s, eval 12.35 s,", "data wait 12.35 s",
    ]  # fmt: skip
