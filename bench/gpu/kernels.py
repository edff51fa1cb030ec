"""Attention kernels, forward and backward, against a float32 reference with a dense mask.

The model's interface (`model.attention.AttentionKernel`) runs SDPA, FlexAttention and varlen, the
latter with FlashAttention-2 and, where their packages are importable, with FlashAttention-3 and -4.
SDPA is also timed by backend, on causal rows without documents: on Hopper and Blackwell PyTorch
prefers cuDNN's to FlashAttention, activated or not (`training.flash_attention`).
Errors are relative to the reference's norm. The limits: bf16 has 8 significant bits, so that inputs
and outputs of a product are rounded by up to 2**-9; float32 kernels may use TF32 with 11 bits.
"""

import math
import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.gpu.parts import Rows
from model.attention import AttentionKernel, document_mask

LIMITS = {torch.float32: 2e-3, torch.bfloat16: 2e-2}
HEADS, KV_HEADS = 8, 2
FLASH = {"fa2": None, "fa3": "FA3", "fa4": "FA4"}
BACKENDS = {"default": None, "cudnn": SDPBackend.CUDNN_ATTENTION, "fa2": SDPBackend.FLASH_ATTENTION}
"""Backends of SDPA without an activated package, by name; None: PyTorch's choice."""
REPETITIONS = 10
TINY = (1, 64, 4, 2, 16)  # batch, seq, heads, kv_heads, head_dim
Case = tuple[str, torch.dtype, int, bool]  # choice, dtype, head_dim, documents
CASES: list[Case] = [
    *(("sdpa", dtype, 128, documents) for dtype in LIMITS for documents in (False, True)),
    *(("flex", dtype, dim, True) for dtype in LIMITS for dim in (64, 128)),
    *((choice, torch.bfloat16, dim, True) for choice in FLASH for dim in (64, 128)),
]


def compare(reduced: bool) -> Rows:
    """Yield the errors of each case. On CPU only `sdpa` runs."""
    device, seq = ("cpu", 256) if reduced else ("cuda", 2_048)
    yield from time_sdpa(BACKENDS, device)
    for choice, dtype, head_dim, documents in CASES:
        name = f"{choice} {str(dtype)[6:]} head_dim={head_dim}" + " documents" * documents
        try:
            yield name, measure(choice, dtype, head_dim, documents, device, seq)
        except Exception as error:  # the other kernels matter too
            yield name, {"passed": False, "error": f"{type(error).__name__}: {error}"[:500]}
    for name in ("fa3", "fa4"):
        reason = activate(name) if device == "cuda" else "needs a GPU"
        if reason is None:
            yield from time_sdpa({"default": None, name: SDPBackend.FLASH_ATTENTION}, device, name)
        else:
            yield f"sdpa speed {name}", {"skipped": reason}


def time_sdpa(backends: Mapping[str, SDPBackend | None], device: str, active: str = "fa2") -> Rows:
    """Yield the speed of causal rows, forward and backward, in bf16 with the heads of Llama 3 8B.

    Args:
        active: FlashAttention in use, which `SDPBackend.FLASH_ATTENTION` runs.
    """
    batch, seq, heads, kv_heads, head_dim = (1, 8_192, 32, 8, 128) if device == "cuda" else TINY
    shapes = ((batch, seq, count, head_dim) for count in (heads, kv_heads, kv_heads, heads))
    q, k, v, gradient = (torch.randn(s, device=device, dtype=torch.bfloat16) for s in shapes)
    kernel = AttentionKernel("sdpa")
    # Two products of a token with half of the sequence, and five in the backward.
    flops = 7 * batch * heads * seq**2 * head_dim
    for name, backend in backends.items():
        row = f"sdpa speed {name}" + f" with {active} active" * (name == "default")
        with nullcontext() if backend is None else sdpa_kernel(backend):
            try:
                seconds = [seconds_of(kernel, q, k, v, gradient) for _ in range(REPETITIONS)]
            except RuntimeError as error:  # the backend does not support GPU or shapes
                yield row, {"skipped": f"{error}"[:300]}
                continue
        median = statistics.median(seconds[2:])
        yield row, {"milliseconds": 1e3 * median, "tflops": flops / median / 1e12}


def seconds_of(kernel: AttentionKernel, q: Tensor, k: Tensor, v: Tensor, gradient: Tensor) -> float:
    """Return the duration of a forward and backward."""
    q, k, v = (t.detach().requires_grad_() for t in (q, k, v))
    synchronize = torch.cuda.synchronize if q.is_cuda else lambda: None
    synchronize()
    start = time.perf_counter()
    torch.autograd.grad(kernel(q, k, v, None), (q, k, v), gradient)
    synchronize()
    return time.perf_counter() - start


def measure(
    choice: str, dtype: torch.dtype, head_dim: int, documents: bool, device: str, seq: int
) -> dict[str, Any]:
    """Return the relative errors of output and gradients, and whether they are within limits."""
    if choice != "sdpa" and device == "cpu":
        return {"skipped": "needs a GPU"}
    if (reason := activate(choice)) is not None:
        return {"skipped": reason}
    generator = torch.Generator().manual_seed(0)
    q, k, v, gradient = (
        torch.randn(2, seq, heads, head_dim, generator=generator).to(device, dtype)
        for heads in (HEADS, KV_HEADS, KV_HEADS, HEADS)
    )
    positions = document_positions(seq).to(device) if documents else None
    kernel = AttentionKernel("varlen" if choice in FLASH else choice)
    mask = kernel.mask(positions, None, like=q)
    found = evaluate(partial(kernel, mask=mask), q, k, v, gradient)
    visible = visible_keys(positions, seq, device)
    full = [t.float() for t in (q, k, v, gradient)]
    expected = evaluate(partial(reference, visible=visible), *full)
    errors = {name: float((found[name] - e).norm() / e.norm()) for name, e in expected.items()}
    passed = all(math.isfinite(error) and error < LIMITS[dtype] for error in errors.values())
    return {"passed": passed, "limit": LIMITS[dtype], **errors}


def activate(choice: str) -> str | None:
    """Activate a FlashAttention implementation; return why it cannot be, or None."""
    if FLASH.get(choice) is None:
        return None
    select = getattr(torch.nn.attention, "activate_flash_attention_impl", None)
    if select is None:
        return f"torch {torch.__version__} has no activate_flash_attention_impl"
    try:
        select(FLASH[choice])
    except Exception as error:  # not installed, or another GPU; torch documents no type
        return f"{type(error).__name__}: {error}"[:300]
    return None


def evaluate(
    attention: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, gradient: Tensor
) -> dict[str, Tensor]:
    """Return the output and the gradients of the inputs in float32."""
    leaves = [t.detach().requires_grad_() for t in (q, k, v)]
    out = attention(*leaves)
    tensors = [out.detach(), *torch.autograd.grad(out, leaves, gradient)]
    return dict(
        zip(("out", "grad_q", "grad_k", "grad_v"), (t.float() for t in tensors), strict=True)
    )


def document_positions(seq: int) -> Tensor:
    """Return (2, seq) positions in documents; the second row starts inside one."""
    ends = [seq // 7, seq // 3, seq // 3 + 1, seq]
    row = torch.cat([torch.arange(b - a) for a, b in zip([0, *ends], ends, strict=False)])
    return torch.stack([row, torch.cat([row[20:], torch.arange(20)])])


def visible_keys(positions: Tensor | None, seq: int, device: str) -> Tensor:
    """Return the dense mask, (batch or 1, 1, seq, seq)."""
    indices = torch.arange(seq, device=device)
    starts = torch.zeros(1, seq, device=device) if positions is None else indices - positions
    return document_mask(starts, indices, indices)


def reference(q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
    """Compute attention in float64 products: (batch, seq, heads, head_dim) in and out."""
    k, v = (t.repeat_interleave(q.shape[2] // t.shape[2], dim=2) for t in (k, v))
    q, k, v = (t.double().transpose(1, 2) for t in (q, k, v))  # (batch, heads, seq, head_dim)
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])  # (batch, heads, seq, seq)
    weights = scores.masked_fill(~visible, -math.inf).softmax(-1)
    return (weights @ v).transpose(1, 2).float()
