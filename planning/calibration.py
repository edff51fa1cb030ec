"""Measure this machine's device in under a minute and describe it as a hardware file.

Each rate is the median over repetitions of an operation that training consists of: large matrix
products by data type, causal attention forward and backward, a copy, and all-gathers between two
processes or all GPUs. Links that cannot be measured are copied from the file of the same device.
"""

import dataclasses
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn

from data.files import write_atomically
from model.attention import AttentionKernel
from planning.hardware import FOLDER, LOCAL, PROCESS_GIB, Hardware, hardware_of

SECONDS = 1.5  # per measurement
MIN_GATHERS = 5
# Matrix size, elements of a copy, (batch, heads, seq, head_dim), elements of an all-gather.
SIZES: dict[str, dict[str, Any]] = {
    "cpu": {"product": 1024, "copy": 2**24, "attention": (4, 8, 512, 64), "payload": 2**22},
    "cuda": {"product": 8192, "copy": 2**28, "attention": (2, 32, 4096, 128), "payload": 2**26},
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
RESERVED_GIB = {"cpu": PROCESS_GIB, "cuda": 3.0}
MAX_CPU_RANKS = 64  # ranks that may share a machine without a GPU
DEFAULT_LINK = (20.0, 20.0)  # GB/s and microseconds: PCI Express, a fast network


def measure_local_hardware() -> tuple[Path, Hardware]:
    """Measure this machine and write the result to conf/hardware/local.yaml."""
    import yaml

    hardware, path = calibrate(), FOLDER / f"{LOCAL}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    text = yaml.safe_dump(_rounded(dataclasses.asdict(hardware)), sort_keys=False)
    write_atomically(path, f"# Measured by `python plan.py calibrate=true`.\n{text}".encode())
    return path, hardware


def calibrate(seconds: float = SECONDS) -> Hardware:
    """Measure the first GPU and the links between all GPUs, or the CPU.

    Args:
        seconds: Duration of each of about eight measurements.
    """
    kind: Literal["cpu", "cuda"] = "cuda" if torch.cuda.is_available() else "cpu"
    known, devices = None, MAX_CPU_RANKS
    name = f"cpu, {torch.get_num_threads()} threads"
    memory = host_memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if kind == "cuda":
        properties = torch.cuda.get_device_properties(0)
        name, memory = properties.name, properties.total_memory
        known, devices = hardware_of(name), torch.cuda.device_count()
    sizes = SIZES[kind]
    n = sizes["product"]
    matrix = {key: matrix_tflops(kind, dtype, n, seconds) for key, dtype in DTYPES.items()}
    attention = {key: _attention(kind, dtype, sizes, seconds) for key, dtype in DTYPES.items()}
    if known is not None and "fp8" in known.matrix_tflops:  # scaled from the known ratio
        for measured, rates in ((matrix, known.matrix_tflops), (attention, known.attention_tflops)):
            measured["fp8"] = measured["bf16"] * rates["fp8"] / rates["bf16"]
    known_link = (known.link_gb_s, known.link_latency_us) if known else DEFAULT_LINK
    link = _link(kind, sizes["payload"], seconds) or known_link
    network = (known.network_gb_s, known.network_latency_us) if known else link
    bandwidth = _bandwidth(kind, sizes["copy"], seconds)
    # A rate may be above the peak of the data sheet, or attention above products of that size.
    peaks = dict(known.peak_tflops if known else matrix)
    for rates in (matrix, attention):
        peaks |= {dtype: max(peaks.get(dtype, 0.0), rate) for dtype, rate in rates.items()}
    return Hardware(
        name=name,
        accelerator=kind,
        memory_gib=memory / 2**30,
        reserved_gib=RESERVED_GIB[kind],
        peak_tflops=peaks,
        matrix_tflops=matrix,
        attention_tflops=attention,
        flash_attention_tflops=known.flash_attention_tflops if known else {},
        bandwidth_gb_s=bandwidth,
        link_gb_s=min(link[0], bandwidth),  # a noisy difference of two times may be higher
        link_latency_us=link[1],
        network_gb_s=min(network[0], bandwidth),
        network_latency_us=network[1],
        devices_per_node=devices,
        host_memory_gib=host_memory / 2**30 if kind == "cuda" else None,
        power_watts=known.power_watts if known else None,
        capability=properties.major + properties.minor / 10 if kind == "cuda" else None,
    )


def _rounded(value: Any) -> Any:
    """Round all floats to four significant digits."""
    if isinstance(value, dict):
        return {key: _rounded(each) for key, each in value.items()}
    return float(f"{value:.4g}") if isinstance(value, float) else value


def _repeated_seconds(kind: str, operation: Callable[[], object], repeats: int) -> float:
    """Return the median time of `repeats` operations."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        operation()
        if kind == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def _median_seconds(kind: str, operation: Callable[[], object], seconds: float) -> float:
    """Return the median time of an operation repeated for `seconds`, and at least three times."""
    _repeated_seconds(kind, operation, 2)  # warm-up
    estimate = _repeated_seconds(kind, operation, 1)
    return _repeated_seconds(kind, operation, max(int(seconds / estimate), 3))


def matrix_tflops(kind: str, dtype: torch.dtype, n: int, seconds: float) -> float:
    """Return the TFLOP/s of an (n, n) × (n, n) matrix product repeated for `seconds`."""
    a, b = (torch.randn(n, n, device=kind).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    return 2 * n**3 / _median_seconds(kind, lambda: torch.mm(a, b, out=out), seconds) / 1e12


def _attention(kind: str, dtype: torch.dtype, sizes: dict[str, Any], seconds: float) -> float:
    """Return the TFLOP/s of causal attention, forward and backward, counted as in `model.flops`."""
    batch, heads, seq, head_dim = sizes["attention"]
    q, k, v = (
        torch.randn(batch, seq, heads, head_dim, device=kind, dtype=dtype, requires_grad=True)
        for _ in range(3)
    )
    kernel = AttentionKernel("auto")

    def forward_backward() -> None:
        out = kernel(q, k, v, None)
        torch.autograd.grad(out.sum(), (q, k, v))

    flops = 6 * batch * heads * head_dim * seq**2
    return flops / _median_seconds(kind, forward_backward, seconds) / 1e12


def _bandwidth(kind: str, elements: int, seconds: float) -> float:
    """Return the GB/s of a copy, bytes read plus bytes written."""
    source = torch.zeros(elements, device=kind)
    target = torch.empty_like(source)
    return 2 * source.nbytes / _median_seconds(kind, lambda: target.copy_(source), seconds) / 1e9


# ---------------------------------------------------------------- between processes


def _link(kind: str, payload: int, seconds: float) -> tuple[float, float] | None:
    """Return GB/s and latency in microseconds of an all-gather.

    The rate is per rank on GPUs and the sum over ranks on CPU, where they share one link.
    """
    ranks = torch.cuda.device_count() if kind == "cuda" else 2
    if ranks < 2:
        return None
    with tempfile.TemporaryDirectory() as folder:
        spawn(_gather, args=(ranks, kind, payload, seconds, folder), nprocs=ranks)
        large, small = map(float, (Path(folder) / "seconds").read_text().split())
    sent = 4 * payload * (ranks - 1) / ranks
    sent *= ranks if kind == "cpu" else 1
    return sent / max(large - small, 1e-9) / 1e9, small * 1e6


def _gather(rank: int, ranks: int, kind: str, payload: int, seconds: float, folder: str) -> None:
    """Time all-gathers of `payload` float32 values and of one per rank; rank 0 writes the times."""
    warnings.simplefilter("ignore", FutureWarning)  # the collective is renamed in PyTorch 2.13
    backend = "nccl" if kind == "cuda" else "gloo"
    torch.set_num_threads(1)
    if kind == "cuda":
        torch.cuda.set_device(rank)
    store = dist.FileStore(f"{folder}/store", ranks)
    dist.init_process_group(backend, store=store, rank=rank, world_size=ranks)
    times = []
    for elements in (payload, ranks):
        shard = torch.zeros(elements // ranks, device=kind)
        full = torch.empty(elements, device=kind)
        gather = partial(dist.all_gather_into_tensor, full, shard)
        estimate = _repeated_seconds(kind, gather, MIN_GATHERS)
        repeats = torch.tensor(max(int(seconds / estimate), MIN_GATHERS), device=kind)
        dist.broadcast(repeats, 0)  # the same number on all ranks
        times.append(_repeated_seconds(kind, gather, int(repeats)))
    if rank == 0:
        (Path(folder) / "seconds").write_text(" ".join(map(str, times)))
    dist.destroy_process_group()
