"""Any content of the event log is read, repaired by the next launch, and gives a valid goodput."""

import json
import math
import os
import tracemalloc
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from resilience.event_log import (
    EventLog,
    is_count,
    is_event,
    is_number,
    is_time,
    read_json_lines,
    scan_json_lines,
)
from resilience.failed_outputs import FailedOutputs
from resilience.goodput import compute_goodput, launch_times
from training.shutdown import goodput_row

NOW = datetime(2026, 1, 2, tzinfo=UTC)


def time(seconds: int) -> str:
    return datetime.fromtimestamp(NOW.timestamp() + seconds, UTC).isoformat(timespec="milliseconds")


def spent(factor: int) -> dict[str, float]:
    seconds = {"elapsed_seconds": 4.5, "productive_seconds": 2.5, "stalled_seconds": 0.5}
    return {key: factor * value for key, value in seconds.items()}


EVENTS: list[dict[str, Any]] = [
    {"time": time(0), "event": "start", "step": 0, "began": time(-9), "last_life": None},
    {"time": time(2), "event": "trained", "step": 1, **spent(1)},
    {
        "time": time(5),
        "event": "rewound",
        "step": 6,
        "to": 4,
        **spent(2),
    },
    {"time": time(7), "event": "save", "step": 6, "path": "step-00000006"},
    {"time": time(20), "event": "start", "step": 6, "began": time(12), "last_step": 7},
    {"time": time(21), "event": "trained", "step": 7, **spent(1)},
    {"time": time(25), "event": "stop", "step": 9, **spent(3)},
]
CONTENT = b"".join(json.dumps(event).encode() + b"\n" for event in EVENTS)


def check_goodput(path: Path) -> None:
    """Assert that a log of any content gives a goodput that can be printed and recorded."""
    goodput = compute_goodput(EventLog(path).read(), NOW)
    assert all(value >= 0 and math.isfinite(value) for value in asdict(goodput).values())
    json.dumps(goodput.to_dict(), allow_nan=False)
    assert goodput_row(goodput)[0] == "goodput"


def test_each_flipped_byte_costs_at_most_two_events(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    for index in range(len(CONTENT)):
        damaged = bytearray(CONTENT)
        damaged[index] ^= (0x01, 0x02, 0x10, 0x80)[index % 4]
        path.write_bytes(damaged)
        assert len(read_json_lines(path, is_event)) >= len(EVENTS) - 2
        check_goodput(path)


JSON = st.recursive(
    st.one_of(
        *(st.none(), st.booleans(), st.floats(), st.text(max_size=5), st.integers()),
        *(st.just(10**400), st.just(-1), st.just(time(3)), st.just("0001-01-01T00:00:00+23:59")),
        *(st.just("2026-01-01T00:00:00"), st.just("9999-12-31T23:59:59-23:59")),
    ),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=2), inner),
    max_leaves=3,
)
FIELDS = sorted({key for event in EVENTS for key in event} | {"reason", "skip"})


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.one_of(
            st.sampled_from(EVENTS).map(json.dumps),
            st.tuples(
                st.sampled_from(EVENTS), st.dictionaries(st.sampled_from(FIELDS), JSON, max_size=3)
            ).map(lambda both: json.dumps(both[0] | both[1])),
            st.tuples(st.sampled_from(EVENTS), st.sampled_from(FIELDS)).map(
                lambda both: json.dumps({k: v for k, v in both[0].items() if k != both[1]})
            ),
            JSON.map(json.dumps),
            st.just("[" * 10_000),
        ),
        max_size=9,
    )
)
def test_events_of_any_types_and_order_are_read(
    tmp_path_factory: pytest.TempPathFactory, lines: list[str]
) -> None:
    path = tmp_path_factory.getbasetemp() / "ledger.jsonl"
    path.write_text("\n".join(lines) + "\n")
    check_goodput(path)


@settings(max_examples=50, deadline=None)
@given(st.binary(max_size=200), st.integers(0, len(CONTENT)))
def test_any_bytes_are_read_and_repaired_once(
    tmp_path_factory: pytest.TempPathFactory, noise: bytes, at: int
) -> None:
    path = tmp_path_factory.mktemp("noise") / "ledger.jsonl"
    path.write_bytes(CONTENT[:at] + noise + CONTENT[at:])
    check_goodput(path)
    events = EventLog(path).read()
    warnings: list[str] = []
    for _ in range(2):
        EventLog(path, FailedOutputs(path.parent, warnings.append)).repair()
    assert EventLog(path).read() == events and scan_json_lines(path, is_event).n_damaged == 0
    assert len(warnings) <= 1
    aside = path.with_name("ledger.jsonl.damaged")
    assert aside.exists() == bool(warnings)
    if warnings:
        assert aside.read_bytes() == CONTENT[:at] + noise + CONTENT[at:]


def test_repair_reports_damage_and_removes_an_incomplete_line_silently(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    warnings: list[str] = []
    log = EventLog(path, FailedOutputs(tmp_path, warnings.append))
    log.repair()
    for content in (b"", CONTENT, CONTENT + b'{"time": "20', b"\n\n" + CONTENT + b"\n"):
        path.write_bytes(content)
        log.repair()
        assert log.read() == EVENTS if content else log.read() == []
    assert not warnings and [each.name for each in tmp_path.iterdir()] == [path.name]
    lines = CONTENT.splitlines(keepends=True)
    for number in (1, 2):
        path.write_bytes(lines[0] + b"damaged\n" + lines[1] * 2 + lines[2])
        log.repair()
        assert path.read_bytes() == b"".join(lines[:3])
        name = "ledger.jsonl.damaged" + ("-2" if number == 2 else "")
        assert f"is damaged and is kept as {name} (invalid lines: 2)" in warnings[number - 1]
        assert "with its valid lines (3)" in warnings[number - 1]
    assert len(warnings) == 2


@pytest.mark.parametrize("kind", ["folder", "symlink", "pipe", "socket"])
def test_what_is_no_file_is_kept_under_another_name(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "ledger.jsonl"
    if kind == "folder":
        path.mkdir()
    elif kind == "symlink":
        path.symlink_to(tmp_path / "missing" / "ledger.jsonl")
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/full")
    warnings: list[str] = []
    log = EventLog(path, FailedOutputs(tmp_path, warnings.append))
    check_goodput(path)
    log.repair()
    log.append("start", step=0)
    assert [event["event"] for event in log.read()] == ["start"]
    assert len(warnings) == 1 and "is kept as ledger.jsonl.damaged" in warnings[0]


def test_unreadable_file_is_kept_under_another_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "ledger.jsonl"
    path.write_bytes(CONTENT)

    def deny(*arguments: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pathlib.Path.open", deny)
    warnings: list[str] = []
    assert EventLog(path).read() == []
    EventLog(path, FailedOutputs(tmp_path, warnings.append)).repair()
    monkeypatch.undo()
    assert (tmp_path / "ledger.jsonl.damaged").read_bytes() == CONTENT and not path.exists()
    assert "cannot be read (Permission denied)" in warnings[0]


def test_line_without_end_is_read_in_bounded_memory(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    with path.open("wb") as file:
        file.write(CONTENT)
        file.seek(1 << 26, os.SEEK_CUR)  # a hole, as zeros
        file.write(b"\n" + CONTENT[: CONTENT.index(b"\n")].replace(b"start", b"later") + b"\n")
    warnings: list[str] = []
    log = EventLog(path, FailedOutputs(tmp_path, warnings.append))
    tracemalloc.start()
    events = log.read()
    log.repair()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(events) == len(EVENTS) + 1 and "invalid lines: 1" in warnings[0]
    assert peak < 2**23


def test_failed_repair_leaves_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "ledger.jsonl"
    path.write_bytes(b"damaged\n" + CONTENT)

    def full(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    warnings: list[str] = []
    EventLog(path, FailedOutputs(tmp_path, warnings.append)).repair()
    assert [each.name for each in tmp_path.iterdir()] == [path.name]
    assert path.read_bytes() == b"damaged\n" + CONTENT and "No space left" in warnings[0]


def test_error_of_any_kind_is_reported_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    warnings: list[str] = []
    log = EventLog(tmp_path / "ledger.jsonl", FailedOutputs(tmp_path, warnings.append))

    def fail(*arguments: Any, **options: Any) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr("resilience.event_log.append_line", fail)
    log.append("start", step=0)
    log.append("stop", step=1)
    assert len(warnings) == 1 and "(RuntimeError: a bug)" in warnings[0]


@pytest.mark.parametrize(
    ("check", "valid", "invalid"),
    [
        (is_count, [0, 2**53], [-1, 2**53 + 1, 1.0, True, "1", None, math.nan]),
        (is_number, [0, -1.5, 10**20], [math.nan, math.inf, 10**400, -(10**400), True, "1", None]),
        (is_time, [time(0), "2026-01-01T00:00:00Z"], ["2026-01-01", "", 5, None, [], "2026-13-01"]),
    ],
)
def test_types_of_fields(check: Any, valid: list[Any], invalid: list[Any]) -> None:
    assert all(map(check, valid)) and not any(map(check, invalid))


def test_previous_steps_come_from_valid_records_only(tmp_path: Path) -> None:
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text('{"step": 3}\n{"step": "4"}\n{"step": null}\n[5]\n{"step": 1e9}\n')
    assert launch_times(tmp_path / "ledger.jsonl", metrics, None)["last_step"] == 3
