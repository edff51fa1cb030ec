"""Metrics logging survives kills, resumes and full disks, and never stops training."""

import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from resilience.event_log import EventLog, read_json_lines
from resilience.failed_outputs import FailedOutputs
from training import metrics, wandb_logger
from training.config import LogConfig
from training.config_rules import wandb_errors
from training.metrics import METRICS, MetricsLog

ROOT = Path(__file__).parents[2]
KEYS = tuple(metric.key for metric in METRICS)


def record(step: int, **changes: Any) -> dict[str, Any]:
    """Return a record with all fields, deliberately not in the order of `METRICS`."""
    fields: dict[str, Any] = {"batch_hash": f"{step:08x}", "mfu_causal": None, "mfu_full": None}
    fields |= {"tflops": 0.5, "tokens_per_second": 1000.0, "lr": 3e-4, "peak_memory_gib": 1.0}
    fields |= {"step_seconds": 0.5, "data_wait_seconds": 0.1, "grad_norm": 2.0, "loss": 8.0 / step}
    fields |= {"bubble_share": 0.2, "slowest_stage": 1, "peak_memory_gib_by_stage": [1.0, 0.5]}
    return fields | {"tokens": 512 * step, "samples": step, "step": step} | changes


def open_log(folder: Path, first_step: int = 0, **changes: Any) -> tuple[MetricsLog, list[str]]:
    warnings: list[str] = []
    options: dict[str, Any] = {
        "tensorboard": False,
        "wandb": None,
        "run_name": "run",
        "run_config": {"a": 1},
    }
    options |= changes
    return MetricsLog(
        folder, first_step=first_step, failed=FailedOutputs(folder, warnings.append), **options
    ), warnings


def test_record_fields_follow_order_of_metrics(tmp_path: Path) -> None:
    log, warnings = open_log(tmp_path / "new" / "run")
    log.write(record(1))
    log.write(record(2, val_loss=4.5, extra=1))
    first, second = read_json_lines(log.path)
    assert tuple(first) == KEYS[:-1]
    assert tuple(second) == (*KEYS, "extra")
    assert first == record(1) and not warnings


def test_resume_removes_later_and_incomplete_lines_and_keeps_bytes_of_others(
    tmp_path: Path,
) -> None:
    log, _ = open_log(tmp_path)
    for step in range(1, 7):
        log.write(record(step, loss=float("nan") if step == 2 else 1 / step))
    kept = log.path.read_bytes()
    for step in range(7, 11):
        log.write(record(step))
    with open(log.path, "ab") as file:
        file.write(b'{"step": 5, "lo')  # incomplete because of a kill
    resumed, warnings = open_log(tmp_path, first_step=6)
    assert resumed.path.read_bytes() == kept
    resumed.write(record(7, loss=0.125))
    assert [r["step"] for r in read_json_lines(resumed.path)] == list(range(1, 8))
    assert not warnings and [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_resume_renames_fields_of_old_versions_and_keeps_other_bytes(tmp_path: Path) -> None:
    old = (
        b'{"step": 1, "loss": null, "memory_gib": 1.25, "data_seconds": 0.1, "val_loss": 2.0, '
        b'"nonfinite": {"loss": "nan"}}\n'
        b'{"step": 2,  "note": "memory_gib, \\"data_seconds\\": 1", "data_seconds":0.25}\n'
        b'{"step": 3, "peak_memory_gib": 1.5, "data_wait_seconds": 0.5}\n'
    )
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(old + b'{"step": 4, "memory_gib": 2.0}\n')
    log, warnings = open_log(tmp_path, first_step=3)
    expected = old.replace(b'"memory_gib": 1.25', b'"peak_memory_gib": 1.25')
    expected = expected.replace(b'"data_seconds": 0.1', b'"data_wait_seconds": 0.1')
    expected = expected.replace(b'"data_seconds":0.25', b'"data_wait_seconds":0.25')
    assert path.read_bytes() == expected
    log.write(record(4))
    log.plot()
    first, second, third, fourth = read_json_lines(path)
    assert first["peak_memory_gib"] == 1.25 and first["data_wait_seconds"] == 0.1
    assert second["note"] == 'memory_gib, "data_seconds": 1'
    assert third["data_wait_seconds"] == 0.5 and fourth == record(4)
    assert not warnings and (tmp_path / "loss.png").exists()


def test_launch_from_scratch_removes_all_lines(tmp_path: Path) -> None:
    log, _ = open_log(tmp_path)
    log.write(record(1) | {"step": 0})
    log.write(record(1))
    fresh, _ = open_log(tmp_path, first_step=0)
    assert fresh.path.read_bytes() == b""


def test_failed_rewrite_leaves_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log, _ = open_log(tmp_path)
    log.write(record(1))
    log.path.write_bytes(log.path.read_bytes() + b'{"torn\n')  # forces a rewrite
    for step in range(2, 4):
        log.write(record(step))
    before = log.path.read_bytes()

    def full(source: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        again, warnings = open_log(tmp_path, first_step=2)
    assert again.path.read_bytes() == before
    assert len(warnings) == 1 and "No space left" in warnings[0]


def test_tensorboard_equals_metrics_jsonl_after_resume(tmp_path: Path) -> None:
    accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    log, warnings = open_log(tmp_path, tensorboard=True)
    for step in range(1, 9):
        log.write(record(step, loss=100.0 + step))  # never closed, as after a kill
    resumed, more = open_log(tmp_path, first_step=4, tensorboard=True)
    for step in range(5, 11):
        resumed.write(record(step, loss=float(step), val_loss=2.0 * step))
    events = accumulators.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    lines = read_json_lines(resumed.path)
    others = ("step", "batch_hash", "mfu_causal", "mfu_full", "peak_memory_gib_by_stage")
    numeric = [key for key in KEYS if key not in others]
    assert set(events.Tags()["scalars"]) == set(numeric)
    for key in numeric:
        shown = {event.step: event.value for event in events.Scalars(key)}
        held = {line["step"]: line[key] for line in lines if key in line}
        assert shown == pytest.approx(held, rel=1e-6), key  # TensorBoard stores fp32
        assert len(events.Scalars(key)) == len(held), key
    resumed.close()
    resumed.close()
    log.close()
    assert not warnings + more


def test_full_disk_warns_once_per_output_and_training_continues(tmp_path: Path) -> None:
    # With this limit on file sizes, writes beyond 2 KiB fail as on a full disk.
    script = """
import resource, sys
from pathlib import Path
from resilience.failed_outputs import FailedOutputs
from training.metrics import MetricsLog
resource.setrlimit(resource.RLIMIT_FSIZE, (2048, resource.RLIM_INFINITY))
folder = Path(sys.argv[1])
failed = FailedOutputs(folder, lambda text: print("WARNING", text))
log = MetricsLog(folder, True, None, "run", {}, 0, failed)
for step in range(1, 200):
    log.write({"step": step, "loss": 1.0 / step})
    if step % 50 == 0:
        log.plot()
log.close()
print("pyplot" if "matplotlib.pyplot" in sys.modules else "no pyplot")
"""
    folder = tmp_path / "run"
    done = subprocess.run(
        [sys.executable, "-c", script, str(folder)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[-1] == "no pyplot"
    targets = sorted(line.split()[4] for line in lines[:-1])
    assert targets == ["TensorBoard", "loss.png", "metrics.jsonl"]
    steps = [r["step"] for r in read_json_lines(folder / "metrics.jsonl")]
    assert (
        steps == list(range(1, len(steps) + 1)) and steps
    )  # complete lines until the disk was full


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Mount a file system with a capacity of 1 MiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("mounting a tmpfs requires root")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
def test_temporarily_full_disk_loses_no_record(
    small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics, "TENSORBOARD_RETRY_SECONDS", 0)
    log, warnings = open_log(small_disk / "run", tensorboard=True)
    ledger = EventLog(small_disk / "run" / "ledger.jsonl", log.failed)
    log.write(record(1))
    ballast = small_disk / "ballast"
    with pytest.raises(OSError), ballast.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    # The free space in the last pages of the files is used up first.
    for step in range(2, 100):
        log.write(record(step))
        log.write_sample(step, "text" * 40)
        ledger.append("save", step=step, note="text" * 20)
    log.plot()
    log.plot()
    (warning,) = warnings
    assert "No space left" in warning and "Other outputs with this error are not" in warning
    ballast.unlink()
    log.write(record(100))
    log.write_sample(100, "the last text")
    log.plot()
    ledger.append("stop")
    log.close()
    assert read_json_lines(log.path) == [record(step) for step in range(1, 101)]
    assert [event.get("step") for event in ledger.read()] == [*range(2, 100), None]
    assert "the last text" in (small_disk / "run" / "samples.txt").read_text()
    assert (small_disk / "run" / "loss.png").exists()
    assert len(warnings) == 1


@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
def test_read_only_folder_does_not_stop_training(small_disk: Path) -> None:
    log, warnings = open_log(small_disk, tensorboard=True)
    log.write(record(1))
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=False)
    if os.statvfs(small_disk).f_flag & os.ST_RDONLY == 0:  # while a file is open for writing
        log.close()
        subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    for step in (2, 3):
        log.write(record(step))
        log.write_sample(step, "text")
        log.plot()
    (warning,) = warnings
    assert "Could not write metrics.jsonl" in warning and "(Read-only file system)" in warning


def test_samples_are_written_under_their_steps(tmp_path: Path) -> None:
    log, _ = open_log(tmp_path)
    for step in (5, 10):
        log.write_sample(step, f"text {step} é")
    text = (tmp_path / "samples.txt").read_text(encoding="utf-8")
    assert text == "--- step 5 ---\ntext 5 é\n\n--- step 10 ---\ntext 10 é\n\n"


@pytest.mark.parametrize("where", ["init", "log"])
def test_hanging_wandb_delays_no_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    never = threading.Event()
    fake_wandb(monkeypatch, wait=lambda name: name == where and never.wait())
    monkeypatch.setattr(wandb_logger, "MAX_QUEUED", 3)
    monkeypatch.setattr(wandb_logger, "FINISH_SECONDS", 0.05)
    log, warnings = open_log(tmp_path, wandb="project")
    start = time.monotonic()
    for step in range(1, 10):
        log.write(record(step))
    log.close()
    assert time.monotonic() - start < 5, "a call blocked"
    never.set()
    assert len(warnings) == 1 and "it does not respond" in warnings[0]
    assert len(read_json_lines(log.path)) == 9


def test_unwritable_folder_does_not_stop_training(tmp_path: Path) -> None:
    blocked = tmp_path / "run"
    blocked.write_text("a file at the path of the folder")
    log, warnings = open_log(blocked, tensorboard=True)
    log.write(record(1))
    log.write(record(2))
    log.plot()
    log.close()
    assert sorted(w.split()[3] for w in warnings) == ["TensorBoard", "metrics.jsonl"]


def test_missing_wandb_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)  # imports fail as without the package
    assert not list(wandb_errors(LogConfig()))
    (error,) = wandb_errors(LogConfig(wandb="my-project"))
    assert "log.wandb=my-project" in error and "pip install '.[wandb]'" in error
    (error,) = wandb_errors(LogConfig(wandb="true"))
    assert "not the name of a project" in error
    log, warnings = open_log(tmp_path, wandb="my-project")
    log.write(record(1))
    assert len(warnings) == 1 and "W&B" in warnings[0] and "import of wandb" in warnings[0]
    assert len(read_json_lines(log.path)) == 1


def fake_wandb(
    monkeypatch: pytest.MonkeyPatch,
    fail: str | None = None,
    wait: Callable[[str], Any] = lambda name: None,
) -> SimpleNamespace:
    """Replace wandb by a recorder that can fail or wait in `init`, `log` or `finish`."""
    seen = SimpleNamespace(init=[], log=[], finish=[])

    def record_call(name: str, value: Any) -> None:
        getattr(seen, name).append(value)
        wait(name)
        if name == fail:
            raise ConnectionError("no such\nhost")

    def init(**options: Any) -> SimpleNamespace:
        record_call("init", options)
        return SimpleNamespace(
            define_metric=lambda name, step_metric: None,
            log=lambda metrics: record_call("log", metrics),
            finish=lambda: record_call("finish", None),
        )

    module = ModuleType("wandb")
    module.__spec__ = SimpleNamespace(origin="wandb/__init__.py")  # type: ignore[assignment]
    module.init = init  # type: ignore[attr-defined]
    module.Settings = lambda **options: options  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", module)
    return seen


def test_wandb_receives_same_metrics_and_resume_continues_its_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = fake_wandb(monkeypatch)
    for first_step in (0, 1, 0):
        log, warnings = open_log(tmp_path, first_step, wandb="project")
        log.write(record(first_step + 1))
        log.close()
        assert not warnings
    assert [o["project"] for o in seen.init] == ["project"] * 3
    assert seen.init[0]["config"] == {"a": 1}
    ids = [options["id"] for options in seen.init]
    assert ids[0] == ids[1] != ids[2]  # resumed, then restarted from scratch
    assert seen.log[0] == {k: v for k, v in record(1).items() if v is not None}
    assert len(seen.finish) == 3


def test_damaged_wandb_id_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = fake_wandb(monkeypatch)
    path = tmp_path / "wandb" / "run_id"
    for damage in (b"", b"\xff\xfe", b"a b", b"x" * 100, None):
        shutil.rmtree(tmp_path / "wandb", ignore_errors=True)
        if damage is None:
            path.mkdir(parents=True)
        else:
            path.parent.mkdir()
            path.write_bytes(damage)
        log, warnings = open_log(tmp_path, 1, wandb="project")
        log.write(record(2))
        log.close()
        assert not warnings and seen.init[-1]["id"] == path.read_text()
    shutil.rmtree(tmp_path / "wandb")
    (tmp_path / "wandb").touch()  # a file at the path of the folder
    log, warnings = open_log(tmp_path, 1, wandb="project")
    log.close()
    assert not warnings and seen.init[-1]["id"] == path.read_text()


@pytest.mark.parametrize("where", ["init", "log", "finish"])
def test_unreachable_wandb_warns_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    seen = fake_wandb(monkeypatch, fail=where)
    log, warnings = open_log(tmp_path, wandb="project")
    for step in (1, 2, 3):
        log.write(record(step))
    log.close()
    assert len(getattr(seen, where)) == 1  # not called again
    assert len(warnings) == 1 and "no such host" in warnings[0]
    assert len(read_json_lines(log.path)) == 3


def test_trackers_receive_no_value_that_is_not_finite(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """metrics.jsonl records such values in `nonfinite`."""
    log, _ = open_log(tmp_path)
    seen: list[dict[str, Any]] = []
    log._wandb = SimpleNamespace(log=seen.append, failure=None, finish=lambda: None)
    log.write(record(1, loss=float("nan"), grad_norm=float("inf")))
    assert "loss" not in seen[0] and "grad_norm" not in seen[0] and seen[0]["lr"] == 3e-4
    (line,) = read_json_lines(log.path)
    assert line["nonfinite"] == {"loss": "nan", "grad_norm": "inf"}
