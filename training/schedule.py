"""Learning-rate schedules as closed forms of the step, so that no scheduler state is saved."""

import math

from training.config import OptimConfig


def learning_rate(step: int, config: OptimConfig) -> float:
    """Return the learning rate of a step (counted from 0): linear warm-up, then decay.

    `cosine` and `linear` decay from `lr` to `min_lr_ratio · lr` over the steps after the warm-up.
    `wsd` holds `lr` and decays linearly over the last `decay_ratio` of the schedule (Hu et al.
    2024, arXiv:2404.06395), or over all steps after the warm-up if those are fewer. After the end
    of the schedule the rate stays constant.
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    length = max(config.schedule_steps - config.warmup_steps, 1)
    progress = min((step - config.warmup_steps) / length, 1.0)
    if config.schedule == "cosine":
        factor = 0.5 * (1 + math.cos(math.pi * progress))
    elif config.schedule == "linear":
        factor = 1 - progress
    else:
        decay = config.decay_ratio * config.schedule_steps / length  # fraction of `length`
        decay = min(max(decay, 1 / length), 1.0)
        factor = min((1 - progress) / decay, 1.0)
    return config.lr * (config.min_lr_ratio + (1 - config.min_lr_ratio) * factor)
