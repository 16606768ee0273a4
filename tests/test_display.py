import io

import pytest
from rich.console import Console

from bigjax.look import display
from bigjax.look.display import Display, layer_table, summary

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


def run(*, terminal: bool, width: int = 140, enabled: bool = True) -> str:
    console = Console(file=io.StringIO(), force_terminal=terminal, width=width)
    with Display(console, enabled=enabled) as shown:
        shown.phase("compiling")
        shown.table("CNN", ROWS, total=18_816)
        shown.phase("training")
        for step in (100, 200):
            shown.update(
                step,
                400,
                metrics={"loss": 0.25, "accuracy": 0.5, "grad_norm": 7.0, "gan/loss": float("nan")},
                examples_per_second=5123.4,
                data_wait_fraction=0.017,
            )
            shown.phase("evaluating")
            shown.line("eval [bold]0.9[/bold]")
            shown.phase("training")
    return console.file.getvalue()


@pytest.fixture(autouse=True)
def circumstances(monkeypatch):
    ticks = iter(range(1000, 9000, 30))  # 30 s between two updates
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setattr(display.time, "monotonic", lambda: float(next(ticks)))


def test_plain_lines_one_a_window_without_control_characters():
    text = run(terminal=False)
    assert all(c == "\n" or c.isprintable() for c in text)
    lines = [line.rstrip() for line in text.splitlines()]
    assert "step 100/400  loss 0.25  accuracy 0.5  gan/loss nan  5,123 examples/s  data wait 2%  ETA -" in lines
    assert "step 200/400  loss 0.25  accuracy 0.5  gan/loss nan  5,123 examples/s  data wait 2%  ETA 1:00" in lines
    assert lines.count("training ...") == lines.count("evaluating ...") == 1
    assert lines.count("eval [bold]0.9[/bold]") == 2


def test_plain_lines_are_never_wrapped_or_cut():
    assert "data wait 2%  ETA 1:00" in run(terminal=False, width=30)


@pytest.mark.parametrize("width", [140, 40])
def test_live_line_is_one_line_and_permanent_lines_stay(width):
    text = run(terminal=True, width=width)
    assert "\x1b[" in text and "━" in text and "training" in text
    assert text.count("eval [bold]0.9[/bold]") == 2
    assert text.count("\x1b[1A") == 1  # the cursor goes up only to take the live line away: it is one line high
    assert ("ETA 1:00" in text) == (width == 140)


def test_update_without_a_number_of_steps_takes_the_eta_it_is_given():
    console = Console(file=io.StringIO(), force_terminal=False)
    Display(console).update(7, None, metrics={}, examples_per_second=9.0, data_wait_fraction=0.0, eta=3661.0)
    assert console.file.getvalue() == "step 7  9 examples/s  data wait 0%  ETA 1:01:01\n"


def test_metrics_of_a_custom_task_are_shown_after_losses_and_never_norms():
    console = Console(file=io.StringIO(), force_terminal=False)
    metrics = {"grad_norm": 7.0, "grad_norm/model/a": 7.0, "skipped": 0.0, "regret": 0.5, "bleu": 31.0, "a/loss": 2.0}
    speed = {"examples_per_second": 9.0, "data_wait_fraction": 0.0}
    Display(console).update(7, None, metrics=metrics | {"x": 1.0, "y": 2.0}, **speed)
    assert console.file.getvalue() == "step 7  a/loss 2  regret 0.5  bleu 31  x 1  9 examples/s  data wait 0%  ETA -\n"


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
