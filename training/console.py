"""What a person sees of a run: a header, progress, notes, and a summary with commands to copy.

On a terminal a `rich` panel and bar; in a file or a pipe plain aligned lines, flushed one by one,
without a control code. Ranks other than 0 hold a disabled console, so callers never ask who they
are. The bar is redrawn by `log` alone: no thread runs beside the training loop, and a bar that
stands still tells that the run does. Output that fails (a closed pipe) never stops training.
"""

import contextlib
import os
import sys
import textwrap
import time
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any, TextIO

from rich.box import ROUNDED
from rich.console import Console as RichConsole
from rich.panel import Panel
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.table import Table
from rich.text import Text

PLAIN_WIDTH = 80
COLUMNS_EVERY = 20  # logged lines between two lines of column names, for a reader of `tail`


def compact(value: float | None) -> str:
    """A count in three significant digits and a letter: 950, 12.3k, 4.56M, 15.6T."""
    if value is None:
        return "-"
    rounded = float(f"{value:.3g}")  # before the letter is chosen: 999.9 is 1.00k
    for unit, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(rounded) >= unit:
            decimals = 3 - len(str(int(abs(rounded) / unit)))
            return f"{rounded / unit:.{max(0, decimals)}f}{letter}"
    return f"{rounded:g}"


def duration(seconds: float | None) -> str:
    """A time to wait: 0:03:12, 27:40:00, from 100 hours on 4d 04h."""
    if seconds is None:
        return "-"
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    if hours >= 100:
        return f"{hours // 24}d {hours % 24:02d}h"
    return f"{hours}:{minute:02d}:{second:02d}"


class Console:
    """A run's output to a person; a disabled one prints nothing.

    Args:
        enabled: whether this process talks (rank 0).
        file: where to; standard output when None.
    """

    def __init__(self, enabled: bool, file: TextIO | None = None) -> None:
        self.enabled = enabled
        self._file = file or sys.stdout
        self._rich: RichConsole | None = None
        if enabled and self._file.isatty() and os.environ.get("TERM", "dumb") != "dumb":
            self._rich = RichConsole(file=self._file, highlight=False)
        self._progress: Progress | None = None
        self._task = TaskID(0)
        self._max_steps = 0
        self._lines = 0
        self._val_loss: float | None = None
        # (seconds, step) of the latest logs: time left follows them, pauses for saves included
        self._pace: deque[tuple[float, int]] = deque(maxlen=50)

    def header(self, title: str, rows: Sequence[tuple[str, str]]) -> None:
        """What is about to run: a title over (name, value) rows."""
        if self._rich is None or not self.enabled:
            self._print(_clean(title))
            for line in _row_lines(rows, PLAIN_WIDTH):
                self._print(line)
            self._print("")
            return
        grid = Table.grid(padding=(0, 2))
        grid.add_column(style="cyan", no_wrap=True)
        grid.add_column(overflow="fold")
        for name, value in rows:
            grid.add_row(Text(_clean(name)), Text(_clean(value)))
        heading = Text(_clean(title), style="bold")
        self._print_rich(Panel(grid, title=heading, title_align="left", box=ROUNDED, expand=False))

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Aligned columns under a title; the first column is text, the others are numbers."""
        first, *lines = _table_lines(title, columns, rows)
        if self._rich is None or not self.enabled:
            self._print(first)
        else:
            self._print_rich(Text(first, style="bold"), soft_wrap=True)
        for line in lines:
            self._print(line)

    def start(self, first_step: int, max_steps: int) -> None:
        """Begin to show progress, `first_step` of `max_steps` steps being done."""
        self.stop()
        self._max_steps = max_steps
        self._lines = 0
        self._pace.clear()
        if self._rich is None or not self.enabled:
            return
        self._progress = Progress(
            TextColumn("{task.fields[step]}", style="bold"),
            BarColumn(bar_width=None, complete_style="cyan", finished_style="green"),
            TextColumn("{task.fields[figures]}"),
            console=self._rich,
            auto_refresh=False,
            expand=True,
        )
        step = f"step {first_step}/{max_steps}"
        self._task = self._progress.add_task(
            "", total=max_steps, completed=first_step, step=step, figures="first step"
        )
        try:
            self._progress.start()
        except (OSError, ValueError):
            self._give_up()

    def log(self, record: Mapping[str, Any]) -> None:
        """Show a record of `metrics.jsonl`: `step`, and whatever else of its fields is there."""
        if not self.enabled:
            return
        step = int(record["step"])
        left = self._seconds_left(step, record.get("step_seconds"))
        if self._progress is None:
            self._log_line(record, left)
            return
        if record.get("val_loss") is not None:
            self._val_loss = record["val_loss"]
        figures = [f"loss {_number(record.get('loss'), '.4f')}"]
        if self._val_loss is not None:
            figures.append(f"val {_number(self._val_loss, '.4f')}")
        figures.append(f"{compact(record.get('tokens_per_second'))} tok/s")
        figures.append(f"{duration(left)} left")
        try:
            self._progress.update(
                self._task,
                completed=step,
                step=f"step {step}/{self._max_steps}",
                figures="  ".join(figures),
                refresh=True,
            )
        except (OSError, ValueError):
            self._give_up()

    def note(self, text: str) -> None:
        """A remark, on lines of its own above the bar."""
        if self._rich is None or not self.enabled:
            self._print(_clean(text))
        else:
            self._print_rich(Text(_clean(text)), soft_wrap=True)

    def stop(self) -> None:
        """End the progress: the bar stays as it stands, the cursor comes back."""
        if self._progress is not None:
            try:
                self._progress.stop()
            except (OSError, ValueError):
                self._give_up()
            self._progress = None

    def summary(
        self, title: str, rows: Sequence[tuple[str, str]], commands: Sequence[tuple[str, str]]
    ) -> None:
        """The end of a run: (name, value) rows, then (what it does, command) to copy.

        A command is printed on one line of its own, never wrapped, cut or coloured.
        """
        self.stop()
        if self._rich is None or not self.enabled:
            self._print("")
            self._print(_clean(title))
        else:
            self._print_rich("")
            self._print_rich(Text(_clean(title), style="bold"))
        width = PLAIN_WIDTH if self._rich is None else self._rich.width
        for line in _row_lines(rows, width):
            self._print(line)
        for what, command in commands:
            self._print("")
            for line in _wrap(_clean(what) + ":", width, indent="  "):
                self._print(line)
            self._print("    " + _clean(command))

    def _log_line(self, record: Mapping[str, Any], left: float | None) -> None:
        """One aligned line of figures; column names above the first and now and then."""
        steps = max(len("step"), 2 * len(str(self._max_steps)) + 1)
        columns = (
            ("step", steps, f"{record['step']}/{self._max_steps}"),
            ("loss", 8, _number(record.get("loss"), ".4f")),
            ("grad norm", 9, _number(record.get("grad_norm"), ".3f")),
            ("lr", 8, _number(record.get("lr"), ".2e")),
            ("tokens/s", 8, compact(record.get("tokens_per_second"))),
            ("time left", 9, duration(left)),
            ("val loss", 8, _number(record.get("val_loss"), ".4f", absent="")),
        )
        if self._lines % COLUMNS_EVERY == 0:
            self._print("  ".join(f"{name:>{width}}" for name, width, _ in columns))
        self._lines += 1
        self._print("  ".join(f"{value:>{width}}" for _, width, value in columns).rstrip())

    def _seconds_left(self, step: int, step_seconds: float | None) -> float | None:
        """From the pace of the latest logs; at the first one from the step's own time."""
        self._pace.append((time.monotonic(), step))
        (first_time, first_step), (last_time, last_step) = self._pace[0], self._pace[-1]
        if last_step > first_step:
            step_seconds = (last_time - first_time) / (last_step - first_step)
        return None if step_seconds is None else max(0, self._max_steps - step) * step_seconds

    def _print(self, line: str) -> None:
        """One line as it is, flushed; what the file's encoding lacks becomes a question mark."""
        if not self.enabled:
            return
        encoding = getattr(self._file, "encoding", None) or "utf-8"
        try:
            self._file.write(line.encode(encoding, "replace").decode(encoding) + "\n")
            self._file.flush()
        except (OSError, ValueError):  # a closed pipe or file
            self._give_up()

    def _print_rich(self, content: Panel | Text | str, soft_wrap: bool = False) -> None:
        assert self._rich is not None, "only on a terminal"
        try:
            self._rich.print(content, soft_wrap=soft_wrap)
        except (OSError, ValueError):
            self._give_up()

    def _give_up(self) -> None:
        """Nobody reads any more: be silent from here on."""
        self.enabled = False
        progress, self._progress = self._progress, None
        if progress is not None:
            with contextlib.suppress(OSError, ValueError):
                progress.stop()  # gives sys.stdout and sys.stderr back


def _number(value: float | None, form: str, absent: str = "-") -> str:
    return absent if value is None else format(value, form)


def _clean(text: str) -> str:
    """Text without control codes, which a model's sample may hold: they are shown escaped."""
    shown = (c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text.expandtabs(4))
    return "".join(shown)


def _wrap(text: str, width: int, indent: str) -> list[str]:
    """Lines of at most `width` where words allow: a path is never cut."""
    return textwrap.wrap(
        text,
        width,
        initial_indent=indent,
        subsequent_indent=indent,
        break_long_words=False,
        break_on_hyphens=False,
    )


def _table_lines(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A title, names of columns and rows as aligned lines, and an empty one."""
    cells = [[_clean(value) for value in row] for row in (columns, *rows)]
    widths = [max(len(row[place]) for row in cells) for place in range(len(columns))]
    lines = [_clean(title)]
    for row in cells:
        first, *others = (
            f"{value:{'>' if place else '<'}{width}}"
            for place, (value, width) in enumerate(zip(row, widths, strict=True))
        )
        lines.append("  ".join([f"  {first}", *others]).rstrip())
    return [*lines, ""]


def _row_lines(rows: Sequence[tuple[str, str]], width: int) -> list[str]:
    """Indented lines of aligned names and wrapped values."""
    names = max((len(_clean(name)) for name, _ in rows), default=0)
    lines = []
    for name, value in rows:
        wrapped = _wrap(_clean(value), width, indent=" " * (names + 4)) or [""]
        wrapped[0] = f"  {_clean(name):<{names}}  " + wrapped[0].lstrip()
        lines += wrapped
    return lines
