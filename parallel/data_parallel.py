"""Data parallelism by FSDP2 with its mixed precision, for more than one process.

Weights are sharded over the flattened `dp_shard` and `cp` axes, whose ranks process different
tokens, and replicated over `dp_replicate` (HSDP). Every parameter becomes a DTensor on one mesh for
all sizes. Gradients are summed, not averaged: the loss is already divided by the number of targets
in the global batch. A single process uses `parallel.mixed_precision` instead.
"""

from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from model.llama import Llama
from parallel.config import BF16_CAPABILITY, PrecisionConfig
from parallel.mixed_precision import keep_copies

_STAYS_GATHERED = "llamesh_stays_gathered"  # attribute of a block or the model
BEFORE_GATHER = (
    "llamesh_before_gather"  # attribute of the model: called before weights are gathered
)
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def apply_data_parallel(
    model: Llama,
    mesh: DeviceMesh,
    precision: MixedPrecisionPolicy,
    reshard_after_forward: bool | None,
) -> None:
    """Shard each block, and the other parameters as one group, in place.

    Args:
        mesh: All axes.
        reshard_after_forward: Whether a block's gathered weights are freed between its forward and
            its backward. None: if they are sharded, except for the last block, whose backward
            follows its forward, and in a pipeline, where other micro-batches come in between.
    """
    shards = mesh["dp_shard"]
    if mesh["cp"].size() > 1:
        shards = mesh["dp_shard", "cp"]._flatten("fsdp")
    n_shards, replicated = shards.size(), mesh["dp_replicate"].size() > 1
    if replicated:
        shards = DeviceMesh._concatenate([mesh["dp_replicate"], shards])
    shard = partial(fully_shard, mesh=shards, mp_policy=precision)
    blocks = {}
    for name, layer in model.layers.named_children():
        reshard, number = reshard_after_forward, int(name)
        if reshard is None:
            is_last = number + 1 == model.config.n_layers
            reshard = n_shards > 1 and not is_last and mesh["pp"].size() == 1
        blocks[number] = shard(layer, reshard_after_forward=reshard)
        vars(layer)[_STAYS_GATHERED] = not reshard
    # The backward starts with the root's weights, so they stay gathered.
    root = shard(model, reshard_after_forward=False)
    vars(model)[_STAYS_GATHERED] = True
    for module in [*blocks.values(), root]:
        if n_shards == 1:
            # It matches PyTorch's protocol, which is private.
            module.set_custom_reduce_scatter(_OneBuffer())  # type: ignore[arg-type]
        if n_shards > 1 or replicated:
            module.set_gradient_divide_factor(1.0)
            # Otherwise the factor would be applied by a premultiplied sum, which gloo lacks.
            module.set_force_sum_reduction_for_comms(True)
    if n_shards > 1:
        for part in model.parts:  # gather weights before they are needed
            own = [blocks[number] for number in part.layers]
            for block, following in pairwise(own):
                block.set_modules_to_forward_prefetch([following])
                following.set_modules_to_backward_prefetch([block])
            if mesh["pp"].size() > 1 and own:  # otherwise FSDP2 gathers what ran before it
                own[0].set_modules_to_backward_prefetch([own[0]])


def hold_gradients(model: nn.Module, hold: bool, replicas_only: bool) -> None:
    """Set whether a backward leaves the reduction of its gradients to a later backward.

    While it does, weights that stay gathered until a backward also stay gathered after it: between
    micro-batches no weight changes, so this saves an all-gather and a cast of each.

    Args:
        replicas_only: Reduce-scatter the gradients in any case; only the all-reduce is left.
    """
    keep_copies(model, hold)
    if not isinstance(model, FSDPModule):
        return
    if replicas_only:
        model.set_requires_all_reduce(not hold)
    else:
        model.set_requires_gradient_sync(not hold)
    for module in model.modules():
        if isinstance(module, FSDPModule) and vars(module)[_STAYS_GATHERED]:
            module.set_reshard_after_backward(not hold, recurse=False)


def gather_kept_weights(model: nn.Module) -> None:
    """Start the all-gathers of all weights that stay gathered, without waiting for them."""
    vars(model).get(BEFORE_GATHER, lambda: None)()
    for module in model.modules():
        if isinstance(module, FSDPModule) and vars(module)[_STAYS_GATHERED]:
            module.unshard(async_op=True)


def free_gathered_weights(model: nn.Module) -> None:
    """Make the parameters of the model its shards, which may then be overwritten.

    After a forward without backward, weights that stay gathered until a backward are the parameters
    instead: values written to them are lost, and those written to the shards are not used.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


class _OneBuffer:
    """Reduce-scatter over one rank, without a copy.

    FSDP2 allocates a buffer for the input, then one for the result. Both are the same tensor here.
    """

    def __init__(self) -> None:
        self.input: torch.Tensor | None = None

    def allocate(
        self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device
    ) -> torch.Tensor:
        """Return an uninitialized buffer, and in every second call the previous one."""
        if self.input is None:
            self.input = torch.empty(*size, dtype=dtype, device=device)
            return self.input
        result, self.input = self.input, None
        return result

    def __call__(self, *_: Any, **__: Any) -> None:
        """Do nothing: the result is the input."""


def mixed_precision_policy(config: PrecisionConfig, device_type: str) -> MixedPrecisionPolicy:
    """Return FSDP2's policy: `param` for forward and backward, `reduce` for the reduction."""
    has_bf16 = device_type == "cuda" and torch.cuda.get_device_capability() >= BF16_CAPABILITY
    auto = torch.bfloat16 if has_bf16 else torch.float32
    return MixedPrecisionPolicy(
        param_dtype=_DTYPES.get(config.param, auto),
        reduce_dtype=_DTYPES.get(config.reduce, torch.float32),
        # The only floating-point inputs are RoPE rotations, which must stay in float32.
        cast_forward_inputs=False,
    )
