"""A process exits in time with its own exit code, whatever its threads do."""

import subprocess
import sys
import time

import pytest
from processes import linux

from resilience.exit_codes import ExitCode

pytestmark = linux

HANGS = {
    "with the GIL held": "import ctypes; ctypes.PyDLL(None).sleep(60)",
    "in a thread that Python joins": (
        "import threading; threading.Thread(target=time.sleep, args=(60,)).start()"
    ),
    "in an exit handler": "import atexit; atexit.register(time.sleep, 60)",
}


@pytest.mark.parametrize("hang", HANGS.values(), ids=HANGS)
def test_process_that_hangs_exits_with_its_code(hang: str) -> None:
    program = f"""
import time
from resilience.exit_timer import ExitTimer
timer = ExitTimer()
timer.start(30, {int(ExitCode.RANK_FAILED)})
timer.start(0.2, {int(ExitCode.STOPPED)})
{hang}
"""
    started = time.monotonic()
    assert subprocess.run([sys.executable, "-c", program]).returncode == ExitCode.STOPPED
    assert time.monotonic() - started < 30


def test_cancelled_timer_does_not_exit() -> None:
    program = """
import time
from resilience.exit_timer import ExitTimer
timer = ExitTimer()
timer.start(0.1, 71)
timer.cancel()
time.sleep(0.3)
"""
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0


def test_late_block_exits_with_a_message() -> None:
    program = """
import threading, time
from resilience.exit_timer import exit_if_late
with exit_if_late("reading", 30, 70):
    pass
assert threading.active_count() == 1
for seconds in (1e300, float("inf")):
    with exit_if_late("writing", seconds, 70):
        time.sleep(0.01)
with exit_if_late("locking run.dir=/runs", 0.1, 72):
    time.sleep(60)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 72
    assert done.stderr.startswith("Aborting: locking run.dir=/runs takes more than 0.1 s."), (
        done.stderr
    )
