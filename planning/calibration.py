"""Measures this machine's device in under a minute, and writes it as a hardware file.

Each rate is the median of repeated operations of the kind that training consists of: large products
by precision, causal attention forward and backward, a copy, and collectives between two processes
or all GPUs. Where a link cannot be measured here, it is what the file of the same card says.
"""

import dataclasses
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.spawn import spawn

from model.attention import AttentionKernel
from planning.hardware import PROCESS_GIB, Hardware, hardware_of

SECONDS = 1.5  # of each measurement
WARM_UP, LEAST = 2, 3  # operations before, and that are timed
# Rows and widths of a product, elements of a copy, (batch, heads, seq, head_dim).
SIZES: dict[str, dict[str, Any]] = {
    "cpu": {"product": 1024, "copy": 2**24, "attention": (4, 8, 512, 64), "payload": 2**22},
    "cuda": {"product": 8192, "copy": 2**28, "attention": (2, 32, 4096, 128), "payload": 2**26},
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
RESERVED_GIB = {"cpu": PROCESS_GIB, "cuda": 4.0}
PROCESSES = 64  # that may share a machine without a GPU
UNKNOWN_LINK = (20.0, 20.0)  # GB/s and microseconds: PCI Express, a fast network


def calibrate(seconds: float = SECONDS) -> Hardware:
    """The hardware of this machine: its first GPU and those beside it, else its CPU.

    Args:
        seconds: Of each of about eight measurements.
    """
    kind: Literal["cpu", "cuda"] = "cuda" if torch.cuda.is_available() else "cpu"
    known, name, peak, memory, devices = _device(kind)
    sizes = SIZES[kind]
    n = sizes["product"]
    matrix = {key: matrix_tflops(kind, dtype, n, seconds) for key, dtype in DTYPES.items()}
    attention = {key: _attention(kind, dtype, sizes, seconds) for key, dtype in DTYPES.items()}
    if known is not None and "fp8" in known.matrix_tflops:  # in proportion to what the card does
        for own, theirs in ((matrix, known.matrix_tflops), (attention, known.attention_tflops)):
            own["fp8"] = own["bf16"] * theirs["fp8"] / theirs["bf16"]
    link = _link(kind, sizes["payload"], seconds)
    if link is None:
        link = (known.link_gb_s, known.link_latency_us) if known else UNKNOWN_LINK
    network = (known.network_gb_s, known.network_latency_us) if known else link
    return Hardware(
        name=name,
        accelerator=kind,
        memory_gib=memory,
        reserved_gib=RESERVED_GIB[kind],
        peak_tflops=peak or matrix,
        matrix_tflops=matrix,
        attention_tflops=attention,
        bandwidth_gb_s=_bandwidth(kind, sizes["copy"], seconds),
        link_gb_s=link[0],
        link_latency_us=link[1],
        network_gb_s=network[0],
        network_latency_us=network[1],
        devices_per_node=devices,
    )


def write_hardware(hardware: Hardware, path: Path) -> None:
    """Writes the file that `load_hardware` reads, whole or not at all."""
    import yaml

    path.parent.mkdir(parents=True, exist_ok=True)
    text = yaml.safe_dump(_rounded(dataclasses.asdict(hardware)), sort_keys=False)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(f"# Measured by `python plan.py calibrate=true`.\n{text}")
    os.replace(temporary, path)


def _rounded(value: Any) -> Any:
    """Four digits of each number."""
    if isinstance(value, dict):
        return {key: _rounded(each) for key, each in value.items()}
    return float(f"{value:.4g}") if isinstance(value, float) else value


def _device(kind: str) -> tuple[Hardware | None, str, dict[str, float] | None, float, int]:
    """What is known of the device, its name, peaks and memory in GiB, and how many there are."""
    if kind == "cuda":
        properties = torch.cuda.get_device_properties(0)
        known = hardware_of(properties.name)
        peak = known.peak_tflops if known else None
        count = torch.cuda.device_count()
        return known, properties.name, peak, properties.total_memory / 2**30, count
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return None, f"cpu, {torch.get_num_threads()} threads", None, memory, PROCESSES


def _median_seconds(kind: str, operation: Callable[[], object], seconds: float) -> float:
    """Median time of an operation, repeated for so long."""

    def wait() -> None:
        if kind == "cuda":
            torch.cuda.synchronize()

    for _ in range(WARM_UP):
        operation()
    wait()
    taken: list[float] = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(taken) < LEAST:
        begin = time.perf_counter()
        operation()
        wait()
        taken.append(time.perf_counter() - begin)
    return statistics.median(taken)


def matrix_tflops(kind: str, dtype: torch.dtype, n: int, seconds: float) -> float:
    """TFLOP/s of a product of (n, n) matrices, repeated for so long."""
    a, b = (torch.randn(n, n, device=kind).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    return 2 * n**3 / _median_seconds(kind, lambda: torch.mm(a, b, out=out), seconds) / 1e12


def _attention(kind: str, dtype: torch.dtype, sizes: dict[str, Any], seconds: float) -> float:
    """TFLOP/s of causal attention, forward and backward, as `model.flops` counts them."""
    batch, heads, seq, head_dim = sizes["attention"]
    q, k, v = (
        torch.randn(batch, seq, heads, head_dim, device=kind, dtype=dtype, requires_grad=True)
        for _ in range(3)
    )
    kernel = AttentionKernel("auto")

    def both() -> None:
        out = kernel(q, k, v, None)
        torch.autograd.grad(out.sum(), (q, k, v))

    return 6 * batch * heads * head_dim * seq**2 / _median_seconds(kind, both, seconds) / 1e12


def _bandwidth(kind: str, elements: int, seconds: float) -> float:
    """GB/s of a copy, read and written."""
    source = torch.zeros(elements, device=kind)
    target = torch.empty_like(source)
    moved = 2 * source.nbytes
    return moved / _median_seconds(kind, lambda: target.copy_(source), seconds) / 1e9


# ---------------------------------------------------------------- between processes


def _link(kind: str, payload: int, seconds: float) -> tuple[float, float] | None:
    """GB/s of a rank in an all-gather, on CPU of all ranks, and microseconds of one of nothing."""
    ranks = torch.cuda.device_count() if kind == "cuda" else 2
    if ranks < 2:
        return None
    with tempfile.TemporaryDirectory() as folder:
        spawn(_gather, args=(ranks, kind, payload, seconds, folder), nprocs=ranks)
        large, small = map(float, (Path(folder) / "seconds").read_text().split())
    sent = 4 * payload * (ranks - 1) / ranks
    if kind == "cpu":  # which all of them share
        sent *= ranks
    return sent / max(large - small, 1e-9) / 1e9, small * 1e6


def _gather(rank: int, ranks: int, kind: str, payload: int, seconds: float, folder: str) -> None:
    """One process: all-gathers of `payload` float32 and of one a rank; rank 0 writes the times."""
    warnings.simplefilter("ignore", FutureWarning)  # the collective has another name from 2.13 on
    backend = "nccl" if kind == "cuda" else "gloo"
    if kind == "cuda":
        torch.cuda.set_device(rank)
    else:
        torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", ranks)
    dist.init_process_group(backend, store=store, rank=rank, world_size=ranks)
    taken = []
    for elements in (payload, ranks):
        part = torch.zeros(elements // ranks, device=kind)
        whole = torch.empty(elements, device=kind)
        once = _seconds_of_gather(kind, whole, part, 5)
        repeats = torch.tensor(max(int(seconds / once), 5), device=kind)
        dist.broadcast(repeats, 0)  # all of them as often
        taken.append(_seconds_of_gather(kind, whole, part, int(repeats)))
    if rank == 0:
        (Path(folder) / "seconds").write_text(" ".join(map(str, taken)))
    dist.destroy_process_group()


def _seconds_of_gather(kind: str, whole: Tensor, part: Tensor, repeats: int) -> float:
    """Median of so many all-gathers."""
    taken = []
    for _ in range(repeats):
        begin = time.perf_counter()
        dist.all_gather_into_tensor(whole, part)
        if kind == "cuda":
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - begin)
    return statistics.median(taken)
