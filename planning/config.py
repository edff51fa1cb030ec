"""The configuration of `plan.py`: that of `train.py`, a hardware, and what is asked about them."""

import dataclasses
from typing import Any, cast

from omegaconf import DictConfig

from cli.arguments import CONF, hydra_arguments, quoted
from cli.config import JobConfig, Rule, load_train_config
from data.config import DataConfig
from model.config import ModelConfig
from parallel.config import ParallelConfig, PrecisionConfig
from parallel.mesh import MeshShape, resolve_mesh
from planning.fit_check import planned_errors
from planning.hardware import Hardware, load_hardware
from training.config import TrainConfig
from training.config_rules import of_every_stage, saving_errors
from training.precision_rules import fp8_size_errors

SECTIONS = ("parallel", "precision", "model", "train", "data", "hardware", "devices", "search")


@dataclasses.dataclass(frozen=True)
class PlanJobConfig(JobConfig):
    """The whole configuration of `plan.py`; conf/plan.yaml explains its own keys."""

    hardware: Hardware
    devices: int | None
    tokens: int | None
    trace: bool
    search: bool
    calibrate: bool
    output: str | None

    @property
    def n_devices(self) -> int:
        """Of the whole mesh."""
        return planned_devices(self.parallel, self.hardware, self.devices)

    @property
    def mesh(self) -> MeshShape:
        """What the configuration itself asks for."""
        return resolve_mesh(self.parallel, self.n_devices)[0]

    @property
    def budget(self) -> int:
        """Tokens that are to be trained on."""
        return self.tokens or self.stages().first_token(self.train.max_steps)

    @property
    def hopper(self) -> bool:
        """Whether the hardware has the symmetric memory of NVIDIA GPUs from Hopper on."""
        return has_hopper(self.hardware)


def has_hopper(hardware: Hardware) -> bool:
    """Whether it is a GPU of Hopper or newer: with products in 8 bits, which A100 lacks."""
    return hardware.accelerator == "cuda" and "fp8" in hardware.peak_tflops


def planned_devices(parallel: ParallelConfig, hardware: Hardware, devices: int | None) -> int:
    """How many devices a plan is for.

    What `devices` says; or as many as the axes and nodes ask for; where an axis fills what is left,
    on GPUs the whole node, or the fewest whole nodes that the other axes fit into.
    """
    if devices is not None:
        return devices
    others = parallel.dp_replicate * parallel.cp * parallel.tp
    if parallel.dp_shard != -1:
        return others * parallel.dp_shard
    if parallel.devices is not None:
        return parallel.devices * (parallel.num_nodes or 1)
    if hardware.accelerator == "cpu" or others < 1:
        return max(others, 1)
    asked = hardware.devices_per_node * (parallel.num_nodes or 1)
    return -(-asked // others) * others


def load_plan_config(composed: DictConfig) -> PlanJobConfig:
    """The typed configuration of `plan.py`.

    Raises:
        ConfigError: every problem of keys, types, rules and mesh at once. A search chooses the mesh
            itself, so that of the configuration need not be one.
    """
    rules: tuple[Rule, ...] = (
        (("devices", "tokens"), _number_errors),
        (("parallel", "precision", "hardware"), _hardware_errors),
        (SECTIONS, _mesh_errors),
        (("checkpoint", "faults"), saving_errors),
    )
    return cast(PlanJobConfig, load_train_config(composed, *rules, program=PlanJobConfig))


def _number_errors(devices: int | None, tokens: int | None) -> list[str]:
    found = []
    if devices is not None and devices < 1:
        found.append(
            f"devices ({devices}) is below 1: use at least 1, or null for what parallel.* asks for"
        )
    if tokens is not None and tokens < 1:
        found.append(
            f"tokens ({tokens}) is below 1: use the budget in tokens, like 15e12, or null for "
            "train.max_steps steps"
        )
    return found


def _hardware_errors(
    parallel: ParallelConfig, precision: PrecisionConfig, hardware: Hardware
) -> list[str]:
    """What the hardware lacks for what is asked."""
    found = []
    if parallel.accelerator not in ("auto", hardware.accelerator):
        found.append(
            f"parallel.accelerator ({parallel.accelerator}) is not that of hardware "
            f"{hardware.name} ({hardware.accelerator}): use parallel.accelerator=auto, or another "
            "hardware"
        )
    if precision.fp8 is not None and not has_hopper(hardware):
        found.append(
            f"precision.fp8 ({precision.fp8}) needs products in 8 bits, and hardware "
            f"{hardware.name} has none: use precision.fp8=null, or hardware=h100"
        )
    return found


def _mesh_errors(
    parallel: ParallelConfig,
    precision: PrecisionConfig,
    model: ModelConfig,
    train: TrainConfig,
    data: DataConfig,
    hardware: Hardware,
    devices: int | None,
    search: bool,
) -> list[str]:
    """The rules that tie the configuration to the mesh of so many devices."""
    if search:
        return []
    mesh, problems = resolve_mesh(parallel, planned_devices(parallel, hardware, devices))
    if problems:
        return problems
    found = planned_errors(
        hardware.accelerator,
        mesh,
        parallel,
        precision,
        model,
        train,
        data,
        has_hopper(hardware),
    )
    return found + of_every_stage(
        train, data, lambda sizes: fp8_size_errors(mesh, precision, model, sizes)
    )


# ---------------------------------------------------------------- what a person types


def plan_arguments(arguments: list[str]) -> list[str]:
    """As `hydra_arguments`; a hardware that is a file takes the place of the group.

    Raises:
        SystemExit: after `--help`; and for a hardware that is neither known nor a file.
    """
    rewritten: list[str] = []
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if key == "hardware" and equals and not (CONF / key / f"{value}.yaml").is_file():
            rewritten += ["~hardware", *_of_file(value)]
        else:
            rewritten.append(argument)
    return hydra_arguments(rewritten, "plan")


def _of_file(name: str) -> list[str]:
    """The keys of a hardware file as words."""
    try:
        hardware = load_hardware(name)
    except (OSError, ValueError) as error:
        raise SystemExit(f"Not planned: {error}") from None
    return [f"++hardware.{key}={_word(one)}" for key, one in dataclasses.asdict(hardware).items()]


def _word(value: Any) -> str:
    """A value of YAML in Hydra's grammar."""
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}:{_word(one)}" for key, one in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(_word, value)) + "]"
    if isinstance(value, str):
        return quoted(value)
    return "null" if value is None else str(value).lower()
