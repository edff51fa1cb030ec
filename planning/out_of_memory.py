"""The message of a run that is out of memory: measured and planned peak, and a change that fits.

The plan was too low, or the run would have been rejected (`planning.fit_check`). Its error on this
machine is known now, so the change is the nearest one that fits with the same relative error. The
memory of a GPU and that of its host have plans of their own.
"""

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from parallel.mesh import MeshShape
from planning.communicators import communicator_bytes
from planning.fit_check import largest_parts, machine_memory, plan_request, this_machine
from planning.hardware import PROCESS_GIB
from planning.memory import GIB, size_text, stage_memory
from planning.plan import host_peak
from planning.remedies import Remedy, remedy
from planning.step_spec import StepSpec
from resilience.errors import OutOfMemory, is_host_out_of_memory, is_out_of_memory
from resilience.processes import Processes, process_ranks
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
        raise explain(error, config, processes, mesh) from error


def explain(
    error: Exception, config: JobConfig, processes: Processes, mesh: MeshShape
) -> OutOfMemory:
    """Return the error of a run that is out of memory on this rank.

    Args:
        error: Error of an allocator, of cuBLAS or of NCCL.
    """
    rank, _ = process_ranks()
    on_host = processes.accelerator == "cuda" and is_host_out_of_memory(error)
    compare = compare_host if on_host else compare_device
    try:
        found, advice = compare(requested_bytes(str(error)), config, processes, mesh)
    except Exception as failure:  # the exit code stays that of the error
        found = f"memory ({type(failure).__name__} in planning: {' '.join(str(failure).split())})"
        advice = Remedy("use a smaller train.micro_batch_size")
    lines = [f"rank {rank} is out of {found}; {advice}", f"  {' '.join(str(error).split())}"]
    snapshot = None if on_host else write_snapshot(Path(config.run.dir), rank)
    if snapshot is not None:
        lines.append(f"  memory snapshot for https://pytorch.org/memory_viz: {snapshot}")
    return OutOfMemory("\n".join(lines), advice.overrides)


def compare_device(
    requested: int, config: JobConfig, processes: Processes, mesh: MeshShape
) -> tuple[str, Remedy]:
    """Return measured and planned memory of the rank's device, as text, and a remedy.

    Planned for the pipeline stage of this rank, which may not be the fullest one.
    """
    measured = peak_bytes(processes.accelerator)
    request, choice = plan_request(config, processes, mesh)
    stages = request.stages(choice)
    own = mesh.stage(process_ranks()[0])
    on_stage = (stage_memory(spec.stages[own]) for spec, _ in stages)
    memory = max(on_stage, key=lambda each: each.peak)
    available = this_machine(processes)[1] - communicator_bytes(stages[0][0])
    excess = max(1.0, (measured + requested) / memory.peak)
    limit = int(min(available / excess, SMALLER * memory.peak))
    found = (
        f"memory: measured peak {size_text(measured)} of {size_text(available)}, planned peak "
        f"{size_text(memory.peak)} ({largest_parts(memory)})"
    )
    return found, remedy(request, lambda _: limit, mesh.world_size, processes.per_node, choice)


def compare_host(
    requested: int, config: JobConfig, processes: Processes, mesh: MeshShape
) -> tuple[str, Remedy]:
    """Return measured and planned host memory of a rank on a GPU, as text, and a remedy."""
    measured, per_node = host_peak_bytes(), processes.per_node
    request, choice = plan_request(config, processes, mesh)
    planned = max(host_peak(spec, per_node) for spec, _ in request.stages(choice))
    available = machine_memory()
    excess = max(1.0, per_node * (measured + requested) / planned)
    host_limit = min(available / excess, SMALLER * planned)
    _, on_device = this_machine(processes)

    def limit(spec: StepSpec) -> int:
        fits_host = host_peak(spec, per_node) <= host_limit
        return on_device - communicator_bytes(spec) if fits_host else 0

    found = (
        f"host memory: measured peak {size_text(measured)} in this process, planned peak "
        f"{size_text(planned // per_node)} in each of the {per_node} processes of a node with "
        f"{size_text(available)}"
    )
    nearest = remedy(request, limit, mesh.world_size, per_node, choice)
    more = f"{nearest}, or more host memory (under SLURM sbatch --mem=0: all that the node has)"
    return found, Remedy(more, nearest.overrides)


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


def host_peak_bytes() -> int:
    """Return the peak of this process's host memory, libraries included."""
    import torch

    from training.throughput import peak_memory_gib

    return int(peak_memory_gib(torch.device("cpu")) * GIB)


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
