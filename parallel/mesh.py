"""Shape of the device mesh, and number and launcher of its processes.

The axes, outermost first, are dp_replicate, pp, dp_shard, cp and tp: neighboring ranks are
tensor-parallel, because that axis communicates most. The process count depends on the launcher:
this program, `torchrun`, `srun` or one that sets the same variables as torchrun.
"""

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass

from parallel.config import ParallelConfig
from parallel.slurm import started_by_srun, tasks_per_node

AXES = ("dp_replicate", "pp", "dp_shard", "cp", "tp")
# The axes whose ranks read different samples of a batch.
DATA_AXES = ("dp_replicate", "dp_shard")
OTHER = "another launcher"
# Set by torchrun, DeepSpeed and the usual MPI scripts in each process that they start.
RANK_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT", "MASTER_ADDR")
# Processes on this node, as torchrun, DeepSpeed, Open MPI and MPICH name it; all if not set.
LOCAL_SIZES = ("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS")


@dataclass(frozen=True)
class MeshShape:
    """Size of each mesh axis; their product is the number of processes."""

    dp_replicate: int
    dp_shard: int
    cp: int
    tp: int
    pp: int = 1

    @property
    def sizes(self) -> tuple[int, ...]:
        """Axis sizes in the order of `AXES`."""
        return tuple(getattr(self, axis) for axis in AXES)

    @property
    def world_size(self) -> int:
        """Number of processes."""
        return math.prod(self.sizes)

    @property
    def dp(self) -> int:
        """Number of data-parallel groups, which read different samples."""
        return self.dp_replicate * self.dp_shard

    @property
    def ranks_per_sample(self) -> int:
        """Number of ranks that read the same samples and compute one loss together."""
        return self.pp * self.cp * self.tp

    @property
    def seq_multiple(self) -> int:
        """The sequence length must be a multiple of this to shard evenly on every axis."""
        return self.tp * (2 * self.cp if self.cp > 1 else 1)

    def stage(self, rank: int) -> int:
        """Return the index on the pp axis of a global rank."""
        return rank // (self.dp_shard * self.cp * self.tp) % self.pp

    def ranks_of_stage(self, stage: int) -> list[int]:
        """Return the global ranks with an index on the pp axis."""
        return [rank for rank in range(self.world_size) if self.stage(rank) == stage]

    def data_rank(self, rank: int) -> int:
        """Return the data-parallel group of a global rank, from 0 to `dp` - 1."""
        stage = self.dp_shard * self.cp * self.tp  # ranks of a stage of one replica
        replica = rank // (self.pp * stage)
        return replica * self.dp_shard + rank % stage // (self.cp * self.tp)

    def __str__(self) -> str:
        named = [f"{axis}={size}" for axis, size in zip(AXES, self.sizes, strict=True) if size > 1]
        return " × ".join(named) or "one process"


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


def resolve_mesh(
    config: ParallelConfig, world_size: int, size_key: str | None = None
) -> tuple[MeshShape, list[str]]:
    """Return the mesh of `world_size` processes with `dp_shard` resolved, and all errors.

    Without a number of processes (0), `dp_shard` is at least what the configuration needs.

    Args:
        size_key: Key that sets the number of processes; None: it is that of the started ones.
    """
    others = config.dp_replicate * config.cp * config.tp * config.pp
    fixed = config.dp_shard != -1
    dp_shard = config.dp_shard if fixed else max(world_size // max(others, 1), 1)
    shape = MeshShape(config.dp_replicate, dp_shard, config.cp, config.tp, config.pp)
    if world_size == shape.world_size or min(*shape.sizes, world_size) < 1:
        # Field constraints report sizes below 1, `resilience.accelerator` a missing GPU.
        return shape, []
    if world_size % others == 0:
        change = f"use parallel.dp_shard=-1, which resolves to {world_size // others}"
    else:
        divisors = [str(size) for size in range(1, world_size + 1) if world_size % size == 0]
        product = f"one of {', '.join(divisors)}" if len(divisors) > 1 else "1"
        free = "use parallel.dp_shard=-1 and " if fixed else ""
        change = f"{free}let dp_replicate × pp × cp × tp be {product}"
    named = ", ".join(
        f"parallel.{axis}={size}" for axis, size in zip(AXES, shape.sizes, strict=True)
    )
    count = shape.world_size if fixed else f"a multiple of {others}"
    per_node = shape.world_size // (config.num_nodes or 1)
    start = f"start {count} processes (parallel.devices={per_node} if the run starts its own)"
    if size_key is not None:
        start = f"use {size_key}={shape.world_size if fixed else -(-world_size // others) * others}"
        change = change.removeprefix("use ")
    return shape, [
        f"the mesh ({named}) needs {shape.world_size} processes, not {world_size}; {start}, or "
        f"{change}"
    ]
