"""What a preparation tells while it works: a bar on a terminal, a line now and then elsewhere."""

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import NamedTuple

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

REFRESH_SECONDS = 0.25
# Elsewhere than on a terminal: a line after as many seconds, and ever more seldom.
FIRST_LINE_SECONDS, LINE_INTERVAL = 10.0, 0.05


class Done(NamedTuple):
    """How far a preparation is: bytes of its input, documents and tokens."""

    n_bytes: int
    n_documents: int
    n_tokens: int


class PreparationProgress:
    """Documents, tokens, speed and time left on standard error; silent when `shown` is False."""

    def __init__(self, shown: bool) -> None:
        self.shown = shown
        self._console = Console(stderr=True)

    def say(self, line: str) -> None:
        """One line, to stay."""
        if self.shown:
            self._console.print(line, highlight=False, soft_wrap=True, markup=False)

    @contextmanager
    def watching(
        self, description: str, look: Callable[[], Done], n_bytes: int | None
    ) -> Iterator[None]:
        """Tells of work in the `with` block.

        Args:
            look: how far the work is
            n_bytes: all bytes of its input; None where nobody knows, so that no time left is told
        """
        if not self.shown:
            yield
            return
        stop = threading.Event()
        bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[told]}"),
            console=self._console,
            transient=True,
            disable=not sys.stderr.isatty(),
        )
        with bar:
            task = bar.add_task(description, total=n_bytes, told="")

            def tell() -> None:
                begin = time.monotonic()
                first, next_line = look(), FIRST_LINE_SECONDS
                while not stop.wait(REFRESH_SECONDS):
                    done, seconds = look(), time.monotonic() - begin
                    told = _told(first, done, seconds, n_bytes)
                    if not bar.disable:
                        bar.update(task, completed=done.n_bytes, told=told)
                    elif seconds >= next_line:
                        next_line = seconds + max(FIRST_LINE_SECONDS, LINE_INTERVAL * seconds)
                        self.say(f"{description}: {told}")

            teller = threading.Thread(target=tell, daemon=True)
            teller.start()
            try:
                yield
            finally:
                stop.set()
                teller.join()


def _told(first: Done, done: Done, seconds: float, n_bytes: int | None) -> str:
    """One line: documents, tokens, and since `first`, `seconds` ago, the speed and time left."""
    told = f"{done.n_documents:,} documents"
    if done.n_tokens:
        speed = (done.n_tokens - first.n_tokens) / seconds
        told += f"  {done.n_tokens:,} tokens  {speed:,.0f} tokens/s"
    read = done.n_bytes - first.n_bytes
    # Rows of Arrow files and of streams count no bytes until their part is done.
    far = 100 * read >= (n_bytes or 0) or done.n_documents - first.n_documents >= 1000
    if n_bytes and read and far:
        left = round(seconds * (n_bytes - done.n_bytes) / read)
        told += f"  {done.n_bytes / n_bytes:.0%}  {timedelta(seconds=left)} left"
    return told
