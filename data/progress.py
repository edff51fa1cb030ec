"""Progress reports on standard error: a bar on a terminal, otherwise an occasional line."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import NamedTuple

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn

REFRESH_SECONDS = 0.25
# Without a terminal, a line is logged after this time and then at growing intervals.
FIRST_LINE_SECONDS, RELATIVE_LINE_INTERVAL = 10.0, 0.05


class ProgressCounts(NamedTuple):
    """Input bytes, documents and tokens processed so far."""

    n_bytes: int
    n_documents: int
    n_tokens: int


class ProgressReporter:
    """Report documents, tokens, speed and remaining time; does nothing if `enabled` is False."""

    def __init__(self, enabled: bool) -> None:
        self.enabled = enabled
        self.console = Console(stderr=True)

    def log(self, line: str) -> None:
        """Print one permanent line."""
        if self.enabled:
            self.console.print(line, highlight=False, soft_wrap=True, markup=False)

    def _progress(self, *columns: str | ProgressColumn) -> Progress:
        disable = not (self.enabled and self.console.is_terminal)
        return Progress(*columns, console=self.console, transient=True, disable=disable)

    @contextmanager
    def bar(
        self, description: str, *columns: ProgressColumn
    ) -> Iterator[Callable[[int, int], None]]:
        """Show a bar on a terminal and yield its callback `update(done, total)`."""
        with self._progress(*columns) as bar:
            task = bar.add_task(description, total=None)
            yield lambda done, total: bar.update(task, completed=done, total=total)

    @contextmanager
    def watch(
        self, description: str, read_counts: Callable[[], ProgressCounts], n_bytes: int | None
    ) -> Iterator[None]:
        """Report the progress of the work inside the `with` block.

        Args:
            n_bytes: Total input bytes; None if unknown, which omits the remaining time.
        """
        if not self.enabled:
            yield
            return
        stop = threading.Event()
        with self._progress("{task.description}", BarColumn(), "{task.fields[status]}") as bar:
            task = bar.add_task(description, total=n_bytes, status="")

            def report() -> None:
                start = time.monotonic()
                first, next_line = read_counts(), FIRST_LINE_SECONDS
                while not stop.wait(REFRESH_SECONDS):
                    counts, seconds = read_counts(), time.monotonic() - start
                    status = format_progress(first, counts, seconds, n_bytes)
                    if not bar.disable:
                        bar.update(task, completed=counts.n_bytes, status=status)
                    elif seconds >= next_line:
                        next_line += max(FIRST_LINE_SECONDS, RELATIVE_LINE_INTERVAL * seconds)
                        self.log(f"{description}: {status}")

            reporter = threading.Thread(target=report, daemon=True)
            reporter.start()
            try:
                yield
            finally:
                stop.set()
                reporter.join()


def format_progress(
    first: ProgressCounts, counts: ProgressCounts, seconds: float, n_bytes: int | None
) -> str:
    """Return one status line; speed and remaining time refer to the `seconds` since `first`."""
    status = f"{counts.n_documents:,} documents"
    if counts.n_tokens:
        tokens_per_second = (counts.n_tokens - first.n_tokens) / seconds
        status += f"  {counts.n_tokens:,} tokens  {tokens_per_second:,.0f} tokens/s"
    n_read = counts.n_bytes - first.n_bytes
    # Arrow files and streamed datasets count bytes only when a part is complete, so an early
    # estimate would be far off.
    reliable = 100 * n_read >= (n_bytes or 0) or counts.n_documents - first.n_documents >= 1000
    if n_bytes and n_read and reliable:
        remaining = timedelta(seconds=round(seconds * (n_bytes - counts.n_bytes) / n_read))
        status += f"  {counts.n_bytes / n_bytes:.0%}  {remaining} left"
    return status
