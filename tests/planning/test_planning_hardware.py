"""Matching of device names to hardware files, and consistency of peaks with training metrics."""

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from cli.arguments import plan_arguments
from planning.hardware import (
    FOLDER,
    Hardware,
    hardware_of,
    known_hardware,
    load_hardware,
)
from training.config_validation import ConfigError
from training.throughput import peak_flops

KNOWN_DEVICES = {
    "NVIDIA A100-SXM4-80GB": "a100",
    "NVIDIA A100-SXM4-40GB": "a100_40gb",
    "NVIDIA A100 80GB PCIe": "a100_pcie",
    "NVIDIA H100 80GB HBM3": "h100",
    "NVIDIA H100 PCIe": "h100_pcie",
    "NVIDIA H100 NVL": "h100_nvl",
    "NVIDIA H200": "h200",
    "NVIDIA L40S": "l40s",
    "NVIDIA GeForce RTX 4090": "rtx4090",
    "NVIDIA GeForce RTX 5090": "rtx5090",
    "NVIDIA RTX PRO 6000 Blackwell Server Edition": "rtx_pro_6000",
    "NVIDIA RTX PRO 6000 Blackwell Workstation Edition": "rtx_pro_6000",
    "NVIDIA B200": "b200",
    "NVIDIA B300 SXM6 AC": "b300",
    "NVIDIA GB200": "gb200",
    "NVIDIA GB300": "gb300",
    "AMD Instinct MI300X": "mi300x",
    "AMD Instinct MI300X VF": "mi300x",  # a whole GPU in a virtual machine
}
# Devices with less memory, less bandwidth, other links or other clocks than those of the files.
UNKNOWN_DEVICES = (
    *("NVIDIA A100-PCIE-40GB", "NVIDIA H100 80GB HBM2e", "NVIDIA H200 NVL", "NVIDIA GH200 480GB"),
    *("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "NVIDIA A100-SXM4-80GB MIG 7g.80gb"),
    *("NVIDIA L40", "NVIDIA GeForce RTX 4090 D", "NVIDIA GeForce RTX 4090 Laptop GPU"),
    *("NVIDIA GeForce RTX 5090 D", "NVIDIA GeForce RTX 5090 Laptop GPU", "AMD Instinct MI300A"),
    "NVIDIA RTX PRO 6000 Blackwell Max-Q Workstation Edition",
)


@pytest.mark.parametrize(("device", "name"), KNOWN_DEVICES.items())
def test_device_name_matches_file_with_same_peak_as_metrics(device: str, name: str) -> None:
    hardware = hardware_of(device)
    assert hardware is not None and hardware.name == name
    assert hardware.peak_tflops["bf16"] * 1e12 == peak_flops(device, torch.bfloat16)
    matching = [file for file in map(load_hardware, known_hardware()) if names(file, device)]
    assert [file.name for file in matching] == [name]


def names(hardware: Hardware, device: str) -> bool:
    return hardware.names is not None and re.search(hardware.names, device) is not None


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
    with pytest.raises(ValueError, match=r"(?s)memory_gib=-1 .*hardware\.link_gb_s=inf "):
        load_hardware(str(path))
    path.write_text(yaml.safe_dump({**values, "matrix_tflops": {"fp32": 1.0}}))
    with pytest.raises(ValueError, match=r"hardware\.matrix_tflops=.* lacks bf16"):
        load_hardware(str(path))


@pytest.mark.parametrize("name", known_hardware())
def test_hardware_file_has_its_own_name_a_source_and_the_power_of_the_board(name: str) -> None:
    hardware, text = load_hardware(name), (FOLDER / f"{name}.yaml").read_text()
    assert hardware.name == name
    assert (hardware.power_watts is None) == (hardware.accelerator == "cpu")
    assert name == "cpu" or re.search(r"data sheet.*dense", text, re.IGNORECASE | re.DOTALL)


def test_consumer_and_pcie_cards_have_no_link_above_that_of_pcie_5() -> None:
    pcie = ("a100_pcie", "h100_pcie", "h100_nvl", "l40s", "rtx4090", "rtx5090", "rtx_pro_6000")
    assert all(load_hardware(name).link_gb_s < 63 for name in pcie)


WRONG: list[tuple[dict[str, Any], str]] = [
    (
        {"memory_gb": 80},
        "Unknown key hardware.memory_gb. Did you mean hardware.memory_gib?",
    ),
    (
        {"price": 2},
        "Unknown key hardware.price. Did you mean hardware.price_per_hour?",
    ),
    (
        {"matrix_tflops": {"fp32": 51, "bf16": 990}},
        "hardware.matrix_tflops.bf16=990 is above hardware.peak_tflops.bf16=989; use the achieved "
        "rate, at most the dense peak",
    ),
    (
        {"attention_tflops": {"fp32": 68, "bf16": 260}},
        "hardware.attention_tflops.fp32=68 is above hardware.peak_tflops.fp32=67; use the achieved "
        "rate, at most the dense peak",
    ),
    (
        {"matrix_tflops": {"fp32": 51, "bf16": 790, "fp4": 3000}},
        "hardware.matrix_tflops.fp4=3000 has no peak; add fp4 to hardware.peak_tflops, or remove "
        "the rate",
    ),
    (
        {"matrix_tflops": {"fp32": 51}},
        "hardware.matrix_tflops={'fp32': 51.0} lacks bf16; add the rate in TFLOP/s",
    ),
    (
        {"flash_attention_tflops": {"FA3": 1400}},
        "hardware.flash_attention_tflops.FA3=1400 is above hardware.peak_tflops.bf16=989; use the "
        "achieved rate, at most the dense peak",
    ),
    (
        {"reserved_gib": 79.6},
        "hardware.reserved_gib=79.6 is not below hardware.memory_gib=79.6; use the memory that "
        "tensors cannot have, such as 3",
    ),
    (
        {"price_per_hour": -1},
        "hardware.price_per_hour=-1 is below 0; use at least 0 or null",
    ),
    (
        {"power_watts": 0},
        "hardware.power_watts=0 is below 1e-06; use at least 1e-06 or null",
    ),
    (
        {"link_gb_s": 0},
        "hardware.link_gb_s=0 is below 1e-06; use at least 1e-06",
    ),
    (
        {"bandwidth_gb_s": 1e-300},
        "hardware.bandwidth_gb_s=1e-300 is below 1e-06; use at least 1e-06",
    ),
    (
        {"price_per_hour": 1e308},
        "hardware.price_per_hour=1e+308 is above 1000000000; use at most 1000000000 or null",
    ),
    (
        {"network_gb_s": 3200},
        "hardware.network_gb_s=3200 is above hardware.bandwidth_gb_s=3000, the memory's; use "
        "gigabytes per second, rank and direction (8 Gb/s are 1)",
    ),
    (
        {"names": "H100("},
        "hardware.names='H100(' is not a regular expression (missing ), unterminated subpattern at "
        r"position 4); use one such as '\bH100\b', or null",
    ),
    (
        {"names": ".*"},
        "hardware.names='.*' matches every device; use a regular expression for the name in "
        r"torch.cuda, such as '\bH100\b', or null",
    ),
    (
        {"capability": 90},
        "hardware.capability=90 is not a compute capability MAJOR.MINOR; use a number such as 9.0, "
        "or null",
    ),
    (
        {"currency": False},
        "hardware.currency=false is not a text; quote it in YAML, which reads no, off, yes and on "
        "as false and true",
    ),
    (
        {"note": True},
        "hardware.note=true is not a text; quote it in YAML, which reads no, off, yes and on as "
        "false and true",
    ),
    (
        {"currency": "euro"},
        "hardware.currency='euro' is not a code of ISO 4217; use three capital letters, such as "
        "USD or EUR",
    ),
]


def write_file(folder: Path, changes: dict[str, Any]) -> str:
    values = yaml.safe_load((FOLDER / "h100.yaml").read_text())
    path = folder / "mine.yaml"
    path.write_text(yaml.safe_dump({**values, **changes}))
    return str(path)


@pytest.mark.parametrize(("changes", "message"), WRONG, ids=[str(each) for each, _ in WRONG])
def test_wrong_value_of_a_hardware_file_is_reported_with_rule_and_remedy(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    path = write_file(tmp_path, changes)
    with pytest.raises(ValueError) as raised:
        load_hardware(path)
    assert isinstance(raised.value, ConfigError)
    assert raised.value.errors == [f"hardware file {path}: {message}"]


def test_all_errors_of_a_hardware_file_are_reported_together(tmp_path: Path) -> None:
    """Also those between two keys, where a third one has the wrong type."""
    changes = {"memory_gib": "much", "names": "(", "price": 2, "matrix_tflops": {"bf16": 990}}
    with pytest.raises(ValueError) as raised:
        load_hardware(write_file(tmp_path, changes))
    assert isinstance(raised.value, ConfigError) and len(raised.value.errors) == 5
    for key in ("memory_gib='much'", "names='('", "price. Did", "tflops.bf16=990", "lacks fp32"):
        assert any(key in each for each in raised.value.errors)


def test_errors_of_a_hardware_file_are_printed_on_lines_of_their_own(tmp_path: Path) -> None:
    path = write_file(tmp_path, {"memory_gib": -1, "names": "("})
    with pytest.raises(ConfigError) as raised:
        plan_arguments([f"hardware={path}"])
    assert len(raised.value.errors) == 2
    assert str(raised.value).count(f"\n  - hardware file {path}: ") == 1


def test_key_that_a_hardware_file_repeats_is_rejected_with_both_lines(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    lines = (FOLDER / "h100.yaml").read_text().splitlines()
    first = next(i for i, line in enumerate(lines, 1) if line.startswith("link_gb_s:"))
    path.write_text("\n".join([*lines, "link_gb_s: 450"]))
    rule = f"link_gb_s is given twice (lines {first} and {len(lines) + 1}); remove one of them"
    with pytest.raises(ValueError, match=f"{re.escape(rule)}$"):
        load_hardware(str(path))
    path.write_text("\n".join([*lines[: first - 1], *lines[first:], "link_gb_s: 450"]))
    assert load_hardware(str(path)).link_gb_s == 450


def test_key_that_a_hardware_file_lacks_is_added_to_the_file(tmp_path: Path) -> None:
    values = yaml.safe_load((FOLDER / "h100.yaml").read_text())
    reserved = values.pop("reserved_gib")
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(values))
    with pytest.raises(ConfigError, match=r"has no value; add reserved_gib to the file$"):
        load_hardware(str(path))
    path.write_text(path.read_text() + f"reserved_gib: {reserved}\n")
    assert load_hardware(str(path)) == load_hardware("h100")


@pytest.mark.parametrize("memory_gib", [79.6, 10, 2, 0.5])
def test_named_reserved_memory_is_below_the_memory(memory_gib: float, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as raised:
        load_hardware(write_file(tmp_path, {"memory_gib": memory_gib, "reserved_gib": memory_gib}))
    named = float(str(raised.value).rpartition("such as ")[2])
    load_hardware(write_file(tmp_path, {"memory_gib": memory_gib, "reserved_gib": named}))


@pytest.mark.parametrize(
    "changes",
    [
        {"reserved_gib": 3},
        {"price_per_hour": 0, "currency": "EUR"},
        {"price_per_hour": None, "names": None, "capability": None},
        {"matrix_tflops": {"fp32": 51, "bf16": 989}},
        {"names": r"\bH100\b", "capability": 10.3},
        {"link_gb_s": 350, "network_gb_s": 45},
    ],
)
def test_remedies_of_hardware_files_are_valid(changes: dict[str, Any], tmp_path: Path) -> None:
    load_hardware(write_file(tmp_path, changes))
