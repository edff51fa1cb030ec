"""The message of a run that is out of memory: measured and planned peak, and a change that fits.

The plan was too low, or the run would have been rejected (`planning.fit_check`). Its error on this
machine is known now, so the change is the nearest one that fits with the same relative error.
"""

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from parallel.mesh import MeshShape, Processes, process_ranks
from planning.fit_check import largest_parts, plan_request, this_machine
from planning.hardware import PROCESS_GIB
from planning.memory import GIB, size_text
from planning.search import peak_memory, remedy
from resilience.errors import OutOfMemory, is_out_of_memory
from training.config import JobConfig

SMALLER = 0.95  # of the plan, for the change if the measured peak is unknown or below the plan
_REQUESTED = re.compile(r"[Tt]ried to allocate ([\d.]+) (GiB|MiB|KiB|bytes)")
_BYTES = {"GiB": 2**30, "MiB": 2**20, "KiB": 2**10, "bytes": 1}


@contextmanager
def memory_advice(config: JobConfig, processes: Processes, mesh: MeshShape) -> Iterator[None]:
    """Raise an `OutOfMemory` that explains an error of the allocator."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemory(explain(error, config, processes, mesh)) from error


def explain(error: Exception, config: JobConfig, processes: Processes, mesh: MeshShape) -> str:
    """Return the message of a run that is out of memory on this rank.

    Args:
        error: Error of the allocator, of cuBLAS or of NCCL.
    """
    measured = peak_bytes(processes.accelerator)
    request, choice = plan_request(config, processes, mesh)
    memory = peak_memory(request.stages(choice))
    _, available = this_machine(processes)
    needed = measured + requested_bytes(str(error))
    excess = max(1.0, needed / memory.peak)
    limit = int(min(available / excess, SMALLER * memory.peak))
    advice = remedy(request, lambda _: limit, mesh.world_size, processes.per_node, choice)
    rank, _ = process_ranks()
    lines = [
        f"rank {rank} is out of memory: measured peak {size_text(measured)} of "
        f"{size_text(available)}, planned peak {size_text(memory.peak)} ({largest_parts(memory)}); "
        f"{advice}",
        f"  {' '.join(str(error).split())}",
    ]
    if (snapshot := write_snapshot(Path(config.run.dir), rank)) is not None:
        lines.append(f"  memory snapshot for https://pytorch.org/memory_viz: {snapshot}")
    return "\n".join(lines)


def requested_bytes(message: str) -> int:
    """Return the size of the allocation that failed, 0 if the message has none."""
    found = _REQUESTED.search(message)
    return int(float(found[1]) * _BYTES[found[2]]) if found else 0


def peak_bytes(accelerator: str) -> int:
    """Return the peak of this process's tensors: on CPU, without interpreter and libraries."""
    import torch

    from training.throughput import peak_memory_gib

    libraries = PROCESS_GIB if accelerator == "cpu" else 0.0
    return max(0, int((peak_memory_gib(torch.device(accelerator)) - libraries) * GIB))


def write_snapshot(run_folder: Path, rank: int) -> Path | None:
    """Write the blocks that CUDA's allocator holds; their stacks are recorded by a profile only."""
    torch = sys.modules["torch"]
    if not torch.cuda.is_initialized():
        return None
    path = run_folder / "out_of_memory" / f"rank_{rank}.pickle"
    with suppress(Exception):  # a full disk, or a device in an error state
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.cuda.memory._dump_snapshot(str(path))
        return path
    return None
