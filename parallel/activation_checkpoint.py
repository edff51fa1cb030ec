"""Activation checkpointing: what a block's forward keeps for its backward, and what is recomputed.

`full` keeps a block's input alone. `selective` also keeps the results of matrix products and of
attention, which cost the most to compute. A number is a memory budget, which only the compiler can
keep: see `compilation`.
"""

from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from model.kernels.onednn_linear import LINEAR_OP
from model.llama import Llama

aten = torch.ops.aten
_KEPT = {
    aten.mm.default,
    aten.addmm.default,
    aten.bmm.default,
    aten._scaled_mm.default,
    LINEAR_OP,
    aten._scaled_dot_product_flash_attention.default,
    aten._scaled_dot_product_flash_attention_for_cpu.default,
    aten._scaled_dot_product_efficient_attention.default,
    aten._scaled_dot_product_cudnn_attention.default,
    aten._scaled_dot_product_fused_attention_overrideable.default,
    torch.ops.higher_order.flex_attention,
    # A row-wise product of tensor parallelism is whole only after its sum over the axis.
    torch.ops._c10d_functional.reduce_scatter_tensor.default,
    torch.ops._c10d_functional.all_reduce.default,
}


def apply_activation_checkpoint(model: Llama, mode: str) -> None:
    """Makes each block recompute in the backward; `mode` is `full` or `selective`. In place.

    A block's `forward` is replaced, not its module, so that parameters keep their names.
    """
    contexts: dict[str, Any] = {}
    if mode == "selective":
        contexts["context_fn"] = partial(create_selective_checkpoint_contexts, _policy)
    for block in model.layers:
        block.forward = partial(
            checkpoint,
            block.forward,
            use_reentrant=False,
            preserve_rng_state=False,  # there is no dropout
            **contexts,
        )


def _policy(_: Any, operation: Any, *arguments: Any, **named: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if keeps(operation) else CheckpointPolicy.PREFER_RECOMPUTE


def keeps(operation: Any) -> bool:
    """Whether `selective` keeps the results of an operation."""
    return operation in _KEPT or "varlen_attn" in str(operation)
