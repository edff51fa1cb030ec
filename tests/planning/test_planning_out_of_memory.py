"""The message of a run that is out of memory names peak, plan and a change that fits."""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hydra import compose, initialize_config_dir

from checkpoint.host_copy import copy_to_host
from cli.arguments import CONF, hydra_arguments
from cli.config import load_train_config
from parallel.mesh import MeshShape, resolve_mesh
from planning import out_of_memory
from planning.communicators import COMMUNICATOR_BYTES, n_communicators
from planning.memory import GIB, size_text, stage_memory
from planning.out_of_memory import memory_advice, requested_bytes
from planning.plan import host_peak
from planning.request import PlanRequest, configured_choice
from planning.search import peak_memory
from resilience.errors import OutOfMemory
from resilience.processes import Processes
from training.config import JobConfig

MESH = MeshShape(1, 8, 1, 1)
PROCESSES = Processes("cuda", 8, 1, "torchrun")
ERROR = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.1 GiB of "
    "which 1.2 GiB is free."
)


@pytest.fixture(scope="module", autouse=True)
def _hydra() -> Iterator[None]:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        yield


def trained(*arguments: str) -> JobConfig:
    words = ["experiment=h100x8_8b", *arguments]
    return load_train_config(compose("train", hydra_arguments(words, "train")))


def planned(config: JobConfig) -> int:
    request = PlanRequest(config, "cuda", 1)
    return peak_memory(request.stages(configured_choice(config, MESH))).peak


@pytest.mark.parametrize("excess", [1.2, 0.8])
def test_named_change_fits_by_the_plan_corrected_by_the_measured_peak(
    excess: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = trained(f"run.dir={tmp_path}")
    measured = int(excess * planned(config))
    available = measured + GIB  # less than the allocation that failed
    nccl = COMMUNICATOR_BYTES * n_communicators(MESH)
    monkeypatch.setattr(out_of_memory, "peak_bytes", lambda _: measured)
    monkeypatch.setattr(out_of_memory, "this_machine", lambda _: (None, available + nccl))
    with pytest.raises(OutOfMemory) as raised, memory_advice(config, PROCESSES, MESH):
        raise torch.OutOfMemoryError(ERROR)
    first, detail, *rest = str(raised.value).splitlines()
    for size in (measured, available, planned(config)):
        assert f"{size / GIB:.2f} GiB" in first
    assert detail.strip() == ERROR and not rest
    words = first.partition("; use ")[2].partition(" (")[0].split()
    assert raised.value.overrides.split() == words
    changed = planned(trained(*words))
    assert changed < planned(config) and changed * max(excess, 1) <= available


def test_measured_peak_of_a_pipeline_stage_is_compared_with_the_plan_of_that_stage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last stage needs far more than its plan, but hardly more than the plan of the first."""
    keys = ["parallel.dp_shard=4", "parallel.pp=2", "parallel.pp_layers=[24,8]"]
    keys += ["train.micro_batch_size=1"]
    config = trained(f"run.dir={tmp_path}", *keys)
    mesh, _ = resolve_mesh(config.parallel, 8)

    def peaks(config: JobConfig) -> list[int]:
        mesh, _ = resolve_mesh(config.parallel, 8)
        ((spec, _),) = PlanRequest(config, "cuda", 1).stages(configured_choice(config, mesh))
        return [stage_memory(each).peak for each in spec.stages]

    first, last = peaks(config)
    measured = available = int(1.02 * first)
    nccl = COMMUNICATOR_BYTES * n_communicators(mesh)
    monkeypatch.setattr(out_of_memory, "process_ranks", lambda: (4, 4))
    monkeypatch.setattr(out_of_memory, "peak_bytes", lambda _: measured)
    monkeypatch.setattr(out_of_memory, "this_machine", lambda _: (None, available + nccl))
    with pytest.raises(OutOfMemory) as raised, memory_advice(config, PROCESSES, mesh):
        raise torch.OutOfMemoryError("CUDA out of memory.")
    assert f"planned peak {size_text(last)}" in str(raised.value)
    changed = peaks(trained(*keys, *raised.value.overrides.split()))
    assert max(changed) * measured / last <= available


def planned_on_host(config: JobConfig) -> int:
    request = PlanRequest(config, "cuda", 1)
    return max(host_peak(spec, 8) for spec, _ in request.stages(configured_choice(config, MESH)))


HOST_ERRORS = [
    MemoryError("Unable to allocate 1.00 GiB for an array"),  # from NumPy
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 512 bytes."),
]


@pytest.mark.parametrize("error", HOST_ERRORS, ids=["numpy", "torch"])
@pytest.mark.parametrize("excess", [1.2, 0.8])
def test_error_of_the_host_is_explained_with_host_memory(
    error: Exception, excess: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = trained(f"run.dir={tmp_path}")
    plan = planned_on_host(config)
    measured, available = int(excess * plan / 8), int(excess * plan * 0.98)
    monkeypatch.setattr(out_of_memory, "host_peak_bytes", lambda: measured)
    monkeypatch.setattr(out_of_memory, "machine_memory", lambda: available)
    monkeypatch.setattr(out_of_memory, "this_machine", lambda _: (None, 80 * GIB))
    with pytest.raises(OutOfMemory) as raised, memory_advice(config, PROCESSES, MESH):
        raise error
    first, detail = str(raised.value).splitlines()
    assert "out of host memory" in first and "sbatch --mem=0" in first and "GPU" not in first
    for size in (measured, available, plan // 8):
        assert size_text(size) in first
    assert detail.strip() == str(error)
    changed = planned_on_host(trained(*raised.value.overrides.split()))
    assert changed < plan and changed * max(excess, 1) <= available


def test_pinned_memory_that_cannot_be_allocated_is_an_error_of_the_host(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """CUDA reports `cudaErrorMemoryAllocation` for both (ATen/cuda/CachingHostAllocator.cpp)."""

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("CUDA error: out of memory")

    state = {"weight": torch.zeros(256)}
    monkeypatch.setattr(torch, "empty_like", fail)
    with pytest.raises(MemoryError, match="tried to allocate 1024 bytes") as raised:
        copy_to_host(state, None)
    assert requested_bytes(str(raised.value)) == 1024


def test_snapshot_is_written_for_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[str] = []
    cuda = SimpleNamespace(
        is_initialized=lambda: True, memory=SimpleNamespace(_dump_snapshot=written.append)
    )
    assert out_of_memory.write_snapshot(tmp_path, 3) is None  # without CUDA
    monkeypatch.setitem(out_of_memory.sys.modules, "torch", SimpleNamespace(cuda=cuda))
    path = out_of_memory.write_snapshot(tmp_path, 3)
    assert path == tmp_path / "out_of_memory" / "rank_3.pickle" and written == [str(path)]


def test_error_while_planning_does_not_replace_the_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object) -> None:
        raise ValueError("a bug")

    monkeypatch.setattr(out_of_memory, "compare_device", fail)
    config = trained(f"run.dir={tmp_path}")
    with pytest.raises(OutOfMemory) as raised, memory_advice(config, PROCESSES, MESH):
        raise torch.OutOfMemoryError(ERROR)
    assert "a bug" in str(raised.value) and "Tried to allocate 2.00 GiB" in str(raised.value)


def test_other_errors_are_not_changed() -> None:
    error = RuntimeError("shape mismatch")
    with pytest.raises(RuntimeError) as raised, memory_advice(trained(), PROCESSES, MESH):
        raise error
    assert raised.value is error


@pytest.mark.parametrize(
    ("message", "size"),
    [
        (ERROR, 2 * GIB),
        ("DefaultCPUAllocator: can't allocate memory: you tried to allocate 512 bytes.", 512),
        ("NCCL WARN Cuda failure 2 'out of memory'", 0),
    ],
)
def test_size_of_the_failed_allocation_is_read_from_the_message(message: str, size: int) -> None:
    assert requested_bytes(message) == size
