"""Collectives of one training step on fake tensors in a fake process group.

`Recorder` records the collectives issued inside it, also those of a real step; `traced_step`
returns those of rank 0 in a step equivalent to `train_step`. The closed forms are in
`parallel.traffic`.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from model.config import ModelConfig
from parallel.config import ParallelConfig, PrecisionConfig
from parallel.gradients import clip_grad_norm
from parallel.mesh import AXES, MeshShape
from parallel.step_scalars import N_EXTRA_SCALARS
from parallel.strategy import MeshStrategy
from parallel.traffic import Collective, Kind, Step
from planning.fake_model import fake_model, materialise

# Operation: (kind, index of the argument that is the complete tensor; None: the result is).
_COLLECTIVES: dict[str, tuple[Kind, int | None]] = {
    "c10d::_allgather_base_": ("all_gather", 0),
    "c10d::allgather_": ("all_gather", 0),
    "c10d::_reduce_scatter_base_": ("reduce_scatter", 1),
    "c10d::allreduce_": ("all_reduce", 0),
    "_c10d_functional::all_gather_into_tensor": ("all_gather", None),
    "_c10d_functional::reduce_scatter_tensor": ("reduce_scatter", 0),
    "_c10d_functional::all_reduce": ("all_reduce", 0),
    "c10d::send": ("send", 0),
}
_NO_COMMUNICATION = {
    *("_c10d_functional::wait_tensor", "_c10d_functional::_wrap_tensor_autograd"),
    *("c10d::recv_", "c10d::barrier"),
}


class Recorder(TorchDispatchMode):
    """Record the collectives of this rank in `collectives`, except in groups of one.

    Args:
        shape: Mesh shape, used to map the ranks of a group to axis names.
    """

    def __init__(self, shape: MeshShape) -> None:
        super().__init__()
        self.shape = shape
        self.collectives: list[Collective] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # DTensor then dispatches its local operations
        out = func(*args, **(kwargs or {}))
        name = func._schema.name
        if "c10d" in name and name not in _NO_COMMUNICATION:
            kind, index = _COLLECTIVES[name]  # an unknown collective must raise
            ranks = dist.get_process_group_ranks(_group(args))
            tensor = out if index is None else args[index]
            if len(ranks) > 1:
                axis = _axes_of(ranks, self.shape)
                self.collectives.append(Collective(axis, len(ranks), kind, 1, _n_bytes(tensor)))
        return out


def _group(args: Any) -> dist.ProcessGroup:
    """Return a collective's process group, given as an object or, as the last argument, by name."""
    for arg in args:
        if isinstance(arg, torch.ScriptObject) and "ProcessGroup" in str(arg._type()):
            return dist.ProcessGroup.unbox(arg)
    return dist.distributed_c10d._resolve_process_group(args[-1])


def _axes_of(ranks: list[int], shape: MeshShape) -> str:
    """Return the axes that a group spans, joined by "+"."""
    spanned, stride = [], 1
    for axis, size in zip(reversed(AXES), reversed(shape.sizes), strict=True):
        if len({rank // stride % size for rank in ranks}) > 1:
            spanned.append(axis)
        stride *= size
    return "+".join(reversed(spanned))


def _n_bytes(tensors: Any) -> int:
    """Return the size of a tensor or of all tensors in nested lists."""
    if isinstance(tensors, Tensor):
        return tensors.numel() * tensors.element_size()
    return sum(map(_n_bytes, tensors))


def traced_step(
    config: ModelConfig,
    shape: MeshShape,
    parallel: ParallelConfig,
    precision: PrecisionConfig,
    step: Step,
    stage: int = 0,
) -> list[Collective]:
    """Return the collectives of the first rank of a pipeline stage in one step, in order.

    `step` defines number and size of the micro-batches; dtypes follow `precision`. The step
    excludes the optimizer, which does not communicate. It is not compiled, because the compiler
    does not run under a dispatch mode.
    """
    with (
        fake_model(config, shape, parallel, precision, stage=stage) as (llama, strategy),
        Recorder(shape) as recorder,
    ):
        materialise(llama)
        _run(llama, strategy, step)
    return recorder.collectives


def _run(llama: Any, strategy: MeshStrategy, step: Step) -> None:
    """Run the communicating parts of `train_step` on fake tokens."""
    n_targets, _ = strategy.sum_over_data(torch.empty(2, dtype=torch.int64))
    tokens = torch.empty(step.micro_batch_size, step.seq_len, dtype=torch.int64)  # (batch, seq)
    micro_batches = [((tokens, tokens, tokens), 0)] * step.micro_batches
    strategy.accumulate(llama, micro_batches, lambda batch: batch, n_targets)
    extra_scalars, tied_weight = torch.empty(N_EXTRA_SCALARS), strategy.tied_weight
    clip_grad_norm(llama, 1.0, extra_scalars, tied_weight)
