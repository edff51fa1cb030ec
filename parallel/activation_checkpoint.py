"""Activation checkpointing: which activations of a block are saved, and which are recomputed.

`full` saves only a block's input. `selective` also saves the results of matrix products and of
attention, which cost the most to compute. A number is a memory budget, which needs the compiler:
see `parallel.compilation`.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
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
    if mode == "selective":
        kernel = getattr(model.kernel, "kernel", model.kernel)  # inside that of context parallelism
        kernel.flex = partial(_kept_attention, kernel.flex, {})


def _policy(_: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if is_saved(operation) else CheckpointPolicy.PREFER_RECOMPUTE


def is_saved(operation: Any) -> bool:
    """Return whether `selective` saves the results of an operation."""
    return operation in _SAVED_OPS or "varlen_attn" in str(operation)


def _kept_attention(
    kernel: Callable[..., Tensor], kept: dict[int, Any], q: Tensor, k: Tensor, v: Tensor, mask: Any
) -> Tensor:
    """Return `kernel(q, k, v, mask)` for a compiled kernel, whose operators the policy cannot see.

    Its backward keeps its results and reads q, k and v from the checkpoint. The recomputation takes
    the last one of `kept` of its forward, which has a mask of its own: blocks are recomputed in
    reverse order, but other micro-batches of a pipeline run in between.
    """
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return kernel(q, k, v, mask)
    inputs = _Inputs.apply(q, k, v)
    if torch._C._current_graph_task_id() != -1:  # in a backward
        return (
            kept[id(mask)].pop().requires_grad_()
        )  # so that the next operators save the same tensors
    node, keys = inputs[0].grad_fn, [_memory(each) for each in inputs]
    recomputed: list[Tensor] = []  # the checkpoint returns each tensor once

    def pack(tensor: Tensor) -> Tensor | int:
        return keys.index(_memory(tensor)) if _memory(tensor) in keys else tensor.detach()

    def unpack(packed: Tensor | int) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        if not recomputed:
            recomputed.extend(node.saved_tensors)
        return recomputed[packed]

    with saved_tensors_hooks(pack, unpack):
        out = kernel(*inputs, mask)
    kept.setdefault(id(mask), []).append(out.detach())
    return out


def _memory(tensor: Tensor) -> tuple[Any, ...]:
    storage = tensor.untyped_storage()._cdata
    return storage, tensor.storage_offset(), tensor.shape, tensor.stride()


class _Inputs(torch.autograd.Function):
    """The identity, which saves its inputs."""

    @staticmethod
    def forward(ctx: Any, *inputs: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(*inputs)
        return tuple(each.view_as(each) for each in inputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        return gradients
