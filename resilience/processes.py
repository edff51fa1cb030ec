"""Number, launcher and ranks of the processes of a run.

They depend on the launcher: this program, `torchrun`, `srun` or one that sets the same variables as
torchrun. Standard library only: it runs before anything is launched.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass

from resilience.slurm import started_by_srun, tasks_per_node

OTHER = "another launcher"
# Set by torchrun, DeepSpeed and the usual MPI scripts in each process that they start.
RANK_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT", "MASTER_ADDR")
# Processes on this node, as torchrun, DeepSpeed, Open MPI and MPICH name it; all if not set.
LOCAL_SIZES = ("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS")


@dataclass(frozen=True)
class Processes:
    """Launcher, device type and number of the processes.

    Attributes:
        capability: Lowest compute capability of this node's GPUs that they use; None without.
    """

    accelerator: str  # "cpu" or "cuda"
    per_node: int
    num_nodes: int
    launcher: str  # "self", "torchrun", "srun" or "another launcher"
    capability: tuple[int, int] | None = None

    @property
    def world_size(self) -> int:
        """Number of processes on all nodes."""
        return self.per_node * self.num_nodes


def launched_processes(environment: Mapping[str, str]) -> Processes | None:
    """Return the processes that a launcher started, None if this run starts its own.

    A launcher is recognized by its complete and consistent set of variables only;
    `resilience.launcher_variables` reports any other set. A run in an interactive SLURM shell (a
    job named bash or interactive) starts its own processes, as in Fabric.
    """
    if is_self_launched(environment):
        return None
    elastic = "TORCHELASTIC_RUN_ID" in environment
    if not elastic and started_by_srun(environment):
        tasks = tasks_per_node(environment)
        return Processes("auto", tasks[0], len(tasks), "srun")
    local_sizes = [environment[name] for name in LOCAL_SIZES if name in environment]
    try:
        rank, local_rank, size, _ = (int(environment[name]) for name in RANK_VARIABLES[:4])
        per_node = int(local_sizes[0]) if local_sizes else size
    except (KeyError, ValueError):
        return None
    consistent = 0 <= local_rank <= rank < size and local_rank < per_node and size % per_node == 0
    if not consistent or "MASTER_ADDR" not in environment:
        return None
    return Processes("auto", per_node, size // per_node, "torchrun" if elastic else OTHER)


def is_self_launched(environment: Mapping[str, str]) -> bool:
    """Return whether this run started this process itself, or has started its other processes.

    True also after the main process has died; `resilience.launch` then ends this one.
    """
    return {"LOCAL_RANK", "LLAMESH_MAIN_PID"} <= environment.keys()


def process_ranks(environment: Mapping[str, str] = os.environ) -> tuple[int, int]:
    """Return the global and the local rank of this process, before a process group exists."""
    started, names = launched_processes(environment), ("RANK", "LOCAL_RANK")
    if started is None:
        rank = int(environment["LOCAL_RANK"]) if is_self_launched(environment) else 0
        return rank, rank
    if started.launcher == "srun":
        names = ("SLURM_PROCID", "SLURM_LOCALID")
    return int(environment[names[0]]), int(environment[names[1]])


def is_first_process(environment: Mapping[str, str] = os.environ) -> bool:
    """Return whether this process will be global rank 0, before a process group exists."""
    return process_ranks(environment)[0] == 0
