"""Start of a program: streams that cannot fail, signals, and a first line before the slow imports.

Programs call `start_up` under `if __name__ == "__main__"`, before torch is imported. The terminal
may be missing, closed, full or limited to ASCII, and matplotlib may be set to a notebook's backend;
none of this should end a program with a trace. Imports only the standard library,
`parallel` and `resilience.standard_streams`.
"""

import os
import signal
import sys
from types import TracebackType

from resilience.processes import is_first_process
from resilience.standard_streams import protect_streams

HANDLED_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)


def start_up(loading: str | None = None) -> None:
    """Make the standard streams safe, and print the first line on the first process.

    Args:
        loading: Line for standard output of a run, which may later be continued in a file; None
            prints a line to standard error if that is a terminal, since output may be data.
    """
    protect_streams(is_run=loading is not None)
    reset_signals()
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


def reset_signals() -> None:
    """Accept signals that the parent of this process has blocked, and the exit codes of children.

    An ignored SIGCHLD hides the exit code of a child that was killed.
    """
    signal.pthread_sigmask(signal.SIG_UNBLOCK, HANDLED_SIGNALS)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)


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
