"""Load weights into a model on a mesh, ready for evaluation and generation."""

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from model.config import ModelConfig
from parallel.config import ParallelConfig, PrecisionConfig
from parallel.mesh import MeshShape, Processes, plan_processes, resolve_mesh
from resilience.exit_codes import ExitCode

if TYPE_CHECKING:
    from lightning.fabric import Fabric

    from evaluation.generation import GenerationSync
    from formats.weights import Weights
    from parallel.strategy import MeshStrategy
    from resilience.watchdog import Watchdog

ModelRule = Callable[[MeshShape, ParallelConfig, ModelConfig, int], list[str]]


@dataclass(frozen=True)
class InferenceContext:
    """A model in evaluation mode on every process of its mesh."""

    fabric: "Fabric"
    strategy: "MeshStrategy"
    mesh: MeshShape
    model: Any  # Fabric's wrapper around the sharded Llama
    weights: "Weights"
    watchdog: "Watchdog"

    @property
    def data_rank(self) -> int:
        """Index of this process among the `dp` data ranks."""
        return self.mesh.data_rank(self.fabric.global_rank)

    @property
    def sync(self) -> "GenerationSync":
        """Synchronization of `generate` between the processes."""
        from evaluation.generation import GenerationSync

        return GenerationSync(self.strategy.device_mesh, self.fabric.device)

    @contextmanager
    def exit_on_interrupt(self) -> Iterator[None]:
        """Exit all processes on Ctrl-C or when the reader of stdout is closed; rank 0 decides."""
        if not self.fabric.is_global_zero:
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # children exit with the main process
        try:
            yield
        except KeyboardInterrupt:
            code = int(ExitCode.INTERRUPTED)
        except BrokenPipeError:
            code = 128 + signal.SIGPIPE
        except Exception as error:
            self.watchdog.wait_for_abort(error)  # exits here if another rank failed
            raise
        else:
            return
        os._exit(code)  # other ranks may be waiting in a collective


def plan_inference(
    parallel: ParallelConfig, model: ModelConfig, seq_len: int, rule: ModelRule
) -> tuple[Processes, MeshShape, list[str]]:
    """Return the processes and the mesh, and the configuration errors found.

    Args:
        rule: Returns the errors of combining mesh, parallelism, model and sequence length.
    """
    processes, errors = plan_processes(parallel)
    mesh, mesh_errors = resolve_mesh(parallel, processes.world_size)
    return processes, mesh, errors + (mesh_errors or rule(mesh, parallel, model, seq_len))


def load_model(
    weights: "Weights",
    processes: Processes,
    mesh: MeshShape,
    parallel: ParallelConfig,
    precision: PrecisionConfig,
) -> InferenceContext:
    """Launch the processes and load each rank's shard of the weights.

    Raises:
        FormatError: On all ranks, if the weights are damaged or a rank cannot read its shard.
        LaunchError: The processes cannot connect to each other.
    """
    import torch

    from formats.weights import load_weights
    from model.llama import Llama
    from resilience.config import WatchdogConfig
    from resilience.launch import launch
    from resilience.watchdog import Watchdog

    watchdog = Watchdog(WatchdogConfig(None, None, None))  # detects dead ranks, without time limits
    fabric, strategy = launch(processes, mesh, parallel, precision, watchdog)
    with torch.device("meta"):
        llama = Llama(weights.model)
    model = fabric.setup_module(llama)
    load_weights(llama, weights)
    model.eval()
    return InferenceContext(fabric, strategy, mesh, model, weights, watchdog)
