"""Learning-rate schedules as closed forms of the step, so that no scheduler state is saved."""

import math
from dataclasses import replace

from training.config import OptimConfig

FAR_ABOVE = 1.5  # times the rate before the change


def learning_rate(step: int, config: OptimConfig) -> float:
    """Return the learning rate of a step (counted from 0): linear warm-up, then decay.

    `cosine` and `linear` decay from `lr` to `min_lr_ratio · lr` over the steps after the warm-up.
    `wsd` holds `lr` and decays over the last `decay_ratio` of the schedule (Hu et al. 2024,
    arXiv:2404.06395), or over all steps after the warm-up if those are fewer. After the end of the
    schedule the rate stays constant.

    With t from 0 to 1 in the decay of `wsd` and r = `min_lr_ratio`, the rate is `lr` times

        linear         r + (1 − r) (1 − t)
        sqrt           r + (1 − r) (1 − √t)               Hägele et al. 2024, arXiv:2405.18392
        cosine         r + (1 − r) (1 + cos πt) / 2
        exponential    r^t
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    start, length = decay_steps(config)
    form: str = config.decay_type if config.schedule == "wsd" else config.schedule
    t = min(max((step - start) / length, 0.0), 1.0)
    if form == "exponential":
        return config.lr * config.min_lr_ratio**t
    factors = {
        "linear": 1 - t,
        "sqrt": 1 - math.sqrt(t),
        "cosine": 0.5 * (1 + math.cos(math.pi * t)),
    }
    return config.lr * (config.min_lr_ratio + (1 - config.min_lr_ratio) * factors[form])


def decay_steps(config: OptimConfig) -> tuple[float, float]:
    """Return the last step with the peak rate (the first is 0), and the length of the decay."""
    length: float = max(config.schedule_steps - config.warmup_steps, 1)
    end = config.warmup_steps + length
    if config.schedule == "wsd":
        decay = config.decay_ratio * config.schedule_steps
        if config.decay_start is not None:
            decay = end - config.decay_start
        length = min(max(decay, 1), length)
    return end - length, length


def rate_jump_warning(step: int, schedule_steps: int, config: OptimConfig) -> str | None:
    """Return a warning if a longer schedule raises the learning rate of a run that resumes.

    Args:
        step: The next step, counted from 0.
        schedule_steps: The former length of the schedule.
    """
    former = replace(config, schedule_steps=schedule_steps)
    rate, raised = learning_rate(step, former), learning_rate(step, config)
    if step < config.warmup_steps or raised <= FAR_ABOVE * rate:
        return None
    return (
        f"the longer schedule raises the learning rate from {rate:.2e} to {raised:.2e}; use "
        f"optim.schedule_steps={schedule_steps} to keep the former schedule"
    )
