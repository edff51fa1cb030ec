"""Start of a program: standard streams that cannot fail, and a first line before the slow imports.

Programs call `start_up` under `if __name__ == "__main__"`, before torch is imported. The terminal
may be missing, closed, full or limited to ASCII, and matplotlib may be set to a notebook's backend;
none of this should end a program with a trace. Imports only the standard library and `parallel`.
"""

import atexit
import os
import signal
import sys
from contextlib import suppress
from types import TracebackType
from typing import Any

from parallel.mesh import is_first_process

STDOUT = "standard output"


class TolerantStream:
    """A text stream whose output is dropped once writing fails: a closed pipe, a full disk."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream

    def write(self, text: str) -> int:
        """Write text and return its length."""
        with suppress(OSError, ValueError):
            self.stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Flush the stream."""
        with suppress(OSError, ValueError):
            self.stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


class ResultStream:
    """Standard output of a program that prints its result: the first error is raised each time.

    The error has the file name `STDOUT`. A caller that drops errors, such as a console, cannot
    hide it from `cli.errors`, which flushes at the end.
    """

    def __init__(self, stream: Any) -> None:
        self.stream = stream
        self.error: OSError | None = None

    def write(self, text: str) -> int:
        """Write text and return its length."""
        self._call(self.stream.write, text)
        return len(text)

    def flush(self) -> None:
        """Flush the stream."""
        self._call(self.stream.flush)

    def _call(self, function: Any, *arguments: str) -> None:
        if self.error is not None:
            raise self.error
        try:
            function(*arguments)
        except OSError as error:
            error.filename, self.error = STDOUT, error
            # Otherwise Python reports the same error again when it flushes stdout at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            raise

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def start_up(loading: str | None = None) -> None:
    """Make the standard streams safe, and print the first line on the first process.

    Args:
        loading: Line for standard output, whose later errors are then ignored as well; None prints
            a line to standard error if that is a terminal, since output may be data for a pipe.
    """
    _open_closed_streams()
    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError, ValueError):
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    sys.stderr = TolerantStream(sys.stderr)
    tolerant = TolerantStream(sys.stdout)
    sys.stdout = ResultStream(sys.stdout) if loading is None else tolerant
    atexit.register(setattr, sys, "stdout", tolerant)  # Python flushes it last
    sys.excepthook = _exit_on_interrupt
    # Programs draw image files only; a notebook's backend may not be installed here.
    os.environ["MPLBACKEND"] = "Agg"
    shows_flags = any(argument.startswith("-") for argument in sys.argv[1:])  # such as --cfg job
    if not is_first_process() or shows_flags:
        return
    if loading is not None:
        print(loading, flush=True)
    elif sys.stderr.isatty():
        print("Loading …", file=sys.stderr, flush=True)


def _open_closed_streams() -> None:
    """Connect closed standard streams to /dev/null, before a file gets their descriptor."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # returns the lowest free descriptor
    for name, descriptor, mode in (("stdin", 0, "r"), ("stdout", 1, "w"), ("stderr", 2, "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(descriptor, mode, encoding="utf-8", closefd=False))


def _exit_on_interrupt(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    """Print one line for Ctrl-C during start-up, and the trace of any other error."""
    if not issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, trace)
        return
    if is_first_process():
        print("Interrupted.", file=sys.stderr, flush=True)
    os._exit(128 + signal.SIGINT)
