"""The flight recorder is on by default, and what the user has set is kept."""

import os
import pickle
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch._C._distributed_c10d as c10d

from resilience import flight_recorder
from resilience.config import TimeLimits
from resilience.exit_codes import ExitCode

LIMITS = TimeLimits(setup=1800, step=7200, checkpoint=3600)
HEARTBEAT = "TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC"
OLD_NAMES = {
    "TORCH_FR_BUFFER_SIZE": "TORCH_NCCL_TRACE_BUFFER_SIZE",
    "TORCH_FR_DUMP_TEMP_FILE": "TORCH_NCCL_DEBUG_INFO_TEMP_FILE",
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "NCCL_ASYNC_ERROR_HANDLING",
}


@pytest.fixture(autouse=True)
def _no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*OLD_NAMES, *OLD_NAMES.values(), HEARTBEAT):
        monkeypatch.setenv(name, "")  # restored at the end
        monkeypatch.delenv(name)


def test_variables_of_the_user_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in OLD_NAMES.values():
        monkeypatch.setenv(name, "7")
    flight_recorder.configure(tmp_path, LIMITS)
    assert not any(name in os.environ for name in OLD_NAMES)


def test_defaults_record_collectives_and_leave_aborts_to_the_watchdog(tmp_path: Path) -> None:
    flight_recorder.configure(tmp_path, LIMITS)
    assert os.environ["TORCH_NCCL_ASYNC_ERROR_HANDLING"] == "0"
    assert int(os.environ["TORCH_FR_BUFFER_SIZE"]) > 0
    assert int(os.environ[HEARTBEAT]) > LIMITS.step
    assert flight_recorder.dump(3) == tmp_path / "flight_recorder"
    assert "entries" in pickle.loads((tmp_path / "flight_recorder" / "rank_3").read_bytes())


def test_a_recorder_that_blocks_or_fails_does_not_delay_the_exit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flight_recorder, "SECONDS", 0.05)
    flight_recorder.configure(tmp_path, LIMITS)
    for function in (lambda: time.sleep(60), lambda: 1 / 0):
        monkeypatch.setattr(c10d, "_dump_nccl_trace", function, raising=False)
        assert flight_recorder.dump(0) is None


def test_a_recorder_that_blocks_all_python_threads_does_not_prevent_the_exit() -> None:
    """`PyDLL` keeps the GIL while it calls, as the recorder's binding does."""
    program = """
import ctypes, time
from resilience import flight_recorder, watchdog
from resilience.config import TimeLimits
watchdog.ABORT_SECONDS = 1.5
flight_recorder.dump = lambda rank: ctypes.PyDLL(None).sleep(60)
subject = watchdog.Watchdog(TimeLimits())
subject._connected, subject._state.rank = True, 1
subject._abort("rank 0 exited")
"""
    started = time.monotonic()
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    code = ExitCode.RANK_FAILED_BEFORE_SAVE if sys.platform == "linux" else 1
    assert result.returncode == code and time.monotonic() - started < 30
    assert "Aborting: rank 0 exited" in result.stderr and "in _abort" in result.stderr


@pytest.mark.parametrize("name", [*OLD_NAMES, HEARTBEAT])
def test_torch_reads_the_variables(name: str) -> None:
    """FlightRecorder.hpp is part of every build, ProcessGroupNCCL only of those with CUDA."""
    if name.startswith("TORCH_NCCL") and not torch.distributed.is_nccl_available():
        header = "ProcessGroupNCCL.hpp"
        include = Path(torch.__file__).parent / "include/torch/csrc/distributed/c10d"
        assert f'"{name}"' in (include / header).read_text()
        return
    folder = Path(torch.__file__).parent / "lib"
    assert any(name.encode() in path.read_bytes() for path in folder.glob("libtorch_c*.so"))
