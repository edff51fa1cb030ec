"""The data axes: FSDP2, with mixed precision by its policy, at every size including one.

Weights are sharded over `dp_shard` and `cp` taken together, whose ranks hold different tokens, and
copied over `dp_replicate` (HSDP). Every parameter becomes a DTensor on one mesh whatever the sizes,
so that clipping, the optimizer and checkpoints know a single case. Gradients are summed, not
averaged: the loss is already divided by the number of targets in the whole global batch.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from model.llama import Llama
from parallel.config import PrecisionConfig

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
    # The root's weights are needed again as soon as the backward begins: kept gathered.
    root = fully_shard(model, mesh=shards, mp_policy=precision, reshard_after_forward=False)
    for module in [*blocks, root]:
        if n_shards == 1:
            # A structural type would do, PyTorch's own is private.
            module.set_custom_all_gather(_NothingToGather())  # type: ignore[arg-type]
        if n_shards > 1 or replicated:
            module.set_gradient_divide_factor(1.0)
            # Else the factor would be a premultiplied sum, which gloo lacks.
            module.set_force_sum_reduction_for_comms(True)
    if n_shards > 1:
        _prefetch(blocks)


def _prefetch(blocks: list[FSDPModule]) -> None:
    """Each block gathers the weights of the one after it before it computes."""
    for block, following in pairwise(blocks):
        block.set_modules_to_forward_prefetch([following])
        following.set_modules_to_backward_prefetch([block])


class _NothingToGather:
    """The all-gather of one rank: its input already is its part of the output, the whole of it."""

    def allocate(
        self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device
    ) -> torch.Tensor:
        """An uninitialised output, as FSDP2's own collective allocates it."""
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self,
        output_tensor: torch.Tensor,
        input_tensor: torch.Tensor,
        group: torch.distributed.ProcessGroup,
        async_op: bool = False,
    ) -> None:
        """Nothing to send: FSDP2 copies its input into place in the output."""
        assert input_tensor.data_ptr() == output_tensor.data_ptr()


def mixed_precision(config: PrecisionConfig, device_type: str) -> MixedPrecisionPolicy:
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
