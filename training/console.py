"""Terminal output of a run: header, progress, notes, and a summary with commands to copy.

Metrics are aligned lines, each flushed; a terminal also shows a `rich` panel and, below the lines,
a progress bar. Output to a file or pipe has no control codes. Ranks other than 0 use a disabled
console, so callers do not check the rank. Only `log` redraws the bar: there is no refresh thread,
so the bar stops if training hangs. `resilience.standard_streams` handles output that fails; text
that `rich` cannot print is printed without it.
"""

import math
import os
import sys
import textwrap
import time
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, TextIO

from rich.box import ROUNDED
from rich.console import Console as RichConsole
from rich.panel import Panel
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.table import Table
from rich.text import Text

from training.metrics import METRICS, Metric

PLAIN_WIDTH = 80
HEADING_INTERVAL = 20  # logged lines between two lines of column headings
# In this order on a narrow terminal.
DROPPED = ("slowest", "lr", "bubble", "grad norm", "tokens/s", "time left")


def compact(value: float | None) -> str:
    """Format a count with three significant digits and a suffix: 950, 12.3k, 4.56M, 15.6T."""
    if value is None or not math.isfinite(value):
        return "-"
    rounded = float(f"{value:.3g}")  # rounded first, so that 999.9 becomes 1.00k
    for unit, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(rounded) >= unit:
            decimals = 3 - len(str(int(abs(rounded) / unit)))
            return f"{rounded / unit:.{max(0, decimals)}f}{letter}"
    return f"{rounded:g}"


def duration(seconds: float | None) -> str:
    """Format a duration: 0:03:12, 27:40:00, and from 100 hours 4d 04h."""
    if seconds is None or not math.isfinite(seconds):
        return "-"
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    if hours >= 100:
        return f"{hours // 24}d {hours % 24:02d}h"
    return f"{hours}:{minute:02d}:{second:02d}"


class _Output(RichConsole):
    """rich's console, which by default exits the process when a pipe is closed."""

    def on_broken_pipe(self) -> None:
        """Raise the error instead of exiting."""
        raise


class Console:
    """Terminal output of one process.

    Args:
        enabled: Whether to print anything; true on rank 0 only.
        file: Output file, standard output if None.
    """

    def __init__(self, enabled: bool, file: TextIO | None = None) -> None:
        self.enabled = enabled
        self._file = file or sys.stdout
        self._set_terminal(self._file.isatty() and os.environ.get("TERM", "dumb") != "dumb")
        self._progress: Progress | None = None
        self._task = TaskID(0)
        self._max_steps = 0
        self._lines = 0
        self._val_loss: float | None = None
        # (time, step) of recent logs: the estimate of the time left includes saves
        self._pace: deque[tuple[float, int]] = deque(maxlen=50)

    def _set_terminal(self, terminal: bool) -> None:
        self._terminal = terminal
        self._rich = _Output(
            file=self._file,
            width=None if terminal else PLAIN_WIDTH,
            force_terminal=terminal,
            highlight=False,
            quiet=not self.enabled,
        )

    def _check_terminal(self) -> None:
        """Print no control codes once the terminal has disappeared."""
        if self._terminal and not self._file.isatty():
            self.stop()
            self._set_terminal(False)

    def header(self, title: str, rows: Sequence[tuple[str, str]]) -> None:
        """Print a title and (name, value) rows."""
        self._check_terminal()
        if not self._terminal:
            for line in (title, *_row_lines(rows, PLAIN_WIDTH), ""):
                self._print(line)
            return
        grid = Table.grid(padding=(0, 2))
        grid.add_column(style="cyan", no_wrap=True)
        grid.add_column(overflow="fold")
        for name, value in rows:
            grid.add_row(self._text(name), self._text(value))
        heading = self._text(title, style="bold")
        panel = Panel(grid, title=heading, title_align="left", box=ROUNDED, expand=False)
        self._rich.print(panel)

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Print aligned columns under a title: the first is text, the others are numbers."""
        self._print(title, style="bold")
        cells = [[_clean(value) for value in row] for row in (columns, *rows)]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        for first, *others in cells:
            numbers = [each.rjust(width) for each, width in zip(others, widths[1:], strict=True)]
            self._print("  ".join(["  " + first.ljust(widths[0]), *numbers]).rstrip())
        self._print("")

    def start(self, first_step: int, max_steps: int) -> None:
        """Start the progress display with `first_step` of `max_steps` steps completed."""
        self.stop()
        self._max_steps = max_steps
        self._lines = 0
        self._pace.clear()
        self._check_terminal()
        if not (self._terminal and self.enabled):
            return
        columns = (
            TextColumn("{task.fields[step]}", style="bold"),
            BarColumn(bar_width=None, complete_style="cyan", finished_style="green"),
            TextColumn("{task.fields[metrics]}"),
        )
        self._progress = Progress(*columns, console=self._rich, auto_refresh=False, expand=True)
        step = f"step {first_step}/{max_steps}"
        try:
            self._task = self._progress.add_task(
                "", total=max_steps, completed=first_step, step=step, metrics="first step"
            )
            self._progress.start()
        except Exception:  # of rich: metrics are printed without the bar
            self._progress = None

    def log(self, record: Mapping[str, Any]) -> None:
        """Show a metrics record; only its `step` is required."""
        if not self.enabled:
            return
        self._check_terminal()
        step = int(record["step"])
        left = self._seconds_left(step, record.get("step_seconds"))
        self._log_line(record, left)  # on a terminal too, where it stays in the scrollback
        if self._progress is None:
            return
        if _is_figure(record.get("val_loss")):
            self._val_loss = record["val_loss"]
        loss = record.get("loss")
        metrics = [f"loss {loss:.4f}" if _is_figure(loss) else "loss -"]
        if self._val_loss is not None:
            metrics.append(f"val {self._val_loss:.4f}")
        metrics.append(f"{compact(record.get('tokens_per_second'))} tok/s")
        metrics.append(f"{duration(left)} left")
        shown = f"step {step}/{self._max_steps}"
        fields: dict[str, Any] = {"step": shown, "metrics": "  ".join(metrics)}
        with suppress(Exception):  # of rich; the line above has the metrics
            self._progress.update(self._task, completed=step, refresh=True, **fields)

    def note(self, text: str) -> None:
        """Print a message, above the progress bar if there is one."""
        self._print(text)

    def stop(self) -> None:
        """Stop the progress display, leaving the bar on the screen."""
        progress, self._progress = self._progress, None
        if progress is not None:
            self._rich.quiet = not self._file.isatty()  # no control codes without a terminal
            with suppress(Exception):  # of rich
                progress.stop()

    def summary(
        self, title: str, rows: Sequence[tuple[str, str]], commands: Sequence[tuple[str, str]]
    ) -> None:
        """Print a title, (name, value) rows, and (description, command) pairs to copy.

        Each command is a separate line, never wrapped, truncated or coloured.
        """
        self.stop()
        self._print("")
        self._print(title, style="bold")
        width = self._rich.width
        lines = _row_lines(rows, width)
        for description, command in commands:
            described = ["  " + line for line in _wrap(_clean(description) + ":", width - 2)]
            lines += ["", *described, "    " + command]
        for line in lines:
            self._print(line)

    def _log_line(self, record: Mapping[str, Any], left: float | None) -> None:
        """Print one aligned line of metrics, with headings above every `HEADING_INTERVAL` lines."""
        cells = [(f"{record['step']}/{self._max_steps}", "step", 2 * len(str(self._max_steps)) + 1)]
        for optional in (False, True):  # optional columns come last
            cells += [
                (_format(record.get(metric.key), metric), metric.column, 8)
                for metric in METRICS
                if metric.column is not None and metric.optional == optional
                if metric.key in record or not metric.of_pipeline
            ]
            if not optional:
                cells.append((duration(left), "time left", 8))
        for dropped in DROPPED if self._terminal else ():
            if (
                sum(max(width, len(heading)) + 2 for _, heading, width in cells) - 2
                < self._rich.width
            ):
                break
            cells = [cell for cell in cells if cell[1] != dropped]
        values, headings, _ = zip(*cells, strict=True)
        for line in (values,) if self._lines % HEADING_INTERVAL else (headings, values):
            aligned = [
                text.rjust(max(width, len(heading)))
                for text, (_, heading, width) in zip(line, cells, strict=True)
            ]
            self._print("  ".join(aligned).rstrip())
        self._lines += 1

    def _seconds_left(self, step: int, step_seconds: float | None) -> float | None:
        """Estimate the time left from recent logs, for the first log from `step_seconds`."""
        self._pace.append((time.monotonic(), step))
        (first_time, first_step), (last_time, last_step) = self._pace[0], self._pace[-1]
        if last_step > first_step:
            step_seconds = (last_time - first_time) / (last_step - first_step)
        return None if step_seconds is None else max(0, self._max_steps - step) * step_seconds

    def _print(self, text: str, style: str = "") -> None:
        """Print and flush text, on a terminal with a style and above the progress bar."""
        try:
            self._check_terminal()
            self._rich.print(self._text(text, style), soft_wrap=True)
        except Exception:  # of rich
            if self.enabled:
                with suppress(Exception):
                    plain = _clean(text).encode("ascii", "backslashreplace").decode()
                    print(plain, file=self._file, flush=True)

    def _text(self, text: str, style: str = "") -> Text:
        """Return text to print; characters outside the file's encoding become "?"."""
        encoding = self._rich.encoding
        return Text(_clean(text).encode(encoding, "replace").decode(encoding), style=style)


def _is_figure(value: float | None) -> bool:
    """Return whether a value can be printed as a number: it exists and is finite."""
    return value is not None and math.isfinite(value)


def _format(value: float | None, metric: Metric) -> str:
    if not _is_figure(value):
        return "" if metric.optional and value is None else "-"
    return compact(value) if metric.spec == "compact" else format(value, metric.spec)


def _clean(text: str) -> str:
    """Escape control codes, which generated text may contain."""
    escaped = (c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text.expandtabs(4))
    return "".join(escaped)


# Long words, such as paths, are never split.
_wrap = partial(textwrap.wrap, break_long_words=False, break_on_hyphens=False)


def _row_lines(rows: Sequence[tuple[str, str]], width: int) -> list[str]:
    """Return indented lines of aligned names and wrapped values."""
    size = max((len(_clean(name)) for name, _ in rows), default=0)
    lines = []
    for name, value in rows:
        first, *rest = _wrap(_clean(value), max(width - size - 4, 1)) or [""]
        lines.append(f"  {_clean(name):<{size}}  {first}")
        lines += [" " * (size + 4) + line for line in rest]
    return lines
