"""Root configuration of `train.py` and the sections of `training`. Imports nothing heavy."""

import math
from dataclasses import dataclass, field
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Interval, Lt, MinLen

from checkpoint.config import CheckpointConfig
from data.config import SAMPLES_TAKEN, DataConfig, TokenizerConfig
from data.stages import Stages, plan_stages
from model.config import ModelConfig
from model.config_base import FREE, ConfigSection, PositiveInt, ResumePolicy
from parallel.config import ParallelConfig, PrecisionConfig
from resilience.config import FaultsConfig, WatchdogConfig

Beta = Annotated[float, Interval(ge=0, lt=1)]
UPDATES = ResumePolicy("override", "all later updates")


@dataclass(frozen=True)
class RunConfig(ConfigSection):
    """Name and folder of a run, its seed, initial state and time limit.

    Attributes:
        resume: `auto` resumes from the newest valid checkpoint of this run, `never` rejects a
            folder that has one, a path starts from that checkpoint or the newest of that run.
        init_from: Initial weights of a run without checkpoints: a run folder (its newest valid
            checkpoint), a checkpoint, a Hugging Face or a Meta folder.
        branch: Checkpoint of a run with a constant learning rate, which this run decays.
        allow_changes: Keys that may differ from the previous launch although they affect results;
            `rewinds.json` rebuilds that file if it is damaged or missing.
        adopt: Whether to continue from checkpoints in the run folder that another run saved.
        time_limit: Minutes from launch; the run saves and stops before it. SLURM's own limit
            counts too.
        plan_check: Whether to reject a run that does not fit into memory, or only warn.
    """

    name: Annotated[str, FREE]
    dir: Annotated[str, FREE]
    seed: Annotated[
        int, Interval(ge=0, lt=2**63), ResumePolicy("forbidden", "the order of all samples")
    ] = 0
    resume: Annotated[str, FREE] = "auto"
    init_from: Annotated[str | None, ResumePolicy("forbidden", "the initial weights")] = None
    branch: Annotated[str | None, FREE] = None
    allow_changes: Annotated[list[str], FREE] = field(default_factory=list)
    adopt: Annotated[bool, FREE] = False
    time_limit: Annotated[Annotated[float, Gt(0), Lt(math.inf)] | None, FREE] = None
    plan_check: Annotated[Literal["refuse", "warn", "off"], FREE] = "refuse"


@dataclass(frozen=True)
class TrainConfig(ConfigSection):
    """Length of the run and shape of its batches; batch sizes count sequences of `seq_len` tokens.

    If `max_tokens` is set, `max_steps` is the number of steps that take at least as many tokens.
    `micro_batch_size` is per data rank and forward; None is the data rank's entire batch.
    `deterministic` makes equal runs on equal GPUs equal bit for bit, as they are on CPUs.
    """

    max_steps: Annotated[PositiveInt, FREE]
    global_batch_size: Annotated[PositiveInt, SAMPLES_TAKEN]
    seq_len: Annotated[PositiveInt, SAMPLES_TAKEN]
    max_tokens: Annotated[PositiveInt | None, FREE] = None
    micro_batch_size: Annotated[PositiveInt | None, FREE] = None
    max_grad_norm: Annotated[
        Annotated[float, Gt(0)] | None, ResumePolicy("override", "every update that is clipped")
    ] = 1.0
    deterministic: Annotated[bool, FREE] = False

    def plan_stages(self, data: DataConfig) -> tuple[Stages, list[str]]:
        """Return the stages of a run that starts with these sizes, and all errors."""
        return plan_stages(
            data,
            seq_len=self.seq_len,
            global_batch_size=self.global_batch_size,
            micro_batch_size=self.micro_batch_size,
        )


@dataclass(frozen=True)
class OptimConfig(ConfigSection):
    """Optimizer and learning-rate schedule; all lengths are in steps.

    `schedule_steps` is the end of the schedule (`train.max_steps` by default), so that a run can
    stop earlier with the same learning rates. `decay_ratio` is the fraction of the schedule that
    `wsd` decays over, and `decay_type` the form of that decay. `decay_start` is the step before
    the first one with a lower rate, instead of `decay_ratio`.
    """

    lr: Annotated[float, Gt(0), FREE]
    optimizer: Annotated[
        Literal["adamw"], ResumePolicy("forbidden", "the meaning of the moments", on_load=True)
    ] = "adamw"
    betas: Annotated[tuple[Beta, Beta], UPDATES] = (0.9, 0.95)
    eps: Annotated[float, Gt(0), UPDATES] = 1e-8
    weight_decay: Annotated[float, Ge(0), UPDATES] = 0.1
    schedule: Annotated[Literal["cosine", "wsd", "linear"], FREE] = "cosine"
    schedule_steps: Annotated[PositiveInt, FREE] = 160
    warmup_steps: Annotated[int, Ge(0), FREE] = 80
    min_lr_ratio: Annotated[float, Interval(ge=0, le=1), FREE] = 0.1
    decay_ratio: Annotated[float, Interval(ge=0, le=1), FREE] = 0.2
    decay_start: Annotated[PositiveInt | None, FREE] = None
    decay_type: Annotated[Literal["linear", "sqrt", "cosine", "exponential"], FREE] = "linear"


@dataclass(frozen=True)
class ValidationConfig(ConfigSection):
    """Validation on `samples` held-out windows every `interval` steps, with a generated sample.

    `samples=0` disables validation, `sample_tokens=0` the generated text after `prompt`,
    which starts a document if it is empty.
    """

    interval: PositiveInt | None = 40
    samples: Annotated[int, Ge(0)] = 64
    prompt: str = ""
    sample_tokens: Annotated[int, Ge(0)] = 64
    temperature: Annotated[float, Ge(0)] = 0.8


@dataclass(frozen=True)
class LogConfig(ConfigSection):
    """Metrics every `interval` steps; `wandb` is a project name.

    `profile` lists steps to profile: a trace, a memory snapshot on GPUs, and a table of where the
    time went, in the run folder.
    """

    interval: PositiveInt = 10
    tensorboard: bool = True
    wandb: str | None = None
    profile: Annotated[list[PositiveInt], MinLen(1)] | None = None


@dataclass(frozen=True)
class JobConfig(ConfigSection):
    """Root configuration of `train.py`."""

    run: RunConfig
    model: ModelConfig
    parallel: Annotated[ParallelConfig, FREE]
    precision: PrecisionConfig
    data: DataConfig
    tokenizer: TokenizerConfig
    train: TrainConfig
    optim: OptimConfig
    checkpoint: Annotated[CheckpointConfig, FREE]
    faults: Annotated[FaultsConfig, FREE]
    watchdog: Annotated[WatchdogConfig, FREE]
    validation: Annotated[ValidationConfig, FREE]
    log: Annotated[LogConfig, FREE]

    def stages(self) -> Stages:
        """The stages of the run; `stage_errors` has rejected those that do not fit the steps."""
        return self.train.plan_stages(self.data)[0]
