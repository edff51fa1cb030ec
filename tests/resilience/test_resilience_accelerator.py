"""Launch tables: launchers, bindings, `CUDA_VISIBLE_DEVICES`, drivers, wheels and kinds of GPUs.

No GPU is used: machines are descriptions, or NVML and the CUDA runtime are replaced below
`torch.cuda.device_count`, which is torch's own.
"""

import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning_fabric import Fabric
from run_config import default

from parallel.config import ParallelConfig, PrecisionConfig
from parallel.mesh import MeshShape
from parallel.strategy import MeshStrategy, OwnGpu
from planning import fit_check
from planning.step_spec import resolved_precision
from resilience import gpu_probe
from resilience.accelerator import accelerator_warnings, resolve_processes
from resilience.gpu_probe import Gpu, Machine, gpu_index, probe_machine
from resilience.processes import Processes, process_ranks

AUTO, ON_CPU = ParallelConfig(), ParallelConfig(accelerator="cpu")
WHEEL = ("sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120")  # torch 2.13 for CUDA 13.0
H100 = Gpu("NVIDIA H100 80GB HBM3", (9, 0), 80 * 2**30, "GPU-1")
T4 = Gpu("Tesla T4", (7, 5), 15 * 2**30)
V100 = Gpu("Tesla V100-SXM2-32GB", (7, 0), 32 * 2**30)


def machine(*gpus: Gpu, **other: Any) -> Machine:
    values: dict[str, Any] = {
        **{"torch": "2.13.0+cu130", "cuda": "13.0", "architectures": WHEEL},
        **{"driver": "580.65.06", "device_files": ("/dev/nvidia0",)},
    }
    return Machine(gpus, **(values | other))


def launched(launcher: str, rank: int, size: int, per_node: int) -> dict[str, str]:
    """Return the environment of one process."""
    local_rank, nodes = rank % per_node, size // per_node
    if launcher == "self":
        return {"LOCAL_RANK": str(rank), "LLAMESH_MAIN_PID": "1"} if rank else {}
    if launcher == "srun":
        numbers = {"PROCID": rank, "LOCALID": local_rank, "NTASKS": size, "STEP_ID": 0}
        numbers |= {"NODEID": rank // per_node, "JOB_ID": 4711, "NTASKS_PER_NODE": per_node}
        values = {f"SLURM_{name}": str(number) for name, number in numbers.items()}
        values |= {"SLURM_STEP_NODELIST": f"n[1-{nodes}]", "SLURM_JOB_NAME": "llama"}
        return values | {"SLURM_STEP_TASKS_PER_NODE": f"{per_node}(x{nodes})"}
    values = {"RANK": str(rank), "LOCAL_RANK": str(local_rank), "WORLD_SIZE": str(size)}
    values |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    if launcher == "mpirun":  # a script that sets torch's variables
        return values | {"OMPI_COMM_WORLD_LOCAL_SIZE": str(per_node)}
    values |= {"LOCAL_WORLD_SIZE": str(per_node), "TORCHELASTIC_RUN_ID": "none"}
    if launcher == "torchrun --virtual-local-rank":
        values |= {"LOCAL_RANK": "0", "CUDA_VISIBLE_DEVICES": str(local_rank)}
    return values


# ---------------------------------------------------------------- device index


@pytest.mark.parametrize(
    ("launcher", "visible", "indices"),
    [
        ("srun", 4, [0, 1, 2, 3]),  # --gpus-per-node=4: every task sees all
        ("srun", 1, [0, 0, 0, 0]),  # --gpus-per-task=1, --gpu-bind=single:1, cgroups, MIG
        ("srun", 8, [0, 1, 2, 3]),
        ("srun", 2, None),  # two GPUs shared by four tasks, or --gpus-per-task=2
        ("torchrun", 4, [0, 1, 2, 3]),
        ("torchrun", 1, None),  # torchrun shows the same GPU to all
        ("torchrun", 3, None),
        ("torchrun --virtual-local-rank", 1, [0, 0, 0, 0]),
        ("mpirun", 4, [0, 1, 2, 3]),
        ("mpirun", 1, [0, 0, 0, 0]),
        ("mpirun", 2, None),
        ("self", 4, [0, 1, 2, 3]),
    ],
)
def test_device_index_follows_the_visible_gpus(
    launcher: str, visible: int, indices: list[int] | None
) -> None:
    """Two nodes of four processes; one node if the run starts them itself."""
    size = 4 if launcher == "self" else 8
    for rank in range(size):
        environment = launched(launcher, rank, size, 4)
        found = machine(*[H100] * visible)
        processes, errors = resolve_processes(AUTO, environment, found)
        assert (processes.accelerator, processes.per_node) == ("cuda", 4)
        if indices is None:
            (error,) = errors
            assert "started 4 processes on this node" in error and f"sees {visible} GPUs" in error
            remedy = launched(launcher, 0, 2 * visible, visible)
            assert resolve_processes(AUTO, remedy, found)[1] == []
            assert "request more GPUs (--gpus-per-node=4)" in error
            assert resolve_processes(AUTO, environment, machine(*[H100] * 4))[1] == []
        else:
            assert errors == []
            assert gpu_index(process_ranks(environment)[1], visible) == indices[rank % 4]
        assert resolve_processes(ON_CPU, environment, found)[1] == []


@pytest.mark.parametrize(
    ("options", "visible", "on_node", "indices"),
    [
        ("--gpus-per-task=2", 2, 8, [0, 1, 0, 1]),
        ("--gpus-per-task=h100:1", 1, 4, [0, 0, 0, 0]),
        ("--gpu-bind=closest", 2, 4, [0, 1, 0, 1]),  # rank_check rejects tasks that share a GPU
        ("--gpu-bind=map_gpu:3,2,1,0", 1, 4, [0, 0, 0, 0]),
        ("--gpus-per-node=2", 2, 2, None),
    ],
)
def test_device_index_with_options_of_slurm(
    options: str, visible: int, on_node: int, indices: list[int] | None
) -> None:
    found = machine(*[H100] * visible)
    for rank in range(8):
        environment = launched("srun", rank, 8, 4) | {"SLURM_GPUS_ON_NODE": str(on_node)}
        _, errors = resolve_processes(AUTO, environment, found)
        assert bool(errors) == (indices is None), options
        if indices is not None:
            assert gpu_index(process_ranks(environment)[1], visible) == indices[rank % 4]


def test_run_that_starts_its_processes_uses_at_most_the_visible_gpus() -> None:
    two = machine(H100, H100)
    expected = Processes("cuda", 2, 1, "self", (9, 0))
    assert resolve_processes(AUTO, {}, two) == (expected, [])
    (error,) = resolve_processes(ParallelConfig(devices=3), {}, two)[1]
    assert "parallel.devices=3 exceeds the 2 visible GPUs; use at most 2" in error
    assert resolve_processes(ParallelConfig(devices=2), {}, two)[1] == []


@pytest.mark.parametrize(("visible", "index"), [(1, 0), (2, 1), (4, 3)])
def test_fabric_uses_the_gpu_of_the_task(
    monkeypatch: pytest.MonkeyPatch, visible: int, index: int
) -> None:
    """Task 3 of 4, with one or two GPUs of its own or with all GPUs."""
    from lightning_fabric.plugins.environments import SLURMEnvironment

    monkeypatch.setattr(torch.cuda, "device_count", lambda: visible)
    for name, value in launched("srun", 3, 4, 4).items():
        monkeypatch.setenv(name, value)
    strategy = MeshStrategy(MeshShape(1, 4, 1, 1), lambda model, mesh: model)
    Fabric(
        accelerator=OwnGpu(),
        devices=4,
        strategy=strategy,
        plugins=SLURMEnvironment(),
    )
    assert strategy.root_device == torch.device("cuda", index)
    assert strategy.num_processes == 4  # node rank × this + local rank is the global rank


# ---------------------------------------------------------------- CUDA_VISIBLE_DEVICES


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Return a function that replaces NVML and the CUDA runtime below torch's own functions."""

    def install(nvml: int, runtime: int | str, files: tuple[str, ...] = ("/dev/nvidia0",)) -> None:
        uuids = [f"GPU-{index}" for index in range(nvml)]

        def initialize() -> None:
            if isinstance(runtime, str):
                raise RuntimeError(runtime)
            if not torch.cuda.device_count():
                raise RuntimeError(gpu_probe.NONE_VISIBLE)

        def properties(index: int) -> SimpleNamespace:
            values = {"name": H100.name, "major": 9, "minor": 0, "total_memory": H100.memory}
            return SimpleNamespace(**values, pci_domain_id=0, pci_bus_id=27, pci_device_id=index)

        cuda = torch.cuda
        monkeypatch.setattr(cuda, "_is_compiled", lambda: True)
        monkeypatch.setattr(cuda, "_raw_device_count_nvml", lambda: nvml)
        monkeypatch.setattr(cuda, "_raw_device_uuid_nvml", lambda: uuids)
        count = runtime if isinstance(runtime, int) else 0
        monkeypatch.setattr(torch._C, "_cuda_getDeviceCount", lambda: count, raising=False)
        monkeypatch.setattr(torch._C, "_cuda_getArchFlags", lambda: " ".join(WHEEL), raising=False)
        monkeypatch.setattr(cuda, "init", initialize)
        monkeypatch.setattr(cuda, "get_device_properties", properties)
        monkeypatch.setattr(torch.version, "cuda", "13.0")
        monkeypatch.setattr(gpu_probe, "_device_files", lambda: files)
        monkeypatch.setattr(gpu_probe, "_driver_version", lambda: "580.65.06" if files else None)

    return install


@pytest.mark.parametrize(
    ("value", "gpus"),
    [
        (None, 8),
        ("0,1,2,3", 4),
        ("3", 1),
        (" 2, 5", 2),
        ("0,8,1", 1),  # CUDA ignores what follows an invalid index
        ("GPU-3", 1),
        ("GPU-3,GPU-0", 2),
        ("MIG-GPU-3/1/0", 1),  # NVML does not count these: the runtime does
        ("", 0),
        ("-1", 0),
    ],
)
def test_every_form_of_visible_devices_is_counted(
    monkeypatch: pytest.MonkeyPatch, driver: Callable[..., None], value: str | None, gpus: int
) -> None:
    """As torch/cuda/__init__.py counts them, `_parse_visible_devices` and `_device_count_nvml`."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if value is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", value)
    driver(nvml=8, runtime=1)
    environment = {} if value is None else {"CUDA_VISIBLE_DEVICES": value}
    processes, errors = resolve_processes(AUTO, environment)
    assert errors == []
    expected = ("cuda", gpus) if gpus else ("cpu", 1)
    assert (processes.accelerator, processes.per_node) == expected
    assert [gpu.bus for gpu in probe_machine().gpus] == [f"0000:1b:{i:02x}.0" for i in range(gpus)]


@pytest.mark.parametrize("value", ["8", "GPU-9", "GPU-1,GPU-1", "NoDevFiles"])
def test_visible_devices_that_name_no_gpu_are_rejected(
    monkeypatch: pytest.MonkeyPatch, driver: Callable[..., None], value: str
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", value)
    driver(nvml=8, runtime=0)
    (error,) = resolve_processes(AUTO, {"CUDA_VISIBLE_DEVICES": value})[1]
    assert f"CUDA_VISIBLE_DEVICES={value} names no GPU" in error
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")  # the remedy
    assert resolve_processes(AUTO, {})[1] == []


# ---------------------------------------------------------------- no GPU


def test_nothing_asks_for_gpus_in_a_cpu_run(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("device_count", "is_available", "init"):
        monkeypatch.setattr(torch.cuda, name, lambda: pytest.fail("asked for GPUs"))
    expected = Processes("cpu", 2, 1, "self")
    assert resolve_processes(ParallelConfig(accelerator="cpu", tp=2), {}) == (expected, [])


def test_machine_without_gpu_trains_on_the_cpu_unless_cuda_is_requested() -> None:
    none = Machine(torch="2.13.0+cpu")
    assert resolve_processes(AUTO, {}, none) == (Processes("cpu", 1, 1, "self"), [])


@pytest.mark.parametrize(
    ("found", "environment", "reason"),
    [
        (Machine(torch="2.13.0+cpu"), {}, "a build for CPUs; run: pip install torch==2.13.0+cu130"),
        (Machine(torch="2.13.0+cu130", cuda="13.0"), {}, "no NVIDIA driver is loaded"),
        (machine(), {"CUDA_VISIBLE_DEVICES": "-1"}, "=-1 hides all GPUs; run: unset CUDA_VISIBLE"),
    ],
)
def test_requested_gpu_that_does_not_exist_is_an_error_with_its_reason(
    found: Machine, environment: dict[str, str], reason: str
) -> None:
    processes, (error,) = resolve_processes(ParallelConfig(accelerator="cuda"), environment, found)
    assert error.startswith("parallel.accelerator=cuda, but torch sees no GPU: ")
    assert reason in error and error.endswith("or use parallel.accelerator=cpu")
    assert (processes.accelerator, processes.world_size) == ("cuda", 0)


@pytest.mark.parametrize(
    ("value", "accelerator", "found", "warns"),
    [
        ("nonsense", "auto", Machine(), True),
        ("0", "auto", Machine(), True),
        ("0", "cpu", Machine(), False),
        ("0", "auto", machine(H100), False),
        ("", "auto", Machine(), False),
        ("-1", "auto", Machine(), False),
        (None, "auto", Machine(), False),
    ],
)
def test_selected_gpus_that_torch_does_not_see_cause_a_warning(
    value: str | None, accelerator: Any, found: Machine, warns: bool
) -> None:
    environment = {} if value is None else {"CUDA_VISIBLE_DEVICES": value}
    config = ParallelConfig(accelerator=accelerator)
    processes, errors = resolve_processes(config, environment, found)
    warnings = list(accelerator_warnings(config, processes, environment))
    assert errors == [] and len(warnings) == warns
    assert all(f"CUDA_VISIBLE_DEVICES={value} names no GPU" in warning for warning in warnings)


JOB = {"SLURM_JOB_ID": "1"}
BROKEN = "Unexpected error from cudaGetDeviceCount(). Error 802: system not yet initialized"


@pytest.mark.parametrize(
    ("found", "environment", "reason", "remedy"),
    [
        (
            machine(torch="2.13.0+cpu", cuda=None),
            {},
            "torch 2.13.0+cpu is a build for CPUs",
            "pip install torch==2.13.0+cu130 --index-url https://download.pytorch.org/whl/cu130",
        ),
        (machine(cuda=None, driver="550.54.15"), {}, "a build for CPUs", "torch==2.13.0+cu126"),
        (machine(torch="2.14.1", cuda=None, driver="550.54.15"), {}, "CPUs", "==2.14.1+cu126"),
        (
            machine(torch="2.15.0", cuda=None, driver="550.54.15"),
            {},
            "a build for CPUs",
            "pip install 'torch<2.15' --index-url https://download.pytorch.org/whl/cu126",
        ),
        (machine(torch="2.15.0", cuda=None), {}, "a build for CPUs", "torch==2.15.0+cu130"),
        (machine(cuda=None, driver="470.82.01"), {}, "for CPUs", "update the driver to 580"),
        (machine(driver="550.54.15"), {}, "for CUDA 13.0 needs driver 580", "==2.13.0+cu126"),
        (machine(driver="550.54.15", cuda="12.6", error=BROKEN), {}, BROKEN, "nvidia-smi"),
        (machine(driver="470.82.01", cuda="12.6"), {}, "needs driver 525", "update the driver"),
        (
            machine(driver=None, device_files=()),
            {**JOB, "SLURM_JOB_GPUS": "0"},
            "SLURM_JOB_GPUS=0): no NVIDIA driver is loaded",
            "load it",
        ),
        (
            machine(cuda=None, driver=None, device_files=()),
            {**JOB, "SLURM_GPUS_ON_NODE": "8"},
            "SLURM_GPUS_ON_NODE=8",
            "torch==2.13.0+cu130",
        ),
        (machine(), JOB, "has not requested one", "--gpus-per-node"),
        (machine(), {**JOB, "SLURM_GPUS_ON_NODE": "0"}, "not requested one", "--gpus-per-node"),
        (  # as SLURM sets it; the GPUs belong to other jobs, so `unset` would be wrong
            machine(),
            {**JOB, "CUDA_VISIBLE_DEVICES": "NoDevFiles"},
            "not requested one",
            "--gpus-per-node",
        ),
        (machine(device_files=()), {}, "/dev/nvidia0 does not exist", "docker run --gpus=all"),
        (machine(error=BROKEN), {"CUDA_VISIBLE_DEVICES": "0"}, BROKEN, "nvidia-fabricmanager"),
    ],
)
@pytest.mark.parametrize("accelerator", ["auto", "cuda"])
def test_gpu_that_torch_does_not_see_is_an_error_with_its_reason(
    found: Machine, environment: dict[str, str], reason: str, remedy: str, accelerator: Any
) -> None:
    (error,) = resolve_processes(ParallelConfig(accelerator=accelerator), environment, found)[1]
    assert "torch sees no GPU, but the machine has one" in error
    assert reason in error and remedy in error.partition(reason)[2], error
    if found.driver:
        assert found.driver in error
    # Both ways to train on the CPU on purpose.
    assert error.endswith("or use parallel.accelerator=cpu to train on the CPU")
    assert resolve_processes(ON_CPU, environment, found)[1] == []
    if accelerator == "auto":
        for value in ("", "-1"):
            hidden = {**environment, "CUDA_VISIBLE_DEVICES": value}
            assert resolve_processes(AUTO, hidden, found)[1] == []


def test_old_driver_is_found_although_nvml_counts_the_gpus(driver: Callable[..., None]) -> None:
    """`torch.cuda.is_available` would be True with Fabric's NVML-based check, False without."""
    driver(nvml=8, runtime="The NVIDIA driver on your system is too old (found version 12040).")
    found = probe_machine()
    assert found.gpus == () and "too old (found version 12040)" in found.error
    (error,) = resolve_processes(AUTO, {})[1]
    assert "too old (found version 12040)" in error


def test_driver_and_device_files_are_read(tmp_path: Path) -> None:
    version = tmp_path / "version"
    for text, expected in (
        ("NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19", "535.104.05"),
        (
            "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.86  Release",
            "570.86",
        ),
        ("something else", None),
    ):
        version.write_text(f"{text}\nGCC version:  gcc version 12.3.0 (Ubuntu 12.3.0-1ubuntu1)\n")
        assert gpu_probe._driver_version(version) == expected
    assert gpu_probe._driver_version(tmp_path / "absent") is None
    for name in ("nvidia1", "nvidia0", "nvidiactl", "nvidia-uvm", "null"):
        (tmp_path / name).touch()
    assert gpu_probe._device_files(tmp_path) == (f"{tmp_path}/nvidia0", f"{tmp_path}/nvidia1")


# ---------------------------------------------------------------- kinds of GPUs


@pytest.mark.parametrize(
    ("gpu", "other", "words"),
    [
        (T4, {}, None),
        (Gpu("NVIDIA L40S", (8, 9), 1), {}, None),
        (Gpu("NVIDIA B300", (10, 3), 1), {}, None),
        (V100, {}, "compute capability 7.0, but 7.5 (Turing) is required"),
        (V100, {"architectures": ("sm_50", "sm_60", "sm_70", "sm_75")}, "7.5 (Turing)"),
        (Gpu("NVIDIA Thor", (11, 0), 1), {}, "is sm_110"),
        (H100, {"architectures": ("sm_80", "sm_86")}, "kernels for sm_80 sm_86 only"),
        (H100, {"architectures": ("sm_80", "compute_80")}, None),  # PTX
        (H100, {"architectures": ("sm_90a",)}, None),
        (Gpu("NVIDIA B200", (10, 0), 1), {"architectures": ("sm_90a", "sm_100f")}, None),
        (Gpu("NVIDIA B200", (10, 0), 1), {"architectures": ("sm_90", "sm_90a")}, "is sm_100"),
        (H100, {"architectures": ()}, None),
        (
            Gpu("AMD Instinct MI300X", (9, 4), 1),
            {"cuda": None, "hip": "6.4.2", "torch": "2.13.0+rocm6.4", "architectures": ("gfx942",)},
            "2.13.0+rocm6.4 is a build for ROCm (HIP 6.4.2), on which this program is untested",
        ),
    ],
)
def test_gpus_without_kernels_and_rocm_are_rejected(
    gpu: Gpu, other: dict[str, Any], words: str | None
) -> None:
    found = machine(gpu, gpu, **other)
    for environment in ({}, launched("srun", 1, 2, 2)):
        errors = resolve_processes(AUTO, environment, found)[1]
        assert len(errors) == (words is not None), errors
        assert all(str(words) in error and "parallel.accelerator=cpu" in error for error in errors)
    assert resolve_processes(ON_CPU, {}, found)[1] == []


def test_gpus_of_other_processes_are_not_checked() -> None:
    """An old GPU for the display may be in the machine."""
    mixed = machine(H100, V100)
    assert resolve_processes(ParallelConfig(devices=1), {}, mixed)[1] == []
    assert resolve_processes(AUTO, launched("srun", 0, 2, 2), mixed)[1] == []
    assert len(resolve_processes(AUTO, launched("srun", 1, 2, 2), mixed)[1]) == 1


def test_processes_of_a_run_have_gpus_with_or_without_bf16() -> None:
    (error,) = resolve_processes(AUTO, {}, machine(H100, T4))[1]
    assert H100.name in error and T4.name in error and "CUDA_VISIBLE_DEVICES" in error
    for gpus in ((H100,), (T4,)):  # the remedy
        assert resolve_processes(AUTO, {}, machine(*gpus))[1] == []


def test_turing_computes_in_fp32_with_sdpa(monkeypatch: pytest.MonkeyPatch) -> None:
    from parallel.data_parallel import mixed_precision_policy

    processes, errors = resolve_processes(AUTO, {}, machine(T4))
    assert (processes.capability, errors) == ((7, 5), [])
    for capability, dtype in (((7, 5), torch.float32), ((8, 0), torch.bfloat16)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda c=capability: c)
        for param in ("auto", "bf16"):
            policy = mixed_precision_policy(PrecisionConfig(param=param), "cuda")
            assert policy.param_dtype == (dtype if param == "auto" else torch.bfloat16)
        name = str(dtype).removeprefix("torch.").replace("bfloat", "bf").replace("float", "fp")
        assert resolved_precision(PrecisionConfig(), "cuda", capability).param == name
    request, choice = fit_check.plan_request(default(), processes, MeshShape(1, 1, 1, 1))
    [(spec, _)] = request.stages(choice)
    assert (spec.precision.param, spec.attention) == ("fp32", "sdpa")


def test_remedies_name_wheels_that_exist_for_all_supported_versions() -> None:
    """torch/cuda/__init__.py lists the CUDA builds of its release, and torch 2.11 has 12.6 too."""
    listed = getattr(torch.cuda, "PYTORCH_RELEASES_CODE_CC", None)
    if listed is None:
        pytest.skip("this torch has no list of its builds")
    tags = {"cu" + version.replace(".", "") for version in listed}
    assert {tag for _, tag in gpu_probe.WHEELS} <= tags
    for minimum, tag in gpu_probe.WHEELS:
        assert gpu_probe.MIN_DRIVER[int(re.findall(r"\d\d", tag)[0])] == minimum
