"""Defaults of a process: CPUs, compile workers, allocator and hidden GPUs."""

import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch._inductor.config as config
from torch.distributed import DistBackendError, DistNetworkError, DistStoreError, HashStore

from parallel.config import ParallelConfig, PrecisionConfig
from parallel.mesh import MeshShape
from resilience import launch as launch_module
from resilience import launcher_variables, process_setup
from resilience.config import TimeLimits
from resilience.errors import LaunchError
from resilience.exit_codes import ExitCode
from resilience.gpu_probe import Gpu
from resilience.launch import _launch_errors, _without_children_on_error, launch
from resilience.process_setup import (
    cpus_per_process,
    local_cpus,
    parse_cpus,
    set_up_process,
    use_expandable_segments,
)
from resilience.processes import Processes

NUMBERS = ("TORCHINDUCTOR_COMPILE_THREADS", "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES")


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Restore the variables and threads that a test changes."""
    for name in (*NUMBERS, *process_setup.ALLOCATOR_VARIABLES, "SLURM_CPUS_ON_NODE"):
        monkeypatch.setenv(name, "")  # recorded, so that it is restored
        monkeypatch.delenv(name)
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    monkeypatch.setattr(os, "cpu_count", lambda: 96)
    compile_threads = config.compile_threads
    yield
    config.compile_threads = compile_threads


@pytest.mark.parametrize(
    ("launcher", "per_node", "allowed", "on_node", "cpus"),
    [
        ("self", 1, 96, None, 96),
        ("self", 8, 96, None, 12),
        ("torchrun", 8, 48, None, 6),  # with --numa-binding: a lower bound
        ("torchrun", 8, 4, None, 1),
        ("srun", 8, 12, "96", 12),  # --cpus-per-task=12, bound to its CPUs
        ("srun", 8, 96, "96", 12),  # all tasks may use all CPUs
        ("srun", 8, 1, "8", 1),  # without --cpus-per-task
        ("srun", 4, 96, None, 24),
        ("another launcher", 4, 96, None, 24),
    ],
)
def test_processes_of_a_node_share_its_cpus(
    monkeypatch: pytest.MonkeyPatch,
    launcher: str,
    per_node: int,
    allowed: int,
    on_node: str | None,
    cpus: int,
) -> None:
    environment = {} if on_node is None else {"SLURM_CPUS_ON_NODE": on_node}
    processes = Processes("cpu", per_node, 1, launcher)
    assert cpus_per_process(processes, allowed, environment) == cpus
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(allowed)))
    os.environ.update(environment)
    set_up_process(processes, ParallelConfig())
    assert os.environ["TORCHINDUCTOR_COMPILE_THREADS"] == str(min(cpus, 32))
    assert os.environ.get("OMP_NUM_THREADS") == (str(cpus) if launcher == "srun" else None)


def test_compile_workers_of_a_loaded_inductor_are_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch/_inductor/config.py reads the variable once, in `decide_compile_threads`."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(24)))
    set_up_process(Processes("cpu", 8, 1, "self"), ParallelConfig())
    assert config.compile_threads == 3 and config.decide_compile_threads() == 3
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "7"  # set by the user
    set_up_process(Processes("cpu", 8, 1, "self"), ParallelConfig())
    assert config.compile_threads == 7


def test_cpu_run_hides_the_gpus_from_all_libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever asks `torch.cuda.is_available()` later, no context is created."""
    for name in ("device_count", "init", "get_device_properties", "set_device"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: pytest.fail("asked for GPUs"))
    set_up_process(Processes("cpu", 1, 1, "self"), ParallelConfig())
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ""
    assert torch.cuda._parse_visible_devices() == []


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}),
        ({"PYTORCH_ALLOC_CONF": "max_split_size_mb:512"}, None),
        ({"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:False"}, None),
        ({"PYTORCH_ALLOC_CONF": ""}, None),
    ],
)
def test_allocator_uses_expandable_segments_unless_configured(
    monkeypatch: pytest.MonkeyPatch, given: dict[str, str], expected: dict[str, str] | None
) -> None:
    applied: list[str] = []
    monkeypatch.setattr(torch.cuda.memory, "_set_allocator_settings", applied.append)
    environment = dict(given)
    use_expandable_segments(environment)
    assert environment == (given if expected is None else expected)
    assert applied == ([] if expected is None else ["expandable_segments:True"])


@pytest.mark.parametrize(
    ("launcher", "per_node", "visible", "per_task", "name", "warning"),
    [
        ("srun", 4, 1, None, "NVIDIA H100 80GB HBM3", "sees one GPU, so that NCCL may not use NVL"),
        ("srun", 4, 1, "1", "NVIDIA H100 80GB HBM3", "sees one GPU, so that NCCL may not use NVL"),
        ("srun", 4, 2, None, "NVIDIA H100 80GB HBM3", "sees 2 GPUs, so that NCCL may not use NVL"),
        ("srun", 4, 2, "h100:2", "NVIDIA H100 80GB HBM3", "has 2 GPUs, but uses one"),
        ("srun", 4, 4, None, "NVIDIA H100 80GB HBM3", None),  # the remedy
        ("srun", 1, 1, None, "NVIDIA H100 80GB HBM3", None),
        ("srun", 4, 1, None, "NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("torchrun", 4, 1, None, "NVIDIA H100 80GB HBM3", None),
    ],
)
def test_tasks_that_do_not_see_all_gpus_are_warned(
    monkeypatch: pytest.MonkeyPatch,
    capsys: Any,
    launcher: str,
    per_node: int,
    visible: int,
    per_task: str | None,
    name: str,
    warning: str | None,
) -> None:
    if per_task is not None:
        monkeypatch.setenv("SLURM_GPUS_PER_TASK", per_task)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(12)))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: visible)
    monkeypatch.setattr(process_setup, "own_gpu", lambda: (0, Gpu(name, (9, 0), 2**36)))
    set_up_process(Processes("cuda", per_node, 2, launcher), ParallelConfig(async_tp=True))
    printed = capsys.readouterr().err
    remedy = "pass --gpus-per-node=4 to sbatch, without --gpus-per-task"
    assert (remedy in printed) == (warning is not None)
    assert (warning or "") in printed


def test_settings_of_a_gpu_process(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0})
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    set_up_process(Processes("cuda", 8, 1, "srun"), ParallelConfig())
    assert os.environ["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"
    assert "CUDA_VISIBLE_DEVICES" not in os.environ
    assert "add --cpus-per-task to sbatch (up to 12 here)" in capsys.readouterr().err
    del os.environ["PYTORCH_ALLOC_CONF"]
    set_up_process(Processes("cuda", 8, 1, "self"), ParallelConfig(async_tp=True))
    assert "PYTORCH_ALLOC_CONF" not in os.environ
    torch._C._accelerator_setAllocatorSettings("expandable_segments:False")


@pytest.mark.parametrize(
    ("allowed", "local", "expected"),
    [
        ("0-7", "4-7", "4-7"),
        ("0-7", "0-3,8", "0-3"),
        ("0-7", "0-7", ""),  # one node, or a virtual machine that hides them
        ("0-1", "4-7", ""),  # bound by SLURM, torchrun --numa-binding or taskset
        ("4-5", "4-7", ""),
        ("0-7", None, ""),  # the GPU is not in /sys
    ],
)
def test_unbound_process_is_bound_to_the_cpus_of_its_gpu(
    tmp_path: Path, allowed: str, local: str | None, expected: str
) -> None:
    (tmp_path / "devices/system/cpu").mkdir(parents=True)
    (tmp_path / "devices/system/cpu/online").write_text("0-7\n")
    if local is not None:
        (tmp_path / "bus/pci/devices/0000:1b:00.0").mkdir(parents=True)
        (tmp_path / "bus/pci/devices/0000:1b:00.0/local_cpulist").write_text(f"{local}\n")
    found = local_cpus("0000:1b:00.0", parse_cpus(allowed), tmp_path)
    assert found == parse_cpus(expected)


def test_all_threads_are_bound_after_the_launch_of_other_processes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Processes inherit the CPUs of the main one, and would count as bound to those of its GPU."""
    events: list[Any] = []
    gpu = Gpu("NVIDIA H100", (9, 0), 1, bus="0000:1b:00.0")
    fabric = SimpleNamespace(launch=lambda: events.append("launch"))
    monkeypatch.setattr(launch_module, "Fabric", lambda **_: fabric)
    monkeypatch.setattr(process_setup, "own_gpu", lambda: (0, gpu))
    monkeypatch.setattr(process_setup, "local_cpus", lambda *_: {0})
    monkeypatch.setattr(os, "sched_setaffinity", lambda *bound: events.append(bound))
    monkeypatch.setattr(process_setup, "use_expandable_segments", lambda environment: None)
    for name in ("MASTER_ADDR", "LLAMESH_MAIN_PID"):
        monkeypatch.setenv(name, "")  # recorded, so that it is restored
    watchdog: Any = SimpleNamespace(limits=TimeLimits(), children=[], connect=lambda: None)
    mesh, precision = MeshShape(1, 2, 1, 1), PrecisionConfig()
    launch(Processes("cuda", 2, 1, "self"), mesh, ParallelConfig(), precision, watchdog)
    assert events[0] == "launch"
    assert (os.getpid(), {0}) in events
    assert len(events) == 1 + len(os.listdir("/proc/self/task"))


@pytest.mark.parametrize(
    ("error", "reported"),
    [
        (DistBackendError("NCCL error: unhandled system error"), True),
        (DistStoreError("wait timeout after 600000ms"), True),
        (RuntimeError("Gloo connectFullMesh failed with no route to host"), True),
        (RuntimeError("a fault of the program"), False),
        (LaunchError("rank 1 cannot start"), False),
    ],
)
def test_only_failed_connections_are_explained(
    monkeypatch: pytest.MonkeyPatch, capsys: Any, error: RuntimeError, reported: bool
) -> None:
    """On another rank than 0 as well, because rank 0 may be waiting for it."""
    values = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "MASTER_PORT": "29500"}
    for name, value in {**values, "MASTER_ADDR": "127.0.0.1", "NCCL_IB_DISABLE": "1"}.items():
        monkeypatch.setenv(name, value)
    code = ExitCode.RANK_FAILED_BEFORE_SAVE
    expected = pytest.raises(RuntimeError, match=re.escape(str(error)))
    with expected as raised, _launch_errors("self", code):
        raise error
    assert (raised.value is not error) == reported
    assert (getattr(raised.value, "code", None) == code) == reported
    hint = "NCCL_IB_DISABLE=1; set NCCL_SOCKET_IFNAME"
    assert (hint in str(raised.value)) == reported
    assert ("rank 1 on" in capsys.readouterr().err) == reported


def test_ranks_that_fail_to_connect_for_one_reason_print_it_once(
    monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    store, code = HashStore(), ExitCode.RANK_FAILED
    for name, value in {"WORLD_SIZE": "8", "MASTER_PORT": "1", "MASTER_ADDR": "n0"}.items():
        monkeypatch.setenv(name, value)
    for rank in range(1, 5):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("LOCAL_RANK", str(rank))
        reason = "no route" if rank == 4 else "refused"
        error = RuntimeError(
            f"Gloo connectFullMesh failed: {reason}, remote=[10.0.0.{rank}]:5{rank}"
        )
        with pytest.raises(LaunchError), _launch_errors("srun", code, store):
            raise error
    printed = capsys.readouterr().err.splitlines()
    assert [line.split()[2] for line in printed] == ["1", "4"]


@pytest.mark.parametrize(
    ("launcher", "code", "remedy"),
    [
        ("self", 1, "unset MASTER_PORT"),
        ("self", 72, "run the same command again"),  # the run has chosen it
        ("srun", 1, "export MASTER_PORT="),
        ("torchrun", 1, "--master-port"),
        ("another launcher", 1, "start the launcher with another MASTER_PORT"),
    ],
)
def test_port_in_use_is_named_and_leaves_no_process(
    monkeypatch: pytest.MonkeyPatch, launcher: str, code: int, remedy: str
) -> None:
    monkeypatch.setenv("MASTER_PORT", "29500")
    child = subprocess.Popen(["sleep", "60"])
    watchdog: Any = SimpleNamespace(children=[child])
    message = rf"MASTER_PORT=29500 is used by another process of .*; .*{remedy}"
    with (
        pytest.raises(LaunchError, match=message),
        _launch_errors(launcher, ExitCode(code)),
        _without_children_on_error(watchdog),
    ):
        raise DistNetworkError("failed to listen; code: -98, name: EADDRINUSE")
    assert child.returncode is not None and not watchdog.children


def test_failed_connection_names_interfaces_and_variables() -> None:
    variables = {"NCCL_SOCKET_IFNAME": "ib0", "GLOO_SOCKET_IFNAME": "lo", "HOME": "/root"}
    hint = launcher_variables.network_hint(variables)
    assert "lo (127.0.0.1)" in hint and "GLOO_SOCKET_IFNAME=lo, NCCL_SOCKET_IFNAME=ib0" in hint
    assert "HOME" not in hint and "NCCL_DEBUG=INFO" in hint
