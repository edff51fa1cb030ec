"""Lightning Fabric's strategy for a mesh with named axes.

Fabric starts the processes, initializes their group and wraps model and optimizer. Its
`ModelParallelStrategy` supports two axes; `MeshStrategy` supports all axes of `parallel.mesh`, and
defines gradient synchronization on them. The transforms of the model are in
`parallel.parallelize`; checkpoints are written by the package `checkpoint`, not by Fabric.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from subprocess import Popen
from typing import Any

import torch
from lightning_fabric.accelerators import CUDAAccelerator
from lightning_fabric.strategies import ModelParallelStrategy
from lightning_fabric.strategies.launchers.subprocess_script import _SubprocessScriptLauncher
from lightning_fabric.strategies.parallel import ParallelStrategy
from lightning_fabric.strategies.strategy import _BackwardSyncControl
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.distributed_c10d import _set_pg_timeout, _world

from parallel.data_parallel import hold_gradients
from parallel.mesh import AXES, DATA_AXES, MeshShape

OnChildren = Callable[[list[Popen[Any]]], None]
"""Called with the processes that the main process has started."""


class MeshStrategy(ModelParallelStrategy):
    """One model on a mesh of `dp_replicate × pp × dp_shard × cp × tp` processes.

    Args:
        shape: Size of each axis; their product is the number of processes.
        parallelize: Transforms a model on the meta device in place.
        reduce_gradients: `parallel.reduce_gradients`.
        on_children: Called in the main process with the processes that it launched, before they
            join the process group. Not called under `torchrun` and `srun`.
        timeout: Timeout of all process groups, and of their store.
    """

    def __init__(
        self,
        shape: MeshShape,
        parallelize: Callable[[Any, DeviceMesh], Any],
        reduce_gradients: str = "step",
        on_children: OnChildren = lambda children: None,
        timeout: timedelta = timedelta(days=7),
    ) -> None:
        super().__init__(parallelize_fn=parallelize, timeout=timeout)
        self.shape, self.on_children, self.timeout = shape, on_children, timeout
        self.llama: Any = None
        self.pipeline: Any = None  # `parallel.pipeline_parallel.Pipeline` of the model
        self.micro_batch_sync = MicroBatchSync(every=reduce_gradients == "micro_batch")
        self._backward_sync_control = self.micro_batch_sync

    def _configure_launcher(self) -> None:
        assert self.cluster_environment is not None
        if not self.cluster_environment.creates_processes_externally:
            self._launcher = _Launcher(self.cluster_environment, self.num_processes, self.num_nodes)
            self._launcher.on_children = self.on_children

    def setup_environment(self) -> None:
        """Initialize the process group and the device mesh."""
        # Not the parent class's, which would build a mesh of two axes.
        ParallelStrategy.setup_environment(self)
        self._setup_distributed()
        device_type = self.root_device.type
        self._device_mesh = init_device_mesh(device_type, self.shape.sizes, mesh_dim_names=AXES)

    def setup_module(self, module: Any) -> Any:
        """Transform the model on the meta device, then allocate this rank's shards.

        The shards are uninitialized; `initialize_weights` or a checkpoint fills them. The parent
        class would call `reset_parameters`, which on a CPU mesh draws the same random numbers for
        every shard.
        """
        module = self._parallelize_fn(module, self.device_mesh)
        for group in list(_world.pg_map):  # the mesh's groups have the default of their backend
            _set_pg_timeout(self.timeout, group)
        module.to_empty(device=self.root_device)
        module.tie_weights()  # `to_empty` separates tied weights
        self.use(module)
        return module

    def use(self, module: Any) -> None:
        """Run steps of a model that `parallelize` has transformed."""
        self.llama, self.pipeline = module, vars(module).get("pipeline")

    def accumulate(
        self,
        module: Any,
        micro_batches: Sequence[tuple[Any, int]],
        to_device: Callable[[Any], Any],
        n_targets: torch.Tensor,
    ) -> torch.Tensor:
        """Run forward and backward of all micro-batches of a step.

        Args:
            module: The model as returned by Fabric.
            micro_batches: Tokens, positions and labels of each, and its number of documents.
            n_targets: In the global batch.

        Returns:
            The loss of each micro-batch, divided by `n_targets`; on pipeline stages without the
            head one zero.
        """
        if self.pipeline is not None:
            return self.pipeline.accumulate(module, micro_batches, to_device, n_targets)
        losses = []
        for index, (micro_batch, n_documents) in enumerate(micro_batches, start=1):
            tokens, positions, labels = to_device(micro_batch)
            with self.micro_batch_sync.no_backward_sync(self.llama, index < len(micro_batches)):
                loss = module(tokens, positions, labels, n_documents=n_documents) / n_targets
                self.backward(loss, module)
            losses.append(loss.detach())
        return torch.stack(losses)

    @property
    def ranks_per_loss(self) -> int:
        """Number of ranks to which `accumulate` returns the same losses."""
        return self.shape.cp * self.shape.tp

    @property
    def tied_weight(self) -> torch.Tensor | None:
        """A weight of this rank that another pipeline stage has too, with the same gradient."""
        return None if self.pipeline is None else self.pipeline.tied_weight

    def sum_losses(self, values: torch.Tensor) -> torch.Tensor:
        """Sum values of the last pipeline stage over the data ranks, in place, for all stages."""
        self.sum_over_data(values)
        if self.pipeline is not None:
            self.pipeline.broadcast_from_last(values)
        return values

    def sum_over_data(self, values: torch.Tensor) -> torch.Tensor:
        """Sum a tensor over the ranks that read different samples, in place, and return it."""
        for axis in DATA_AXES:
            if getattr(self.shape, axis) > 1:
                torch.distributed.all_reduce(values, group=self.device_mesh.get_group(axis))
        return values


class OwnGpu(CUDAAccelerator):
    """CUDA in processes that may each see GPUs of their own, whose indices start at 0 in each."""

    @staticmethod
    def parse_devices(devices: Any) -> list[int]:
        """Return the device index of each local process."""
        visible = torch.cuda.device_count()
        return [local_rank % visible for local_rank in range(int(devices))]


class MicroBatchSync(_BackwardSyncControl):
    """`fabric.no_backward_sync` for FSDP2.

    While it is enabled, gradients stay unsharded on each rank; the first backward without it sums
    all of them over the data ranks, so that a step has one reduction for any number of
    micro-batches. Weights that stay gathered between forward and backward also stay gathered for
    the next micro-batch. Fabric's own control leaves synchronization off after an exit with
    `enabled=False`.

    Args:
        every: Reduce-scatter the gradients of every micro-batch; only the all-reduce over
            `dp_replicate` waits for the last one.
    """

    def __init__(self, every: bool) -> None:
        super().__init__()
        self.every = every

    @contextmanager
    def no_backward_sync(self, module: nn.Module, enabled: bool) -> Iterator[None]:
        if enabled:
            hold_gradients(module, True, self.every)
        try:
            yield
        finally:
            if enabled:
                hold_gradients(module, False, self.every)


class _Launcher(_SubprocessScriptLauncher):
    """Fabric's launcher of local processes, without its supervision.

    When a child dies, Fabric kills the main process up to five seconds later and prints no reason.
    """

    on_children: OnChildren

    def _call_children_scripts(self) -> None:
        super()._call_children_scripts()
        self.on_children(self.procs)
        self.procs = []  # Fabric's observer watches this list
