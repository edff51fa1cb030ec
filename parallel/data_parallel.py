"""The data axes: FSDP2, with mixed precision by its policy, for more than one process.

Weights are sharded over `dp_shard` and `cp` taken together, whose ranks hold different tokens, and
copied over `dp_replicate` (HSDP). Every parameter becomes a DTensor on one mesh whatever the sizes.
Gradients are summed, not averaged: the loss is already divided by the number of targets in the
whole global batch. What a process alone does is in `parallel.mixed_precision`.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from model.llama import Llama
from parallel.config import PrecisionConfig
from parallel.mixed_precision import keep_copies

_KEPT = "llamesh_kept_gathered"  # a block's or the model's attribute
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def apply_data_parallel(
    model: Llama,
    mesh: DeviceMesh,
    precision: MixedPrecisionPolicy,
    reshard_after_forward: bool | None,
) -> None:
    """Shards each block, and what lies around the blocks, in place.

    Args:
        mesh: With the axes `dp_replicate`, `dp_shard` and `cp`.
        reshard_after_forward: Whether a block's gathered weights are freed between its forward and
            its backward. None: where there is something to gather, but for the last block, whose
            backward follows at once.
    """
    shards = mesh["dp_shard"]
    if mesh["cp"].size() > 1:
        shards = mesh["dp_shard", "cp"]._flatten("fsdp")
    n_shards, replicated = shards.size(), mesh["dp_replicate"].size() > 1
    if replicated:
        shards = DeviceMesh._concatenate([mesh["dp_replicate"], shards])
    blocks = []
    for number, block in enumerate(model.layers, start=1):
        reshard = reshard_after_forward
        if reshard is None:
            reshard = n_shards > 1 and number < len(model.layers)
        blocks.append(
            fully_shard(block, mesh=shards, mp_policy=precision, reshard_after_forward=reshard)
        )
        vars(block)[_KEPT] = not reshard
    # The root's weights are needed again as soon as the backward begins: kept gathered.
    root = fully_shard(model, mesh=shards, mp_policy=precision, reshard_after_forward=False)
    vars(model)[_KEPT] = True
    for module in [*blocks, root]:
        if n_shards == 1:
            # A structural type would do, PyTorch's own is private.
            module.set_custom_reduce_scatter(_OneBuffer())  # type: ignore[arg-type]
        if n_shards > 1 or replicated:
            module.set_gradient_divide_factor(1.0)
            # Else the factor would be a premultiplied sum, which gloo lacks.
            module.set_force_sum_reduction_for_comms(True)
    if n_shards > 1:
        _prefetch(blocks)


def hold_gradients(model: nn.Module, hold: bool, replicas_only: bool) -> None:
    """Whether a backward leaves its gradients to a later one to sum over the ranks.

    Weights that stay gathered until a backward then stay so behind it, for a next forward: as long
    as no weight changes, between micro-batches, that saves a gather of each, and the cast.

    Args:
        replicas_only: Gradients are summed over the shards all the same.
    """
    keep_copies(model, hold)
    if not isinstance(model, FSDPModule):
        return
    if replicas_only:
        model.set_requires_all_reduce(not hold)
    else:
        model.set_requires_gradient_sync(not hold)
    for module in model.modules():
        if isinstance(module, FSDPModule) and vars(module)[_KEPT]:
            module.set_reshard_after_backward(not hold, recurse=False)


def _prefetch(blocks: list[FSDPModule]) -> None:
    """Each block gathers the weights of the one after it before it computes."""
    for block, following in pairwise(blocks):
        block.set_modules_to_forward_prefetch([following])
        following.set_modules_to_backward_prefetch([block])


class _OneBuffer:
    """The reduce-scatter of one rank, whose result is its input.

    FSDP2 asks for a buffer for the input, then for one for the result, and copies one to the other:
    of the same tensor there is nothing to copy.
    """

    def __init__(self) -> None:
        self.input: torch.Tensor | None = None

    def allocate(
        self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device
    ) -> torch.Tensor:
        """An uninitialised buffer, every second time the one from before."""
        if self.input is None:
            self.input = torch.empty(*size, dtype=dtype, device=device)
            return self.input
        result, self.input = self.input, None
        return result

    def __call__(self, *_: Any, **__: Any) -> None:
        """Nothing to send."""


def mixed_precision_policy(config: PrecisionConfig, device_type: str) -> MixedPrecisionPolicy:
    """The policy that FSDP2 applies: `param` in forward and backward, `reduce` in the sum."""
    param = config.param
    if param == "auto":
        param = "bf16" if device_type == "cuda" else "fp32"
    reduce = "fp32" if config.reduce == "auto" else config.reduce
    return MixedPrecisionPolicy(
        param_dtype=_DTYPES[param],
        reduce_dtype=_DTYPES[reduce],
        # The only floating-point inputs are RoPE's rotations, which must stay in float32.
        cast_forward_inputs=False,
    )
