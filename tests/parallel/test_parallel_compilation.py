"""Compiler settings besides the blocks; test_parallel_grid.py trains compiled blocks."""

from dataclasses import replace

import pytest
import torch
import torch._inductor.config
from small_run import Case, model_config
from torch.distributed.device_mesh import init_device_mesh

from model.llama import Llama
from parallel.config import PrecisionConfig
from parallel.mesh import AXES
from parallel.parallelize import parallelize
from parallel.trace import fake_processes


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
