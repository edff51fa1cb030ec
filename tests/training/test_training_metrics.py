"""The figures of a run are right, survive kills and resumes, and never stop training."""

import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from resilience.event_log import Ledger, read_json_lines
from training import metrics
from training import wandb_logger as tracker
from training.metrics import (
    FIELDS,
    MetricsLog,
    Throughput,
    draw_loss,
    peak_flops,
    peak_memory_gib,
    smooth,
)
from training.wandb_logger import tracker_errors

ROOT = Path(__file__).parents[2]


def record(step: int, **changes: Any) -> dict[str, Any]:
    """A full record, its fields in the wrong order on purpose."""
    figures: dict[str, Any] = {"batch_hash": f"{step:08x}", "mfu_causal": None, "mfu_full": None}
    figures |= {"tflops": 0.5, "tokens_per_second": 1000.0, "lr": 3e-4, "peak_memory_gib": 1.0}
    figures |= {"step_seconds": 0.5, "data_wait_seconds": 0.1, "grad_norm": 2.0, "loss": 8.0 / step}
    return figures | {"tokens": 512 * step, "samples": step, "step": step} | changes


def open_log(folder: Path, first_step: int = 0, **changes: Any) -> tuple[MetricsLog, list[str]]:
    warnings: list[str] = []
    options: dict[str, Any] = {
        "tensorboard": False,
        "wandb": None,
        "run_name": "run",
        "run_config": {"a": 1},
    }
    options |= changes
    return MetricsLog(folder, first_step=first_step, warn=warnings.append, **options), warnings


def test_line_has_the_fields_in_their_order(tmp_path: Path) -> None:
    log, warnings = open_log(tmp_path / "new" / "run")
    log.write(record(1))
    log.write(record(2, val_loss=4.5, extra=1))
    first, second = read_json_lines(log.path)
    assert tuple(first) == FIELDS[:-1]
    assert tuple(second) == (*FIELDS, "extra")
    assert first == record(1) and not warnings


def test_resume_drops_lost_and_torn_lines_and_keeps_the_rest_byte_for_byte(tmp_path: Path) -> None:
    log, _ = open_log(tmp_path)
    for step in range(1, 7):
        log.write(record(step, loss=float("nan") if step == 2 else 1 / step))
    kept = log.path.read_bytes()
    for step in range(7, 11):
        log.write(record(step))
    with open(log.path, "ab") as file:
        file.write(b'{"step": 5, "lo')  # torn by the kill
    resumed, warnings = open_log(tmp_path, first_step=6)
    assert resumed.path.read_bytes() == kept
    resumed.write(record(7, loss=0.125))
    assert [r["step"] for r in read_json_lines(resumed.path)] == list(range(1, 8))
    assert not warnings and [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_start_from_scratch_drops_all_lines(tmp_path: Path) -> None:
    log, _ = open_log(tmp_path)
    log.write(record(1) | {"step": 0})
    log.write(record(1))
    fresh, _ = open_log(tmp_path, first_step=0)
    assert fresh.path.read_bytes() == b""


def test_rewrite_that_fails_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log, _ = open_log(tmp_path)
    log.write(record(1))
    log.path.write_bytes(log.path.read_bytes() + b'{"torn\n')  # makes a file of the rest necessary
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


def test_tensorboard_shows_what_metrics_jsonl_holds_across_a_resume(tmp_path: Path) -> None:
    accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    log, warnings = open_log(tmp_path, tensorboard=True)
    for step in range(1, 9):
        log.write(record(step, loss=100.0 + step))  # never closed: the process is killed
    resumed, more = open_log(tmp_path, first_step=4, tensorboard=True)
    for step in range(5, 11):
        resumed.write(record(step, loss=float(step), val_loss=2.0 * step))
    events = accumulators.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    lines = read_json_lines(resumed.path)
    numeric = [key for key in FIELDS if key not in ("step", "batch_hash", "mfu_causal", "mfu_full")]
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


def test_full_disk_warns_once_a_kind_and_training_goes_on(tmp_path: Path) -> None:
    # A limit on file sizes makes every write beyond 2 KiB fail as a full disk does.
    script = """
import resource, sys
from pathlib import Path
from training.metrics import MetricsLog
resource.setrlimit(resource.RLIMIT_FSIZE, (2048, resource.RLIM_INFINITY))
log = MetricsLog(Path(sys.argv[1]), True, None, "run", {}, 0, lambda text: print("WARNING", text))
for step in range(1, 200):
    log.write({"step": step, "loss": 1.0 / step})
    if step % 50 == 0:
        log.draw()
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
    kinds = sorted(re.match(r"WARNING (\S+) in ", line).group(1) for line in lines[:-1])  # type: ignore[union-attr]
    assert kinds == ["TensorBoard", "loss.png", "metrics.jsonl"]
    steps = [r["step"] for r in read_json_lines(folder / "metrics.jsonl")]
    assert steps == list(range(1, len(steps) + 1)) and steps  # whole lines until it was full


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own with room for a megabyte."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("only root may mount a small file system, and not everywhere")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


# TensorBoard's own thread tells the failure too, which comes up here at the next figures.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_disk_that_was_full_for_a_while_costs_no_line(
    small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics, "AGAIN_SECONDS", 0)
    log, warnings = open_log(small_disk / "run", tensorboard=True)
    ledger = Ledger(small_disk / "run" / "ledger.jsonl", warnings.append)
    log.write(record(1))
    ballast = small_disk / "ballast"
    with pytest.raises(OSError), ballast.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    # The room that is left in the last pages of the files is used up first.
    for step in range(2, 100):
        log.write(record(step))
        log.write_sample(step, "text" * 40)
        ledger.append("save", step=step, note="text" * 20)
    log.draw()
    log.draw()
    kinds = [re.split(" in | cannot ", warning)[0] for warning in warnings]
    expected = ["TensorBoard", "loss.png", "metrics.jsonl", "samples.txt", str(ledger.path)]
    assert sorted(kinds) == sorted(expected)
    ballast.unlink()
    log.write(record(100))
    log.write_sample(100, "the last text")
    log.draw()
    ledger.append("stop")
    log.close()
    assert read_json_lines(log.path) == [record(step) for step in range(1, 101)]
    assert [event.get("step") for event in ledger.read()] == [*range(2, 100), None]
    assert "the last text" in (small_disk / "run" / "samples.txt").read_text()
    assert (small_disk / "run" / "loss.png").exists()
    assert len(warnings) == len(expected)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_read_only_folder_does_not_stop_training(small_disk: Path) -> None:
    log, warnings = open_log(small_disk, tensorboard=True)
    log.write(record(1))
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=False)
    if os.statvfs(small_disk).f_flag & os.ST_RDONLY == 0:  # a file is open for writing
        log.close()
        subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    for step in (2, 3):
        log.write(record(step))
        log.write_sample(step, "text")
        log.draw()
    told = sorted(warning.split(" in ")[0] for warning in warnings)
    assert set(told) >= {"loss.png", "metrics.jsonl", "samples.txt"}
    assert len(told) == len(set(told))
    assert all("Read-only" in warning for warning in warnings)


def test_samples_are_told_under_their_steps(tmp_path: Path) -> None:
    log, _ = open_log(tmp_path)
    for step in (5, 10):
        log.write_sample(step, f"text {step} é")
    told = (tmp_path / "samples.txt").read_text(encoding="utf-8")
    assert told == "--- step 5 ---\ntext 5 é\n\n--- step 10 ---\ntext 10 é\n\n"


@pytest.mark.parametrize("where", ["init", "log"])
def test_wandb_that_hangs_keeps_no_step_waiting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    never = threading.Event()
    fake_wandb(monkeypatch, wait=lambda name: name == where and never.wait())
    monkeypatch.setattr(tracker, "MAX_WAITING", 3)
    monkeypatch.setattr(tracker, "FINISH_SECONDS", 0.05)
    log, warnings = open_log(tmp_path, wandb="project")
    begin = time.monotonic()
    for step in range(1, 10):
        log.write(record(step))
    log.close()
    assert time.monotonic() - begin < 5, "something waited"
    never.set()
    assert len(warnings) == 1 and "it does not answer" in warnings[0]
    assert len(read_json_lines(log.path)) == 9


def test_unwritable_folder_does_not_stop_training(tmp_path: Path) -> None:
    blocked = tmp_path / "run"
    blocked.write_text("a file where the folder should be")
    log, warnings = open_log(blocked, tensorboard=True)
    log.write(record(1))
    log.write(record(2))
    log.draw()
    log.close()
    assert sorted(w.split()[0] for w in warnings) == ["TensorBoard", "loss.png", "metrics.jsonl"]


def test_missing_wandb_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)  # an import now fails as without the package
    assert tracker_errors(None) == []
    (problem,) = tracker_errors("my-project")
    assert "log.wandb (my-project)" in problem and "llamesh[wandb]" in problem
    log, warnings = open_log(tmp_path, wandb="my-project")
    log.write(record(1))
    assert len(warnings) == 1 and "llamesh[wandb]" in warnings[0]
    assert len(read_json_lines(log.path)) == 1


def fake_wandb(
    monkeypatch: pytest.MonkeyPatch,
    fail: str | None = None,
    wait: Callable[[str], Any] = lambda name: None,
) -> SimpleNamespace:
    """A stand-in that notes what it is given; can fail or wait in `init`, `log` or `finish`."""
    seen = SimpleNamespace(init=[], log=[], finish=[])

    def note(name: str, value: Any) -> None:
        getattr(seen, name).append(value)
        wait(name)
        if name == fail:
            raise ConnectionError("no such\nhost")

    def init(**options: Any) -> SimpleNamespace:
        note("init", options)
        return SimpleNamespace(
            define_metric=lambda name, step_metric: None,
            log=lambda figures: note("log", figures),
            finish=lambda: note("finish", None),
        )

    module = ModuleType("wandb")
    module.__spec__ = SimpleNamespace(origin="wandb/__init__.py")  # type: ignore[assignment]
    module.init = init  # type: ignore[attr-defined]
    module.Settings = lambda **options: options  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", module)
    return seen


def test_wandb_gets_the_same_figures_and_a_resume_goes_on_in_its_run(
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
    assert ids[0] == ids[1] != ids[2]  # resumed, then started from scratch
    assert seen.log[0] == {k: v for k, v in record(1).items() if v is not None}
    assert len(seen.finish) == 3


@pytest.mark.parametrize("where", ["init", "log", "finish"])
def test_wandb_out_of_reach_warns_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    seen = fake_wandb(monkeypatch, fail=where)
    log, warnings = open_log(tmp_path, wandb="project")
    for step in (1, 2, 3):
        log.write(record(step))
    log.close()
    assert len(getattr(seen, where)) == 1  # not asked again
    assert len(warnings) == 1 and "no such host" in warnings[0]
    assert len(read_json_lines(log.path)) == 3


def has_colour(image: Path, colour: tuple[int, int, int]) -> bool:
    from matplotlib.image import imread

    pixels = torch.tensor(imread(image))[..., :3]  # (height, width, 3), 0 to 1
    return bool(((pixels * 255).round() == torch.tensor(colour)).all(-1).any())


def test_picture_shows_training_and_validation_once_there_are_losses(tmp_path: Path) -> None:
    blue, orange = (8, 81, 156), (217, 72, 1)
    log, warnings = open_log(tmp_path, run_name="a $run_1$")  # not to be read as mathematics
    image = tmp_path / "loss.png"
    log.draw()
    log.write(record(1, loss=float("nan")))
    log.draw()
    assert not image.exists()
    for step in range(2, 30):
        log.write(record(step))
    log.draw()
    assert has_colour(image, blue) and not has_colour(image, orange)
    log.write(record(30, loss=float("inf"), val_loss=1.0))
    log.draw()
    assert has_colour(image, blue) and has_colour(image, orange)
    assert not warnings
    assert sorted(p.name for p in tmp_path.iterdir()) == ["loss.png", "metrics.jsonl"]


def test_picture_without_tokens_is_drawn_over_steps(tmp_path: Path) -> None:
    (tmp_path / "m.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "val_loss": 1.0}\n')
    draw_loss(tmp_path / "m.jsonl", tmp_path / "steps.png", "run")
    assert (tmp_path / "steps.png").read_bytes().startswith(b"\x89PNG")


@given(st.lists(st.floats(-100, 100), max_size=60), st.integers(0, 80))
def test_smoothed_value_is_the_mean_of_its_window(values: list[float], half: int) -> None:
    smoothed = smooth(values, half)
    assert len(smoothed) == len(values)
    for i, value in enumerate(smoothed):
        reach = min(half, i)
        window = values[i - reach : i + reach + 1]
        # running sums of up to 60 values below 100 round at 60 * 100 * 2**-53, far below 1e-9
        assert value == pytest.approx(sum(window) / len(window), abs=1e-9)


def test_smoothing_begins_at_the_first_loss_and_does_not_lag() -> None:
    falling = [10.0 - 0.1 * i for i in range(50)]
    # a centred mean of a straight line is the line; 1e-12 is rounding
    assert smooth(falling, 5)[:45] == pytest.approx(falling[:45], abs=1e-12)


def meter(peak: float | None, world_size: int = 4) -> Throughput:
    return Throughput(6e9, 8e9, world_size, peak, torch.device("cpu"))


def test_mesh_at_its_peak_has_an_mfu_of_one() -> None:
    peak, world_size, seconds = 2e12, 4, 10.0
    tokens = round(peak * world_size * seconds / 8e9)
    figures = meter(peak, world_size).figures(tokens, seconds, 0.5, 5)
    assert tuple(figures) == tuple(f for f in FIELDS if f in figures)
    assert figures["mfu_full"] == pytest.approx(1.0)
    assert figures["mfu_causal"] == pytest.approx(6 / 8)
    assert figures["tflops"] == pytest.approx(peak * 6 / 8 / 1e12)
    assert figures["tokens_per_second"] == tokens / seconds
    assert (figures["step_seconds"], figures["data_wait_seconds"]) == (2.0, 0.1)


def test_unknown_peak_gives_no_mfu_but_the_same_speed() -> None:
    known, unknown = (meter(peak).figures(1000, 2.0, 0.0, 1) for peak in (1e12, None))
    assert unknown["mfu_causal"] is None and unknown["mfu_full"] is None
    for key in ("tokens_per_second", "tflops", "step_seconds"):
        assert known[key] == unknown[key]


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989),
        ("NVIDIA B200", 2250),
        ("AMD Instinct MI300X", 1307),
        ("NVIDIA H100 NVL", None),
        ("NVIDIA H200 NVL", None),
        ("NVIDIA GH200 480GB", None),
        ("NVIDIA GB200", None),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None),
        ("NVIDIA GeForce RTX 4090", None),
        ("cpu", None),
    ],
)
def test_peak_is_the_dense_one_or_unknown(name: str, tflops: float | None) -> None:
    expected = None if tflops is None else tflops * 1e12
    assert peak_flops(name, torch.bfloat16) == peak_flops(name, torch.float16) == expected
    assert peak_flops(name, torch.float32) is None


def test_memory_on_cpu_is_the_peak_resident_set() -> None:
    status = Path("/proc/self/status")
    if not status.exists():
        pytest.skip("needs /proc for the reference")
    torch.ones(2**26).sum()  # 256 MiB touched and given back: the peak stays
    reference = int(re.search(r"VmHWM:\s+(\d+) kB", status.read_text()).group(1)) / 2**20  # type: ignore[union-attr]
    # the kernel counts pages per thread in batches, so the two may differ by some MiB
    assert peak_memory_gib(torch.device("cpu")) == pytest.approx(reference, abs=0.02)
