"""Activation checkpointing: which activations of a block are saved, and which are recomputed.

`full` saves only a block's input. `selective` also saves the results of matrix products and of
attention, which cost the most to compute. A number is a memory budget, which needs the compiler:
see `parallel.compilation`.
"""

from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
    noop_context_fn,
)

from model.kernels.onednn_linear import LINEAR_OP
from model.llama import Llama

aten = torch.ops.aten
_SAVED_OPS = {
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
    # A row-wise product of tensor parallelism is complete only after its reduction.
    torch.ops._c10d_functional.reduce_scatter_tensor.default,
    torch.ops._c10d_functional.all_reduce.default,
}


def apply_activation_checkpoint(model: Llama, mode: str) -> None:
    """Make each block recompute activations in the backward, in place.

    Wraps a block's `forward`, not its module, so that parameters keep their names.

    Args:
        mode: `full` or `selective`.
    """
    selective = partial(create_selective_checkpoint_contexts, _policy)
    for block in model.layers:
        block.forward = partial(
            checkpoint,
            block.forward,
            use_reentrant=False,
            preserve_rng_state=False,  # there is no dropout
            context_fn=selective if mode == "selective" else noop_context_fn,
        )


def _policy(_: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if is_saved(operation) else CheckpointPolicy.PREFER_RECOMPUTE


def is_saved(operation: Any) -> bool:
    """Return whether `selective` saves the results of an operation."""
    return operation in _SAVED_OPS or "varlen_attn" in str(operation)
