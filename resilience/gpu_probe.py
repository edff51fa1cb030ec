"""GPUs that this process can use, and the reason if torch sees none of the machine's.

Nothing here creates a CUDA context: `torch.cuda.device_count` asks NVML, `torch.cuda.init` and
`get_device_properties` initialize the driver and read tables (torch/cuda/__init__.py). Contexts
come with the first `set_device` or tensor, and a CPU run does not call any of these functions.
"""

import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from resilience.processes import process_ranks

Capability = tuple[int, int]

MIN_CAPABILITY: Capability = (7, 5)
"""Turing. The wheels of torch 2.11 and later for CUDA 12.8 and newer have no older kernels."""
MIN_DRIVER = {12: 525, 13: 580}
"""Oldest driver by CUDA version (NVIDIA, CUDA Compatibility, "Minor Version Compatibility")."""
WHEELS = ((580, "cu130"), (525, "cu126"))
"""Oldest driver and tag of wheels; the best one first."""
END = {"cu126": (2, 15)}
"""First torch version without wheels of a tag (https://github.com/pytorch/pytorch/issues/190385)."""
ALLOCATED = ("SLURM_JOB_GPUS", "SLURM_STEP_GPUS")  # indices of a job's GPUs
N_ALLOCATED = ("SLURM_GPUS_ON_NODE", "SLURM_GPUS_PER_NODE")  # their number
NONE_VISIBLE = "No CUDA GPUs are available"  # from c10/cuda/CUDAFunctions.cpp
TO_CPU = "parallel.accelerator=cpu"


@dataclass(frozen=True)
class Gpu:
    """One GPU, as torch describes it.

    Attributes:
        uuid: Unique among all machines; empty if unknown.
        bus: PCI address as in /sys/bus/pci/devices; None if unknown.
    """

    name: str
    capability: Capability
    memory: int  # bytes
    uuid: str = ""
    bus: str | None = None

    def __str__(self) -> str:
        return f"{self.name}, {self.memory / 2**30:.0f} GiB"


@dataclass(frozen=True)
class Machine:
    """GPUs, driver and torch installation of this machine.

    Attributes:
        gpus: GPUs visible to this process, by device index.
        torch: Version of torch; `cuda` and `hip` are what it was built for, None without.
        architectures: GPU architectures whose kernels the installed torch contains.
        driver: Version of the loaded NVIDIA driver.
        device_files: Files in /dev of NVIDIA GPUs.
        error: Why CUDA cannot be initialized.
    """

    gpus: tuple[Gpu, ...] = ()
    torch: str = ""
    cuda: str | None = None
    hip: str | None = None
    architectures: tuple[str, ...] = ()
    driver: str | None = None
    device_files: tuple[str, ...] = ()
    error: str = ""


def probe_machine() -> Machine:
    """Return what this process sees; it initializes CUDA if NVML reports a GPU."""
    import torch

    gpus: tuple[Gpu, ...] = ()
    driver, device_files, error = _driver_version(), _device_files(), ""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            # NVML also counts GPUs that this torch cannot use, and `is_available` hides the reason.
            if torch.cuda.device_count() > 0 or driver or device_files:
                torch.cuda.init()
                gpus = tuple(describe_gpu(index) for index in range(torch.cuda.device_count()))
        except Exception as failure:  # RuntimeError, AssertionError, DeferredCudaCallError
            error = " ".join(str(failure).split())
    error = error or " ".join(" ".join(str(each.message).split()) for each in caught)
    return Machine(
        gpus=gpus,
        torch=torch.__version__,
        cuda=torch.version.cuda,
        hip=torch.version.hip,
        architectures=tuple(torch.cuda.get_arch_list()),
        driver=driver,
        device_files=device_files,
        error=error,
    )


def describe_gpu(index: int) -> Gpu:
    """Return the description of a visible GPU."""
    import torch

    found: Any = torch.cuda.get_device_properties(index)
    bus = None
    if hasattr(found, "pci_bus_id"):
        numbers = found.pci_domain_id, found.pci_bus_id, found.pci_device_id
        bus = "{:04x}:{:02x}:{:02x}.0".format(*numbers)
    capability = found.major, found.minor
    return Gpu(found.name, capability, found.total_memory, str(getattr(found, "uuid", "")), bus)


def gpu_index(local_rank: int, visible: int) -> int:
    """Return the device index of a process: its local rank modulo the number of visible GPUs.

    SLURM's `--gpus-per-task` and `--gpu-bind`, and scripts that set `CUDA_VISIBLE_DEVICES`, show
    each process GPUs of its own, whose indices start at 0.
    """
    return local_rank % visible


def own_gpu() -> tuple[int, Gpu]:
    """Return device index and description of the GPU of this process."""
    import torch

    index = gpu_index(process_ranks()[1], torch.cuda.device_count())
    return index, describe_gpu(index)


def visible_devices(environment: Mapping[str, str]) -> list[str]:
    """Return the entries of `CUDA_VISIBLE_DEVICES`: indices or UUIDs."""
    return [each.strip() for each in environment.get("CUDA_VISIBLE_DEVICES", "").split(",")]


def is_hidden(environment: Mapping[str, str]) -> bool:
    """Return whether the user hides all GPUs, which means to train on the CPU."""
    return environment.get("CUDA_VISIBLE_DEVICES", "0").strip() in ("", "-1")


def missing_gpu_error(machine: Machine, environment: Mapping[str, str]) -> str | None:
    """Return why torch sees no GPU although the machine has one, with a remedy.

    None if it has none, or if the user hides them.
    """
    evidence = [*machine.device_files[:1]]
    if machine.driver:
        evidence.append(f"NVIDIA driver {machine.driver}")
    evidence += _allocated(environment)
    if machine.gpus or is_hidden(environment) or not evidence:
        return None
    return (
        f"torch sees no GPU, but the machine has one ({', '.join(evidence)}): "
        f"{_reason(machine, environment)}, or use {TO_CPU} to train on the CPU"
    )


def requested_gpu_error(machine: Machine, environment: Mapping[str, str]) -> str:
    """Return why torch sees no GPU although `parallel.accelerator=cuda`, with a remedy."""
    reason = _reason(machine, environment)
    if is_hidden(environment):
        value = environment["CUDA_VISIBLE_DEVICES"]
        reason = f"CUDA_VISIBLE_DEVICES={value} hides all GPUs; run: unset CUDA_VISIBLE_DEVICES"
    return (
        f"parallel.accelerator=cuda, but torch sees no GPU: {reason}, or start the run on a "
        f"machine with a GPU, or use {TO_CPU}"
    )


def _reason(machine: Machine, environment: Mapping[str, str]) -> str:
    """Return why torch sees no GPU, and the remedy."""
    driver = int(machine.driver.split(".")[0]) if machine.driver else None
    if machine.cuda is None and machine.hip is None:
        return f"torch {machine.torch} is a build for CPUs; {_wheel(machine, driver)}"
    if driver is None:
        return (
            "no NVIDIA driver is loaded (/proc/driver/nvidia/version does not exist); load it "
            "until nvidia-smi lists the GPU"
        )
    built = f"torch {machine.torch} for CUDA {machine.cuda}"
    needed = MIN_DRIVER.get(int((machine.cuda or "0").split(".")[0]), 0)
    if driver < needed:
        return f"{built} needs driver {needed} or newer; {_wheel(machine, driver)}"
    if "SLURM_JOB_ID" in environment and not _allocated(environment):
        # SLURM may set CUDA_VISIBLE_DEVICES=NoDevFiles then; the GPUs belong to other jobs.
        return "the SLURM job has not requested one; add --gpus-per-node=… to sbatch or srun"
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and NONE_VISIBLE in (machine.error or NONE_VISIBLE):
        return (
            f"CUDA_VISIBLE_DEVICES={visible} names no GPU of this machine; "
            "run: unset CUDA_VISIBLE_DEVICES"
        )
    if not machine.device_files:
        return "/dev/nvidia0 does not exist; start the container with GPUs (docker run --gpus=all)"
    return (
        f"{built} reports: {machine.error or NONE_VISIBLE}; check the GPU with nvidia-smi, and its "
        "services (nvidia-fabricmanager on machines with NVSwitch)"
    )


def _allocated(environment: Mapping[str, str]) -> list[str]:
    """Return the variables that list GPUs allocated by SLURM, with their values."""
    names = [name for name in ALLOCATED if environment.get(name)]
    names += [name for name in N_ALLOCATED if environment.get(name, "0") not in ("", "0")]
    return [f"{name}={environment[name]}" for name in names]


def _wheel(machine: Machine, driver: int | None) -> str:
    """Return how to install a torch for the driver."""
    version = machine.torch.partition("+")[0]
    tags = [tag for oldest, tag in WHEELS if driver is None or driver >= oldest]
    update = f"update the driver to {WHEELS[0][0]} or newer"
    if not tags:
        return update
    tag = tags[0]
    pinned = f"torch=={version}+{tag}"
    major, minor = map(int, version.split(".")[:2])
    if (major, minor) >= END.get(tag, (major, minor + 1)):
        pinned = "'torch<{}.{}'".format(*END[tag])
    install = f"run: pip install {pinned} --index-url https://download.pytorch.org/whl/{tag}"
    return install if machine.cuda is None else f"{update}, or {install}"


def unsupported_gpu_error(machine: Machine, gpu: Gpu) -> str | None:
    """Return why a GPU cannot run this torch or this program, with a remedy."""
    major, minor = gpu.capability
    if machine.hip is not None:
        return (
            f"torch {machine.torch} is a build for ROCm (HIP {machine.hip}), on which this program "
            f"is untested; use {TO_CPU}, or an NVIDIA GPU"
        )
    if gpu.capability < MIN_CAPABILITY:
        return (
            f"{gpu.name} has compute capability {major}.{minor}, but {MIN_CAPABILITY[0]}."
            f"{MIN_CAPABILITY[1]} (Turing) is required, the oldest in current wheels of torch; "
            f"use {TO_CPU}, or a newer GPU"
        )
    if machine.architectures and not _has_kernels(machine.architectures, gpu.capability):
        return (
            f"torch {machine.torch} has kernels for {' '.join(machine.architectures)} only, but "
            f"{gpu.name} is sm_{major}{minor}; install a torch for it (a newer version, or "
            f"https://download.pytorch.org/whl/cu130), or use {TO_CPU}"
        )
    return None


def _has_kernels(architectures: tuple[str, ...], capability: Capability) -> bool:
    """Return whether kernels for the architectures run on a GPU.

    Machine code (`sm_80`) runs on GPUs of the same major and an equal or higher minor version,
    PTX (`compute_80`) on all newer ones, `sm_90a` on exactly that GPU.
    """
    for architecture in architectures:
        kind, _, number = architecture.partition("_")
        digits = re.sub(r"\D", "", number)
        built = int(digits[:-1]), int(digits[-1])
        if number.endswith("a"):
            runs = capability == built
        elif kind == "compute":
            runs = capability >= built
        else:
            runs = capability[0] == built[0] and capability >= built
        if runs:
            return True
    return False


def _driver_version(path: Path = Path("/proc/driver/nvidia/version")) -> str | None:
    """Return the version of the loaded NVIDIA driver."""
    try:
        found = re.search(r"\b(\d{3}\.\d+(?:\.\d+)?)\b", path.read_text())
    except OSError:
        return None
    return found[1] if found else None


def _device_files(folder: Path = Path("/dev")) -> tuple[str, ...]:
    """Return the device files of NVIDIA GPUs."""
    return tuple(sorted(str(path) for path in folder.glob("nvidia[0-9]*")))
