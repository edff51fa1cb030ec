"""Fabric's strategy on a mesh with named axes.

Fabric launches the processes, sets up their group and wraps model and optimizer. Its own
`ModelParallelStrategy` knows two axes; `MeshStrategy` owns all of ours, and says what a gradient
synchronisation and a global norm are on them. What the plan does to the model is not here but in
`parallelize`; checkpoints are not Fabric's but `checkpoint`'s.
"""

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from lightning.fabric.strategies import ModelParallelStrategy
from lightning.fabric.strategies.parallel import ParallelStrategy
from lightning.fabric.strategies.strategy import _BackwardSyncControl
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from parallel.data_parallel import hold_gradients
from parallel.gradients import clip_grad_norm
from parallel.launcher import Launcher
from parallel.mesh import AXES, DATA_AXES, MeshShape

PR_SET_PDEATHSIG = 1  # linux/prctl.h


def end_with_main_process() -> None:
    """Makes Linux kill the processes that a run launches itself when the main one dies.

    Every process of the run calls it, the main one first. Without it a child whose main process
    was killed waits for it as long as a rendezvous or a collective call may take.
    """
    if int(os.environ.get("LOCAL_RANK", 0)) == 0:
        os.environ["LLAMESH_MAIN_PID"] = str(os.getpid())  # the children inherit it
    elif sys.platform == "linux":
        _end_with_parent()
        if os.getppid() != int(os.environ["LLAMESH_MAIN_PID"]):  # it died before we asked
            os._exit(1)


def end_with_torchrun() -> None:
    """Makes Linux kill this process when the `torchrun` that started it dies.

    Without it the processes of a killed `torchrun` train on, into the folder of the next start.
    """
    if sys.platform == "linux":
        _end_with_parent()


def _end_with_parent() -> None:
    """Asks Linux to kill this process when the one that started it dies."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


class MeshStrategy(ModelParallelStrategy):
    """A mesh of `dp_replicate × dp_shard × cp × tp` processes that share one model.

    Args:
        shape: Size of each axis; their product is the number of processes.
        parallelize: Applies the plan to a model on the meta device, in place.
        reduce_gradients: `parallel.reduce_gradients`.
    """

    def __init__(
        self,
        shape: MeshShape,
        parallelize: Callable[[Any, DeviceMesh], Any],
        reduce_gradients: str = "step",
    ) -> None:
        super().__init__(parallelize_fn=parallelize)
        self.shape = shape
        self.micro_batch_sync = MicroBatchSync(shards=reduce_gradients == "micro_batch")
        self._backward_sync_control = self.micro_batch_sync
        self.on_children: Callable[[list[subprocess.Popen[Any]]], None] = lambda children: None

    def _configure_launcher(self) -> None:
        """Where no other program starts the processes: `on_children` hears of those started."""
        assert self.cluster_environment is not None
        if not self.cluster_environment.creates_processes_externally:
            self._launcher = Launcher(self.cluster_environment, self.num_processes, self.num_nodes)
            self._launcher.on_children = self.on_children

    def setup_environment(self) -> None:
        """Starts the process group and lays the mesh over it."""
        # Not the parent's: it would build its own mesh of two axes.
        ParallelStrategy.setup_environment(self)
        self._setup_distributed()
        self._device_mesh = init_device_mesh(
            self.root_device.type, self.shape.sizes, mesh_dim_names=AXES
        )

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        """Which share of the samples this rank reads, in Fabric's words."""
        return {"num_replicas": self.shape.dp, "rank": self.shape.data_rank(self.global_rank)}

    def setup_module(self, module: Any) -> Any:
        """Applies the plan on the meta device, then allocates each rank's shard, uninitialised.

        Weights come afterwards, from `initialize_weights` or from a checkpoint: the parent would
        call `reset_parameters`, whose random numbers repeat from shard to shard on a CPU mesh.
        """
        module = self._parallelize_fn(module, self.device_mesh)
        module.to_empty(device=self.root_device)
        module.tie_weights()  # `to_empty` gave the two ends of a tied weight a tensor each
        return module

    def clip_gradients_norm(
        self,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        max_norm: float | int,
        norm_type: float | int = 2.0,
        error_if_nonfinite: bool = False,
    ) -> torch.Tensor:
        """Clips by the global 2-norm over every axis; returns the norm before, a scalar."""
        assert norm_type == 2.0 and not error_if_nonfinite
        return clip_grad_norm(module, max_norm, torch.empty(0, device=self.root_device))[0]

    def sum_over_data(self, values: torch.Tensor) -> torch.Tensor:
        """Sums a tensor over the ranks that read different samples, in place; returns it."""
        for axis in DATA_AXES:
            if getattr(self.shape, axis) > 1:
                torch.distributed.all_reduce(values, group=self.device_mesh.get_group(axis))
        return values


class MicroBatchSync(_BackwardSyncControl):
    """`fabric.no_backward_sync` for FSDP2.

    Gradients stay unsharded on each rank while it is enabled; the first backward without it sums
    them all over the data ranks, so that a step has one reduction however many micro-batches it
    has. Weights that stay gathered between forward and backward stay so for the next micro-batch.
    Fabric's own control leaves synchronisation off after an exit with `enabled=False`.

    Args:
        shards: Gradients are sharded all the same, and only replicas wait for the last micro-batch.
    """

    def __init__(self, shards: bool) -> None:
        super().__init__()
        self.shards = shards

    def no_backward_sync(self, module: nn.Module, enabled: bool) -> AbstractContextManager[None]:
        return self._without_sync(module) if enabled else nullcontext()

    @contextmanager
    def _without_sync(self, module: Any) -> Iterator[None]:
        hold_gradients(module, True, self.shards)
        try:
            yield
        finally:
            hold_gradients(module, False, self.shards)
