"""Calibration: the FLOPs and bytes it assumes, and the round trip through a hardware file."""

import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from cli.arguments import CONF
from cli.config import load_train_config
from parallel.mesh import MeshShape
from planning import calibration
from planning.fit_check import check_plan
from planning.hardware import Hardware, load_hardware
from resilience.processes import Processes


def test_rate_is_work_divided_by_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the FLOPs counted by PyTorch and a time of one second.

    Causal attention counts as half the FLOPs of its matrix products.
    """
    flops: list[int] = []

    def one_second(kind: str, operation: Any, seconds: float) -> float:
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            operation()
        flops.append(counter.get_total_flops())
        return 1.0

    monkeypatch.setattr(calibration, "_median_seconds", one_second)
    product = calibration.matrix_tflops("cpu", torch.float32, 64, 1.0)
    assert product * 1e12 == pytest.approx(flops[-1]) and flops[-1] > 0
    sizes = {"attention": (2, 3, 64, 16)}
    attention = calibration._attention("cpu", torch.float32, sizes, 1.0)
    assert attention * 1e12 == pytest.approx(flops[-1] / 2) and flops[-1] > 0
    copied = calibration._bandwidth("cpu", 1000, 1.0)
    assert copied * 1e9 == 2 * 4 * 1000


def test_measured_hardware_is_written_and_used_by_fit_check(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Two processes measure the link; the file is exact to four digits; `train.py` uses it.

    `python -m bench.planned_speed` reports the accuracy of the rates.
    """
    measurements: list[Hardware] = []

    def calibrate() -> Hardware:
        measurements.append(calibrate_for(seconds=0.01))
        return measurements[0]

    calibrate_for = calibration.calibrate
    monkeypatch.setattr(calibration, "calibrate", calibrate)
    monkeypatch.setattr("planning.calibration.FOLDER", tmp_path / "hardware")
    monkeypatch.setattr("planning.hardware.FOLDER", tmp_path / "hardware")
    path, _ = calibration.measure_local_hardware()

    assert path == tmp_path / "hardware" / "local.yaml"
    assert [each.name for each in path.parent.iterdir()] == ["local.yaml"]
    [measured], loaded = measurements, load_hardware("local")
    for field in fields(measured):
        before, after = getattr(measured, field.name), getattr(loaded, field.name)
        exact = not isinstance(before, float | dict)
        assert after == (before if exact else pytest.approx(before, rel=1e-3)), field.name

    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = load_train_config(compose("train", ["experiment=smoke"]))
    message = check_plan(config, Processes("cpu", 1, 1, "self"), MeshShape(1, 1, 1, 1))
    assert message is not None and re.search(r"about [\d,]+ tokens/s$", message)
