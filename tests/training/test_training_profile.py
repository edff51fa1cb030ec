"""Step profiles: each instant of a step belongs to exactly one row of the breakdown."""

import gzip
import json
import random
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from train import profiled
from training.config import LogConfig
from training.profile import (
    ATTENTION,
    COMMUNICATION,
    DATA,
    ELEMENTWISE,
    HOST,
    MATRIX,
    OPTIMIZER,
    ROWS,
    STEP,
    WAIT,
    Span,
    StepBreakdown,
    break_down,
    partition,
    read_breakdown,
)

MAIN, OTHER = 1, 2  # threads


def event(name: str, start: int, end: int, thread: int = MAIN, **more: Any) -> dict[str, Any]:
    """Return a complete trace event; times are in microseconds."""
    cat = more.pop("cat", "cpu_op")
    complete = {"ph": "X", "name": name, "cat": cat, "ts": start, "dur": end - start}
    return complete | {"tid": thread, "args": more}


def annotation(name: str, start: int, end: int, thread: int = MAIN) -> dict[str, Any]:
    return event(name, start, end, thread, cat="user_annotation")


def microseconds(breakdown: StepBreakdown) -> dict[str, int]:
    """Return all rows that are not zero."""
    assert list(breakdown.rows) == list(ROWS)
    return {name: round(1e6 * seconds) for name, seconds in breakdown.rows.items() if seconds}


def test_instant_belongs_to_first_layer_that_covers_it() -> None:
    draw = random.Random(0)
    for _ in range(50):
        start, end = 10, 60
        layers = [
            [
                Span(first, first + draw.randrange(12))
                for first in draw.sample(range(80), draw.randrange(6))
            ]
            for _ in range(4)
        ] + [[Span(start, end)]]
        expected = [0] * len(layers)
        for instant in range(start, end):
            covers = [any(s.start <= instant < s.end for s in spans) for spans in layers]
            expected[covers.index(True)] += 1
        assert partition(Span(start, end), layers) == expected


def test_cpu_operators_count_for_self_time() -> None:
    breakdown = break_down(
        [
            annotation(STEP, 0, 1000),
            annotation(DATA, 0, 100),
            event("aten::empty", 90, 100),  # of the loader, part of the data wait
            event("aten::linear", 100, 300),
            event("aten::addmm", 120, 290),
            event("aten::copy_", 130, 140),  # nested in the product
            event("aten::_scaled_dot_product_attention_math", 300, 400),
            event("aten::bmm", 310, 350),
            event("aten::mul", 400, 450),
            event("## Call CompiledFxGraph fabc ##", 450, 520),
            event("aten::mm", 460, 480),
            annotation("Optimizer.step#AdamW.step", 600, 700),
            event("aten::_fused_adamw_", 620, 690),
            event("aten::mm", 0, 1000, OTHER),  # on another thread
            event("aten::mul", 1000, 1100),  # after the step
        ]
    )
    assert microseconds(breakdown) == {
        MATRIX: 170 + 20,
        ATTENTION: 100,
        ELEMENTWISE: 50 + 50,
        OPTIMIZER: 70,
        WAIT: 100,
        HOST: 1000 - 190 - 100 - 100 - 70 - 100,
    }


def test_cpu_communication_is_exposed_where_nothing_is_computed() -> None:
    breakdown = break_down(
        [
            annotation(STEP, 0, 1000),
            event("aten::mm", 0, 300),
            annotation(
                "gloo:all_gather", 100, 500, OTHER
            ),  # 200 overlapped by the product, 200 exposed
            event("FSDP::pre_forward", 300, 600, cat="user_annotation"),
            event("c10d::allreduce_", 700, 800),
            event("aten::copy_", 720, 750),
        ]
    )
    assert microseconds(breakdown) == {
        MATRIX: 300,
        ELEMENTWISE: 30,
        COMMUNICATION: 200 + 70,
        HOST: 100 + 300 - 100 + 100,
    }
    assert breakdown.communication == pytest.approx(470e-6)
    assert "overlapped communication       0.2 ms" in breakdown.table()


def kernel(name: str, start: int, end: int, stream: int = 7, **more: Any) -> dict[str, Any]:
    return event(name, start, end, stream, cat="kernel", **more)


def test_gpu_kernels_count_and_communication_is_exposed_where_none_runs() -> None:
    external = {"External id": 3}
    breakdown = break_down(
        [
            annotation(STEP, 100, 900, 7) | {"cat": "gpu_user_annotation"},
            annotation(STEP, 0, 1000),
            annotation(DATA, 0, 50),
            event("aten::mm", 60, 990),  # host time, not device time
            event("aten::mm", 60, 70, **external),
            annotation("Optimizer.step#AdamW.step", 80, 90),
            event("cudaLaunchKernel", 85, 86, cat="cuda_runtime", correlation=5),
            kernel("kernel_with_unknown_name", 100, 200, **external),
            kernel("nvjet_tst_128x256_64x4", 200, 300),
            kernel("void cutlass::device_kernel<flash::FlashAttnFwdSm90>", 300, 400),
            kernel("triton_poi_fused__scaled_dot_product_flash_attention_mul_0", 400, 450),
            kernel("ncclDevKernel_AllGather_RING_LL", 350, 500, stream=8),
            kernel("void at::native::multi_tensor_apply_kernel", 600, 640, correlation=5),
            event("Memcpy HtoD (Pinned -> Device)", 50, 60, 9, cat="gpu_memcpy"),
        ]
    )
    assert microseconds(breakdown) == {
        MATRIX: 200,
        ATTENTION: 100,
        ELEMENTWISE: 50 + 10,
        OPTIMIZER: 40,
        COMMUNICATION: 50,
        WAIT: 50,
        HOST: 1000 - 200 - 100 - 60 - 40 - 50 - 50,
    }
    assert breakdown.communication == pytest.approx(150e-6)


def test_peak_allocated_is_relative_to_start_of_step() -> None:
    def memory(at: int, change: int, device: int = 0) -> dict[str, Any]:
        args = {"Bytes": change, "Device Type": device}
        return {"ph": "i", "name": "[memory]", "ts": at, "args": args}

    before, other_device = memory(-5, 900), memory(30, 800, device=1)
    changes = [memory(10, 100), memory(20, 50), memory(30, -120), memory(40, 60)]
    step = annotation(STEP, 0, 100)
    assert break_down([step, before, other_device, *changes]).peak_allocated == 150


# ---------------------------------------------------------------- in a run


def test_unlisted_steps_and_other_ranks_are_not_profiled() -> None:
    def run(first: bool, profile: list[int] | None) -> Any:
        config = SimpleNamespace(log=LogConfig(profile=profile))
        return SimpleNamespace(config=config, fabric=SimpleNamespace(is_global_zero=first))

    for context in (
        profiled(run(True, None), 3),
        profiled(run(True, [2, 4]), 3),
        profiled(run(False, [3]), 3),
    ):
        assert isinstance(context, nullcontext)


def test_run_writes_trace_and_breakdown_of_listed_steps(smoke_run: Any, tmp_path: Path) -> None:
    run = tmp_path / "run"
    done = smoke_run(run, "log.profile=[2,4]", "train.max_steps=5", "validation.samples=0")
    folders = sorted((run / "profile").iterdir())
    assert [folder.name for folder in folders] == ["step-00000002", "step-00000004"]
    for folder in folders:
        trace = folder / "trace.json.gz"
        breakdown = read_breakdown(trace)
        # A sum of sorted differences of one clock: only float rounding, of 1e12 microseconds.
        assert sum(breakdown.rows.values()) == pytest.approx(breakdown.total, rel=1e-3)
        events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
        steps = [e for e in events if e["name"] == STEP]
        assert [e["dur"] / 1e6 for e in steps] == [pytest.approx(breakdown.total)]
        # One process without communication has time in all other rows.
        for row in (MATRIX, ATTENTION, ELEMENTWISE, OPTIMIZER, WAIT, HOST):
            assert breakdown.rows[row] > 0, row
        table = (folder / "time.txt").read_text()
        assert table == breakdown.table() + "\n" and table in done.stdout + "\n"
        assert breakdown.peak_allocated > 0


def test_failed_profile_write_is_reported_and_training_continues(
    smoke_run: Any, tmp_path: Path
) -> None:
    (tmp_path / "profile").touch()  # at the path of the folder
    done = smoke_run(tmp_path, "log.profile=[1]", "train.max_steps=2", "validation.samples=0")
    assert "Could not write the profile of step 1 in " in done.stdout
    assert (tmp_path / "checkpoints" / "step-00000002" / "COMMITTED").exists()
