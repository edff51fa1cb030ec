"""`train.deterministic` sets everything that PyTorch, cuBLAS and NCCL need."""

import os
import re
from collections.abc import Iterator

import pytest
import torch
import torch._inductor.config

from training.deterministic import make_deterministic, nondeterministic

NCCL_ALGORITHMS = {"Tree", "Ring", "CollNetDirect", "CollNetChain", "NVLS", "NVLSTree", "PAT"}
"""`ncclAlgoStr` of NCCL 2.30 (src/init.cc); an unknown name fails the creation of a group."""


@pytest.fixture(autouse=True)
def _restored(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in ("CUBLAS_WORKSPACE_CONFIG", "NCCL_ALGO"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    yield
    torch.use_deterministic_algorithms(False)


def test_all_libraries_are_deterministic(monkeypatch: pytest.MonkeyPatch) -> None:
    make_deterministic()
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] in (":4096:8", ":16:8")
    prefix, *excluded = re.split("[,^]", os.environ["NCCL_ALGO"])
    assert prefix == "" and set(excluded) == {"NVLS", "NVLSTree"} < NCCL_ALGORITHMS
    assert torch.get_deterministic_debug_mode() == 2  # operators without such an algorithm raise
    assert torch._inductor.config.deterministic
    assert not getattr(torch.utils.deterministic, "fill_uninitialized_memory")  # noqa: B009
    with nondeterministic():
        assert torch.get_deterministic_debug_mode() == 0
    assert torch.get_deterministic_debug_mode() == 2
    monkeypatch.setenv("NCCL_ALGO", "Ring")
    make_deterministic()
    assert os.environ["NCCL_ALGO"] == "Ring"
