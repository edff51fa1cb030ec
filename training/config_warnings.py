"""Warnings about valid configurations that are probably not intended, printed before launch.

Each function yields messages with key, value, consequence and remedy. Like the rules of
`training.config_rules`, it names the sections that it needs as parameters. Imports nothing heavy.
"""

import inspect
import math
from bisect import bisect_left
from collections.abc import Iterator

from checkpoint.config import CheckpointConfig
from model.config import ModelConfig
from model.flops import parameter_count
from parallel.config import ParallelConfig
from training.config import JobConfig, OptimConfig, RunConfig, TrainConfig, ValidationConfig

RECIPE_RATES = (
    (1.312e6, 4e-3),
    (1.236e9, 3e-4),
    (8.03e9, 3e-4),
    (70.55e9, 1.5e-4),
    (405.9e9, 8e-5),
)
"""Parameters and peak learning rates of the models in conf/model (docs/recipes.md)."""
SHORT_RUN = 50  # steps; below, one save and one validation at the end are usually intended
FAR_ABOVE = 5  # times the recipe


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
    """Yield a warning for each interval that is longer than the run, unless that is a short one."""
    steps = train.max_steps
    if steps < SHORT_RUN:
        return
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


def learning_rate_warnings(run: RunConfig, model: ModelConfig, optim: OptimConfig) -> Iterator[str]:
    """Yield a warning if the learning rate is far above the recipes of models of this size."""
    n_parameters = parameter_count(model)
    recipe = recipe_learning_rate(n_parameters)
    size = f"a model of {n_parameters:,} parameters"
    if run.init_from is not None and optim.lr > recipe:
        yield (
            f"optim.lr={optim.lr:g} is above the recipe for training {size} from scratch, and the "
            f"run continues from run.init_from={run.init_from}: it may forget what these weights "
            f"have learned; use optim.lr={recipe / 10:.1g}"
        )
    elif optim.lr > FAR_ABOVE * recipe:
        yield (
            f"optim.lr={optim.lr:g} is far above the recipe for {size}: the loss may diverge; use "
            f"optim.lr={recipe:.1g}"
        )


def async_tp_warnings(parallel: ParallelConfig, train: TrainConfig) -> Iterator[str]:
    """Yield a warning if the compiler finds few patterns of async TP (measured by tests/cuda)."""
    if parallel.async_tp and train.micro_batch_size == 1:
        yield (
            "parallel.async_tp=true overlaps 2 of the 8 collectives of a block with "
            "train.micro_batch_size=1, and 6 from 2 on; use train.micro_batch_size=2 if it fits"
        )


def recipe_learning_rate(n_parameters: int) -> float:
    """Return the peak learning rate of a model size, interpolated between `RECIPE_RATES`."""
    sizes, rates = zip(*RECIPE_RATES, strict=True)
    above = bisect_left(sizes, n_parameters)
    if above in (0, len(sizes)):
        return rates[min(above, len(sizes) - 1)]
    low, high = above - 1, above
    fraction = math.log(n_parameters / sizes[low]) / math.log(sizes[high] / sizes[low])
    return rates[low] * (rates[high] / rates[low]) ** fraction


WARNING_RULES = (learning_rate_warnings, warmup_warnings, interval_warnings, async_tp_warnings)


def config_warnings(config: JobConfig) -> Iterator[str]:
    """Yield the warnings about a valid configuration."""
    for rule in WARNING_RULES:
        names = inspect.signature(rule).parameters
        yield from rule(**{name: getattr(config, name) for name in names})
