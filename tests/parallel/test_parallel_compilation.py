"""Compiler settings besides the blocks; test_parallel_grid.py trains compiled blocks."""

from dataclasses import replace
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
import torch._inductor.config
from small_run import Case, model_config
from torch.distributed.device_mesh import init_device_mesh

from model.llama import Llama
from parallel import compilation
from parallel.config import ParallelConfig, PrecisionConfig
from parallel.mesh import AXES, MeshShape
from parallel.parallelize import parallelize
from planning.fake_model import fake_processes
from planning.step_spec import StepSpec


@torch._inductor.config.patch(_micro_pipeline_tp=False)  # monkeypatch would delete the setting
def test_async_tp_is_enabled_only_on_request_and_only_for_the_tp_group(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Async TP itself needs NVLink; the test checks the settings of compiler and group."""
    enabled: list[str] = []
    name = "torch.distributed._symmetric_memory.enable_symm_mem_for_group"
    monkeypatch.setattr(name, enabled.append)
    for async_tp in (False, True):
        case = Case(dp=2, tp=2, compile=True)
        parallel = replace(case.parallel, async_tp=async_tp)
        with fake_processes(case.world):
            mesh = init_device_mesh("cpu", case.mesh.sizes, mesh_dim_names=AXES)
            with torch.device("meta"):
                llama = Llama(model_config(tied=False, n_layers=1))
            parallelize(llama, mesh, parallel, PrecisionConfig())
            expected = [mesh["tp"].get_group().group_name] if async_tp else []
        assert enabled == expected
        assert torch._inductor.config._micro_pipeline_tp == async_tp


@pytest.mark.parametrize("accelerator", ["cpu", "cuda"])
@pytest.mark.parametrize("given", ["auto", True, False])
def test_auto_compiles_on_gpus_in_runs_and_plans(accelerator: Any, given: Any) -> None:
    parallel = ParallelConfig(compile=given)
    expected = accelerator == "cuda" if given == "auto" else given
    assert parallel.resolved(accelerator).compile is expected
    shape = MeshShape(1, 1, 1, 1)
    precision = PrecisionConfig("bf16", "fp32")
    spec = StepSpec(model_config(False, 1), shape, parallel, precision, accelerator, 8, 1, 1)
    assert spec.parallel.compile is expected


@pytest.mark.parametrize(("device_type", "expected"), [("cuda", [1.0]), ("cpu", [])])
def test_parallelize_compiles_by_default_on_gpus_only(
    monkeypatch: pytest.MonkeyPatch, device_type: str, expected: list[float]
) -> None:
    found: list[float] = []
    monkeypatch.setattr(
        compilation, "apply_compile", lambda model, memory_budget: found.append(memory_budget)
    )
    with torch.device("meta"):
        llama = Llama(model_config(tied=False, n_layers=1))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    mesh: Any = MagicMock(device_type=device_type)
    mesh.size.return_value = mesh["tp"].size.return_value = mesh["cp"].size.return_value = 1
    parallelize(llama, mesh, ParallelConfig(), PrecisionConfig())
    assert found == expected
