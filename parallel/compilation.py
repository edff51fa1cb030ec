"""`torch.compile` of each block, one program for all of them.

A block's `forward` is compiled, not its module: parameters keep their names, and FSDP2's hooks,
which gather weights and reduce gradients, stay outside.
"""

from typing import Any

import torch
from torch import Tensor
from torch.distributed._functional_collectives import AsyncCollectiveTensor

from model.llama import Llama


def apply_compile(model: Llama, memory_budget: float | None) -> None:
    """Compiles every block's forward and backward, and the stages of the loss; in place.

    Args:
        memory_budget: The share of the activations that may be kept for the backward, between 0
            (recompute all) and 1 (what is fastest); the compiler chooses which. None: 1.
    """
    if memory_budget is not None:
        torch._functorch.config.activation_memory_budget = memory_budget
    model.tok_embeddings.register_forward_hook(_awaited)
    for block in model.layers:
        block.forward = torch.compile(block.forward, fullgraph=True)


def _awaited(_: Any, __: Any, out: Tensor) -> Tensor:
    """A collective's result as a plain tensor: compiled code would drop the gradient of another."""
    return out.clone() if isinstance(out, AsyncCollectiveTensor) else out
