"""Global gradient norm over all mesh axes, and gradient clipping.

The norm needs one all-reduce over all processes per step; other scalars that all ranks need after
the step (`parallel.step_scalars`) are summed in the same call.
"""

import math

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate

NORM_ROW = 4096
"""Elements per float32 sum of squares on CPU; the error of a norm of many rows is 2e-9."""


@torch.no_grad()
def clip_grad_norm(
    model: torch.nn.Module,
    max_norm: float,
    extra_scalars: Tensor,
    tied_weight: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Scale the gradients so that their global 2-norm is at most `max_norm`, with one all-reduce.

    Each rank sums the squares of its local shards, divided by the number of ranks that hold the
    same shard. One sum over all processes then covers all parameters on all axes.

    Args:
        model: Parameters are all DTensors or all plain; those without a gradient are ignored.
        max_norm: Infinity disables clipping.
        extra_scalars: (n), this rank's terms of other sums.
        tied_weight: A parameter that is on two pipeline stages, with the same gradient.

    Returns:
        The norm before clipping, a float32 scalar, and `extra_scalars` (n) summed over all
        processes, in float64 on CPU and float32 on CUDA; both equal on all ranks. If the norm is
        not finite, the gradients are not either, and the caller must skip the step.
    """
    weights = [weight for weight in model.parameters() if weight.grad is not None]
    gradients = [weight.grad for weight in weights if weight.grad is not None]
    stages = [2 if weight is tied_weight else 1 for weight in weights]
    local = [grad.to_local() if isinstance(grad, DTensor) else grad for grad in gradients]
    if local[0].device.type == "cpu":
        precise = torch.float64
        norms = [precise_norm(shard) for shard in local]
    else:  # CUDA sums in a tree, which is precise enough
        precise = torch.float32
        norms = list(torch._foreach_norm(local, 2, dtype=torch.float32))
    copies = [n * _n_replicas(grad) for n, grad in zip(stages, gradients, strict=True)]
    torch._foreach_div_(norms, [n**0.5 for n in copies])
    squares = torch.stack(norms).square().sum()
    sums = torch.cat([squares.view(1), extra_scalars.to(precise)])  # (1 + n)
    torch.distributed.all_reduce(sums)
    norm = sums[0].sqrt().float()
    # As in torch.nn.utils.clip_grad_norm_: never scales up, and does not synchronize the host.
    torch._foreach_mul_(local, torch.clamp(max_norm / (norm + 1e-6), max=1.0))
    return norm, sums[1:]


def precise_norm(shard: Tensor) -> Tensor:
    """Return the 2-norm of a shard on CPU as a float64 scalar, without a float64 copy.

    PyTorch's float32 norm sums sequentially: its error is 3e-5 on half a million elements, and
    differs between meshes. Here short rows are summed in float32, and the rows in float64.
    """
    flat = shard.reshape(-1)  # (local size)
    n_rows = len(flat) // NORM_ROW
    rows = flat[: n_rows * NORM_ROW].view(n_rows, NORM_ROW)  # (rows, NORM_ROW)
    rest = flat[n_rows * NORM_ROW :].view(1, -1)  # (1, rest)
    norms = [torch.linalg.vector_norm(part, dim=1, dtype=torch.float32) for part in (rows, rest)]
    return torch.linalg.vector_norm(torch.cat(norms), dtype=torch.float64)


def _n_replicas(gradient: Tensor) -> int:
    """Return how many ranks hold the same shard of a gradient."""
    if not isinstance(gradient, DTensor):
        return 1
    sizes = zip(gradient.placements, gradient.device_mesh.shape, strict=True)
    return math.prod(size for placement, size in sizes if isinstance(placement, Replicate))
