"""The plan: what is applied to a model on a mesh, in one fixed order.

The products' number format, or their library, is set on whole matrices; tensor parallelism cuts
these, context parallelism the sequences; then comes what a block keeps for its backward, then its
compilation, and FSDP shards what is left of each matrix. An axis has a file of its own; here is
only the order. The model knows nothing of it.
"""

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from model.config import ModelConfig
from model.init import initialize
from model.kernels.onednn_linear import apply_onednn_products, multiplies_by_onednn
from model.llama import Llama
from parallel.activation_checkpoint import apply_activation_checkpoint
from parallel.compilation import apply_async_tensor_parallel, apply_compile
from parallel.config import ParallelConfig, PrecisionConfig
from parallel.context_parallel import apply_context_parallel
from parallel.data_parallel import apply_data_parallel, mixed_precision
from parallel.float8 import apply_float8
from parallel.mixed_precision import apply_mixed_precision
from parallel.tensor_parallel import apply_tensor_parallel


def parallelize(
    model: Llama, mesh: DeviceMesh, parallel: ParallelConfig, precision: PrecisionConfig
) -> Llama:
    """Applies the plan to `model`, in place and in this order; returns it.

    Args:
        model: On the meta device, so that no rank ever holds the whole.
        mesh: Four axes named as in `parallel.mesh.AXES`.
    """
    if precision.fp8 is not None:
        apply_float8(model, precision.fp8)
    elif multiplies_by_onednn(mesh, parallel, precision):
        apply_onednn_products(model)
    if mesh["tp"].size() > 1:
        apply_tensor_parallel(
            model,
            mesh["tp"],
            sequence_parallel=parallel.sequence_parallel,
            loss_parallel=parallel.loss_parallel,
        )
    if mesh["cp"].size() > 1:
        apply_context_parallel(model, mesh["cp"])
    kept = parallel.activation_checkpoint
    if parallel.compile and kept == "full":
        # The same, and PyTorch 2.13 fails to compile a checkpoint around DTensors that keeps none.
        kept = 0.0
    if kept in ("full", "selective"):
        apply_activation_checkpoint(model, kept)
    if parallel.async_tp:
        apply_async_tensor_parallel(mesh["tp"])
    if parallel.compile:
        apply_compile(model, memory_budget=kept if isinstance(kept, float) else 1.0)
    formats = mixed_precision(precision, mesh.device_type)
    if mesh.size() == 1:
        apply_mixed_precision(model, formats.param_dtype or torch.float32)
    else:
        apply_data_parallel(model, mesh, formats, parallel.reshard_after_forward)
    return model


def initialize_weights(model: Llama, config: ModelConfig, seed: int) -> None:
    """Gives every rank its shard of the run's initial weights, which no mesh changes."""
    initialize(model, config, seed, local_block=local_block)


def local_block(parameter: torch.Tensor) -> tuple[torch.Tensor, tuple[int, ...]]:
    """A parameter's local shard, and where it lies in the global tensor."""
    if not isinstance(parameter, DTensor):
        return parameter, (0,) * parameter.dim()
    _, offsets = compute_local_shape_and_global_offset(
        parameter.shape, parameter.device_mesh, parameter.placements
    )
    return parameter.to_local(), offsets
