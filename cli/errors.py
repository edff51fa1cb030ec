"""How a program ends that cannot start: one process tells why, all end with the same code."""

import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

from data.errors import DataError
from evaluation.errors import TaskError
from formats.errors import FormatError
from parallel.errors import LaunchError
from parallel.mesh import is_first_process
from resilience.exit_codes import ExitCode
from resilience.run_folder import RunFolderError
from training.config_validation import ConfigError

TELLING_SECONDS = 10.0
"""How long the others wait at most for the first process to tell why none of them can start."""
MEETING_SECONDS = 1.0
"""How long the first process waits at most for the others to find out that they cannot start."""


@contextmanager
def exit_on_user_error(refused: str = "Not started") -> Iterator[None]:
    """Ends the program where it cannot start; only the first process tells why.

    The exit code is 1, or what the folder's error tells; after Ctrl-C 130. `refused` begins what
    is told.
    """
    code = ExitCode.USER_ERROR
    try:
        yield
    except ConfigError as error:
        message = f"{refused}, the configuration has problems:\n{error}"
    except (DataError, FormatError, LaunchError, TaskError) as error:
        message = f"{refused}: {error}"
    except RunFolderError as error:
        message, code = f"{refused}: {error}", error.code
    except KeyboardInterrupt:
        if is_first_process():
            print("Interrupted before the first step.", file=sys.stderr, flush=True)
        os._exit(ExitCode.INTERRUPTED)  # peers may wait for us in a collective call
    else:
        return
    if is_first_process():
        print(message, file=sys.stderr, flush=True)
    else:
        _keep_code(code)
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_initialized():
        _await_others(distributed)
        os._exit(code)  # no orderly end of the group: the others end by themselves
    if not is_first_process():
        time.sleep(TELLING_SECONDS)
    sys.exit(code)


def _keep_code(code: ExitCode) -> None:
    """SIGTERM is no request to stop any more: it comes when the first process has told and ended.

    torchrun and srun end all processes when one has failed: it must not be one that says nothing.
    """
    signal.signal(signal.SIGTERM, lambda *_: os._exit(code))
    signal.set_wakeup_fd(-1)  # what listened there ends with a code of its own


def _await_others(distributed: Any) -> None:
    """Returns when the first process has told why and every other one knows its exit code.

    Not every process need be refused, and the first one may be gone: nobody waits for long.
    """
    with suppress(Exception):  # the store ends with the first process
        store = distributed.distributed_c10d._get_default_store()
        if is_first_process():
            others = range(1, distributed.get_world_size())
            store.set("told", "")
            store.wait([f"refused-{rank}" for rank in others], timedelta(seconds=MEETING_SECONDS))
        else:
            store.wait(["told"], timedelta(seconds=TELLING_SECONDS))
            store.set(f"refused-{distributed.get_rank()}", "")
