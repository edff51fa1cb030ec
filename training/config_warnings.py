"""Warnings about valid configurations that are probably not intended, printed before launch.

Each function yields messages with key, value, consequence and remedy. Like the rules of
`training.config_rules`, it names the sections that it needs as parameters. Imports nothing heavy.
"""

import inspect
from collections.abc import Iterator

from checkpoint.config import CheckpointConfig
from training.config import JobConfig, OptimConfig, TrainConfig, ValidationConfig


def warmup_warnings(optim: OptimConfig) -> Iterator[str]:
    """Yield a warning if the learning rate never decays because the warm-up takes all steps."""
    warmup, steps = optim.warmup_steps, optim.schedule_steps
    if warmup >= steps:
        yield (
            f"optim.warmup_steps={warmup} is not below optim.schedule_steps={steps} "
            "(train.max_steps by default): the learning rate rises until the end and never "
            f"decays; use optim.warmup_steps={steps // 10} or a longer schedule"
        )


def interval_warnings(
    train: TrainConfig, checkpoint: CheckpointConfig, validation: ValidationConfig
) -> Iterator[str]:
    """Yield a warning for each interval that is longer than the run."""
    steps = train.max_steps
    at_end = f"exceeds train.max_steps={steps}"
    use = f"use a number up to {steps}, or null to do so only at the end"
    interval = checkpoint.interval
    if interval is not None and interval > steps and checkpoint.interval_minutes is None:
        yield (
            f"checkpoint.interval={interval} {at_end}: the only checkpoint is saved after the "
            f"last step; {use}"
        )
    interval = validation.interval
    validates = validation.samples or validation.sample_tokens
    if interval is not None and interval > steps and validates:
        yield (
            f"validation.interval={interval} {at_end}: the run is validated only after the last "
            f"step; {use}"
        )


WARNING_RULES = (warmup_warnings, interval_warnings)


def config_warnings(config: JobConfig) -> Iterator[str]:
    """Yield the warnings about a valid configuration."""
    for rule in WARNING_RULES:
        names = inspect.signature(rule).parameters
        yield from rule(**{name: getattr(config, name) for name in names})
