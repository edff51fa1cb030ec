"""Configuration of `plan.py`: the one of `train.py`, the hardware, and what to plan."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from data.config import DataConfig
from model.config import ModelConfig
from model.config_base import PositiveInt
from parallel.config import ParallelConfig, PrecisionConfig
from parallel.mesh import MeshShape, resolve_mesh
from planning.frameworks import FRAMEWORKS
from planning.hardware import Hardware, Positive
from planning.request import PlanRequest
from training.config import JobConfig, TrainConfig
from training.config_rules import device_errors, mesh_errors, other_axes_errors


@dataclass(frozen=True)
class PlanJobConfig(JobConfig):
    """Root configuration of `plan.py`; conf/plan.yaml documents its own keys."""

    hardware: Hardware
    devices: PositiveInt | None
    tokens: PositiveInt | None
    device_mtbf_days: Positive
    restart_seconds: Positive | None
    flash_attention_impl: Literal["FA2", "FA3", "FA4", "cuDNN", "Triton"]
    framework: str
    power_limit_watts: Positive | None
    trace: bool
    search: bool
    search_fp8: bool
    smallest: bool
    calibrate: bool
    output: str | None

    @property
    def device(self) -> Hardware:
        """The hardware with its power limit."""
        limit = self.power_limit_watts
        return self.hardware if limit is None else self.hardware.with_power_limit(limit)

    @property
    def searches(self) -> bool:
        """Whether mesh and settings are searched."""
        return self.search or self.smallest or self.parallel.auto

    @property
    def n_devices(self) -> int:
        """Devices of the mesh."""
        return planned_devices(self.parallel, self.hardware, self.devices)

    @property
    def devices_text(self) -> str:
        """The number of devices, and that a node is planned where none is given."""
        parallel, number = self.parallel, self.n_devices
        given = (self.devices, parallel.devices, parallel.num_nodes)
        fixed = parallel.dp_shard != -1 and not self.searches
        if fixed or any(given) or self.hardware.accelerator == "cpu":
            return f"{number:,}"
        nodes = -(-number // self.hardware.devices_per_node)
        planned = "one node is" if nodes == 1 else f"{nodes} nodes are"
        return f"{number:,}: devices is not given, so {planned} planned"

    @property
    def mesh(self) -> MeshShape:
        """The mesh of the configuration."""
        return resolve_mesh(self.parallel, self.n_devices)[0]

    @property
    def token_budget(self) -> int:
        """Tokens to train on."""
        return self.tokens or self.stages().first_token(self.train.max_steps)

    @property
    def request(self) -> PlanRequest:
        hardware = self.hardware
        capability, tokens = hardware.compute_capability, self.token_budget
        return PlanRequest(
            self,
            hardware.accelerator,
            tokens,
            capability,
            self.flash_attention_impl,
            self.framework,
            search_fp8=self.search_fp8,
        )


def planned_devices(parallel: ParallelConfig, hardware: Hardware, devices: int | None) -> int:
    """Return the number of devices to plan for.

    That is `devices` if given, else what axes and nodes need. Where `dp_shard=-1`, a GPU node is
    used completely: the fewest complete nodes that fit the other axes.
    """
    if devices is not None:
        return devices
    others = parallel.dp_replicate * parallel.pp * parallel.cp * parallel.tp
    if parallel.dp_shard != -1:
        return others * parallel.dp_shard
    if parallel.devices is not None:
        return parallel.devices * (parallel.num_nodes or 1)
    if hardware.accelerator == "cpu":
        return others
    on_nodes = hardware.devices_per_node * (parallel.num_nodes or 1)
    return -(-on_nodes // others) * others


def hardware_errors(
    parallel: ParallelConfig, precision: PrecisionConfig, hardware: Hardware
) -> Iterator[str]:
    """Yield errors for requirements that the hardware does not meet."""
    if parallel.accelerator not in ("auto", hardware.accelerator):
        yield (
            f"parallel.accelerator={parallel.accelerator} does not match hardware "
            f"{hardware.name} ({hardware.accelerator}); use parallel.accelerator=auto or another "
            "hardware"
        )
    if precision.fp8 is not None and "fp8" not in hardware.peak_tflops:
        yield (
            f"precision.fp8={precision.fp8} needs 8-bit matrix products, but hardware "
            f"{hardware.name} has none; use precision.fp8=null or hardware=h100"
        )


def flash_attention_errors(flash_attention_impl: str, hardware: Hardware) -> Iterator[str]:
    """Yield an error for a FlashAttention whose rate is unknown."""
    known = ("FA2", *hardware.flash_attention_tflops)
    if flash_attention_impl not in known:
        yield (
            f"flash_attention_impl={flash_attention_impl} has no rate for hardware "
            f"{hardware.name}; use flash_attention_impl={' or '.join(known)}"
        )


def node_errors(parallel: ParallelConfig, hardware: Hardware, devices: int | None) -> Iterator[str]:
    """Yield an error for a number of devices that is not that of the nodes."""
    nodes = parallel.num_nodes
    if devices is None or nodes is None:
        return
    per_node = parallel.devices or hardware.devices_per_node
    if parallel.devices is None and hardware.accelerator == "cpu":
        per_node = max(devices // nodes, 1)
    if devices != nodes * per_node:
        needed = "null" if devices % per_node else f"{devices // per_node}"
        yield (
            f"devices={devices} does not match parallel.num_nodes={nodes} with {per_node} devices "
            f"each; use devices={nodes * per_node}, or parallel.num_nodes={needed}"
        )


def planned_mesh_errors(
    parallel: ParallelConfig,
    precision: PrecisionConfig,
    model: ModelConfig,
    train: TrainConfig,
    data: DataConfig,
    hardware: Hardware,
    devices: int | None,
    search: bool,
    smallest: bool,
) -> list[str]:
    """Return the errors of the configured mesh; a search chooses its own."""
    if search or smallest or parallel.auto:
        return []
    mesh, errors = resolve_mesh(parallel, planned_devices(parallel, hardware, devices), "devices")
    if errors:
        return errors
    capability = hardware.compute_capability
    others = other_axes_errors(mesh, parallel, precision, model, train, data)
    return [
        *device_errors(hardware.accelerator, mesh, parallel, precision, model, capability),
        *mesh_errors(mesh, parallel, precision, model, train, data),
        *(others if devices is not None else ()),
    ]


def framework_errors(framework: str) -> Iterator[str]:
    """Yield an error for a framework that is not modelled."""
    if framework not in FRAMEWORKS:
        yield f"framework={framework} is not known; use {', '.join(FRAMEWORKS)}"


def power_limit_errors(power_limit_watts: float | None, hardware: Hardware) -> Iterator[str]:
    """Yield an error for a limit above that of the hardware file."""
    most = hardware.power_watts
    if power_limit_watts is None or (most is not None and power_limit_watts <= most):
        return
    key = f"power_limit_watts={power_limit_watts:g}"
    if most is None:
        yield (
            f"{key} scales the rates of hardware {hardware.name}, whose limit is unknown; add "
            "power_watts to its file, or use power_limit_watts=null"
        )
    else:
        yield (
            f"{key} is above power_watts={most:g} of hardware {hardware.name}; use at most "
            f"{most:g}, or power_limit_watts=null"
        )


def search_errors(
    search: bool,
    search_fp8: bool,
    smallest: bool,
    devices: int | None,
    parallel: ParallelConfig,
) -> Iterator[str]:
    """Yield errors for keys of a search without one, and for a number of devices to be found."""
    if search_fp8 and not (search or smallest or parallel.auto):
        yield "search_fp8=true has no effect without a search; use search=true or search_fp8=false"
    if smallest and devices is not None:
        yield (
            f"smallest=true finds the number of devices, but devices={devices}; use devices=null "
            "or smallest=false"
        )


def output_errors(output: str | None) -> Iterator[str]:
    """Yield an error for a file that the plot would replace."""
    if output is not None and Path(output).suffix.lower() == ".png":
        json = Path(output).with_suffix(".json")
        yield (
            f"output={output} is the name of the plot next to the plan; use output={json}, whose "
            "plot has this name"
        )


PLAN_RULES = (
    *(hardware_errors, flash_attention_errors, framework_errors, power_limit_errors),
    *(search_errors, output_errors, node_errors, planned_mesh_errors),
)
