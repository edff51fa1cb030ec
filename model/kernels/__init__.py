"""CPU kernels, one per file, and their selection.

The functions here are the only place that decides between these kernels and PyTorch's own. On
CUDA, and if the CPU or the dtype does not profit, they select PyTorch's.
"""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from model.kernels import attention_backward
from model.kernels.rms_norm import fused_rms_norm

MIN_ATTENTION_QUERIES = 512
"""With fewer queries the backward of PyTorch's flash kernel may be faster."""

SDPA = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]


def select_sdpa(default: SDPA) -> SDPA:
    """Return `default`, with the backward of `attention_backward` for bf16 inputs where faster."""
    if not has_bf16_units():
        return default

    def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        on_cpu_in_bf16 = q.device.type == "cpu" and q.dtype == torch.bfloat16
        if on_cpu_in_bf16 and q.shape[2] >= MIN_ATTENTION_QUERIES:
            return attention_backward.attention(q, k, v, mask)
        return default(q, k, v, mask)

    return sdpa


def rms_norm(x: Tensor, shape: torch.Size, weight: Tensor, eps: float) -> Tensor:
    """`F.rms_norm` over the last dim: (…, dim), (dim) -> (…, dim); fused in eager mode on CPU."""
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return F.rms_norm(x, shape, weight, eps)
    return fused_rms_norm(x, weight, eps)


def prefers_onednn_linear(device_type: str, dtype: torch.dtype) -> bool:
    """Return whether `onednn_linear` is faster than PyTorch's Linear: in float32 on AMD CPUs."""
    return device_type == "cpu" and dtype == torch.float32 and _is_amd_cpu_with_mkl()


@cache
def has_bf16_units() -> bool:
    """Return whether the CPU multiplies bf16 in hardware and PyTorch has oneDNN, which uses it."""
    units = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return units and torch.backends.mkldnn.is_available()


@cache
def _is_amd_cpu_with_mkl() -> bool:
    """Return whether PyTorch calls MKL on an AMD CPU although it also has oneDNN."""
    try:
        cpu_info = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    libraries = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()
    return libraries and "AuthenticAMD" in cpu_info
