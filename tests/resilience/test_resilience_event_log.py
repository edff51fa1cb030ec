"""The ledger keeps every whole event, through kills, full disks and odd values."""

import json
import os
import signal
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from resilience.event_log import Ledger, json_line, read_json_lines


def test_events_come_back_in_order_with_utc_times(tmp_path: Path) -> None:
    before = datetime.now(UTC)
    ledger = Ledger(tmp_path / "run" / "ledger.jsonl")
    ledger.append("start", step=0, mesh="1x2")
    ledger.append("save", step=10, path=Path("checkpoints/step-00000010"))
    events = ledger.read()
    assert [(e["event"], e["step"]) for e in events] == [("start", 0), ("save", 10)]
    assert events[1]["path"] == "checkpoints/step-00000010"
    for event in events:
        time = datetime.fromisoformat(event["time"])
        assert time.utcoffset() == timedelta(0)
        # milliseconds are cut off, so a time may lie up to 1 ms before `before`
        assert before - timedelta(milliseconds=1) <= time <= datetime.now(UTC)
    assert len(ledger.path.read_text().splitlines()) == 2


def test_line_torn_at_any_byte_costs_only_itself(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.jsonl")
    ledger.append("start", note="é")  # two bytes in UTF-8, so a cut can fall inside a letter
    first = ledger.path.stat().st_size
    ledger.append("save", note="é", nested={"a": 1})
    whole = ledger.path.read_bytes()
    for end in range(first, len(whole) + 1):
        ledger.path.write_bytes(whole[:end])
        ledger.append("stop")
        complete = end >= len(whole) - 1  # only the newline is missing
        expected = ["start", "save", "stop"] if complete else ["start", "stop"]
        assert [e["event"] for e in ledger.read()] == expected, end


def test_block_of_zeros_after_power_loss_is_skipped(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.jsonl")
    ledger.append("start")
    with open(ledger.path, "ab") as file:
        file.write(b"\0" * 512)
    ledger.append("stop")
    assert [e["event"] for e in ledger.read()] == ["start", "stop"]


def test_file_and_its_name_are_forced_to_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []
    real = os.fsync

    def spy(descriptor: int) -> None:
        synced.append(os.path.realpath(f"/proc/self/fd/{descriptor}"))
        real(descriptor)

    if not Path("/proc/self/fd").exists():
        pytest.skip("needs /proc to name what is synced")
    monkeypatch.setattr(os, "fsync", spy)
    ledger = Ledger(tmp_path / "ledger.jsonl")
    ledger.append("start")
    ledger.append("stop")
    file, folder = os.path.realpath(ledger.path), os.path.realpath(tmp_path)
    assert synced == [file, folder, file]  # the name is new only once


def test_event_survives_sigkill_right_after_append(tmp_path: Path) -> None:
    script = (
        "import os, sys\nfrom pathlib import Path\nfrom resilience.event_log import Ledger\n"
        "Ledger(Path(sys.argv[1])).append('start', step=3)\nos.kill(os.getpid(), 9)\n"
    )
    path = tmp_path / "ledger.jsonl"
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", script, str(path)], cwd=root)
    assert done.returncode == -signal.SIGKILL
    assert [e["step"] for e in Ledger(path).read()] == [3]


def test_unwritable_folder_warns_once_and_is_used_again_later(tmp_path: Path) -> None:
    warnings: list[str] = []
    blocked = tmp_path / "run"
    blocked.write_text("a file where the folder should be")
    ledger = Ledger(blocked / "ledger.jsonl", warnings.append)
    ledger.append("start")
    ledger.append("save")
    assert len(warnings) == 1 and str(ledger.path) in warnings[0]
    blocked.unlink()
    ledger.append("stop")
    assert [e["event"] for e in ledger.read()] == ["start", "save", "stop"]  # none is lost
    assert len(warnings) == 1


def test_required_event_that_cannot_be_written_is_an_error_and_never_comes(tmp_path: Path) -> None:
    warnings: list[str] = []
    blocked = tmp_path / "run"
    blocked.write_text("a file where the folder should be")
    ledger = Ledger(blocked / "ledger.jsonl", warnings.append)
    with pytest.raises(OSError):
        ledger.append("rewind", required=True, skip=[3, 5])
    blocked.unlink()
    ledger.append("stop")
    assert [e["event"] for e in ledger.read()] == ["stop"] and warnings == []


def test_progress_is_told_once_a_minute_and_where_it_must_be(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.jsonl")
    for step in range(1, 9):
        ledger.progress(step, {"elapsed_seconds": 1.0}, now=step == 5)
    assert [e["step"] for e in ledger.read()] == [1, 5]


def test_no_file_is_no_events(tmp_path: Path) -> None:
    assert read_json_lines(tmp_path / "nothing.jsonl") == []


def test_nonfinite_values_stay_strict_json_and_are_not_lost() -> None:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    record = {"step": 1, "loss": float("nan"), "grad_norm": float("-inf"), "lr": 0.1}
    back = json.loads(json_line(record), parse_constant=refuse)
    assert back.pop("nonfinite") == {"loss": "nan", "grad_norm": "-inf"}
    assert back == {"step": 1, "loss": None, "grad_norm": None, "lr": 0.1}
    assert "nonfinite" not in json_line({"loss": 1.0})
