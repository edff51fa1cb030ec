"""Shape of the device mesh, and number and launcher of its processes.

The axes, outermost first, are dp_replicate, dp_shard, cp and tp: neighboring ranks are
tensor-parallel, because that axis communicates most. The process count depends on the launcher:
this program, `torchrun` or `srun`. Imports torch only to count GPUs.
"""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from parallel.config import ParallelConfig
from parallel.slurm import in_slurm, started_by_srun, tasks_per_node

AXES = ("dp_replicate", "dp_shard", "cp", "tp")
# The axes whose ranks read different samples of a batch.
DATA_AXES = ("dp_replicate", "dp_shard")


@dataclass(frozen=True)
class MeshShape:
    """Size of each mesh axis; their product is the number of processes."""

    dp_replicate: int
    dp_shard: int
    cp: int
    tp: int

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """Axis sizes in the order of `AXES`."""
        return self.dp_replicate, self.dp_shard, self.cp, self.tp

    @property
    def world_size(self) -> int:
        """Number of processes."""
        return self.dp_replicate * self.dp_shard * self.cp * self.tp

    @property
    def dp(self) -> int:
        """Number of data-parallel groups, which read different samples."""
        return self.dp_replicate * self.dp_shard

    @property
    def ranks_per_sample(self) -> int:
        """Number of ranks that read the same samples and compute one loss together."""
        return self.cp * self.tp

    @property
    def seq_multiple(self) -> int:
        """The sequence length must be a multiple of this to shard evenly on every axis."""
        return self.tp * (2 * self.cp if self.cp > 1 else 1)

    def data_rank(self, rank: int) -> int:
        """Return the data-parallel group of a global rank, from 0 to `dp` - 1."""
        return rank // (self.cp * self.tp)

    def __str__(self) -> str:
        named = [f"{axis}={size}" for axis, size in vars(self).items() if size > 1]
        return " × ".join(named) or "one process"


@dataclass(frozen=True)
class Processes:
    """Launcher, device type and number of the processes."""

    accelerator: str  # "cpu" or "cuda"
    per_node: int
    num_nodes: int
    launcher: str  # "self", "torchrun" or "srun"

    @property
    def world_size(self) -> int:
        """Number of processes on all nodes."""
        return self.per_node * self.num_nodes


def started_processes(environment: Mapping[str, str]) -> Processes | None:
    """Return the processes that `torchrun` or `srun` started, None if this run starts its own.

    A run in an interactive SLURM shell (a job named bash or interactive) starts its own, as in
    Fabric.
    """
    if "TORCHELASTIC_RUN_ID" in environment:
        per_node = int(environment["LOCAL_WORLD_SIZE"])
        nodes = int(environment["WORLD_SIZE"]) // per_node
        return Processes("auto", per_node, nodes, "torchrun")
    if started_by_srun(environment):
        tasks = tasks_per_node(environment)
        return Processes("auto", tasks[0], len(tasks), "srun")
    return None


def is_first_process(environment: Mapping[str, str] = os.environ) -> bool:
    """Return whether this process will be global rank 0, before a process group exists."""
    # A job's script also has SLURM_PROCID, which is not the rank of a process it starts.
    slurm = ("SLURM_PROCID",) if started_by_srun(environment) else ()
    ranks = (environment.get(name) for name in ("RANK", *slurm, "LOCAL_RANK"))
    return int(next((rank for rank in ranks if rank is not None), 0)) == 0


def plan_processes(
    config: ParallelConfig, environment: Mapping[str, str] = os.environ
) -> tuple[Processes, list[str]]:
    """Return device type and process counts, and all validation errors."""
    accelerator, gpus = _accelerator(config)
    errors = []
    if config.accelerator == "cuda" and gpus == 0:
        errors.append(
            "parallel.accelerator=cuda but no GPU is visible; use parallel.accelerator=cpu"
        )
    started = started_processes(environment)
    if started is not None:
        processes = Processes(accelerator, started.per_node, started.num_nodes, started.launcher)
        if started.launcher == "srun":
            errors += _task_errors(environment)
        errors += started_errors(config, started)
    else:
        if in_slurm(environment):
            errors.append(
                "this is the script of a SLURM job, not one of its tasks; put srun before the "
                "command (srun python train.py …), as slurm/train.sbatch does"
            )
        mesh_size = config.dp_replicate * max(config.dp_shard, 1) * config.cp * config.tp
        num_nodes = config.num_nodes or 1
        on_this_machine = gpus if accelerator == "cuda" else max(mesh_size // num_nodes, 1)
        processes = Processes(accelerator, config.devices or on_this_machine, num_nodes, "self")
    if accelerator == "cuda" and processes.per_node > gpus > 0:
        errors.append(
            f"parallel.devices={processes.per_node} exceeds the {gpus} visible GPUs; use at most "
            f"{gpus}, or parallel.accelerator=cpu"
        )
    return processes, errors


def started_errors(config: ParallelConfig, started: Processes) -> list[str]:
    """Return errors if the launched processes do not match the configuration."""
    return [
        f"parallel.{key}={value} does not match {started.launcher}, which started {actual}; "
        f"use parallel.{key}=null, or start {value}"
        for key, actual in (("devices", started.per_node), ("num_nodes", started.num_nodes))
        if (value := getattr(config, key)) is not None and value != actual
    ]


def _task_errors(environment: Mapping[str, str]) -> Iterator[str]:
    """Yield errors in the task layout that `srun` started."""
    tasks = tasks_per_node(environment)
    if len(set(tasks)) > 1:
        yield (
            f"srun started {sum(tasks)} tasks unevenly on {len(tasks)} nodes "
            f"({', '.join(map(str, tasks))}); use --nodes and --ntasks-per-node"
        )
    elif "SLURM_NTASKS_PER_NODE" not in environment:
        yield (
            f"srun --ntasks={sum(tasks)} does not set the number of tasks per node; add "
            f"--ntasks-per-node={tasks[0]}"
        )


def _accelerator(config: ParallelConfig) -> tuple[str, int]:
    """Return the device type and the number of visible GPUs."""
    if config.accelerator == "cpu":
        return "cpu", 0
    import torch

    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return ("cpu" if config.accelerator == "auto" and not gpus else "cuda"), gpus


def resolve_mesh(config: ParallelConfig, world_size: int) -> tuple[MeshShape, list[str]]:
    """Return the mesh of `world_size` processes with `dp_shard` resolved, and all errors."""
    min_shard = 1 if config.dp_shard == -1 else config.dp_shard
    if min(config.dp_replicate, min_shard, config.cp, config.tp, world_size) < 1:
        # No mesh: field constraints report sizes below 1, `plan_processes` a missing GPU.
        return MeshShape(1, 1, 1, 1), []
    others = config.dp_replicate * config.cp * config.tp
    dp_shard = config.dp_shard if config.dp_shard != -1 else max(world_size // others, 1)
    shape = MeshShape(config.dp_replicate, dp_shard, config.cp, config.tp)
    if world_size == shape.world_size:
        return shape, []
    named = ", ".join(f"parallel.{axis}={size}" for axis, size in vars(shape).items())
    if world_size % others == 0:
        return shape, [
            f"the mesh ({named}) needs {shape.world_size} processes, not {world_size}; use "
            f"parallel.dp_shard=-1, which resolves to {world_size // others}"
        ]
    divisors = [str(size) for size in range(1, world_size + 1) if world_size % size == 0]
    return shape, [
        f"the mesh ({named}) needs {shape.world_size} processes, not {world_size}; start a "
        f"multiple of {others} processes, or let dp_replicate × cp × tp be one of "
        f"{', '.join(divisors)}"
    ]
