"""What calibration times is what it counts, and what it writes is what a later plan reads."""

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
from parallel.mesh import MeshShape, Processes
from planning import calibration
from planning.answer import measure_machine
from planning.fit_check import check_plan
from planning.hardware import load_hardware


def test_a_rate_is_the_work_that_was_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """By PyTorch's own count of an operation's work, had it taken a second.

    Attention is counted as a causal mask needs it: half of what its products do without one.
    """
    counted: list[int] = []

    def in_a_second(kind: str, operation: Any, seconds: float) -> float:
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            operation()
        counted.append(counter.get_total_flops())
        return 1.0

    monkeypatch.setattr(calibration, "_median_seconds", in_a_second)
    product = calibration.matrix_tflops("cpu", torch.float32, 64, 1.0)
    assert product * 1e12 == pytest.approx(counted[-1]) and counted[-1] > 0
    sizes = {"attention": (2, 3, 64, 16)}
    attention = calibration._attention("cpu", torch.float32, sizes, 1.0)
    assert attention * 1e12 == pytest.approx(counted[-1] / 2) and counted[-1] > 0
    copied = calibration._bandwidth("cpu", 1000, 1.0)
    assert copied * 1e9 == 2 * 4 * 1000


def test_this_machine_is_measured_and_planned_with(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two processes measure the link; the file is read back to four digits, and `train.py` asks it.

    How good the figures are is what `python -m bench.planned_speed` tells.
    """
    measured = []

    def briefly() -> Any:
        measured.append(calibrate(seconds=0.01))
        return measured[0]

    calibrate = calibration.calibrate
    monkeypatch.setattr(calibration, "calibrate", briefly)
    monkeypatch.setattr("planning.answer.CONF", tmp_path)
    monkeypatch.setattr("planning.hardware.FOLDER", tmp_path / "hardware")
    measure_machine()

    path = tmp_path / "hardware" / "local.yaml"
    assert [each.name for each in path.parent.iterdir()] == ["local.yaml"]
    told = capsys.readouterr().out
    assert str(path) in told and "hardware=local" in told
    [found], read = measured, load_hardware("local")
    assert read.problems() == []
    for field in fields(found):
        before, after = getattr(found, field.name), getattr(read, field.name)
        exact = not isinstance(before, float | dict)
        assert after == (before if exact else pytest.approx(before, rel=1e-3)), field.name

    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = load_train_config(compose("train", ["experiment=smoke"]))
    verdict = check_plan(config, Processes("cpu", 1, 1, "self"), MeshShape(1, 1, 1, 1))
    assert verdict is not None and re.search(r"about [\d,]+ tokens/s$", verdict)
