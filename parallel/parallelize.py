"""All transforms of a model on a mesh, in one fixed order.

Pipeline parallelism removes the layers of other stages. fp8 or oneDNN replaces the products of
complete matrices; tensor parallelism shards the matrices, context parallelism the sequences; then
come activation checkpointing and compilation of each block, and FSDP2 shards the remaining
matrices. Each transform has its own file. The docstring of `model.llama` lists which part of the
model each one replaces. A transform is imported only if it is applied.
"""

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from model.config import ModelConfig
from model.init import initialize
from model.kernels import prefers_onednn_linear
from model.kernels.onednn_linear import apply_onednn_linear
from model.llama import Llama
from parallel.config import ParallelConfig, PrecisionConfig
from parallel.data_parallel import apply_data_parallel, mixed_precision_policy
from parallel.mixed_precision import apply_mixed_precision


def parallelize(
    model: Llama, mesh: DeviceMesh, parallel: ParallelConfig, precision: PrecisionConfig
) -> Llama:
    """Apply all transforms to `model` in place and return it.

    Args:
        model: On the meta device, so that no rank allocates the complete model.
        mesh: Device mesh with the dims `parallel.mesh.AXES`.
    """
    if mesh.device_type == "cuda":
        torch.set_float32_matmul_precision(precision.float32_matmul)
    parallel = parallel.resolved(mesh.device_type).of_stage(mesh["pp"].get_local_rank())
    dtypes = mixed_precision_policy(precision, mesh.device_type)
    if mesh["pp"].size() > 1:
        from parallel.pipeline_parallel import Pipeline, apply_pipeline_parallel

        apply_pipeline_parallel(model, mesh["pp"], parallel)
    param_dtype = dtypes.param_dtype or torch.float32
    checkpoint = parallel.activation_checkpoint
    if parallel.compile and checkpoint == "full":
        # Equivalent; PyTorch 2.13 fails to compile a checkpoint around DTensors that saves nothing.
        checkpoint = 0.0
    budgeted = parallel.compile and checkpoint not in ("none", "selective", 1.0)
    if precision.fp8 is not None:
        from parallel.float8 import apply_float8

        apply_float8(model, precision.fp8)
    elif (
        mesh["tp"].size() == 1
        and not budgeted  # the compiler's choice of what to recompute ignores custom ops
        and prefers_onednn_linear(mesh.device_type, param_dtype)
    ):
        apply_onednn_linear(model.layers)
    if mesh["tp"].size() > 1:
        from parallel.tensor_parallel import apply_tensor_parallel

        apply_tensor_parallel(model, mesh["tp"], parallel.sequence_parallel, parallel.loss_parallel)
    if mesh["cp"].size() > 1:
        from parallel.context_parallel import apply_context_parallel

        apply_context_parallel(model, mesh["cp"])
    if checkpoint in ("full", "selective"):
        from parallel.activation_checkpoint import apply_activation_checkpoint

        apply_activation_checkpoint(model, checkpoint)
    if parallel.async_tp:
        from parallel.compilation import apply_async_tensor_parallel

        apply_async_tensor_parallel(mesh["tp"])
    if parallel.compile:
        from parallel.compilation import apply_compile

        apply_compile(model, memory_budget=checkpoint if isinstance(checkpoint, float) else 1.0)
    if mesh.size() == 1:
        apply_mixed_precision(model, param_dtype)
    else:
        apply_data_parallel(model, mesh, dtypes, parallel.reshard_after_forward)
    if precision.fp8 == "tensorwise" and mesh["dp_shard", "cp"].size() > mesh["tp"].size() == 1:
        from parallel.float8 import gather_in_float8

        gather_in_float8(model, param_dtype, mesh["fsdp" if mesh["cp"].size() > 1 else "dp_shard"])
    if mesh["pp"].size() > 1:
        vars(model)["pipeline"] = Pipeline(model, mesh, parallel, param_dtype)
    return model


def initialize_weights(model: Llama, config: ModelConfig, seed: int) -> None:
    """Fill this rank's shards with the initial weights, which are the same on every mesh."""
    initialize(model, config, seed, local_block=local_block)


def local_block(parameter: torch.Tensor) -> tuple[torch.Tensor, tuple[int, ...]]:
    """Return a parameter's local shard and its offsets in the global tensor."""
    if not isinstance(parameter, DTensor):
        return parameter, (0,) * parameter.dim()
    _, offsets = compute_local_shape_and_global_offset(
        parameter.shape, parameter.device_mesh, parameter.placements
    )
    return parameter.to_local(), offsets
