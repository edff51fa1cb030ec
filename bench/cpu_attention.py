"""Attention backward in bf16 on CPU: our kernel compared with PyTorch's.

    python -m bench.cpu_attention

Alternates both at the shapes of the two models of `bench.training_step` and of larger ones, one of
them without grouped queries, with and without documents. A ratio above 1 means that our kernel is
faster. Errors are relative to float64 gradients.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.measurement import spread, write
from model.kernels.attention_backward import attention

# (batch, heads, kv_heads, seq, head_dim)
SHAPES = ((4, 6, 2, 512, 64), (4, 10, 5, 512, 64), (2, 8, 8, 1024, 64), (1, 8, 2, 2048, 128))
DOCUMENT, ROUNDS, WARM_UP = 200, 20, 3  # tokens per document

Gradients = Callable[[], tuple[Tensor, ...]]


def main() -> None:
    """Run the benchmark and write `bench/results/cpu_attention.json`."""
    results: dict[str, Any] = {}
    for batch, heads, kv_heads, seq, head_dim in SHAPES:
        torch.manual_seed(0)
        q, k, v, gradient = (
            torch.randn(batch, seq, n, head_dim, dtype=torch.bfloat16).transpose(1, 2)
            for n in (heads, kv_heads, kv_heads, heads)
        )
        leaves = [each.requires_grad_() for each in (q, k, v)]
        wide = [each.detach().double().requires_grad_() for each in leaves]
        for packed in (False, True):
            mask = _documents(batch, seq) if packed else None
            exact = _gradients(sdpa(wide[0], wide[1], wide[2], mask), wide, gradient.double())()
            ours = _gradients(attention(q, k, v, mask), leaves, gradient)
            theirs = _gradients(sdpa(q, k, v, mask), leaves, gradient)
            own, other = _in_turns(ours, theirs)
            name = f"{heads} heads of {head_dim}, {kv_heads} of keys, {batch} rows of {seq}"
            results[name + (", documents" if packed else "")] = {
                "ratio": spread([b / a for a, b in zip(own, other, strict=True)]),
                "seconds": {"ours": spread(own), "PyTorch's": spread(other)},
                "error": {"ours": _errors(ours(), exact), "PyTorch's": _errors(theirs(), exact)},
            }
    write(Path(__file__).stem, results)
    for name, each in results.items():
        ratio, error = each["ratio"], each["error"]
        quartiles = f"{ratio['quartile_1']:.2f}, {ratio['quartile_3']:.2f}"
        print(f"{name:60} {ratio['median']:.2f} ({quartiles}), errors {error}")


def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Return PyTorch's attention, (batch, heads, seq, head_dim)."""
    mask = mask if mask is None else mask.to(q.dtype)
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True
    )


def _documents(batch: int, seq: int) -> Tensor:
    """Return the additive mask, (batch, 1, seq, seq)."""
    document = torch.arange(seq) // DOCUMENT
    allowed = (document.unsqueeze(1) == document).tril().expand(batch, 1, -1, -1)
    return torch.zeros((), dtype=torch.bfloat16).where(allowed, -torch.inf)


def _gradients(out: Tensor, leaves: list[Tensor], gradient: Tensor) -> Gradients:
    return lambda: torch.autograd.grad(out, leaves, gradient, retain_graph=True)


def _in_turns(ours: Gradients, theirs: Gradients) -> tuple[list[float], list[float]]:
    """Return the seconds of both."""
    taken = [(_seconds(ours), _seconds(theirs)) for _ in range(WARM_UP + ROUNDS)][WARM_UP:]
    return [own for own, _ in taken], [other for _, other in taken]


def _seconds(gradients: Gradients) -> float:
    start = time.perf_counter()
    gradients()
    return time.perf_counter() - start


def _errors(found: tuple[Tensor, ...], exact: tuple[Tensor, ...]) -> dict[str, float]:
    """Return root-mean-square errors relative to the gradients."""
    pairs = zip("qkv", found, exact, strict=True)
    return {
        name: round(((own.double() - true).norm() / true.norm()).item(), 4)
        for name, own, true in pairs
    }


if __name__ == "__main__":
    main()
