"""A step without its processes: the real plan on fake tensors, in a process group of one's fancy.

Nothing is computed, allocated or sent, so a laptop traces hundreds of processes. `Recorder` notes
the collectives of whatever runs inside it, a real step included; `traced_step` runs one that does
what `train_step` does, on rank 0, and returns them. The closed forms are in `parallel.traffic`.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import _clear_sharding_prop_cache
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from model.config import ModelConfig
from model.llama import Llama
from parallel.config import ParallelConfig, PrecisionConfig
from parallel.gradients import clip_grad_norm
from parallel.mesh import AXES, MeshShape
from parallel.parallelize import parallelize
from parallel.step_scalars import N_EXTRA_SCALARS
from parallel.strategy import MeshStrategy
from parallel.traffic import Collective, Kind, Step

# Operation: (kind, which argument holds the whole tensor; None: the result does).
_COLLECTIVES: dict[str, tuple[Kind, int | None]] = {
    "c10d::_allgather_base_": ("all_gather", 0),
    "c10d::allgather_": ("all_gather", 0),
    "c10d::_reduce_scatter_base_": ("reduce_scatter", 1),
    "c10d::allreduce_": ("all_reduce", 0),
    "_c10d_functional::all_gather_into_tensor": ("all_gather", None),
    "_c10d_functional::reduce_scatter_tensor": ("reduce_scatter", 0),
    "_c10d_functional::all_reduce": ("all_reduce", 0),
}
_SEND_NOTHING = {"_c10d_functional::wait_tensor", "_c10d_functional::_wrap_tensor_autograd"}


class Recorder(TorchDispatchMode):
    """Notes in `collectives`, one by one, what this rank takes part in; groups of one are left out.

    Args:
        shape: The mesh, by which a group gets the names of the axes that it spans.
    """

    def __init__(self, shape: MeshShape) -> None:
        super().__init__()
        self.shape = shape
        self.collectives: list[Collective] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # DTensor turns it into local operations, which come here
        out = func(*args, **(kwargs or {}))
        name = func._schema.name
        if "c10d" in name and name not in _SEND_NOTHING:
            kind, place = _COLLECTIVES[name]  # one that is not in the table must not pass unseen
            ranks = dist.get_process_group_ranks(_group(args))
            whole = out if place is None else args[place]
            if len(ranks) > 1:
                axis = _axes_of(ranks, self.shape)
                self.collectives.append(Collective(axis, len(ranks), kind, 1, _bytes(whole)))
        return out


def _group(args: Any) -> dist.ProcessGroup:
    """The process group of a collective's arguments: an object, or last of all its name."""
    for arg in args:
        if isinstance(arg, torch.ScriptObject) and "ProcessGroup" in str(arg._type()):
            return dist.ProcessGroup.unbox(arg)
    return dist.distributed_c10d._resolve_process_group(args[-1])


def _axes_of(ranks: list[int], shape: MeshShape) -> str:
    """The axes along which ranks of a group differ, joined by "+"."""
    spanned, stride = [], 1
    for axis, size in zip(reversed(AXES), reversed(shape.sizes), strict=True):
        if len({rank // stride % size for rank in ranks}) > 1:
            spanned.append(axis)
        stride *= size
    return "+".join(reversed(spanned))


def _bytes(whole: Any) -> int:
    """Size of a tensor, or of all tensors of a list or of its lists."""
    if isinstance(whole, Tensor):
        return whole.numel() * whole.element_size()
    return sum(_bytes(each) for each in whole)


@contextmanager
def fake_processes(world_size: int) -> Iterator[None]:
    """A process group of `world_size`, of which this process is rank 0 and the others are not."""
    dist.init_process_group("fake", rank=0, world_size=world_size, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()
        # It remembers meshes, which may have an equal with groups of other names the next time.
        _clear_sharding_prop_cache()


def traced_step(
    config: ModelConfig,
    shape: MeshShape,
    parallel: ParallelConfig,
    precision: PrecisionConfig,
    step: Step,
) -> list[Collective]:
    """The collectives of rank 0 in a step up to the optimizer, which sends nothing, in order.

    `step` gives number and size of the micro-batches; number formats are those of `precision`. What
    runs is not compiled: PyTorch's compiler refuses to run where operations are watched.
    """
    with (
        traced_model(config, shape, parallel, precision) as (llama, strategy),
        Recorder(shape) as recorder,
    ):
        materialise(llama)
        _run(llama, strategy, step)
    return recorder.collectives


@contextmanager
def traced_model(
    config: ModelConfig,
    shape: MeshShape,
    parallel: ParallelConfig,
    precision: PrecisionConfig,
    prepare: Callable[[Llama], None] = lambda llama: None,
) -> Iterator[tuple[Any, MeshStrategy]]:
    """The model under its plan, on the meta device; what is made inside is fake.

    Not compiled. Its weights come by `materialise`, under whatever is to see them come.

    Args:
        prepare: Called with the model before the plan is applied to it.
    """
    eager = replace(parallel, compile=False, async_tp=False)
    if isinstance(eager.activation_checkpoint, float):  # which the compiler alone can keep
        eager = replace(eager, activation_checkpoint="none")
    with fake_processes(shape.world_size):
        mesh = init_device_mesh("cpu", shape.sizes, mesh_dim_names=AXES)
        plan = partial(parallelize, parallel=eager, precision=precision)
        strategy = MeshStrategy(shape, plan, parallel.reduce_gradients)
        strategy._device_mesh = mesh  # what its set-up does, which launches processes as well
        with torch.device("meta"):
            llama = Llama(config)
        prepare(llama)
        # The plan outside of the fake mode, in which no mesh can be sliced; the memory inside it.
        plan(llama, mesh)
        with FakeTensorMode(allow_non_fake_inputs=True):
            yield llama, strategy


def materialise(llama: Any) -> None:
    """Gives a sharded model its weights, uninitialised."""
    llama.to_empty(device="cpu")
    llama.tie_weights()


def _run(llama: Any, strategy: MeshStrategy, step: Step) -> None:
    """Sum of the counts, forward, backward and clipping as in `train_step`, on unknown tokens."""
    n_targets, _ = strategy.sum_over_data(torch.empty(2, dtype=torch.int64))
    tokens = torch.empty(step.micro_batch_size, step.seq_len, dtype=torch.int64)  # (batch, seq)
    for place in range(1, step.micro_batches + 1):
        with strategy.micro_batch_sync.no_backward_sync(llama, place < step.micro_batches):
            (llama(tokens, tokens, tokens) / n_targets).backward()
    clip_grad_norm(llama, max_norm=1.0, extra_scalars=torch.empty(N_EXTRA_SCALARS))
