"""Matching of device names to hardware files, and consistency of peaks with training metrics."""

import math
from pathlib import Path

import pytest
import torch
import yaml

from planning.hardware import FOLDER, hardware_of, known_hardware, load_hardware
from training.throughput import peak_flops

KNOWN_DEVICES = {
    "NVIDIA A100-SXM4-80GB": "a100",
    "NVIDIA H100 80GB HBM3": "h100",
    "NVIDIA H200": "h200",
    "NVIDIA B200": "b200",
}
# Devices with less memory, less bandwidth, other links or other clocks than those of the files.
UNKNOWN_DEVICES = (
    *("NVIDIA A100-SXM4-40GB", "NVIDIA A100 80GB PCIe", "NVIDIA A100-PCIE-40GB"),
    *("NVIDIA H100 PCIe", "NVIDIA H100 NVL", "NVIDIA H100 80GB HBM2e", "NVIDIA H200 NVL"),
    *("NVIDIA GH200 480GB", "NVIDIA GB200", "NVIDIA H100 80GB HBM3 MIG 1g.10gb"),
    *("NVIDIA A100-SXM4-80GB MIG 7g.80gb", "NVIDIA L40S"),
)


@pytest.mark.parametrize(("device", "name"), KNOWN_DEVICES.items())
def test_device_name_matches_file_with_same_peak_as_metrics(device: str, name: str) -> None:
    hardware = hardware_of(device)
    assert hardware is not None and hardware.name == name
    assert hardware.peak_tflops["bf16"] * 1e12 == peak_flops(device, torch.bfloat16)


def test_every_hardware_file_with_device_names_is_covered() -> None:
    files = {name for name in known_hardware() if load_hardware(name).names is not None}
    assert files == set(KNOWN_DEVICES.values())


@pytest.mark.parametrize("device", UNKNOWN_DEVICES)
def test_variants_of_known_devices_do_not_match(device: str) -> None:
    assert hardware_of(device) is None


def test_invalid_hardware_file_is_rejected_with_all_errors(tmp_path: Path) -> None:
    values = yaml.safe_load((FOLDER / "h100.yaml").read_text())
    path = tmp_path / "broken.yaml"
    path.write_text(yaml.safe_dump({**values, "memory_gib": -1, "link_gb_s": math.inf}))
    with pytest.raises(ValueError, match=r"memory_gib=-1 .*hardware\.link_gb_s=inf "):
        load_hardware(str(path))
    path.write_text(yaml.safe_dump({**values, "matrix_tflops": {"fp32": 1.0}}))
    with pytest.raises(ValueError, match=r"hardware\.matrix_tflops=.* lacks bf16"):
        load_hardware(str(path))


@pytest.mark.parametrize("name", known_hardware())
def test_achieved_rates_do_not_exceed_peak(name: str) -> None:
    hardware = load_hardware(name)
    for rates in (hardware.matrix_tflops, hardware.attention_tflops):
        for precision, rate in rates.items():
            assert rate <= hardware.peak_tflops[precision], (precision, rate)
