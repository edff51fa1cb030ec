"""PyTorch's flight recorder: the last collectives of each rank, written before the watchdog exits.

It shows which rank did not join which collective. The recorder is part of the process groups and
reads environment variables when they are created; values that the user has set are kept. Names:
torch/csrc/distributed/c10d/FlightRecorder.hpp and ProcessGroupNCCL.hpp of PyTorch 2.11 to 2.13.
"""

import os
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

from resilience.config import TimeLimits
from resilience.exit_timer import run_limited

FOLDER = "flight_recorder"  # in the run folder
ENTRIES = "2000"  # collectives per rank, PyTorch's default: a megabyte
SECONDS = 3.0  # for writing

_SIZE = ("TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_TRACE_BUFFER_SIZE")
_PREFIX = ("TORCH_FR_DUMP_TEMP_FILE", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE")
_HEARTBEAT = ("TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC",)
_ERROR_HANDLING = ("TORCH_NCCL_ASYNC_ERROR_HANDLING", "NCCL_ASYNC_ERROR_HANDLING")


def configure(run_folder: Path, limits: TimeLimits) -> None:
    """Record collectives, and leave all exits to the watchdog; before process groups exist.

    By default, NCCL aborts the process soon after it has lost a peer (`SkipCleanUp`), and when a
    call into the driver blocks for 8 minutes, before the watchdog can report which rank failed and
    exit with its own code.
    """
    seconds = str(round(limits.group_timeout.total_seconds()))
    for names, value in (
        (_SIZE, ENTRIES),
        (_PREFIX, str(run_folder.absolute() / FOLDER / "rank_")),
        (_ERROR_HANDLING, "0"),
        (_HEARTBEAT, seconds),
    ):
        if not any(name in os.environ for name in names):
            os.environ[names[0]] = value  # PyTorch warns about the other, older name


def dump(rank: int) -> Path | None:
    """Write this rank's record and return the folder of all ranks; None if there is no record.

    Takes a few seconds at most, unless the recorder blocks in C++ with the GIL held.
    """
    prefix = next((os.environ[name] for name in _PREFIX if name in os.environ), None)
    if prefix is None:
        return None
    path, written = Path(f"{prefix}{rank}"), threading.Event()

    def write() -> None:
        from torch._C import _distributed_c10d

        c10d: Any = _distributed_c10d
        # Without NCCL, the recorder of gloo.
        function = getattr(c10d, "_dump_nccl_trace", None) or c10d._dump_fr_trace
        with suppress(Exception):  # of the recorder or the disk: the process exits anyway
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(function())
            written.set()

    run_limited(write, SECONDS)
    return path.parent if written.is_set() else None
