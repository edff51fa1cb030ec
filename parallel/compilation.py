"""`torch.compile` of each block; identical blocks share one compiled program.

A block's `forward` is compiled, not its module: parameters keep their names, and FSDP2's hooks,
which gather weights and reduce gradients, stay outside of the compiled code.
"""

from typing import Any

import torch
import torch._dynamo.utils
import torch._functorch.config
import torch._inductor.config
from torch import Tensor
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.device_mesh import DeviceMesh

from model.compiled import compile_for_any_shape
from model.llama import Llama


def apply_compile(model: Llama, memory_budget: float = 1.0) -> None:
    """Compile every block's forward and backward, and the stages of the loss, in place.

    Args:
        memory_budget: Fraction of the activations to save for the backward, between 0 (recompute
            all) and 1 (fastest); the compiler chooses which ones. Applies to the whole process.
    """
    config = torch._functorch.config
    config.activation_memory_budget = memory_budget
    if hasattr(config, "unsafe_treat_script_objects_as_zero_size"):  # PyTorch 2.13 and later
        # The script objects are process groups of tensor parallelism, which hold no activations.
        config.unsafe_treat_script_objects_as_zero_size = True
    if hasattr(model, "tok_embeddings"):
        model.tok_embeddings.register_forward_hook(_wait_for_collective)
    for block in model.layers:
        block.forward = compile_for_any_shape(block.forward)
    model.loss.compile_stages()


def apply_async_tensor_parallel(mesh: DeviceMesh) -> None:
    """Make the compiler overlap communication and matrix products on the one-axis `tp` mesh.

    Each all-gather along seq and each reduce-scatter is split into chunks, sent through symmetric
    memory while the product before or after it computes the other chunks
    (torch.distributed._symmetric_memory).
    """
    from torch.distributed._symmetric_memory import enable_symm_mem_for_group

    torch._inductor.config._micro_pipeline_tp = True
    enable_symm_mem_for_group(mesh.get_group().group_name)


def compiled_graphs() -> int:
    """Return how many graphs this process has compiled; constant after warm-up."""
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def _wait_for_collective(_: Any, __: Any, out: Tensor) -> Tensor:
    """Return a plain tensor; compiled code loses the gradient of an AsyncCollectiveTensor."""
    return out.clone() if isinstance(out, AsyncCollectiveTensor) else out
