"""The learning rate: a closed form of the step, so that no schedule has a state to save."""

import math

from training.config import OptimConfig


def learning_rate(step: int, config: OptimConfig) -> float:
    """Learning rate of a step (counted from 0): linear warm-up, then the schedule.

    `cosine` and `linear` fall from `lr` to `min_lr_ratio · lr` over the steps after the warm-up;
    `wsd` holds `lr` and falls linearly over the last `decay_ratio` of the schedule (Hu et al.
    2024, arXiv:2404.06395), or over all that the warm-up leaves where that is less. Beyond the
    schedule's end the rate stays at its last value.
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    length = max(config.schedule_steps - config.warmup_steps, 1)
    progress = min((step - config.warmup_steps) / length, 1.0)
    if config.schedule == "cosine":
        height = 0.5 * (1 + math.cos(math.pi * progress))
    elif config.schedule == "linear":
        height = 1 - progress
    else:
        share = config.decay_ratio * config.schedule_steps / length
        decay = min(max(share, 1 / length), 1.0)
        height = min((1 - progress) / decay, 1.0)
    return config.lr * (config.min_lr_ratio + (1 - config.min_lr_ratio) * height)
