"""Configuration of a run: folder, steps, optimizer, checkpoints, faults, validation and log."""

import math
from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class RunConfig:
    """Name, folder, seed, where to go on from, and when to stop.

    `resume`: `auto` goes on from this run's newest good checkpoint, `never` refuses a folder that
    holds one, and a path goes on from that checkpoint. `init_from` names weights that a run without
    checkpoints begins from instead of random ones: a checkpoint, a Hugging Face folder or a Meta
    folder. `allow_changes` names the keys that may
    differ from the run's last start although they change what is computed. `time_limit`, in
    minutes from the start, is kept by saving and stopping before it; under SLURM the job's own
    limit counts too. `plan_check` says what becomes of a run whose ranks would need more memory
    than they have: it is refused, or begun with a warning.
    """

    name: str
    dir: str
    seed: int = 0
    resume: str = "auto"
    init_from: str | None = None
    allow_changes: list[str] = field(default_factory=list)
    time_limit: float | None = None
    plan_check: Literal["refuse", "warn", "off"] = "refuse"

    def problems(self) -> list[str]:
        """Every broken rule, as messages that name key, value, rule and remedy."""
        found = []
        if not self.name or "/" in self.name or self.name.startswith("."):
            found.append(
                f"run.name ({self.name!r}) is not a folder's name: use letters, digits, - and _"
            )
        if not 0 <= self.seed < 2**63:
            found.append(f"run.seed ({self.seed}) is not in [0, 2**63): use a smaller number")
        if self.init_from is not None and self.resume not in ("auto", "never"):
            found.append(
                f"run.resume ({self.resume}) goes on from a checkpoint with its optimizer, and "
                f"run.init_from ({self.init_from}) begins with weights alone: use one of them"
            )
        if self.time_limit is not None and not 0 < self.time_limit < math.inf:
            found.append(
                f"run.time_limit ({self.time_limit}) is not above 0: use minutes, or null for none"
            )
        return found


@dataclass(frozen=True)
class TrainConfig:
    """Length and shape of the run; batch sizes count sequences of `seq_len` tokens.

    `micro_batch_size` is what one data rank computes at a time; null takes its whole share.
    """

    max_steps: int
    global_batch_size: int
    seq_len: int
    micro_batch_size: int | None = None
    max_grad_norm: float | None = 1.0

    def problems(self) -> list[str]:
        """Every broken rule, as messages that name key, value, rule and remedy."""
        found = [
            f"train.{key} ({value}) is below 1: use at least 1"
            for key in ("max_steps", "global_batch_size", "seq_len", "micro_batch_size")
            if (value := getattr(self, key)) is not None and value < 1
        ]
        if self.max_grad_norm is not None and self.max_grad_norm <= 0:
            found.append(
                f"train.max_grad_norm ({self.max_grad_norm}) is not above 0: use null for no clip"
            )
        return found


@dataclass(frozen=True)
class OptimConfig:
    """AdamW and its learning-rate schedule; all lengths are in steps.

    `schedule_steps` is where the schedule ends (default: `train.max_steps`), so that a run can be
    stopped earlier with the same learning rates. `decay_ratio` is the share of the schedule that
    `wsd` spends decaying at the end.
    """

    lr: float
    optimizer: Literal["adamw"] = "adamw"
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    schedule: Literal["cosine", "wsd", "linear"] = "cosine"
    schedule_steps: int = 1
    warmup_steps: int = 0
    min_lr_ratio: float = 0.1
    decay_ratio: float = 0.2

    def problems(self) -> list[str]:
        """Every broken rule, as messages that name key, value, rule and remedy."""
        found = [
            f"optim.{key} ({value}) is not above 0: use a positive number"
            for key in ("lr", "eps", "schedule_steps")
            if (value := getattr(self, key)) <= 0
        ]
        found += [
            f"optim.{key} ({value}) is below 0: use 0 to switch it off"
            for key in ("weight_decay", "warmup_steps")
            if (value := getattr(self, key)) < 0
        ]
        found += [
            f"optim.{key} ({value}) is not between 0 and 1: use a share of the whole"
            for key in ("min_lr_ratio", "decay_ratio")
            if not 0 <= (value := getattr(self, key)) <= 1
        ]
        if not all(0 <= beta < 1 for beta in self.betas):
            found.append(
                f"optim.betas ({self.betas}) are not in [0, 1): use for example [0.9, 0.95]"
            )
        return found


@dataclass(frozen=True)
class CheckpointConfig:
    """When checkpoints are saved, which of them stay, and what a failing one means.

    One every `interval` steps and one every `interval_minutes`, each null for never; at the end of
    the run always. The newest `keep_last` stay (null: all), and those of every `keep_every`-th
    step. `async_save` writes while training goes on; `when_busy` says whether a save that finds
    the one before still being written waits for it or is left out, `on_failure` whether a failed
    one stops the run or is only told.
    """

    interval: int | None = 100
    interval_minutes: float | None = None
    keep_last: int | None = 3
    keep_every: int | None = None
    async_save: bool = True
    when_busy: Literal["wait", "skip"] = "wait"
    on_failure: Literal["stop", "continue"] = "stop"

    def problems(self) -> list[str]:
        """Every broken rule, as messages that name key, value, rule and remedy."""
        found = [
            f"checkpoint.{key} ({value}) is below 1: use null to switch it off"
            for key in ("interval", "keep_last", "keep_every")
            if (value := getattr(self, key)) is not None and value < 1
        ]
        if self.interval_minutes is not None and not 0 < self.interval_minutes < math.inf:
            found.append(
                f"checkpoint.interval_minutes ({self.interval_minutes}) is not above 0: "
                "use null to switch it off"
            )
        return found


@dataclass(frozen=True)
class FaultsConfig:
    """What losses and gradients that are not finite, or far too large, lead to.

    An update that is not finite is skipped. After `max_consecutive_skips` of them the run rewinds
    to
    its last good checkpoint and leaves out the samples of those steps, at most `max_rewinds`
    times. A
    loss more than `spike_threshold` standard deviations above the running mean is told (null:
    never), and rewound like the others where `rewind_on_spike` is set.
    """

    max_consecutive_skips: int = 3
    max_rewinds: int = 3
    spike_threshold: float | None = 8.0
    rewind_on_spike: bool = False

    def problems(self) -> list[str]:
        """Every broken rule, as messages that name key, value, rule and remedy."""
        found = []
        if self.max_consecutive_skips < 1:
            found.append(
                f"faults.max_consecutive_skips ({self.max_consecutive_skips}) is below 1: use at"
                " least 1"
            )
        if self.max_rewinds < 0:
            found.append(f"faults.max_rewinds ({self.max_rewinds}) is below 0: use 0 for none")
        if self.spike_threshold is not None and not self.spike_threshold > 0:
            found.append(
                f"faults.spike_threshold ({self.spike_threshold}) is not above 0: "
                "use null to switch it off"
            )
        if self.rewind_on_spike and self.spike_threshold is None:
            found.append(
                "faults.rewind_on_spike (true) needs a threshold: set faults.spike_threshold"
            )
        return found


@dataclass(frozen=True)
class WatchdogConfig:
    """How long the processes may take, in seconds, before the run ends with their stacks told.

    For the set-up (the first step included), for each step, for each checkpoint; null for ever.
    """

    setup_seconds: float | None = 1800
    step_seconds: float | None = 600
    checkpoint_seconds: float | None = 1800

    def problems(self) -> list[str]:
        """Every broken rule, as messages that name key, value, rule and remedy."""
        return [
            f"watchdog.{key} ({value}) is not above 0: use null to switch it off"
            for key in ("setup_seconds", "step_seconds", "checkpoint_seconds")
            if (value := getattr(self, key)) is not None and not value > 0
        ]


@dataclass(frozen=True)
class ValidationConfig:
    """Validation on `samples` windows every `interval` steps, with a text sample beside it.

    `samples: 0` trains without validation. `sample_tokens` tokens are generated after `prompt`
    into `samples.txt`; 0 switches that off.
    """

    interval: int | None = 100
    samples: int = 64
    prompt: str = ""
    sample_tokens: int = 64
    temperature: float = 0.8

    def problems(self) -> list[str]:
        """Every broken rule, as messages that name key, value, rule and remedy."""
        found = []
        if self.interval is not None and self.interval < 1:
            found.append(f"validation.interval ({self.interval}) is below 1: use null for none")
        if self.samples < 0:
            found.append(f"validation.samples ({self.samples}) is below 0: use 0 for none")
        if self.sample_tokens < 0:
            found.append(
                f"validation.sample_tokens ({self.sample_tokens}) is below 0: use 0 for none"
            )
        if self.temperature < 0:
            found.append(
                f"validation.temperature ({self.temperature}) is below 0: use 0 for the likeliest"
            )
        return found


@dataclass(frozen=True)
class LogConfig:
    """A line of figures every `interval` steps; `wandb` is a project's name or null.

    `profile` lists the steps that are looked into: a profiler trace, a memory snapshot on GPUs, and
    a table of where the time went, in the run's folder.
    """

    interval: int = 10
    tensorboard: bool = True
    wandb: str | None = None
    profile: list[int] | None = None

    def problems(self) -> list[str]:
        """Every broken rule, as messages that name key, value, rule and remedy."""
        found = []
        if self.interval < 1:
            found.append(f"log.interval ({self.interval}) is below 1: use at least 1")
        if self.profile is not None and (not self.profile or min(self.profile) < 1):
            found.append(
                f"log.profile ({self.profile}) lists no steps, which count from 1: use for example "
                "[20,21], or null to look into none"
            )
        return found
