"""What refuses a start: told by the first process, and every process ends with the same code."""

from pathlib import Path

import pytest
from fork_server import ForkServer

from resilience.exit_codes import ExitCode

REFUSED = """
import os, sys, time
from training.shutdown import exit_early
from cli.errors import exit_on_user_error
from checkpoint.restore import NoCheckpoint
from resilience.signals import Requests

if sys.argv[1] == "together":
    import torch.distributed
    torch.distributed.init_process_group("gloo")
Requests().catch_signals(exit_early)
with exit_on_user_error():
    if os.environ["RANK"] == sys.argv[2]:
        time.sleep(0.5)
    raise NoCheckpoint("the run is elsewhere")
"""


@pytest.mark.parametrize(("met", "late"), [("apart", "0"), ("together", "0"), ("together", "1")])
def test_the_first_process_tells_and_all_end_alike_whoever_is_sooner(
    fork_server: ForkServer, tmp_path: Path, met: str, late: str
) -> None:
    """Before and after they have met; what starts them ends all at once when one has failed."""
    program = tmp_path / "refused.py"
    program.write_text(REFUSED)
    start = fork_server.run([met, late], 2, program=str(program))
    assert start.output(0) == "Not started: the run is elsewhere\n"
    assert start.output(1) == ""
    assert start.exit_codes == {0: ExitCode.NO_CHECKPOINT, 1: ExitCode.NO_CHECKPOINT}
