"""A run configuration in the planner's terms: its stages and the rules for valid choices.

`Choice` holds the settings that a search varies; `PlanRequest` maps a choice to the training steps
it results in. Imports no heavy packages.
"""

from copy import copy
from dataclasses import asdict, dataclass, replace
from typing import Literal

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
    fp8_errors,
    fp8_size_errors,
    interleaving_errors,
    mesh_errors,
    moment_errors,
    parallel_errors,
    pipeline_errors,
    precision_errors,
)

SEARCHED = (
    "pp_parts",
    "activation_checkpoint",
    "reshard_after_forward",
    "reduce_gradients",
    "compile",
    "async_tp",
)
"""Keys of `parallel` that a search varies in addition to the axes."""


@dataclass(frozen=True)
class Choice:
    """One candidate of a search: a mesh, with `dp_shard` resolved, and how each rank computes."""

    parallel: ParallelConfig
    micro_batch_size: int | None
    fp8: Literal["tensorwise", "rowwise"] | None = None

    @property
    def mesh(self) -> MeshShape:
        return MeshShape(**{axis: getattr(self.parallel, axis) for axis in AXES})

    @property
    def overrides(self) -> tuple[str, ...]:
        """Command-line overrides of `train.py` for this choice."""
        return (
            *(f"parallel.{axis}={getattr(self.parallel, axis)}" for axis in AXES),
            f"train.micro_batch_size={in_yaml(self.micro_batch_size)}",
            *(f"parallel.{key}={in_yaml(getattr(self.parallel, key))}" for key in SEARCHED),
            *(
                f"parallel.{key}={_list_in_yaml(getattr(self.parallel, key))}"
                for key in ("pp_layers", "pp_checkpoint")
                if self.parallel.pp > 1
            ),
            f"precision.fp8={in_yaml(self.fp8)}",
        )

    def settings(self) -> dict[str, str]:
        """Return the settings other than the mesh and the micro-batch, in command-line syntax."""
        values = {key: getattr(self.parallel, key) for key in SEARCHED} | {"fp8": self.fp8}
        return {key: in_yaml(value) for key, value in values.items()}

    def __str__(self) -> str:
        return " ".join(self.overrides)


def in_yaml(value: object) -> str:
    """Return a value in command-line syntax."""
    return {"None": "null", "True": "true", "False": "false"}.get(str(value), str(value))


def _list_in_yaml(values: tuple[object, ...] | None) -> str:
    """Return a list in command-line syntax."""
    return "null" if values is None else f"[{','.join(map(in_yaml, values))}]"


def is_open(key: str, value: object) -> bool:
    """Return whether a value leaves a key that a search varies to the search."""
    return (key, value) in (("parallel.dp_shard", -1), ("train.micro_batch_size", None))


def configured_choice(config: JobConfig, mesh: MeshShape) -> Choice:
    """Return the choice that a configuration makes itself."""
    parallel = replace(config.parallel, **asdict(mesh))
    return Choice(parallel, config.train.micro_batch_size, config.precision.fp8)


class PlanRequest:
    """A configuration to be planned for some mesh, or searched for the best one.

    Args:
        tokens: Number of training tokens.
        capability: Compute capability of the GPUs.
        flash_attention: Version of FlashAttention that is installed where the run runs.
        framework: Key of `planning.frameworks.FRAMEWORKS`.
        kept: Keys, such as `parallel.tp`, that a search does not vary.
        search_fp8: Search `precision.fp8`, which changes results.
    """

    def __init__(
        self,
        config: JobConfig,
        accelerator: str,
        tokens: int,
        capability: tuple[int, int] = HOPPER,
        flash_attention: str = "FA2",
        framework: str = DEFAULT,
        kept: frozenset[str] = frozenset(),
        search_fp8: bool = False,
    ) -> None:
        self.config, self.accelerator, self.tokens = config, accelerator, tokens
        self.capability, self.flash_attention = capability, flash_attention
        self.framework = framework
        self.precision = resolved_precision(config.precision, accelerator, capability)
        self.kept, self.search_fp8 = kept, search_fp8

    def keeping(self, *keys: str) -> "PlanRequest":
        """Return the request with more keys that a search does not vary, unless left open."""
        parallel, train = self.config.parallel, self.config.train
        values = {
            "parallel.dp_shard": parallel.dp_shard,
            "train.micro_batch_size": train.micro_batch_size,
        }
        request = copy(self)
        request.kept = self.kept | {key for key in keys if not is_open(key, values.get(key))}
        return request

    def without(self, *keys: str) -> "PlanRequest":
        """Return the request with fewer keys that a search does not vary."""
        request = copy(self)
        request.kept = self.kept - set(keys)
        return request

    @property
    def searches_fp8(self) -> bool:
        return self.search_fp8 and "precision.fp8" not in self.kept

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
                precision=replace(self.precision, fp8=choice.fp8),
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
        # Interleaved parts need several micro-batches; if single sequences do not do, no size does.
        size = 1 if parallel.pp_parts > 1 else None
        train = replace(self.config.train, micro_batch_size=size)
        accelerator, precision = self.accelerator, self.precision
        if self.searches_fp8:  # `choice_errors` checks it
            precision = replace(precision, fp8=None)
        if "parallel.async_tp" not in self.kept:  # which a search sets where it is supported
            parallel = replace(parallel, async_tp=False)
        # `choice_errors` checks these.
        parallel = replace(parallel, pp_parts=1, pp_layers=None, pp_checkpoint=None)
        return [
            *device_errors(accelerator, mesh, parallel, precision, model, self.capability),
            *mesh_errors(mesh, parallel, precision, model, train, data),
        ]

    def choice_errors(self, choice: Choice) -> list[str]:
        """Return the remaining validation errors of a choice on a valid mesh.

        Without stages, fp8, a given micro-batch and several parts per pipeline rank there are none,
        as sizes divide the local batch.
        """
        config, mesh, parallel = self.config, choice.mesh, choice.parallel
        if errors := list(pipeline_errors(mesh, parallel, config.model)):
            return errors
        is_given = "train.micro_batch_size" in self.kept or parallel.pp_parts > 1
        if choice.fp8 is None and not config.data.stages and not is_given:
            return []
        precision = replace(self.precision, fp8=choice.fp8)

        def size_errors(sizes: TrainConfig) -> list[str]:
            batch = list(batch_errors(mesh, sizes)) or [*interleaving_errors(mesh, parallel, sizes)]
            return batch or list(fp8_size_errors(mesh, precision, config.model, sizes))

        train = replace(config.train, micro_batch_size=choice.micro_batch_size)
        return for_every_stage(train, config.data, size_errors)

    def compute_errors(self, choice: Choice) -> list[str]:
        """Return the errors of `compile`, `async_tp` and a memory budget on the device."""
        model, parallel, precision = self.config.model, choice.parallel, self.precision
        device = (self.accelerator, choice.mesh, parallel, precision, model, self.capability)
        return [*parallel_errors(parallel), *device_errors(*device)]

    def fp8_recipes(self) -> list[Literal["tensorwise", "rowwise"] | None]:
        """Return the values of `precision.fp8` that a search plans on this device."""
        if not self.searches_fp8:
            return [self.config.precision.fp8]

        def is_supported(recipe: Literal["tensorwise", "rowwise"] | None) -> bool:
            precision = replace(self.precision, fp8=recipe)
            errors = fp8_errors(self.accelerator, precision, self.capability)
            return not any(errors) and not any(precision_errors(precision))

        recipes: tuple[Literal["tensorwise", "rowwise"] | None, ...]
        recipes = (None, "tensorwise", "rowwise")
        return [recipe for recipe in recipes if is_supported(recipe)]
