"""Shape of the device mesh.

The axes, outermost first, are dp_replicate, pp, dp_shard, cp and tp: neighboring ranks are
tensor-parallel, because that axis communicates most.
"""

import math
from dataclasses import dataclass

from parallel.config import ParallelConfig

AXES = ("dp_replicate", "pp", "dp_shard", "cp", "tp")
# The axes whose ranks read different samples of a batch.
DATA_AXES = ("dp_replicate", "dp_shard")


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
