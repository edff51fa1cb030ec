"""Throughput of a run: tokens/s, TFLOP/s and model FLOPs utilization (MFU).

Replaces Fabric's own monitor, which counts tensor-parallel ranks as data-parallel and lacks recent
GPUs in its table of peaks.
"""

import re
import resource
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from model.flops import flops_per_token
from parallel.data_parallel import mixed_precision_policy
from parallel.mesh import MeshShape
from training.config import JobConfig

if TYPE_CHECKING:
    from parallel.pipeline_parallel import Pipeline

# Dense bf16 peak in TFLOP/s by device name, as torch.cuda.get_device_name returns it.
_PEAK_TFLOPS = (
    (r"\bA100\b", 312.0),
    (r"\bL40S\b", 362.0),
    (r"\bRTX 4090$", 165.2),
    (r"\bRTX 5090$", 209.5),
    (r"\bRTX PRO 6000 Blackwell (Server|Workstation) Edition\b", 503.0),
    (r"\bH100\b.*(PCIe|HBM2e)", 756.0),
    (r"\bH100 NVL\b", 835.0),
    (r"\bH100\b.*(SXM|HBM3\b)", 989.0),
    (r"\bH200\b(?!.*NVL)", 989.0),
    (r"\bB[23]00\b", 2250.0),
    (r"\bGB[23]00\b", 2500.0),
    (r"\bMI300X\b", 1307.0),
)


def peak_flops(device_name: str, dtype: torch.dtype) -> float | None:
    """Return the dense peak of one device in FLOP/s for matrix products, or None if unknown.

    The table has bf16 and fp16 peaks of some GPUs. The result is None for CPUs, other dtypes, MIG
    slices and all other GPUs, since a wrong peak would give a wrong MFU. Source: the data sheets,
    without structured sparsity, with accumulation in fp32.
    """
    if dtype not in (torch.bfloat16, torch.float16) or " MIG " in f"{device_name} ":
        return None
    peaks = (tflops for pattern, tflops in _PEAK_TFLOPS if re.search(pattern, device_name))
    tflops = next(peaks, None)
    return tflops and tflops * 1e12


def peak_memory_gib(device: torch.device) -> float:
    """Return peak allocated memory on CUDA, peak resident set size of the process on CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)  # bytes on macOS, KiB elsewhere


@dataclass(frozen=True)
class Throughput:
    """Convert token counts and seconds to throughput metrics.

    FLOPs per token are 6·N + 12·layers·heads·head_dim·seq_len ("full"; PaLM, arXiv:2204.02311,
    appendix B). "causal" halves the second term: it excludes masked positions.
    Recomputed activations do not count.

    Attributes:
        world_size: Number of devices in the mesh.
        peak_flops: Peak of one device in FLOP/s, or None if unknown.
    """

    flops_per_token_causal: float
    flops_per_token_full: float
    world_size: int
    peak_flops: float | None
    device: torch.device

    def metrics(
        self, tokens: int, seconds: float, data_wait_seconds: float, steps: int
    ) -> dict[str, float | None]:
        """Return the metrics of `steps` steps.

        `tokens_per_second` counts the entire mesh, `tflops` is per device (causal), and
        `mfu_causal` and `mfu_full` are fractions of the device's peak, None if it is unknown.
        `step_seconds` and `data_wait_seconds` are means per step.

        Args:
            tokens: Tokens of all ranks in these steps.
            seconds: Duration of these steps.
            data_wait_seconds: Part of `seconds` spent waiting for data.
        """
        tokens_per_second = tokens / seconds
        causal = tokens_per_second * self.flops_per_token_causal / self.world_size
        full = tokens_per_second * self.flops_per_token_full / self.world_size
        return {
            "tokens_per_second": tokens_per_second,
            "tflops": causal / 1e12,
            "mfu_causal": causal / self.peak_flops if self.peak_flops else None,
            "mfu_full": full / self.peak_flops if self.peak_flops else None,
            "peak_memory_gib": peak_memory_gib(self.device),
            "step_seconds": seconds / steps,
            "data_wait_seconds": data_wait_seconds / steps,
        }


def build_throughput(
    config: JobConfig, mesh: MeshShape, device: torch.device, seq_len: int
) -> Throughput:
    """Return the throughput meter of a run for sequences of length `seq_len`."""
    dtype = mixed_precision_policy(config.precision, device.type).param_dtype or torch.float32
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    causal, full = (flops_per_token(config.model, seq_len, causal=each) for each in (True, False))
    # With fp8 products, a fraction of the bf16 peak would be meaningless.
    peak = None if config.precision.fp8 else peak_flops(name, dtype)
    return Throughput(causal, full, mesh.world_size, peak, device)


def pipeline_metrics(
    pipeline: "Pipeline", device: torch.device
) -> dict[str, float | int | list[float]]:
    """Return how the pipeline ranks shared the last step, equal on all ranks; a collective call.

    Each value of a pipeline rank is the largest of its processes. The device must have completed
    the step.

    - `bubble_share`: fraction of the forwards and backwards of a step in which a pipeline rank
      waits for others, averaged over the pipeline ranks; `parallel.pipeline_schedule.bubble` if
      stages and micro-batches take equally long.
    - `slowest_stage`: the pipeline rank that computes longest.
    - `peak_memory_gib_by_stage`: peak memory by pipeline rank, and `peak_memory_gib` the largest.
    """
    ranks, rank = pipeline.ranks, pipeline.rank
    values = torch.zeros(ranks, 3, device=device)  # seconds computed, seconds in total, memory
    values[rank] = torch.tensor([*pipeline.step_seconds(), peak_memory_gib(device)])
    dist.all_reduce(values, dist.ReduceOp.MAX)
    computed, total, memory = values.unbind(1)  # each (pipeline ranks)
    return {
        "bubble_share": 1 - (computed.mean() / total.max()).item(),
        "slowest_stage": int(computed.argmax()),
        "peak_memory_gib": memory.max().item(),
        "peak_memory_gib_by_stage": memory.tolist(),
    }
