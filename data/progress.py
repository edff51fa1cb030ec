"""What a preparation tells while it works: a bar on a terminal, plain lines elsewhere."""

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn


class PreparationProgress:
    """Documents, tokens and speed on standard error; silent when `shown` is False."""

    def __init__(self, shown: bool) -> None:
        self.shown = shown
        self._began = time.monotonic()
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed:,.0f} documents  {task.fields[speed]}"),
            TimeElapsedColumn(),
            console=Console(stderr=True),
            transient=True,
            disable=not (shown and sys.stderr.isatty()),
        )

    def __enter__(self) -> "PreparationProgress":
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.stop()

    def begin(self, description: str, n_documents: int | None) -> TaskID:
        """Starts a part of the work; `n_documents` is None where nobody knows it before."""
        self._began = time.monotonic()
        return self._bar.add_task(description, total=n_documents, speed="", tokens=0)

    def advance(self, task: TaskID, n_documents: int, n_tokens: int) -> None:
        """Counts documents and tokens that are done."""
        state = self._bar.tasks[self._bar.task_ids.index(task)]
        tokens = state.fields["tokens"] + n_tokens
        seconds = max(time.monotonic() - self._began, 1e-9)
        speed = f"{tokens:,} tokens  {tokens / seconds:,.0f} tokens/s" if tokens else ""
        self._bar.update(task, advance=n_documents, tokens=tokens, speed=speed)

    def end(self, task: TaskID, line: str) -> None:
        """Replaces a part's bar by one line that tells what came of it."""
        self._bar.remove_task(task)
        if self.shown:
            self._bar.console.print(line, highlight=False, soft_wrap=True)
