"""A parallelized model on fake tensors in a fake process group.

Nothing is computed, allocated or sent, so a laptop can trace hundreds of processes.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.debug import _clear_sharding_prop_cache
from torch.testing._internal.distributed.fake_pg import FakeStore

from model.config import ModelConfig
from model.llama import Llama
from parallel.config import ParallelConfig, PrecisionConfig
from parallel.mesh import AXES, MeshShape
from parallel.parallelize import parallelize
from parallel.strategy import MeshStrategy


@contextmanager
def fake_processes(world_size: int, rank: int = 0) -> Iterator[None]:
    """Create a fake process group of `world_size` processes, of which this is one."""
    dist.init_process_group("fake", rank=rank, world_size=world_size, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()
        # This cache would return an equal mesh with the previous names of its groups.
        _clear_sharding_prop_cache()


@contextmanager
def fake_model(
    config: ModelConfig,
    shape: MeshShape,
    parallel: ParallelConfig,
    precision: PrecisionConfig,
    prepare: Callable[[Llama], None] = lambda llama: None,
    stage: int = 0,
) -> Iterator[tuple[Any, MeshStrategy]]:
    """Build the parallelized model, not compiled, on the meta device, and enter fake mode.

    Weights are allocated by `materialise`, so that the caller can record their allocation.

    Args:
        prepare: Called with the model before it is parallelized.
        stage: Index of the pipeline rank whose first process this is.
    """
    eager = replace(parallel.of_stage(stage), compile=False, async_tp=False, pp_checkpoint=None)
    if isinstance(eager.activation_checkpoint, float):  # a memory budget needs the compiler
        eager = replace(eager, activation_checkpoint="none")
    rank = stage * shape.dp_shard * shape.cp * shape.tp
    with fake_processes(shape.world_size, rank):
        mesh = init_device_mesh("cpu", shape.sizes, mesh_dim_names=AXES)
        transform = partial(parallelize, parallel=eager, precision=precision)
        strategy = MeshStrategy(shape, transform, parallel.reduce_gradients)
        strategy._device_mesh = mesh  # normally set by its set-up, which starts processes
        with torch.device("meta"):
            llama = Llama(config)
        prepare(llama)
        # Outside of fake mode, in which a mesh cannot be sliced.
        transform(llama, mesh)
        strategy.use(llama)
        with FakeTensorMode(allow_non_fake_inputs=True):
            yield llama, strategy


def materialise(llama: Any) -> None:
    """Allocate the weights of a sharded model, uninitialized."""
    llama.to_empty(device="cpu")
    llama.tie_weights()
