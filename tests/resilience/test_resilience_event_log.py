"""The event log keeps every complete event through kills, full disks and non-finite values."""

import json
import os
import signal
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from resilience.event_log import EventLog, json_line, read_json_lines
from resilience.failed_outputs import FailedOutputs


def test_events_are_read_in_order_with_utc_times(tmp_path: Path) -> None:
    before = datetime.now(UTC)
    event_log = EventLog(tmp_path / "ledger.jsonl")
    event_log.append("start", step=0, mesh="1x2")
    event_log.append("save", step=10, path=Path("checkpoints/step-00000010"))
    events = event_log.read()
    assert [(e["event"], e["step"]) for e in events] == [("start", 0), ("save", 10)]
    assert events[1]["path"] == "checkpoints/step-00000010"
    for event in events:
        time = datetime.fromisoformat(event["time"])
        assert time.utcoffset() == timedelta(0)
        # Times are truncated to milliseconds.
        assert before - timedelta(milliseconds=1) <= time <= datetime.now(UTC)
    assert len(event_log.path.read_text().splitlines()) == 2


def test_line_truncated_at_any_byte_loses_only_itself(tmp_path: Path) -> None:
    event_log = EventLog(tmp_path / "ledger.jsonl")
    event_log.append("start", note="é")  # two bytes in UTF-8: a cut may split the character
    first = event_log.path.stat().st_size
    event_log.append("save", note="é", nested={"a": 1})
    content = event_log.path.read_bytes()
    for end in range(first, len(content) + 1):
        event_log.path.write_bytes(content[:end])
        event_log.append("stop")
        complete = end >= len(content) - 1  # only the newline is missing
        expected = ["start", "save", "stop"] if complete else ["start", "stop"]
        assert [e["event"] for e in event_log.read()] == expected, end


def test_block_of_zeros_after_power_loss_is_skipped(tmp_path: Path) -> None:
    event_log = EventLog(tmp_path / "ledger.jsonl")
    event_log.append("start")
    with open(event_log.path, "ab") as file:
        file.write(b"\0" * 512)
    event_log.append("stop")
    assert [e["event"] for e in event_log.read()] == ["start", "stop"]


def test_file_and_new_folder_entry_are_fsynced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []
    fsync = os.fsync

    def recording_fsync(descriptor: int) -> None:
        synced.append(os.path.realpath(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    if not Path("/proc/self/fd").exists():
        pytest.skip("needs /proc to identify descriptors")
    monkeypatch.setattr(os, "fsync", recording_fsync)
    event_log = EventLog(tmp_path / "ledger.jsonl")
    event_log.append("start")
    event_log.append("stop")
    file, folder = os.path.realpath(event_log.path), os.path.realpath(tmp_path)
    assert synced == [file, folder, file]  # the folder only when the file is new


def test_event_survives_sigkill_right_after_append(tmp_path: Path) -> None:
    script = (
        "import os, sys\nfrom pathlib import Path\nfrom resilience.event_log import EventLog\n"
        "EventLog(Path(sys.argv[1])).append('start', step=3)\nos.kill(os.getpid(), 9)\n"
    )
    path = tmp_path / "ledger.jsonl"
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", script, str(path)], cwd=root)
    assert done.returncode == -signal.SIGKILL
    assert [e["step"] for e in EventLog(path).read()] == [3]


def test_unwritable_folder_warns_once_and_events_are_written_later(tmp_path: Path) -> None:
    warnings: list[str] = []
    blocked = tmp_path / "run"
    blocked.write_text("a file instead of the folder")
    event_log = EventLog(blocked / "ledger.jsonl", FailedOutputs(tmp_path, warnings.append))
    event_log.append("start")
    event_log.append("save")
    assert len(warnings) == 1 and "ledger.jsonl in" in warnings[0]
    assert [e["event"] for e in event_log.read()] == ["start", "save"]  # for the goodput
    blocked.unlink()
    blocked.mkdir()
    event_log.append("stop")
    assert [e["event"] for e in event_log.read()] == ["start", "save", "stop"]
    assert len(warnings) == 1


def test_progress_is_recorded_once_a_minute_or_on_demand(tmp_path: Path) -> None:
    event_log = EventLog(tmp_path / "ledger.jsonl")
    for step in range(1, 9):
        event_log.progress(step, {"elapsed_seconds": 1.0}, now=step == 5)
    assert [e["step"] for e in event_log.read()] == [1, 5]


def test_missing_file_has_no_events(tmp_path: Path) -> None:
    assert read_json_lines(tmp_path / "missing.jsonl") == []


def test_nonfinite_values_are_strict_json_and_keep_their_value() -> None:
    def reject(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    record = {"step": 1, "loss": float("nan"), "grad_norm": float("-inf"), "lr": 0.1}
    parsed = json.loads(json_line(record), parse_constant=reject)
    assert parsed.pop("nonfinite") == {"loss": "nan", "grad_norm": "-inf"}
    assert parsed == {"step": 1, "loss": None, "grad_norm": None, "lr": 0.1}
    assert "nonfinite" not in json_line({"loss": 1.0})


def test_nested_nonfinite_values_are_null() -> None:
    line = json_line({"event": "x", "rows": [{"loss": float("nan")}, float("inf")]})
    assert json.loads(line, parse_constant=pytest.fail) == {
        "event": "x",
        "rows": [{"loss": None}, None],
    }
