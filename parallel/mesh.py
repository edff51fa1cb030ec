"""The mesh's shape: one validated object that holds every axis.

The axes, outermost first, are dp_replicate, dp_shard, cp and tp: neighbours in rank are
tensor-parallel peers, which talk the most. Also here: how many processes a run has, which depends
on who starts them. Imports torch only where GPUs have to be counted.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass

from parallel.config import ParallelConfig
from parallel.slurm import in_slurm, started_by_srun, tasks_per_node

AXES = ("dp_replicate", "dp_shard", "cp", "tp")
# The axes whose ranks read different samples of a batch.
DATA_AXES = ("dp_replicate", "dp_shard")


@dataclass(frozen=True)
class MeshShape:
    """Size of each axis; their product is the number of processes."""

    dp_replicate: int
    dp_shard: int
    cp: int
    tp: int

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """The sizes in the order of `AXES`."""
        return (self.dp_replicate, self.dp_shard, self.cp, self.tp)

    @property
    def world_size(self) -> int:
        """Number of processes."""
        return self.dp_replicate * self.dp_shard * self.cp * self.tp

    @property
    def dp(self) -> int:
        """Number of ranks that read different samples."""
        return self.dp_replicate * self.dp_shard

    @property
    def ranks_per_sample(self) -> int:
        """Number of ranks that read the same samples, and compute one loss together."""
        return self.cp * self.tp

    @property
    def seq_multiple(self) -> int:
        """What the length of a sequence is a multiple of, so that every axis cuts it evenly."""
        return self.tp * (2 * self.cp if self.cp > 1 else 1)

    def data_rank(self, rank: int) -> int:
        """Which of the `dp` shares of a batch a global rank reads."""
        return rank // (self.cp * self.tp)

    def __str__(self) -> str:
        named = [f"{axis}={size}" for axis, size in zip(AXES, self.sizes, strict=True) if size > 1]
        return " × ".join(named) or "one process"


@dataclass(frozen=True)
class Processes:
    """Who starts the processes, on what, and how many."""

    accelerator: str  # "cpu" or "cuda"
    per_node: int
    num_nodes: int
    launcher: str  # "self", "torchrun" or "srun"

    @property
    def world_size(self) -> int:
        """Number of processes on all nodes."""
        return self.per_node * self.num_nodes


def started_processes(environment: Mapping[str, str]) -> Processes | None:
    """The processes that `torchrun` or `srun` started, or None when this run starts its own.

    An interactive SLURM shell (a job named bash or interactive) starts its own, as in Fabric.
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
    """Whether this process will be global rank 0, told before any process group exists."""
    # In a job's script, which has it too, it says nothing of the processes started there.
    slurm = ("SLURM_PROCID",) if started_by_srun(environment) else ()
    ranks = (environment.get(name) for name in ("RANK", *slurm, "LOCAL_RANK"))
    return int(next((rank for rank in ranks if rank is not None), 0)) == 0


def plan_processes(
    config: ParallelConfig, environment: Mapping[str, str] = os.environ
) -> tuple[Processes, list[str]]:
    """Decides device type and process counts; returns them with every problem found."""
    accelerator, gpus = _accelerator(config)
    problems = []
    if config.accelerator == "cuda" and gpus == 0:
        problems.append(
            "parallel.accelerator (cuda) finds no GPU on this machine: use parallel.accelerator=cpu"
        )
    started = started_processes(environment)
    if started is not None:
        processes = Processes(accelerator, started.per_node, started.num_nodes, started.launcher)
        if started.launcher == "srun":
            problems += _task_errors(environment)
        problems += started_errors(config, started)
    else:
        if in_slurm(environment):
            problems.append(
                "this is the script of a SLURM job, not one of its tasks: put srun before the "
                "command (srun python train.py …), as slurm/train.sbatch does"
            )
        asked_by_mesh = config.dp_replicate * max(config.dp_shard, 1) * config.cp * config.tp
        num_nodes = config.num_nodes or 1
        on_this_machine = gpus if accelerator == "cuda" else max(asked_by_mesh // num_nodes, 1)
        processes = Processes(accelerator, config.devices or on_this_machine, num_nodes, "self")
    if accelerator == "cuda" and processes.per_node > gpus > 0:
        problems.append(
            f"parallel.devices ({processes.per_node}) is more than the {gpus} visible GPUs: "
            f"use at most {gpus}, or parallel.accelerator=cpu"
        )
    return processes, problems


def started_errors(config: ParallelConfig, started: Processes) -> list[str]:
    """Where the processes that a launcher starts are not those that the configuration asks for."""
    return [
        f"parallel.{key} ({asked}) is not what {started.launcher} started ({there}): "
        f"leave parallel.{key} at null, or start {asked}"
        for key, there in (("devices", started.per_node), ("num_nodes", started.num_nodes))
        if (asked := getattr(config, key)) is not None and asked != there
    ]


def _task_errors(environment: Mapping[str, str]) -> list[str]:
    """What is wrong with the tasks that `srun` started."""
    tasks = tasks_per_node(environment)
    if len(set(tasks)) > 1:
        listed = ", ".join(map(str, tasks))
        return [
            f"srun started {sum(tasks)} tasks unevenly on {len(tasks)} nodes ({listed}): use "
            f"--ntasks-per-node with the same number for each, and --nodes"
        ]
    if "SLURM_NTASKS_PER_NODE" not in environment:
        return [
            f"srun (--ntasks={sum(tasks)}) does not say how many tasks run on each node: add "
            f"--ntasks-per-node={tasks[0]}"
        ]
    return []


def _accelerator(config: ParallelConfig) -> tuple[str, int]:
    """The device type that will be used, and the number of visible GPUs."""
    if config.accelerator == "cpu":
        return "cpu", 0
    import torch

    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if config.accelerator == "auto":
        return ("cuda" if gpus else "cpu"), gpus
    return "cuda", gpus


def resolve_mesh(config: ParallelConfig, world_size: int) -> tuple[MeshShape, list[str]]:
    """The mesh of `world_size` processes, `dp_shard: -1` filled in, with every problem found."""
    asked_shard = 1 if config.dp_shard == -1 else config.dp_shard
    if min(config.dp_replicate, asked_shard, config.cp, config.tp, world_size) < 1:
        # No mesh: `ParallelConfig.problems` tells what is below 1, `plan_processes` a missing GPU.
        return MeshShape(1, 1, 1, 1), []
    others = config.dp_replicate * config.cp * config.tp
    dp_shard = config.dp_shard if config.dp_shard != -1 else max(world_size // others, 1)
    shape = MeshShape(config.dp_replicate, dp_shard, config.cp, config.tp)
    if world_size == shape.world_size:
        return shape, []
    named = ", ".join(
        f"parallel.{axis}={size}" for axis, size in zip(AXES, shape.sizes, strict=True)
    )
    remedy = (
        f"start a multiple of {others} processes, or let dp_replicate × cp × tp be one of "
        + ", ".join(str(n) for n in range(1, world_size + 1) if world_size % n == 0)
        if world_size % others
        else f"use parallel.dp_shard=-1 (that is {world_size // others})"
    )
    return shape, [
        f"the mesh ({named}) has {shape.world_size} places for {world_size} processes: {remedy}"
    ]
