"""Any content of `metrics.jsonl` is accepted, and lost steps are reported once."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from resilience.failed_outputs import FailedOutputs
from training.loss_plot import plot_loss
from training.metrics import MetricsLog
from training.metrics_file import missing_steps, newly_missing, read_records, truncate_records


def record(step: int) -> dict[str, Any]:
    return {"step": step, "samples": step, "tokens": 8 * step, "loss": 4.0 / step, "val_loss": 2.0}


def content(*steps: int) -> bytes:
    return b"".join(json.dumps(record(step)).encode() + b"\n" for step in steps)


def open_log(folder: Path, first_step: int) -> tuple[MetricsLog, list[str]]:
    warnings: list[str] = []
    return MetricsLog(
        folder, False, None, "run", {}, first_step, FailedOutputs(folder, warnings.append)
    ), warnings


def test_each_flipped_byte_costs_at_most_two_records(tmp_path: Path) -> None:
    path, lines = tmp_path / "metrics.jsonl", content(1, 2, 3)
    for index in range(len(lines)):
        damaged = bytearray(lines)
        damaged[index] ^= (0x01, 0x02, 0x10, 0x80)[index % 4]
        path.write_bytes(damaged)
        truncate_records(path, 2**53)
        records = read_records(path)
        assert len(records) >= 1 and all(isinstance(each["step"], int) for each in records)
        for aside in tmp_path.glob("*.damaged"):
            aside.unlink()


def test_damaged_lines_are_kept_aside_and_reported_once(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    damaged = content(1, 2) + b'{"step": "3"}\n[4]\n\xff\xfe\n' + content(5, 6, 9)
    path.write_bytes(damaged + b'{"step": 7, "lo')
    log, warnings = open_log(tmp_path, 6)
    (warning,) = warnings
    assert "is kept as metrics.jsonl.damaged (invalid lines: 3)" in warning
    assert "with its valid lines (4)" in warning and path.read_bytes() == content(1, 2, 5, 6)
    assert (tmp_path / "metrics.jsonl.damaged").read_bytes().startswith(damaged)
    log.write(record(7))
    assert open_log(tmp_path, 7)[1] == [] and read_records(path)[-1]["step"] == 7


@pytest.mark.parametrize("name", ["metrics.jsonl", "samples.txt", "loss.png", "tensorboard"])
@pytest.mark.parametrize("kind", ["other", "symlink"])
def test_what_is_no_file_is_kept_under_another_name(tmp_path: Path, name: str, kind: str) -> None:
    path = tmp_path / name
    if kind == "symlink":
        path.symlink_to(tmp_path / "missing" / name)
    elif name == "tensorboard":
        path.write_bytes(b"")
    else:
        path.mkdir()
    log, warnings = open_log(tmp_path, 0)
    for step in (1, 2):
        log.write(record(step))
        log.write_sample(step, "text")
    log.plot()
    assert len(warnings) == 1 and f"is kept as {name}.damaged" in warnings[0]
    assert os.path.lexists(tmp_path / f"{name}.damaged")
    files = {each.name for each in tmp_path.iterdir() if each.is_file()}
    assert files >= {"metrics.jsonl", "samples.txt", "loss.png"}


def test_named_pipe_for_samples_is_used(tmp_path: Path) -> None:
    """A program that the user runs reads it."""
    os.mkfifo(tmp_path / "samples.txt")
    log, warnings = open_log(tmp_path, 0)
    assert warnings == [] and (tmp_path / "samples.txt").is_fifo()
    reader = os.open(tmp_path / "samples.txt", os.O_RDONLY | os.O_NONBLOCK)
    log.write_sample(1, "text")
    assert os.read(reader, 100) == b"--- step 1 ---\ntext\n\n"
    os.close(reader)
    log.write_sample(2, "text")  # does not wait for the next reader
    assert len(warnings) == 1 and "Could not write samples.txt" in warnings[0]


@settings(max_examples=50, deadline=None)
@given(
    st.lists(
        st.dictionaries(
            st.sampled_from(["step", "tokens", "loss", "val_loss"]),
            st.one_of(
                *(st.integers(-1, 9), st.floats(), st.text(max_size=2), st.none(), st.booleans()),
                *(st.just(10**400), st.lists(st.integers(), max_size=1)),
            ),
        ),
        max_size=4,
    )
)
def test_records_of_any_types_are_truncated(
    tmp_path_factory: pytest.TempPathFactory, records: list[dict[str, Any]]
) -> None:
    path = tmp_path_factory.mktemp("any") / "metrics.jsonl"
    path.write_text("".join(json.dumps(each) + "\n" for each in records))
    truncate_records(path, 5)
    assert all(each["step"] <= 5 for each in read_records(path))
    assert truncate_records(path, 5) is None


def test_plot_ignores_values_of_other_types(tmp_path: Path) -> None:
    path, image = tmp_path / "metrics.jsonl", tmp_path / "loss.png"
    path.write_bytes(content(1, 2) + b'{"step": 3, "loss": "x"}\n{"step": 4, "loss": NaN}\n{}\n7\n')
    plot_loss(path, image, "run")
    assert image.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("steps", "last", "intervals", "expected"),
    [
        (range(1, 9), 8, [1], []),
        ([], 8, [1], [(1, 8)]),
        ([], 0, [1], []),
        ([1, 2, 5, 6], 8, [1], [(3, 4), (7, 8)]),
        ([1, 2, 5, 6, 12], 6, [1], [(3, 4)]),
        ([1, 10, 20], 29, [10], []),  # the next one is due at step 30
        ([1, 10, 20], 30, [10], [(21, 30)]),
        ([1, 7, 20], 29, [10], [(8, 19)]),  # also logged when validated
        ([1, 4, 8, 12, 20, 30], 33, [10, 4], []),
        ([1, 4, 8, 30, 33], 33, [10, 4], [(9, 29)]),
    ],
)
def test_missing_steps(
    steps: Any, last: int, intervals: list[int], expected: list[tuple[int, int]]
) -> None:
    assert missing_steps(steps, 0, last, intervals) == expected


def test_missing_steps_are_reported_once(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    events: list[dict[str, Any]] = [{"event": "start", "step": 4}]  # from another run's checkpoint
    path.write_bytes(content(5, 6))
    assert newly_missing(path, events, 6, 1) == []
    path.write_bytes(b"")
    assert newly_missing(path, events, 6, 1) == [(5, 6)]
    events.append({"event": "metrics_missing", "ranges": [[5, 6]]})
    path.write_bytes(content(7, 9))
    assert newly_missing(path, events, 9, 1) == [(8, 8)]
    for damaged in (None, 5, [5], [None]):
        events.append({"event": "metrics_missing", "ranges": damaged})
        events.append({"event": "start", "changed": damaged})
    events.append({"event": "start", "changed": {"log.interval": [1, 10]}})
    assert newly_missing(path, events, 9, 10) == []
