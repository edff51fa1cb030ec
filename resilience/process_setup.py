"""CPUs, GPUs and memory allocator of one process of a run.

Everything here is a default: variables that the user or the launcher has set, and CPUs that it has
bound the process to, are kept. The caches of Inductor and Triton are per user and node. Graphs and
GPU kernels are written atomically (torch/_inductor/codecache.py, `write_atomic`;
triton/runtime/cache.py, `put`), and the libraries of a CPU run are by `resilience.atomic_builds`.
"""

import os
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch

from parallel.config import ParallelConfig
from resilience.gpu_probe import own_gpu
from resilience.processes import Processes, is_first_process

ALLOCATOR = "PYTORCH_ALLOC_CONF"
ALLOCATOR_VARIABLES = (ALLOCATOR, "PYTORCH_CUDA_ALLOC_CONF")  # the second is deprecated
EXPANDABLE = "expandable_segments:True"
MAX_COMPILE_WORKERS = 32  # Inductor's own limit
FEWEST_CPUS = 4  # main thread, data loader, checkpoint writer, NCCL's proxy


def set_up_process(processes: Processes, parallel: ParallelConfig) -> None:
    """Set threads, compile workers and allocator of this process, before its group exists."""
    has_affinity = hasattr(os, "sched_getaffinity")
    allowed = len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1
    cpus = cpus_per_process(processes, allowed, os.environ)
    _limit_threads(processes, cpus)
    if processes.accelerator == "cpu":
        # No library may create a context on a GPU, and `torch.cuda.is_available()` is False.
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        return
    if processes.launcher == "srun" and cpus < FEWEST_CPUS and is_first_process():
        on_node = os.cpu_count() or 1
        print(
            f"Warning: a task has {cpus} CPUs for the training loop, data, checkpoints and the "
            f"compiler; add --cpus-per-task to sbatch (up to {on_node // processes.per_node} here)",
            file=sys.stderr,
            flush=True,
        )
    _warn_about_hidden_gpus(processes)
    if not parallel.async_tp:  # torch's pool of symmetric memory does not support the setting
        use_expandable_segments(os.environ)


def _warn_about_hidden_gpus(processes: Processes) -> None:
    """Print a warning if SLURM hides GPUs of the node from this task, or gives it several."""
    per_node, visible = processes.per_node, torch.cuda.device_count()
    if processes.launcher != "srun" or not is_first_process():
        return
    per_task = os.environ.get("SLURM_GPUS_PER_TASK", "").rpartition(":")[2]  # of "h100:2"
    effect = None
    if per_task not in ("", "1"):
        effect = f"has {per_task} GPUs, but uses one"
    elif visible < per_node and " MIG " not in own_gpu()[1].name:  # slices have no NVLink
        effect = f"sees {'one GPU' if visible == 1 else f'{visible} GPUs'}, so that NCCL may not "
        effect += "use NVLink between all (github.com/NVIDIA/nccl/issues/1066)"
    if effect is not None:
        print(
            f"Warning: each of the {per_node} tasks on a node {effect}; pass "
            f"--gpus-per-node={per_node} to sbatch, without --gpus-per-task and --gpu-bind",
            file=sys.stderr,
            flush=True,
        )


def cpus_per_process(processes: Processes, allowed: int, environment: Mapping[str, str]) -> int:
    """Return the CPUs that a process may count on.

    Args:
        allowed: CPUs in the affinity of this process.
    """
    if processes.launcher == "srun":  # bound to its own CPUs, or free to use those of the job
        on_node = environment.get("SLURM_CPUS_ON_NODE", "")
        of_job = int(on_node) if on_node.isdecimal() else os.cpu_count() or 1
        return max(min(allowed, of_job // processes.per_node), 1)
    return max(allowed // processes.per_node, 1)


def _limit_threads(processes: Processes, cpus: int) -> None:
    """Limit the workers that compile kernels, and the threads of CPU operators under srun.

    Fabric sets the threads of processes that the run starts itself, and torchrun sets one.
    """
    workers = min(cpus, MAX_COMPILE_WORKERS)
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", str(workers))
    if "torch._inductor.config" in sys.modules:  # it has read the variable already
        workers = int(os.environ["TORCHINDUCTOR_COMPILE_THREADS"])
        sys.modules["torch._inductor.config"].compile_threads = workers  # type: ignore[attr-defined]
    if processes.launcher == "srun" and "OMP_NUM_THREADS" not in os.environ:
        os.environ["OMP_NUM_THREADS"] = str(cpus)
        torch.set_num_threads(cpus)


def use_expandable_segments(environment: "os._Environ[str] | dict[str, str]") -> None:
    """Let the CUDA allocator grow its segments, so that sizes that change do not fragment memory.

    Not if the user has configured the allocator. torchtitan sets the same (run_train.sh).
    """
    if not any(name in environment for name in ALLOCATOR_VARIABLES):
        environment[ALLOCATOR] = EXPANDABLE  # for the processes that this one starts
        with warnings.catch_warnings():  # the name is deprecated since torch 2.12
            warnings.simplefilter("ignore")
            torch.cuda.memory._set_allocator_settings(EXPANDABLE)  # it may have read the variable


def bind_to_gpu() -> None:
    """Bind all threads of this process to the CPUs of the NUMA node of its GPU.

    Not if the process is bound already (SLURM, `torchrun --numa-binding`, numactl), or if the
    machine has one node only. New memory then comes from that node as well. Call it after this
    process has started others: they would inherit its CPUs and count as bound.
    """
    bus = own_gpu()[1].bus
    cpus = local_cpus(bus, os.sched_getaffinity(0)) if bus is not None else set()
    for thread in os.listdir("/proc/self/task") if cpus else ():
        try:
            os.sched_setaffinity(int(thread), cpus)
        except OSError:  # the thread has ended
            continue


def local_cpus(bus: str, allowed: set[int], system: Path = Path("/sys")) -> set[int]:
    """Return the CPUs next to a GPU, or none if a process with `allowed` CPUs stays as it is.

    Args:
        bus: PCI address of the GPU.
    """
    try:
        online = parse_cpus((system / "devices/system/cpu/online").read_text())
        local = parse_cpus((system / "bus/pci/devices" / bus / "local_cpulist").read_text())
    except OSError:
        return set()
    if allowed != online or local >= allowed:
        return set()
    return local & allowed


def parse_cpus(text: str) -> set[int]:
    """Return the numbers of a list as Linux writes it: `0-3,8`."""
    cpus: set[int] = set()
    for part in filter(None, text.strip().split(",")):
        first, _, last = part.partition("-")
        cpus |= set(range(int(first), int(last or first) + 1))
    return cpus
