"""Report a user error on the first process and exit all processes with the same code."""

import errno
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

from data.errors import DataError
from data.files import write_problem
from evaluation.errors import EvaluationError
from formats.errors import FormatError
from resilience.errors import LaunchError, OutOfMemory, exceeded_limit, is_out_of_memory
from resilience.exit_codes import ExitCode
from resilience.processes import is_first_process, process_ranks
from resilience.rank_check import report_error
from resilience.run_folder import RunFolderError
from resilience.slurm import host_name
from resilience.standard_streams import STDOUT, flush_result
from training.config_validation import ConfigError

# A full disk, a quota, a limit of file sizes, a read-only file system.
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
REPORT_SECONDS = 10.0  # other processes wait this long for the first one to report the error
COLLECT_SECONDS = 1.0  # the first process waits this long for the other ranks to fail as well


@contextmanager
def exit_on_user_error(
    interrupted: str = "Interrupted.", smaller: str = "use a machine with more memory"
) -> Iterator[None]:
    """Exit on errors that the user can correct; only the first process prints the message.

    The exit code is 1 or the code of the error, 76 if a process is out of memory, 130
    after Ctrl-C, and 141 if the reader of standard output has closed it.

    Args:
        interrupted: Message after Ctrl-C.
        smaller: Remedy if the program is out of memory.
    """
    code, known = ExitCode.USER_ERROR, False
    try:
        yield
        flush_result()
    except ConfigError as error:
        message = f"Invalid configuration:\n{error}"
    except (DataError, FormatError, LaunchError, EvaluationError) as error:
        message, known = f"Error: {error}", isinstance(error, LaunchError)
        code = getattr(error, "code", code)
    except RunFolderError as error:
        message, code = f"Error: {error}", error.code
    except (RuntimeError, MemoryError) as error:
        limit = exceeded_limit(error)
        if limit is None and not is_out_of_memory(error):
            raise
        code = ExitCode.OUT_OF_MEMORY if limit is None else ExitCode.USER_ERROR
        if limit is not None:
            message = f"Error: {limit}"
        elif isinstance(error, OutOfMemory):
            message = f"Error: {error}" if error.is_first else ""
        else:
            message = f"Error: out of memory ({' '.join(str(error).split())}); {smaller}"
    except KeyboardInterrupt:
        if is_first_process():
            print(interrupted, file=sys.stderr, flush=True)
        os._exit(ExitCode.INTERRUPTED)  # other ranks may wait for this one in a collective
    except OSError as error:
        is_stdout = error.filename == STDOUT
        if is_stdout and isinstance(error, BrokenPipeError):
            os._exit(128 + signal.SIGPIPE)
        limit = exceeded_limit(error)
        if not is_stdout and limit is None and error.errno not in DISK_ERRORS:
            raise
        path = Path(error.filename or Path.cwd())
        problem = str(error.strerror) if is_stdout else write_problem(error, path.parent)
        message = f"Error: {limit or f'{path} cannot be written ({problem})'}"
    else:
        return
    _report_and_exit(message, code, known)


def _report_and_exit(message: str, code: ExitCode, known: bool) -> NoReturn:
    """Print the message and exit, so that a launcher sees the exit of the first process first.

    Args:
        message: Empty if another process has printed one.
        known: The first process has the same error, or prints this one.
    """
    if message and (is_first_process() or code == ExitCode.OUT_OF_MEMORY):  # perhaps of this only
        print(message, file=sys.stderr, flush=True)
    if not is_first_process():
        _exit_on_sigterm(code)
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_initialized():
        _wait_for_report(distributed)
        os._exit(code)  # skips destroy_process_group, which would wait for the other ranks
    if not known and not report_error(message):
        print(f"Rank {process_ranks()[0]} on {host_name()}: {message}", file=sys.stderr, flush=True)
    if not is_first_process():
        time.sleep(REPORT_SECONDS)
    sys.exit(code)


def _exit_on_sigterm(code: ExitCode) -> None:
    """Exit with `code` on SIGTERM, which a launcher sends once the first process has exited.

    torchrun and srun terminate all processes when one fails, so the first to exit must be the one
    that has printed the error.
    """
    signal.signal(signal.SIGTERM, lambda *_: os._exit(code))
    signal.set_wakeup_fd(-1)  # disconnects the thread that turns signals into requests


def _wait_for_report(distributed: Any) -> None:
    """Return once the first process has reported and all ranks know, or after a short timeout.

    The other ranks need not fail, and the first one may have exited already.
    """
    with suppress(Exception):  # the store disappears with the first process
        store = distributed.distributed_c10d._get_default_store()
        if is_first_process():
            others = range(1, distributed.get_world_size())
            store.set("reported", "")
            store.wait([f"failed-{rank}" for rank in others], timedelta(seconds=COLLECT_SECONDS))
        else:
            store.wait(["reported"], timedelta(seconds=REPORT_SECONDS))
            store.set(f"failed-{distributed.get_rank()}", "")
