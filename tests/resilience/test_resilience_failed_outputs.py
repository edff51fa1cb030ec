"""Outputs that cannot be written are reported once for each output and cause."""

import errno
import os
from pathlib import Path

from resilience.failed_outputs import FailedOutputs


def system_error(number: int) -> OSError:
    return OSError(number, os.strerror(number))


def test_error_of_the_file_system_is_reported_once_for_all_outputs(tmp_path: Path) -> None:
    warnings: list[str] = []
    failed = FailedOutputs(tmp_path, warnings.append)
    for _ in range(2):
        failed.report("metrics.jsonl", system_error(errno.EROFS))
        failed.report("ledger.jsonl", system_error(errno.EROFS))
        failed.report("loss.png", system_error(errno.EIO))
    assert len(warnings) == 2
    assert "Could not write metrics.jsonl" in warnings[0] and "(Read-only file" in warnings[0]
    assert "Could not write loss.png" in warnings[1] and "(Input/output error)" in warnings[1]


def test_folder_that_was_moved_is_reported_once_for_all_outputs(tmp_path: Path) -> None:
    warnings: list[str] = []
    failed = FailedOutputs(tmp_path / "moved", warnings.append)
    for output in ("metrics.jsonl", "ledger.jsonl", "TensorBoard"):
        failed.report(output, system_error(errno.ENOENT))
    assert len(warnings) == 1 and "(No such file or directory)" in warnings[0]


def test_error_of_one_output_does_not_hide_errors_of_others(tmp_path: Path) -> None:
    warnings: list[str] = []
    failed = FailedOutputs(tmp_path, warnings.append)
    for output in ("metrics.jsonl", "loss.png", "loss.png"):
        failed.report(output, system_error(errno.EACCES))
    failed.report("the header", RuntimeError("a\nbug"))
    failed.report("W&B", "it does not respond")
    assert [warning.split(" in ")[0].removeprefix("Could not write ") for warning in warnings] == [
        *("metrics.jsonl", "loss.png", "the header", "W&B")
    ]
    assert "(RuntimeError: a bug). Training continues." in warnings[2]
    assert not any("Other outputs" in warning for warning in warnings)
