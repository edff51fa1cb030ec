"""A device and its links, as the planner sees them: the contents of conf/hardware/*.yaml.

Every figure has a unit in its name. A peak is the data sheet's, without structured sparsity; what
is achieved comes from measurements of the operation alone, never from a training step that the
planner is held against. Calibration writes the same file. Imports nothing heavy.
"""

import dataclasses
import math
import re
from pathlib import Path
from typing import Any, Literal

FOLDER = Path(__file__).parent.parent / "conf" / "hardware"
PROCESS_GIB = 0.45
"""Of a process on CPU with its libraries and no tensor: what `bench.plan_search` finds."""


@dataclasses.dataclass(frozen=True)
class Hardware:
    """One kind of device, and how `devices_per_node` of them are linked.

    On GPUs the figures are a device's. On `cpu` they are a node's, which its ranks share, each of
    them a device of its own.

    Args:
        memory_gib: Of a device, or of the node.
        reserved_gib: Of it, what tensors of a rank cannot have: context, libraries, buffers of
            collectives, gaps of the allocator.
        peak_tflops, matrix_tflops: By precision; dense peak, and what large products achieve.
        attention_tflops: What the fused kernel achieves on causal attention of long sequences, in
            forward and backward together, counted as `model.flops` counts.
        bandwidth_gb_s: Achieved by a copy, bytes read and written together.
        link_gb_s, link_latency_us: Of a rank's link inside the node, one direction, achieved by
            collectives (on `cpu` of all ranks together), and what a collective takes at least.
        network_gb_s, network_latency_us: The same between nodes.
        price_per_hour: Of a device, in whatever currency; null where nobody said.
        names: Pattern of the names under which torch.cuda knows it.
    """

    name: str
    accelerator: Literal["cpu", "cuda"]
    memory_gib: float
    reserved_gib: float
    peak_tflops: dict[str, float]
    matrix_tflops: dict[str, float]
    attention_tflops: dict[str, float]
    bandwidth_gb_s: float
    link_gb_s: float
    link_latency_us: float
    network_gb_s: float
    network_latency_us: float
    devices_per_node: int
    price_per_hour: float | None = None
    names: str | None = None

    def problems(self) -> list[str]:
        """Every broken rule, as messages that name key, value, rule and remedy."""
        found = []
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            each = value.values() if isinstance(value, dict) else [value]
            if field.name in ("name", "accelerator", "names", "price_per_hour"):
                continue
            zero_too = "latency" in field.name or field.name == "reserved_gib"
            if not all(0 < one < math.inf or (zero_too and one == 0) for one in each):
                found.append(
                    f"hardware.{field.name} ({value}) is not above 0: use what the device has, or "
                    "plan.py calibrate=true"
                )
        for key in ("matrix_tflops", "attention_tflops"):
            if missing := self._missing(key):
                found.append(
                    f"hardware.{key} ({getattr(self, key)}) lacks {' and '.join(missing)}: add the "
                    "rate in TFLOP/s"
                )
        return found

    def _missing(self, key: str) -> list[str]:
        """Precisions that every device computes in, and of which nothing is said."""
        return [name for name in ("fp32", "bf16") if name not in getattr(self, key)]


def known_hardware() -> list[str]:
    """The names of the files in conf/hardware."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def load_hardware(name_or_path: str) -> Hardware:
    """The hardware of that name, or of that file.

    Raises:
        ValueError: there is none, or its figures are not what they should be.
    """
    import yaml
    from pydantic import TypeAdapter, ValidationError

    path = FOLDER / f"{name_or_path}.yaml"
    if not path.exists():
        path = Path(name_or_path)
    if not path.is_file():
        raise ValueError(
            f"hardware ({name_or_path}) is neither a name nor a file: use "
            f"{', '.join(known_hardware())}, or the path of what plan.py calibrate=true wrote"
        )
    try:
        given: Any = yaml.safe_load(path.read_text(encoding="utf-8"))
        hardware = TypeAdapter(Hardware).validate_python(given)
    except (yaml.YAMLError, ValidationError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"hardware file {path} cannot be read ({reason}): mend it") from None
    if problems := hardware.problems():
        raise ValueError(f"hardware file {path}: {'; '.join(problems)}")
    return hardware


def hardware_of(device_name: str) -> Hardware | None:
    """The hardware that torch.cuda calls by that name.

    None for cards that no file describes, and for a slice of a card (MIG): its rates are not the
    card's.
    """
    if " MIG " in f"{device_name} ":
        return None
    for name in known_hardware():
        hardware = load_hardware(name)
        if hardware.names is not None and re.search(hardware.names, device_name):
            return hardware
    return None
