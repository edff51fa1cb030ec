"""Which file describes a card, and that the planner and the speed meter know the same peaks."""

import pytest
import torch

from planning.hardware import hardware_of, known_hardware, load_hardware
from training.throughput import peak_flops

DESCRIBED = {
    "NVIDIA A100-SXM4-80GB": "a100",
    "NVIDIA H100 80GB HBM3": "h100",
    "NVIDIA H200": "h200",
    "NVIDIA B200": "b200",
}
# Less memory, less bandwidth, other links or other clocks than those of the files.
OTHERS = (
    *("NVIDIA A100-SXM4-40GB", "NVIDIA A100 80GB PCIe", "NVIDIA A100-PCIE-40GB"),
    *("NVIDIA H100 PCIe", "NVIDIA H100 NVL", "NVIDIA H100 80GB HBM2e", "NVIDIA H200 NVL"),
    *("NVIDIA GH200 480GB", "NVIDIA GB200", "NVIDIA H100 80GB HBM3 MIG 1g.10gb"),
    *("NVIDIA A100-SXM4-80GB MIG 7g.80gb", "NVIDIA L40S"),
)


@pytest.mark.parametrize(("card", "name"), DESCRIBED.items())
def test_a_card_is_described_by_the_file_whose_peak_the_speed_meter_uses(
    card: str, name: str
) -> None:
    hardware = hardware_of(card)
    assert hardware is not None and hardware.name == name
    assert hardware.peak_tflops["bf16"] * 1e12 == peak_flops(card, torch.bfloat16)


def test_every_card_that_a_file_describes_is_named_here() -> None:
    files = {name for name in known_hardware() if load_hardware(name).names is not None}
    assert files == set(DESCRIBED.values())


@pytest.mark.parametrize("card", OTHERS)
def test_a_card_of_another_kind_is_taken_for_none_of_them(card: str) -> None:
    assert hardware_of(card) is None


@pytest.mark.parametrize("name", known_hardware())
def test_what_is_achieved_is_below_the_peak(name: str) -> None:
    hardware = load_hardware(name)
    for rates in (hardware.matrix_tflops, hardware.attention_tflops):
        for precision, rate in rates.items():
            assert rate <= hardware.peak_tflops[precision], (precision, rate)
