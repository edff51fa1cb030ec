"""A run configuration in the planner's terms: its stages and the rules for valid choices.

`Choice` holds the settings that a search varies; `PlanRequest` maps a choice to the training steps
it results in. Imports no heavy packages.
"""

from dataclasses import dataclass, replace
from typing import Literal

from data.config import DataConfig
from model.config import ModelConfig
from parallel.config import ParallelConfig, PrecisionConfig
from parallel.mesh import AXES, MeshShape
from planning.step_spec import StepSpec, resolved_precision
from training.config import JobConfig, TrainConfig
from training.config_rules import (
    batch_errors,
    device_errors,
    for_every_stage,
    fp8_size_errors,
    mesh_errors,
)

CheckpointMode = Literal["none", "full", "selective"] | float
ReduceMode = Literal["step", "micro_batch"]


@dataclass(frozen=True)
class Choice:
    """One candidate of a search: a mesh and how each rank computes on it."""

    mesh: MeshShape
    micro_batch_size: int | None
    activation_checkpoint: CheckpointMode
    reshard_after_forward: bool | None
    reduce_gradients: ReduceMode

    def parallel(self, base: ParallelConfig) -> ParallelConfig:
        """Return `base` with the values of this choice."""
        mesh = self.mesh
        return replace(
            base,
            dp_replicate=mesh.dp_replicate,
            dp_shard=mesh.dp_shard,
            cp=mesh.cp,
            tp=mesh.tp,
            activation_checkpoint=self.activation_checkpoint,
            reshard_after_forward=self.reshard_after_forward,
            reduce_gradients=self.reduce_gradients,
        )

    @property
    def reshard(self) -> str:
        """`reshard_after_forward` in command-line syntax."""
        return {None: "null", True: "true", False: "false"}[self.reshard_after_forward]

    @property
    def overrides(self) -> tuple[str, ...]:
        """Command-line overrides of `train.py` for this choice."""
        size = "null" if self.micro_batch_size is None else self.micro_batch_size
        return (
            *(f"parallel.{axis}={n}" for axis, n in zip(AXES, self.mesh.sizes, strict=True)),
            f"train.micro_batch_size={size}",
            f"parallel.activation_checkpoint={self.activation_checkpoint}",
            f"parallel.reshard_after_forward={self.reshard}",
            f"parallel.reduce_gradients={self.reduce_gradients}",
        )


def configured_choice(config: JobConfig, mesh: MeshShape) -> Choice:
    """Return the choice that a configuration makes itself."""
    parallel = config.parallel
    return Choice(
        mesh,
        config.train.micro_batch_size,
        parallel.activation_checkpoint,
        parallel.reshard_after_forward,
        parallel.reduce_gradients,
    )


class PlanRequest:
    """A configuration to be planned for some mesh, or searched for the best one.

    Args:
        tokens: Number of training tokens.
        hopper: Whether the devices are NVIDIA Hopper GPUs or newer.
    """

    def __init__(
        self, config: JobConfig, accelerator: str, tokens: int, hopper: bool = True
    ) -> None:
        self.config, self.accelerator, self.tokens = config, accelerator, tokens
        self.hopper = hopper
        self.precision = resolved_precision(config.precision, accelerator)

    def local_batch_size(self, mesh: MeshShape) -> int:
        """Return the sequences per data-parallel rank and step on a valid mesh."""
        return self.config.train.global_batch_size // mesh.dp

    def stages(self, choice: Choice) -> list[tuple[StepSpec, int]]:
        """Return (step, number of tokens) for each sequence length and batch size of the run."""
        config = self.config
        train = replace(config.train, micro_batch_size=choice.micro_batch_size)
        stages, _ = train.plan_stages(config.data)
        ends = [stage.first_token for stage in stages.all[1:]] + [self.tokens]
        tokens: dict[StepSpec, int] = {}
        for stage, end in zip(stages.all, ends, strict=True):
            stage_tokens = min(end, self.tokens) - stage.first_token
            if stage_tokens <= 0 and stage.first_token:
                continue  # beyond the end of the run
            spec = StepSpec(
                model=config.model,
                mesh=choice.mesh,
                parallel=choice.parallel(config.parallel),
                precision=self.precision,
                accelerator="cuda" if self.accelerator == "cuda" else "cpu",
                seq_len=stage.seq_len,
                global_batch_size=stage.global_batch_size,
                micro_batch_size=stage.micro_batch_size
                or stage.global_batch_size // choice.mesh.dp,
                document_mask=config.data.document_mask,
            )
            tokens[spec] = tokens.get(spec, 0) + stage_tokens
        return list(tokens.items())

    def mesh_errors(self, mesh: MeshShape) -> list[str]:
        """Return the validation errors of `train.py` for a mesh with the entire local batch."""
        config = self.config
        return planned_errors(
            self.accelerator,
            mesh,
            config.parallel,
            self.precision,
            config.model,
            replace(config.train, micro_batch_size=None),
            config.data,
            self.hopper,
        )

    def choice_errors(self, choice: Choice) -> list[str]:
        """Return the remaining validation errors of a choice on a valid mesh.

        Without stages and fp8 there are none, as micro-batch sizes divide the local batch.
        """
        config = self.config
        if self.precision.fp8 is None and not config.data.stages:
            return []
        train = replace(config.train, micro_batch_size=choice.micro_batch_size)
        return for_every_stage(
            train,
            config.data,
            lambda sizes: (
                list(batch_errors(choice.mesh, sizes))
                or fp8_size_errors(choice.mesh, self.precision, config.model, sizes)
            ),
        )


def planned_errors(
    accelerator: str,
    mesh: MeshShape,
    parallel: ParallelConfig,
    precision: PrecisionConfig,
    model: ModelConfig,
    train: TrainConfig,
    data: DataConfig,
    hopper: bool,
) -> list[str]:
    """Apply the rules of `train.py` to a mesh of devices that need not be present."""
    return [
        *device_errors(accelerator, mesh, parallel, precision, model, lambda: hopper),
        *mesh_errors(mesh, parallel, precision, model, train, data),
    ]
