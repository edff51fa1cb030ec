"""`torch.compile` of each block, one program for all of them.

A block's `forward` is compiled, not its module: parameters keep their names, and FSDP2's hooks,
which gather weights and reduce gradients, stay outside.
"""

from typing import Any

import torch
import torch._dynamo.utils
import torch._functorch.config
import torch._inductor.config
from torch import Tensor
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.device_mesh import DeviceMesh

from model.llama import Llama


def apply_compile(model: Llama, memory_budget: float = 1.0) -> None:
    """Compiles every block's forward and backward, and the stages of the loss; in place.

    Args:
        memory_budget: The share of the activations that may be kept for the backward, between 0
            (recompute all) and 1 (what is fastest); the compiler chooses which.
    """
    config = torch._functorch.config  # of this process, for good
    config.activation_memory_budget = memory_budget
    if hasattr(config, "unsafe_treat_script_objects_as_zero_size"):  # from PyTorch 2.13 on
        # Tensor parallelism's process groups, which hold nothing that is kept for a backward.
        config.unsafe_treat_script_objects_as_zero_size = True
    model.tok_embeddings.register_forward_hook(_awaited)
    for block in model.layers:
        block.forward = torch.compile(block.forward, fullgraph=True)
    model.loss.compile_stages()


def apply_async_tensor_parallel(mesh: DeviceMesh) -> None:
    """Lets the compiler cut the products of the one-axis `tp` mesh into overlapped pieces.

    Each gather along seq and each scatter is sent piece by piece through symmetric memory while the
    product it feeds or follows computes the other pieces (torch.distributed._symmetric_memory).
    """
    from torch.distributed._symmetric_memory import enable_symm_mem_for_group

    torch._inductor.config._micro_pipeline_tp = True
    enable_symm_mem_for_group(mesh.get_group().group_name)


def compiled_graphs() -> int:
    """How many graphs this process has compiled; it stands still once a run is warm."""
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def _awaited(_: Any, __: Any, out: Tensor) -> Tensor:
    """A collective's result as a plain tensor: compiled code would drop the gradient of another."""
    return out.clone() if isinstance(out, AsyncCollectiveTensor) else out
