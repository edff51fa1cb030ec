"""Hardware descriptions: one kind of device and its links, as in conf/hardware/*.yaml.

Each number has its unit in the field name. Peaks are the data sheet's, without structured sparsity;
achieved rates are microbenchmarks of a single operation, never training steps that the planner is
validated against. Calibration writes the same format. Imports no heavy packages.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Literal

from annotated_types import Ge, Le

from model.config_base import ConfigSection, PositiveInt
from parallel.config import BF16_CAPABILITY
from resilience.safe_yaml import parse_yaml
from training.config_rules import HOPPER
from training.config_validation import ConfigError, validate

FOLDER = Path(__file__).parent.parent / "conf" / "hardware"
DEFAULT = "h100"
"""Name of the hardware file of a plan without a recipe."""
LOCAL = "local"
"""Name of the hardware file that `plan.py calibrate=true` writes."""
PROCESS_GIB = 0.45
"""Memory of a CPU process and its libraries without tensors, measured by `bench.plan_search`."""


PRODUCT_EXPONENT, ATTENTION_EXPONENT = 0.8, 0.5
"""Rates follow the power limit to this power; sources: `Hardware.with_power_limit`."""

LEAST, MOST = 1e-6, 1e9
"""Bounds of sizes, rates, times and prices. A kilobyte per second, a millisecond per million
operations and 32 years are beyond any device, and the plan's products of them are finite."""
Positive = Annotated[float, Ge(LEAST), Le(MOST)]
NonNegative = Annotated[float, Ge(0), Le(MOST)]


@dataclass(frozen=True)
class Hardware(ConfigSection):
    """One kind of device and the links between `devices_per_node` devices.

    On GPUs the numbers are per device. On `cpu` they are per node and shared by its ranks.

    Attributes:
        memory_gib: Memory of the device or node.
        reserved_gib: Memory per rank unavailable to tensors: context, libraries, fragmentation;
            NCCL's buffers are added (`planning.communicators`).
        peak_tflops, matrix_tflops: By data type: dense peak, and rate achieved by large matrix
            products.
        attention_tflops: Rate of the fused kernel in causal attention over long sequences, forward
            and backward, with FLOPs counted as in `model.flops`.
        flash_attention_tflops: The same in bf16, by version of FlashAttention (FA3, FA4) that
            replaces the kernel for document masks where its package is installed.
        bandwidth_gb_s: Achieved by a copy, bytes read plus bytes written.
        link_gb_s, link_latency_us: Per rank and direction inside a node, achieved by collectives
            (on `cpu`: all ranks together), and the minimum time of a collective.
        network_gb_s, network_latency_us: The same between nodes.
        host_memory_gib: Memory of a node with GPUs, which their processes share; null if unknown.
        storage_gb_s: Per node, at which checkpoints are written and read. It depends on the file
            system, and only the time limits of the watchdog depend on it.
        price_per_hour: Per device, in `currency`; 0 if it is free, null if unknown.
        currency: Code of ISO 4217, such as EUR.
        power_watts: Power limit of a device's board, at which the rates were measured; null if
            unknown.
        devices_per_pod: Devices that are connected without oversubscription; null: all.
        oversubscription: By how much the network between pods is slower than inside of one.
        names: Regular expression for the device name in torch.cuda.
        capability: Compute capability of a GPU, as in 9.0. null: 9.0 if it has a rate for fp8, else
            8.0.
        note: Printed with each plan.
    """

    name: str
    accelerator: Literal["cpu", "cuda"]
    memory_gib: Positive
    reserved_gib: NonNegative
    peak_tflops: dict[str, Positive]
    matrix_tflops: dict[str, Positive]
    attention_tflops: dict[str, Positive]
    bandwidth_gb_s: Positive
    link_gb_s: Positive
    link_latency_us: NonNegative
    network_gb_s: Positive
    network_latency_us: NonNegative
    devices_per_node: PositiveInt
    host_memory_gib: Positive | None = None
    storage_gb_s: Positive = 0.5
    price_per_hour: NonNegative | None = None
    currency: str = "USD"
    power_watts: Positive | None = None
    names: str | None = None
    capability: Positive | None = None
    flash_attention_tflops: dict[str, Positive] = field(default_factory=dict)
    devices_per_pod: PositiveInt | None = None
    oversubscription: Annotated[float, Ge(1), Le(MOST)] = 1.0
    note: str | None = None

    @property
    def compute_capability(self) -> tuple[int, int]:
        """`capability` as (major, minor), with null resolved."""
        if self.capability is None:
            return HOPPER if "fp8" in self.peak_tflops else BF16_CAPABILITY
        major, minor = divmod(round(10 * self.capability), 10)
        return major, minor

    def with_power_limit(self, watts: float) -> "Hardware":
        """Return the device with a lower power limit than that of its rates.

        Matrix products are limited by power: at 500 W an H100 multiplies bf16 matrices of 8,192 at
        585 TFLOP/s (github.com/pytorch/FBGEMM/pull/2546), at 700 W at 765
        (github.com/NVIDIA/cutlass/issues/1662), a power of 0.8. Attention keeps the tensor cores
        less busy; a power of 0.5 is assumed. Memory and links are not slower.

        Args:
            watts: At most `power_watts`, which must be known.
        """
        assert self.power_watts is not None
        part = watts / self.power_watts

        def scaled(rates: dict[str, float], exponent: float) -> dict[str, float]:
            return {key: rate * part**exponent for key, rate in rates.items()}

        return replace(
            self,
            name=f"{self.name} at {watts:g} W",
            power_watts=watts,
            matrix_tflops=scaled(self.matrix_tflops, PRODUCT_EXPONENT),
            attention_tflops=scaled(self.attention_tflops, ATTENTION_EXPONENT),
            flash_attention_tflops=scaled(self.flash_attention_tflops, ATTENTION_EXPONENT),
        )


# ---------------------------------------------------------------- rules


def missing_rate_errors(
    matrix_tflops: dict[str, float], attention_tflops: dict[str, float]
) -> Iterator[str]:
    """Yield an error for each table without a rate that every plan needs."""
    tables = {"matrix_tflops": matrix_tflops, "attention_tflops": attention_tflops}
    for key, rates in tables.items():
        if missing := [each for each in ("fp32", "bf16") if each not in rates]:
            yield f"hardware.{key}={rates} lacks {' and '.join(missing)}; add the rate in TFLOP/s"


def matrix_rate_errors(
    peak_tflops: dict[str, float], matrix_tflops: dict[str, float]
) -> Iterator[str]:
    """Yield errors for rates of matrix products without a peak or above it."""
    yield from _peak_errors("matrix_tflops", matrix_tflops, peak_tflops)


def attention_rate_errors(
    peak_tflops: dict[str, float], attention_tflops: dict[str, float]
) -> Iterator[str]:
    """Yield errors for rates of attention without a peak or above it."""
    yield from _peak_errors("attention_tflops", attention_tflops, peak_tflops)


def _peak_errors(key: str, rates: dict[str, float], peaks: dict[str, float]) -> Iterator[str]:
    for dtype, rate in rates.items():
        if dtype not in peaks:
            yield (
                f"hardware.{key}.{dtype}={rate:g} has no peak; add {dtype} to "
                "hardware.peak_tflops, or remove the rate"
            )
        elif rate > peaks[dtype]:
            yield (
                f"hardware.{key}.{dtype}={rate:g} is above hardware.peak_tflops.{dtype}="
                f"{peaks[dtype]:g}; use the achieved rate, at most the dense peak"
            )


def flash_attention_rate_errors(
    peak_tflops: dict[str, float], flash_attention_tflops: dict[str, float]
) -> Iterator[str]:
    """Yield errors for rates of FlashAttention above the peak of bf16."""
    peak = peak_tflops.get("bf16", math.inf)
    for name, rate in flash_attention_tflops.items():
        if rate > peak:
            yield (
                f"hardware.flash_attention_tflops.{name}={rate:g} is above "
                f"hardware.peak_tflops.bf16={peak:g}; use the achieved rate, at most the dense peak"
            )


def reserved_memory_errors(memory_gib: float, reserved_gib: float) -> Iterator[str]:
    """Yield an error if no memory remains."""
    if reserved_gib >= memory_gib:
        yield (
            f"hardware.reserved_gib={reserved_gib:g} is not below hardware.memory_gib="
            f"{memory_gib:g}; use the memory that tensors cannot have, such as "
            f"{min(3, memory_gib / 10):g}"
        )


def link_rate_errors(bandwidth_gb_s: float, link_gb_s: float, network_gb_s: float) -> Iterator[str]:
    """Yield errors for links faster than the memory that they read."""
    for key, rate in (("link_gb_s", link_gb_s), ("network_gb_s", network_gb_s)):
        if rate > bandwidth_gb_s:
            yield (
                f"hardware.{key}={rate:g} is above hardware.bandwidth_gb_s={bandwidth_gb_s:g}, the "
                "memory's; use gigabytes per second, rank and direction (8 Gb/s are 1)"
            )


def device_name_errors(names: str | None) -> Iterator[str]:
    """Yield an error for a pattern that is invalid, or that matches any name."""
    if names is None:
        return
    try:
        pattern = re.compile(names)
    except (re.error, OverflowError, RecursionError) as error:
        yield (
            f"hardware.names={names!r} is not a regular expression ({error}); use one such as "
            r"'\bH100\b', or null"
        )
        return
    if pattern.search(""):
        yield (
            f"hardware.names={names!r} matches every device; use a regular expression for the "
            r"name in torch.cuda, such as '\bH100\b', or null"
        )


def capability_errors(capability: float | None) -> Iterator[str]:
    """Yield an error for a number that is not MAJOR.MINOR."""
    if capability is not None and not (
        1 <= capability < 20 and math.isclose(10 * capability, round(10 * capability))
    ):
        yield (
            f"hardware.capability={capability:g} is not a compute capability MAJOR.MINOR; use a "
            "number such as 9.0, or null"
        )


def currency_errors(currency: str) -> Iterator[str]:
    """Yield an error for a currency that is not a code."""
    if not re.fullmatch("[A-Z]{3}", currency):
        yield (
            f"hardware.currency={currency!r} is not a code of ISO 4217; use three capital letters, "
            "such as USD or EUR"
        )


def oversubscription_errors(oversubscription: float, devices_per_pod: int | None) -> Iterator[str]:
    """Yield an error for a slower network between pods whose size is unknown."""
    if oversubscription > 1 and devices_per_pod is None:
        yield (
            f"hardware.oversubscription={oversubscription:g} applies between pods, but "
            "hardware.devices_per_pod=null; use hardware.devices_per_pod=1024 or the size of a "
            "pod, or hardware.oversubscription=1"
        )


RULES = (
    *(missing_rate_errors, matrix_rate_errors, attention_rate_errors, flash_attention_rate_errors),
    *(reserved_memory_errors, link_rate_errors, device_name_errors, capability_errors),
    *(currency_errors, oversubscription_errors),
)


# ---------------------------------------------------------------- files


def known_hardware() -> list[str]:
    """Return the names of the files in conf/hardware."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def load_hardware(name_or_path: str) -> Hardware:
    """Load a hardware description by name or path.

    Raises:
        ConfigError: The file is invalid, with all errors.
        ValueError: The file does not exist or is not YAML.
    """
    path = FOLDER / f"{name_or_path}.yaml"
    if not path.exists():
        path = Path(name_or_path)
    if not path.is_file():
        raise ValueError(
            f"hardware={name_or_path} is neither a known name nor a file; use "
            f"{', '.join(known_hardware())}, or the path of a file from plan.py calibrate=true"
        )
    try:
        values = parse_yaml(path.read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise ValueError("expected a mapping of keys to values")
        return validate(values, Hardware, RULES, prefix="hardware.", in_file=True)
    except ConfigError as error:
        errors = [f"hardware file {path}: {each}" for each in error.errors]
        raise ConfigError(errors) from None
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"invalid hardware file {path}: {reason}") from None


def hardware_of(device_name: str) -> Hardware | None:
    """Return the known hardware for a torch.cuda device name.

    Returns None for unknown devices and for MIG slices, whose rates differ from the full device.
    """
    if " MIG " in f"{device_name} ":
        return None
    known = map(load_hardware, known_hardware())
    return next((each for each in known if each.names and re.search(each.names, device_name)), None)
