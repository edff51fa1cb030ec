"""A run configuration in the planner's terms: its stages and the rules for valid choices.

`Choice` holds the settings that a search varies; `PlanRequest` maps a choice to the training steps
it results in. Imports no heavy packages.
"""

from copy import copy
from dataclasses import asdict, dataclass, replace

from parallel.config import ParallelConfig
from parallel.mesh import AXES, MeshShape
from planning.frameworks import DEFAULT
from planning.step_spec import StepSpec, resolved_precision
from training.config import JobConfig, TrainConfig
from training.config_rules import (
    HOPPER,
    batch_errors,
    device_errors,
    for_every_stage,
    fp8_size_errors,
    mesh_errors,
    moment_errors,
)

SEARCHED = ("activation_checkpoint", "reshard_after_forward", "reduce_gradients")
"""Keys of `parallel` that a search varies in addition to the axes."""


@dataclass(frozen=True)
class Choice:
    """One candidate of a search: a mesh, with `dp_shard` resolved, and how each rank computes."""

    parallel: ParallelConfig
    micro_batch_size: int | None

    @property
    def mesh(self) -> MeshShape:
        return MeshShape(*(getattr(self.parallel, axis) for axis in AXES))

    @property
    def overrides(self) -> tuple[str, ...]:
        """Command-line overrides of `train.py` for this choice."""
        return (
            *(f"parallel.{axis}={getattr(self.parallel, axis)}" for axis in AXES),
            f"train.micro_batch_size={in_yaml(self.micro_batch_size)}",
            *(f"parallel.{key}={in_yaml(getattr(self.parallel, key))}" for key in SEARCHED),
        )

    def __str__(self) -> str:
        return " ".join(self.overrides)


def in_yaml(value: object) -> str:
    """Return a value in command-line syntax."""
    return {"None": "null", "True": "true", "False": "false"}.get(str(value), str(value))


def configured_choice(config: JobConfig, mesh: MeshShape) -> Choice:
    """Return the choice that a configuration makes itself."""
    return Choice(replace(config.parallel, **asdict(mesh)), config.train.micro_batch_size)


class PlanRequest:
    """A configuration to be planned for some mesh, or searched for the best one.

    Args:
        tokens: Number of training tokens.
        capability: Compute capability of the GPUs.
        flash_attention: Version of FlashAttention that is installed where the run runs.
        framework: Key of `planning.frameworks.FRAMEWORKS`.
    """

    def __init__(
        self,
        config: JobConfig,
        accelerator: str,
        tokens: int,
        capability: tuple[int, int] = HOPPER,
        flash_attention: str = "FA2",
        framework: str = DEFAULT,
    ) -> None:
        self.config, self.accelerator, self.tokens = config, accelerator, tokens
        self.capability, self.flash_attention = capability, flash_attention
        self.framework = framework
        self.precision = resolved_precision(config.precision, accelerator, capability)

    def with_synchronous_saves(self) -> tuple["PlanRequest", str] | None:
        """Return the request without copies for asynchronous saves, and the overrides for it.

        Returns None if saves are synchronous already.
        """
        checkpoint = self.config.checkpoint
        if not checkpoint.async_save:
            return None
        changed = replace(checkpoint, async_save=False, when_busy="wait")
        config = replace(self.config, checkpoint=changed)
        overrides = "checkpoint.async_save=false"
        if checkpoint.when_busy != "wait":  # which has no effect then
            overrides += " checkpoint.when_busy=wait"
        request = copy(self)
        request.config = config
        return request, overrides

    def with_bf16_moments(self) -> tuple["PlanRequest", str] | None:
        """Return the request with AdamW's moments in bf16, and the override for it.

        Returns None if they are 16 bits or less already, or cannot decay in bf16.
        """
        precision = replace(self.config.precision, optimizer_state="bf16")
        is_fp32 = self.config.precision.optimizer_state == "fp32"
        if not is_fp32 or any(moment_errors(precision, self.config.optim)):
            return None
        request = copy(self)
        request.config = replace(self.config, precision=precision)
        request.precision = replace(self.precision, optimizer_state="bf16")
        return request, "precision.optimizer_state=bf16"

    def local_batch_size(self, mesh: MeshShape) -> int:
        """Return the sequences per data-parallel rank and step on a valid mesh."""
        return self.config.train.global_batch_size // mesh.dp

    def stages(self, choice: Choice) -> list[tuple[StepSpec, int]]:
        """Return (step, number of tokens) for each sequence length and batch size of the run."""
        config, mesh = self.config, choice.mesh
        train = replace(config.train, micro_batch_size=choice.micro_batch_size)
        stages = train.plan_stages(config.data)[0].all
        ends = [stage.first_token for stage in stages[1:]] + [self.tokens]
        tokens: dict[StepSpec, int] = {}
        for stage, end in zip(stages, ends, strict=True):
            stage_tokens = min(end, self.tokens) - stage.first_token
            if stage_tokens <= 0 and stage.first_token:
                continue  # beyond the end of the run
            batch_size = stage.global_batch_size
            spec = StepSpec(
                model=config.model,
                mesh=mesh,
                parallel=choice.parallel,
                precision=self.precision,
                accelerator="cuda" if self.accelerator == "cuda" else "cpu",
                capability=self.capability,
                flash_attention=self.flash_attention,
                framework=self.framework,
                seq_len=stage.seq_len,
                global_batch_size=batch_size,
                micro_batch_size=stage.micro_batch_size or batch_size // mesh.dp,
                document_mask=config.data.document_mask,
                async_save=config.checkpoint.async_save,
                prefetch=config.data.prefetch,
            )
            tokens[spec] = tokens.get(spec, 0) + stage_tokens
        return list(tokens.items())

    def mesh_errors(self, mesh: MeshShape) -> list[str]:
        """Return the validation errors of `train.py` for a mesh with the entire local batch.

        The devices need not be present.
        """
        model, parallel, data = self.config.model, self.config.parallel, self.config.data
        train = replace(self.config.train, micro_batch_size=None)
        accelerator, precision = self.accelerator, self.precision
        return [
            *device_errors(accelerator, mesh, parallel, precision, model, self.capability),
            *mesh_errors(mesh, parallel, precision, model, train, data),
        ]

    def choice_errors(self, choice: Choice) -> list[str]:
        """Return the remaining validation errors of a choice on a valid mesh.

        Without stages and fp8 there are none, as micro-batch sizes divide the local batch.
        """
        config, mesh = self.config, choice.mesh
        if self.precision.fp8 is None and not config.data.stages:
            return []

        def size_errors(sizes: TrainConfig) -> list[str]:
            batch = list(batch_errors(mesh, sizes))
            return batch or list(fp8_size_errors(mesh, self.precision, config.model, sizes))

        train = replace(config.train, micro_batch_size=choice.micro_batch_size)
        return for_every_stage(train, config.data, size_errors)
