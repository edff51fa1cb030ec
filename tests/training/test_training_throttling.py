"""Reduced clocks of a GPU are reported once, and NVML may be absent or fail."""

import ctypes
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from training.throttling import Throttling

DEVICE = torch.device("cuda", 0)


def library(reasons: list[int], error: int = 0) -> Any:
    """Return NVML of a GPU with these reasons, one for each call."""

    def find(uuid: bytes, handle: Any) -> int:
        assert uuid == b"GPU-1234"
        return error

    def read(handle: Any, found: Any) -> int:
        found._obj.value = reasons.pop(0)
        return 0

    return SimpleNamespace(
        nvmlInit_v2=lambda: 0,
        nvmlDeviceGetHandleByUUID=find,
        nvmlDeviceGetCurrentClocksThrottleReasons=read,
    )


@pytest.fixture
def _gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    properties = SimpleNamespace(uuid="1234")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)


@pytest.mark.usefixtures("_gpu")
def test_each_combination_of_reasons_is_reported_once(monkeypatch: pytest.MonkeyPatch) -> None:
    idle, power_cap, thermal, brake = 0x1, 0x4, 0x20, 0x80
    states = [idle, power_cap, thermal | power_cap, thermal, 0, thermal | brake, thermal]
    monkeypatch.setattr(ctypes, "CDLL", lambda name: library(list(states)))
    throttling = Throttling(DEVICE)
    messages = [throttling.warning(3, "node7") for _ in states]
    assert [message is not None for message in messages] == [0, 0, 1, 0, 0, 1, 0]
    assert "rank 3 on node7" in str(messages[2]) and "(thermal slowdown" in str(messages[2])
    assert "power brake" in str(messages[5]) and "nvidia-smi" in str(messages[5])


@pytest.mark.usefixtures("_gpu")
@pytest.mark.parametrize("nvml", [None, library([], error=3), SimpleNamespace(), library([])])
def test_errors_of_nvml_are_ignored(nvml: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(name: str) -> Any:
        if nvml is None:
            raise OSError("libnvidia-ml.so.1: cannot open shared object file")
        return nvml

    monkeypatch.setattr(ctypes, "CDLL", load)
    assert Throttling(DEVICE).warning(0, "node") is None
