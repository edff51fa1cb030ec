"""The data axis: FSDP2, with mixed precision by its policy, at every size including one.

Every parameter becomes a DTensor on one mesh whatever the sizes, so that clipping, the optimizer
and checkpoints know a single case. Gradients are summed, not averaged, over the axis: the loss is
already divided by the number of targets in the whole global batch.
"""

from collections.abc import Sequence

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from model.llama import Llama
from parallel.config import PrecisionConfig

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def apply_data_parallel(
    model: Llama,
    mesh: DeviceMesh,
    precision: MixedPrecisionPolicy,
    reshard_after_forward: bool,
) -> None:
    """Shards each block, and what lies around the blocks, over the one-axis `mesh`, in place."""
    for block in model.layers:
        fully_shard(
            block, mesh=mesh, mp_policy=precision, reshard_after_forward=reshard_after_forward
        )
    # The root's weights are needed again as soon as the backward begins: kept gathered.
    fully_shard(model, mesh=mesh, mp_policy=precision, reshard_after_forward=False)
    for module in [*model.layers, model]:
        if mesh.size() == 1:
            module.set_custom_all_gather(_NothingToGather())
        else:
            module.set_gradient_divide_factor(1.0)
            # Else the factor would be a premultiplied sum, which gloo lacks.
            module.set_force_sum_reduction_for_comms(True)


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
        # The only floating-point inputs are RoPE's tables, which must stay in float32.
        cast_forward_inputs=False,
    )
