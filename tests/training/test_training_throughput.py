"""Throughput, MFU, peak FLOP/s and peak memory."""

import re
from pathlib import Path

import pytest
import torch

from training.metrics import METRICS
from training.throughput import Throughput, peak_flops, peak_memory_gib


def throughput(peak: float | None, world_size: int = 4) -> Throughput:
    return Throughput(6e9, 8e9, world_size, peak, torch.device("cpu"))


def test_mesh_at_peak_flops_has_mfu_of_one() -> None:
    peak, world_size, seconds = 2e12, 4, 10.0
    tokens = round(peak * world_size * seconds / 8e9)
    metrics = throughput(peak, world_size).metrics(tokens, seconds, 0.5, 5)
    assert list(metrics) == [m.key for m in METRICS if m.key in metrics]
    assert metrics["mfu_full"] == pytest.approx(1.0)
    assert metrics["mfu_causal"] == pytest.approx(6 / 8)
    assert metrics["tflops"] == pytest.approx(peak * 6 / 8 / 1e12)
    assert metrics["tokens_per_second"] == tokens / seconds
    assert (metrics["step_seconds"], metrics["data_wait_seconds"]) == (2.0, 0.1)


def test_unknown_peak_gives_no_mfu_and_same_throughput() -> None:
    known, unknown = (throughput(peak).metrics(1000, 2.0, 0.0, 1) for peak in (1e12, None))
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
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA H200 NVL", None),
        ("NVIDIA GH200 480GB", None),
        ("NVIDIA GB200", 2500),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA GeForce RTX 4090 D", None),
        ("cpu", None),
    ],
)
def test_peak_flops_is_dense_peak_or_none(name: str, tflops: float | None) -> None:
    expected = None if tflops is None else tflops * 1e12
    assert peak_flops(name, torch.bfloat16) == peak_flops(name, torch.float16) == expected
    assert peak_flops(name, torch.float32) is None


def test_peak_memory_on_cpu_is_peak_resident_set_size() -> None:
    status = Path("/proc/self/status")
    if not status.exists():
        pytest.skip("the reference value is read from /proc")
    torch.ones(2**26).sum()  # 256 MiB touched and freed: the peak stays
    reference = int(re.search(r"VmHWM:\s+(\d+) kB", status.read_text()).group(1)) / 2**20  # type: ignore[union-attr]
    # The kernel counts pages per thread in batches, so the two differ by some MiB.
    assert peak_memory_gib(torch.device("cpu")) == pytest.approx(reference, abs=0.02)
