"""The norm of all gradients together, whichever axes shard them, and clipping by it.

The sum that it needs goes over all processes, once a step: what else all of them have to know of
the step travels with it.
"""

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate

NORM_ROW = 4096
"""Elements whose squares are added up in float32 on CPU; a norm of many rows is wrong by 2e-9."""


@torch.no_grad()
def clip_grad_norm(
    model: torch.nn.Module, max_norm: float, extra_scalars: Tensor
) -> tuple[Tensor, Tensor]:
    """Scales the gradients so that their global 2-norm is at most `max_norm`, with one reduction.

    Each rank adds up the squares of its local shards, a replicated shard divided by the number of
    its copies, and one sum over all processes gives the norm of every parameter together,
    whichever axes shard it.

    Args:
        model: Every parameter a DTensor, or all plain; those without a gradient are left out.
        max_norm: Infinity leaves the gradients as they are.
        extra_scalars: (n), this process's shares of other sums.

    Returns:
        The norm before clipping, a float32 scalar, and `extra_scalars` (n) summed over all
        processes, in float64 on CPU and float32 on CUDA; both the same on every rank. Where the
        norm is not finite, neither are the gradients, scaled or not: the step is to be skipped.
    """
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    local = [g.to_local() if isinstance(g, DTensor) else g for g in gradients]
    if local[0].device.type == "cpu":
        precise, norms = torch.float64, [precise_norm(shard) for shard in local]
    else:  # adds in a tree
        precise, norms = torch.float32, list(torch._foreach_norm(local, 2, dtype=torch.float32))
    torch._foreach_div_(norms, [_copies(gradient) ** 0.5 for gradient in gradients])
    squares = torch.stack(norms).square().sum()
    sums = torch.cat([squares.view(1), extra_scalars.to(precise)])  # (1 + n)
    torch.distributed.all_reduce(sums)
    norm = sums[0].sqrt().float()
    # As in torch.nn.utils.clip_grad_norm_: never scales up, and no host synchronisation.
    torch._foreach_mul_(local, torch.clamp(max_norm / (norm + 1e-6), max=1.0))
    return norm, sums[1:]


def precise_norm(shard: Tensor) -> Tensor:
    """The 2-norm of a shard on CPU, a float64 scalar, in one pass and without a copy in float64.

    A float32 norm adds up one by one: it is wrong by 3e-5 on half a million elements, by another
    amount on each mesh. Rows are short enough for float32, and are added up in float64.
    """
    flat = shard.reshape(-1)  # (local size)
    n_rows = len(flat) // NORM_ROW
    rows = flat[: n_rows * NORM_ROW].view(n_rows, NORM_ROW)
    rest = flat[n_rows * NORM_ROW :].view(1, -1)
    norms = [torch.linalg.vector_norm(part, dim=1, dtype=torch.float32) for part in (rows, rest)]
    return torch.linalg.vector_norm(torch.cat(norms), dtype=torch.float64)


def _copies(gradient: Tensor) -> int:
    """How many ranks hold the same shard of a gradient."""
    if not isinstance(gradient, DTensor):
        return 1
    sizes = zip(gradient.placements, gradient.device_mesh.shape, strict=True)
    held = 1
    for placement, size in sizes:
        held *= size if isinstance(placement, Replicate) else 1
    return held
