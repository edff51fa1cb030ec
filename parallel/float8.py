"""fp8 matrix products of the blocks, by torchao.

The products of forward and backward cast their operands to fp8 with dynamic scales, one per tensor
or one per row, and return the dtype of a Linear layer. Weights, their names and gradients do not
change. Embedding, output head, norms and attention are not affected.
"""

import math
from dataclasses import replace
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from model.llama import Llama
from parallel.data_parallel import BEFORE_GATHER

Recipe = Literal["tensorwise", "rowwise"]

# Minimum compute capability of NVIDIA GPUs whose tensor cores support the scaled product.
CAPABILITY = {"tensorwise": (8, 9), "rowwise": (9, 0)}


def apply_float8(model: Llama, recipe: Recipe, emulate: bool = False) -> None:
    """Replace the Linear layers of the blocks in place. Call it before sharding them.

    Args:
        model: On the meta device or with weights.
        recipe: `tensorwise`, one scale per tensor (fastest), or `rowwise`, one per row, rounded to
            a power of two (more accurate).
        emulate: Round the operands to fp8 and multiply them in float32, on any device.
    """
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    config = replace(Float8LinearConfig.from_recipe_name(recipe), emulate=emulate)
    convert_to_float8_training(model.layers, config=config)


def gather_in_float8(model: Llama, dtype: torch.dtype, shards_mesh: DeviceMesh) -> None:
    """Let FSDP2 gather the matrices of `tensorwise` layers in fp8. Call it after sharding them.

    Each rank casts its shard like the gathered weight, from `dtype` and with the complete weight's
    scale: results do not change. Weights that the ranks of `shards_mesh`, over which FSDP2 shards
    them, do not divide are gathered in `dtype`.
    """
    from torchao.float8.float8_linear import Float8Linear
    from torchao.float8.float8_utils import amax_to_scale
    from torchao.float8.fsdp_utils import WeightWithDynamicFloat8CastTensor as Cast

    shards: list[Any] = []

    def extended(shard: Any, *config: Any) -> Any:
        """Set FSDP2's extension ("allow monkey patch" in `FSDPParamGroup.lazy_init`)."""
        shard.fsdp_pre_all_gather = lambda mesh, size, stride, module, policy: Cast(
            shard.to(dtype), *config, shard.scale
        ).fsdp_pre_all_gather(mesh)
        shard.fsdp_post_all_gather = Cast(shard, *config).fsdp_post_all_gather
        return shard

    @torch.no_grad()
    def update_scales(*_: Any) -> None:
        for layer in [] if shards else model.modules():  # `to_empty` replaces parameters
            if isinstance(layer, Float8Linear) and layer.out_features % shards_mesh.size() == 0:
                weight: Any = layer.weight
                config = layer.linear_mm_config, torch.float8_e4m3fn
                shards.append(extended(weight._local_tensor, *config))
        if shards:
            amax = torch.stack(torch._foreach_norm(shards, math.inf)).to(dtype)  # (weights)
            dist.all_reduce(amax, dist.ReduceOp.MAX, shards_mesh.get_group())
            for shard, scale in zip(shards, amax_to_scale(amax, torch.float8_e4m3fn), strict=True):
                shard.scale = scale

    # Before FSDP2's hook, which looks for extensions and starts the first all-gather.
    model.register_forward_pre_hook(update_scales, prepend=True)
    vars(model)[BEFORE_GATHER] = update_scales
