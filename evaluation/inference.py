"""Load weights into a model on a mesh, ready for evaluation and generation."""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from lightning_fabric import Fabric

from evaluation.generation import GenerationSync
from formats.detection import agreed_weights
from formats.weights import Weights, load_weights
from model.llama import Llama
from parallel.config import ParallelConfig, PrecisionConfig
from parallel.mesh import MeshShape
from parallel.strategy import MeshStrategy
from resilience.config import TimeLimits
from resilience.exit_codes import ExitCode
from resilience.launch import launch
from resilience.processes import Processes
from resilience.standard_streams import STDOUT
from resilience.watchdog import Watchdog


@dataclass(frozen=True)
class InferenceContext:
    """A model in evaluation mode on every process of its mesh."""

    fabric: Fabric
    strategy: MeshStrategy
    mesh: MeshShape
    llama: Llama  # sharded
    model: Any  # Fabric's wrapper around it
    weights: Weights
    watchdog: Watchdog

    @property
    def data_rank(self) -> int:
        """Index of this process among the `dp` data ranks."""
        return self.mesh.data_rank(self.fabric.global_rank)

    @property
    def sync(self) -> GenerationSync:
        """Synchronization of `generate` between the processes."""
        return GenerationSync(self.strategy.device_mesh)

    @contextmanager
    def exit_on_interrupt(self) -> Iterator[None]:
        """Exit all processes on Ctrl-C or when the reader of stdout is closed; rank 0 decides."""
        if not self.fabric.is_global_zero:
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # children exit with the main process
        try:
            yield
        except KeyboardInterrupt:
            code = int(ExitCode.INTERRUPTED)
        except BrokenPipeError as error:
            if error.filename != STDOUT:
                raise
            code = 128 + signal.SIGPIPE
        except Exception as error:
            self.watchdog.wait_for_abort(error)  # exits here if another rank failed
            raise
        else:
            return
        os._exit(code)  # other ranks may be waiting in a collective


def load_model(
    weights: Weights,
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
    # The shapes of prompts and windows vary, so only an explicit `compile` takes the time.
    parallel = replace(parallel, compile=parallel.compile is True)
    watchdog = Watchdog(TimeLimits())  # detects dead ranks, without time limits
    fabric, strategy = launch(processes, mesh, parallel, precision, watchdog)
    weights = agreed_weights(weights.folder, opened=weights)
    for warning in weights.warnings if fabric.is_global_zero else ():
        print(f"Warning: {warning}", file=sys.stderr, flush=True)
    with torch.device("meta"):
        llama = Llama(weights.model)
    model = fabric.setup_module(llama)
    load_weights(llama, weights)
    model.eval()
    return InferenceContext(fabric, strategy, mesh, llama, model, weights, watchdog)
