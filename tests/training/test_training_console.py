"""Terminal output fits 80 columns, can be copied, and never stops training."""

import io
import os
import re
import threading
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from training import console as console_module
from training.console import HEADING_INTERVAL, Console, compact, duration

COMMAND = "python train.py run.name=long data.folder=/" + "a/very/long/path/" * 8 + " model=x"
CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\x1b\][^\x07]*\x07")


def record(step: int, **changes: Any) -> dict[str, Any]:
    fields = {"step": step, "loss": 4.5, "grad_norm": 1.25, "lr": 3e-4}
    return fields | {"tokens_per_second": 12345.6, "step_seconds": 2.0} | changes


def show_run(console: Console, max_steps: int = 40) -> None:
    """Print everything that a run prints, in order."""
    console.header("Llamesh: tiny", [("model", "text " * 40), ("mesh", "1 x 2 on cpu")])
    console.start(0, max_steps)
    for step in range(1, 6):
        console.log(record(max_steps - 5 + step, **({"val_loss": 4.75} if step == 3 else {})))
        console.note(f"remark {step}")
    console.stop()
    console.summary(
        "Done", [("loss", "4.5"), ("files", "runs/x " * 20)], [("evaluate", COMMAND), ("go", "x y")]
    )


def plain(run: Callable[[Console], None]) -> str:
    file = io.StringIO()
    run(Console(True, file))
    return file.getvalue()


def terminal(run: Callable[[Console], None], monkeypatch: pytest.MonkeyPatch) -> str:
    """Return what a pseudo-terminal of 80 columns receives, control codes included."""
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "80")
    master, slave = os.openpty()
    received: list[bytes] = []

    def drain() -> None:
        while True:
            try:
                chunk = os.read(master, 65536)
            except OSError:  # the other end is closed
                return
            if not chunk:
                return
            received.append(chunk)

    reader = threading.Thread(target=drain)
    reader.start()
    with os.fdopen(slave, "w", encoding="utf-8") as file:
        run(Console(True, file))
    reader.join()
    os.close(master)
    return b"".join(received).decode()


@pytest.mark.parametrize("columns", [40, 60, 80])
def test_metrics_on_a_narrow_terminal_are_not_wrapped(
    columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", str(columns))
    file = io.StringIO()
    monkeypatch.setattr(file, "isatty", lambda: True)
    console = Console(True, file)
    console.log(record(1, val_loss=4.75))
    lines = CONTROL.sub("", file.getvalue()).splitlines()
    assert max(map(len, lines)) < columns and ("lr" in lines[0]) == (columns == 80)
    assert {"4.5000", "4.7500"} <= set(lines[1].split())


def shown_lines(output: str) -> list[str]:
    return re.split(r"[\r\n]+", CONTROL.sub("", output))


def test_disabled_console_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    show_run(Console(False))
    file = io.StringIO()
    show_run(Console(False, file))
    assert capfd.readouterr() == ("", "") and file.getvalue() == ""


def test_plain_output_has_no_control_code_and_fits_80_columns() -> None:
    for max_steps in (40, 1_200_000):
        output = plain(lambda console, steps=max_steps: show_run(console, steps))  # type: ignore[misc]
        assert all(c.isprintable() or c == "\n" for c in output)
        lines = [line for line in output.split("\n") if COMMAND not in line]
        assert max(map(len, lines)) <= 80


def test_plain_values_are_aligned_with_headings() -> None:
    def run(console: Console) -> None:
        console.start(0, 100)
        console.log(record(1))
        console.log(record(100, loss=12.5, grad_norm=float("nan"), val_loss=4.75))

    names, first, last = plain(run).splitlines()
    ends = [m.end() for m in re.finditer(r"\S+( [a-z]\S*)?", names)]
    assert len(ends) == 7
    assert [m.end() for m in re.finditer(r"\S+", first)] == ends[:-1]
    assert [m.end() for m in re.finditer(r"\S+", last)] == ends
    assert last.split()[:2] == ["100/100", "12.5000"] and last.split()[2] == "-"
    assert last.split()[-1] == "4.7500"


def test_headings_repeat_at_interval() -> None:
    def run(console: Console) -> None:
        console.start(0, 100)
        for step in range(1, 2 * HEADING_INTERVAL + 1):
            console.log(record(step))

    lines = plain(run).splitlines()
    named = [i for i, line in enumerate(lines) if "grad norm" in line]
    assert named == [0, HEADING_INTERVAL + 1]


def test_each_plain_line_is_flushed() -> None:
    class Unflushed(io.StringIO):
        pending = 0

        def write(self, text: str) -> int:
            assert not self.pending, "a line was written before the previous one was flushed"
            self.pending += text.count("\n")
            return super().write(text)

        def flush(self) -> None:
            self.pending = 0

    file = Unflushed()
    show_run(Console(True, file))
    assert file.pending == 0 and file.getvalue()


def test_record_with_step_alone_is_shown() -> None:
    assert "-" in plain(lambda console: console.log({"step": 3, "loss": None}))


def test_control_codes_in_text_are_escaped(monkeypatch: pytest.MonkeyPatch) -> None:
    hostile = "\x1b[2J\x07 def f():\n\treturn [bold]1[/bold]"
    expected = "\\x1b[2J\\x07 def f():\n    return [bold]1[/bold]"
    assert plain(lambda console: console.note(hostile)) == expected + "\n"
    output = terminal(lambda console: console.note(hostile), monkeypatch)
    assert output.replace("\r\n", "\n") == expected + "\n"


def test_commands_are_unbroken_on_separate_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    assert f"\n    {COMMAND}\n" in plain(show_run)
    # Control codes are not stripped here, so a colour in the command would fail.
    assert f"\r\n    {COMMAND}\r\n" in terminal(show_run, monkeypatch)


def test_paths_in_rows_and_notes_are_never_split(monkeypatch: pytest.MonkeyPatch) -> None:
    path = "/a/path/without/a/space" * 5

    def run(console: Console) -> None:
        console.note(path)
        console.summary("Done", [("folder", path)], [])

    for output in (plain(run), terminal(run, monkeypatch)):
        assert sum(path in line for line in shown_lines(output)) == 2


def test_progress_bar_shows_metrics_within_width(monkeypatch: pytest.MonkeyPatch) -> None:
    output = terminal(show_run, monkeypatch)
    lines = [line for line in shown_lines(output) if COMMAND not in line]
    assert max(map(len, lines)) <= 80
    bar = [line for line in lines if line.startswith("step 40/40")][-1]
    assert all(part in bar for part in ("loss 4.5000", "val 4.7500", "12.3k tok/s", "0:00:00 left"))
    assert output.count("\x1b[?25l") == output.count("\x1b[?25h") == 1  # cursor hidden and restored
    remarks = [line for line in lines if line.startswith("remark")]
    assert remarks == [f"remark {step}" for step in range(1, 6)]


def test_terminal_keeps_a_line_of_metrics_for_each_logged_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lines = shown_lines(terminal(show_run, monkeypatch))
    steps = [line.split()[0] for line in lines if re.match(r" *\d+/40  ", line)]
    logged = shown_lines(plain(show_run))
    assert steps == [line.split()[0] for line in logged if re.match(r" *\d+/40  ", line)] != []


def test_values_that_are_not_finite_are_never_printed_as_figures(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def run(console: Console) -> None:
        console.start(0, 100)
        for value in (float("nan"), float("inf"), float("-inf")):
            figures = dict.fromkeys(("loss", "grad_norm", "tokens_per_second", "val_loss"), value)
            console.log(record(1, **figures, step_seconds=value))
        console.stop()

    for output in (plain(run), terminal(run, monkeypatch)):
        assert not re.search(r"\b(nan|inf)\b", output)


def test_progress_bar_starts_no_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(console: Console) -> None:
        before = threading.active_count()
        console.start(0, 10)
        console.log(record(1))
        assert threading.active_count() == before
        console.stop()

    terminal(run, monkeypatch)


@pytest.mark.parametrize("on_terminal", [False, True])
def test_text_is_printed_despite_errors_of_rich(
    monkeypatch: pytest.MonkeyPatch, on_terminal: bool
) -> None:
    def fail(*arguments: Any, **options: Any) -> None:
        raise RuntimeError("a bug")

    def run(console: Console) -> None:
        for name in ("start", "stop", "update"):
            monkeypatch.setattr(console_module.Progress, name, fail)
        if not on_terminal:
            monkeypatch.setattr(console_module.RichConsole, "print", fail)
        console.start(0, 40)
        console.log(record(1))
        console.note("remark é")
        console.stop()
        console.summary("Done", [("loss", "4.5")], [("evaluate", COMMAND)])

    output = terminal(run, monkeypatch) if on_terminal else plain(run)
    assert ("remark é" if on_terminal else r"remark \xe9") in output
    assert "1/40" in output and COMMAND in output


def test_output_is_plain_once_the_terminal_has_disappeared(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        exists = True

        def isatty(self) -> bool:
            return self.exists

    monkeypatch.setenv("TERM", "xterm")
    file = Terminal()
    console = Console(True, file)
    console.start(0, 10)
    console.log(record(1))
    assert CONTROL.search(file.getvalue())
    file.exists = False
    file.seek(0)
    file.truncate()
    console.log(record(2))
    console.stop()
    show_run(console)
    assert "4.5000" in file.getvalue() and not CONTROL.search(file.getvalue())


def test_character_outside_encoding_becomes_question_mark() -> None:
    raw = io.BytesIO()
    file = io.TextIOWrapper(raw, encoding="ascii")
    Console(True, file).note("caf\u00e9")
    assert raw.getvalue() == b"caf?\n"


def test_time_left_includes_time_between_steps(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = [100.0]
    monkeypatch.setattr(console_module.time, "monotonic", lambda: clock[0])

    def run(console: Console) -> None:
        console.start(10, 100)
        for step in (20, 30, 40):
            console.log(record(step))  # 2 s per step, 3 s per step including saves
            clock[0] += 30.0

    lines = plain(run).splitlines()[1:]
    assert [line.split()[5] for line in lines] == [duration(s) for s in (80 * 2, 70 * 3, 60 * 3)]


@given(st.floats(1.0, 9.99e14))
def test_compact_count_is_short_and_accurate(value: float) -> None:
    text = compact(value)
    factor = {"k": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}.get(text[-1], 1.0)
    # Rounding to three significant digits changes at most half a unit of the third.
    assert float(text.rstrip("kMBT")) * factor == pytest.approx(value, rel=0.5e-2)
    assert len(text) <= 5


@given(st.integers(0, 99 * 3600))
def test_duration_can_be_parsed_back(seconds: int) -> None:
    hours, minutes, rest = map(int, duration(seconds).split(":"))
    assert hours * 3600 + minutes * 60 + rest == seconds and minutes < 60 and rest < 60


def test_long_duration_is_in_days() -> None:
    assert duration(4 * 86400 + 4 * 3600 + 59) == "4d 04h"
    assert duration(None) == "-"


def test_table_has_right_aligned_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(console: Console) -> None:
        console.table("Sizes", ["what", "GiB"], [["weights", "3.70"], ["all\x1b[31m", "123.45"]])

    title, names, weights, everything, empty = plain(run).splitlines()
    assert (title, empty) == ("Sizes", "")
    assert len(names) == len(weights) == len(everything)
    assert weights.startswith("  weights ") and everything.startswith("  all\\x1b[31m ")
    shown = shown_lines(terminal(run, monkeypatch))
    assert [line for line in shown if line] == [title, names, weights, everything]
