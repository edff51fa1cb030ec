"""A cause that many ranks have in common is printed once, with the rank that failed first."""

import errno
import os

from checkpoint.writer import one_line
from resilience.heartbeat import Heartbeat, group_by_stack
from resilience.rank_check import RankReport, compare
from resilience.rank_groups import group_causes, name_ranks


def test_ranks_are_shown_as_spans() -> None:
    assert name_ranks([3]) == "rank 3"
    assert name_ranks([8, 0, 2, 1]) == "ranks 0-2, 8"


def test_causes_are_in_the_order_of_their_first_failure() -> None:
    causes = [(7, "a"), *((rank, "b") for rank in range(7)), (8, "a")]
    assert group_causes(causes) == {"a": [7, 8], "b": list(range(7))}


def test_error_of_512_ranks_at_the_start_is_one_line() -> None:
    reports = {
        rank: RankReport(rank, f"n{rank // 8}", error="no CUDA driver", order=2 + rank)
        for rank in range(511)
    }
    reports[511] = RankReport(511, "n63", error="torch cannot be imported", order=1)
    first, second = compare(reports, 512)[0]
    assert first == "rank 511 on n63: torch cannot be imported"
    assert second == "ranks 0-510 on n0, n1, n2, n3 and 60 more hosts: no CUDA driver"


def test_late_ranks_with_one_stack_are_shown_as_spans() -> None:
    beats = [Heartbeat(rank, "n0", 1, "step", 5, 700.0, 1) for rank in range(512)]
    assert "rank 0 (pid 1 on n0) and ranks 1-511 stuck" in beats[0].late_message(beats[1:])


def test_silent_ranks_with_one_stack_are_shown_as_spans() -> None:
    beats = [Heartbeat(rank, f"n{rank // 8}", 1, "step", 5) for rank in range(8, 16)]
    beats += [Heartbeat(16, "n2", 1, "step", 5, stack=["train.py:9 main"])]
    first, second = (group[0].silent_message(60.0, group[1:]) for group in group_by_stack(beats))
    assert first.startswith("no heartbeat from rank 8 (pid 1 on n1) and ranks 9-15 for 60 s; ")
    assert second.startswith("no heartbeat from rank 16 (pid 1 on n2) for 60 s; ")


def test_failed_save_of_all_ranks_is_one_cause() -> None:
    from torch.distributed.checkpoint.api import CheckpointException

    full = OSError(28, "No space left on device")
    failures = {rank: (full, None) for rank in range(512)}
    assert one_line(CheckpointException("save", failures)) == (  # type: ignore[arg-type]
        "ranks 0-511: No space left on device"
    )
    text = os.strerror(errno.EACCES)
    failures = {
        rank: (OSError(errno.EACCES, text, f"/r/.step-4/__{rank}_0.distcp"), None)
        for rank in range(512)
    }
    error = one_line(CheckpointException("save", failures))  # type: ignore[arg-type]
    assert error.startswith("ranks 0-511: ") and error.endswith("(/r/.step-4/*.distcp)")
