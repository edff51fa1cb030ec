"""The learning rate equals a reference made of straight lines and a cosine between points."""

import math
import re
from dataclasses import replace
from itertools import pairwise

import pytest

from training.config import OptimConfig
from training.schedule import learning_rate, rate_jump_warning

LR, RATIO = 3e-4, 0.1
FORMS = ("linear", "sqrt", "cosine", "exponential")
CONFIGS = [
    OptimConfig(
        lr=LR,
        schedule=schedule,
        schedule_steps=steps,
        warmup_steps=warmup,
        min_lr_ratio=RATIO,
        decay_ratio=decay,
        decay_type=form,  # type: ignore[arg-type]
    )
    for schedule in ("cosine", "linear", "wsd")
    for steps, warmup in ((1000, 0), (1000, 100), (1000, 700), (10, 10), (7, 6), (1, 0))
    for decay in ((0.0, 0.2, 0.5, 1.0) if schedule == "wsd" else (0.2,))
    for form in (FORMS if schedule == "wsd" else ("linear",))
]


def name_of(config: OptimConfig) -> str:
    name = f"{config.schedule}-{config.schedule_steps}-{config.warmup_steps}-{config.decay_ratio:g}"
    return f"{name}-{config.decay_type}"


every_config = pytest.mark.parametrize("config", CONFIGS, ids=name_of)


def interpolate(step: float, points: list[tuple[float, float]]) -> float:
    """Interpolate linearly between (step, rate) points; constant after the last."""
    for (left, low), (right, high) in pairwise(points):
        if left <= step < right:
            return low + (high - low) * (step - left) / (right - left)
    return points[-1][1]


def reference_rate(step: int, config: OptimConfig) -> float:
    """Return the learning rate from points instead of formulas."""
    low, end = RATIO * LR, config.schedule_steps
    start: float = config.warmup_steps
    if step < start:
        return interpolate(step, [(-1, 0.0), (start - 1, LR), (start, LR)])
    if step >= max(end, start + 1):
        return low
    if config.schedule == "linear":
        return interpolate(step, [(start, LR), (end, low)])
    if config.schedule == "wsd":
        steps = min(max(config.decay_ratio * end, 1), end - start)
        if step < end - steps:
            return LR
        match config.decay_type:
            case "linear":
                return interpolate(step, [(end - steps, LR), (end, low)])
            case "sqrt":
                return LR - (LR - low) * interpolate(step, [(end - steps, 0), (end, 1)]) ** 0.5
            case "exponential":  # linear in the logarithm
                points = [(end - steps, math.log(LR)), (end, math.log(low))]
                return math.exp(interpolate(step, points))
        start = end - steps
    angle = interpolate(step, [(start, 0.0), (end, math.pi)])
    return low + (LR - low) * (1 + math.cos(angle)) / 2


@every_config
def test_rate_equals_reference_at_every_step(config: OptimConfig) -> None:
    """Both take a few float64 operations with errors of 1e-16 each."""
    for step in range(config.schedule_steps + 20):
        if config.schedule_steps == config.warmup_steps == step:
            continue  # no decay step exists, so any rate up to the peak is correct
        assert learning_rate(step, config) == pytest.approx(reference_rate(step, config), rel=1e-12)


def test_decay_start_replaces_the_ratio() -> None:
    wsd = OptimConfig(lr=LR, schedule="wsd", schedule_steps=90, warmup_steps=10, decay_ratio=0.2)
    for end in (80, 90, 200):
        rates = [
            learning_rate(s, replace(wsd, decay_start=72, schedule_steps=end)) for s in range(end)
        ]
        assert rates[10:73] == [LR] * 63 and rates[73] < LR
    same = replace(wsd, decay_start=72)
    assert all(learning_rate(s, same) == learning_rate(s, wsd) for s in range(100))


@every_config
def test_rate_is_positive_and_never_above_lr(config: OptimConfig) -> None:
    rates = [learning_rate(step, config) for step in range(config.schedule_steps + 20)]
    assert min(rates) > 0
    assert max(rates) <= LR * (1 + 1e-15)


@every_config
def test_rate_stays_at_minimum_after_schedule(config: OptimConfig) -> None:
    for step in (config.schedule_steps, config.schedule_steps + 1, 10 * config.schedule_steps):
        if step > config.warmup_steps:
            assert learning_rate(step, config) == pytest.approx(RATIO * LR, rel=1e-12)


@every_config
def test_rate_increases_only_during_warm_up(config: OptimConfig) -> None:
    rates = [learning_rate(step, config) for step in range(config.schedule_steps + 20)]
    warmup = rates[: config.warmup_steps]
    assert all(a < b for a, b in pairwise(warmup))
    assert all(a >= b for a, b in pairwise(rates[config.warmup_steps :]))


@pytest.mark.parametrize(
    "config", [c for c in CONFIGS if c.schedule_steps - c.warmup_steps > 1], ids=name_of
)
def test_rate_has_no_discontinuity(config: OptimConfig) -> None:
    """No change exceeds the change in the steepest segment; a single decay step is excluded."""
    left = config.schedule_steps - config.warmup_steps
    falling: float = left
    if config.schedule == "wsd":
        falling = min(max(config.decay_ratio * config.schedule_steps, 1), left)
    slopes = {"linear": math.pi / 2, "cosine": math.pi / 2, "exponential": math.log(1 / RATIO)}
    # √t is steepest at 0: its first step is the largest.
    decay = (
        math.sqrt(1 / falling)
        if config.decay_type == "sqrt"
        else (slopes[config.decay_type] / falling)
    )
    steepest = LR * max(1 / max(config.warmup_steps, 1), decay)
    rates = [learning_rate(step, config) for step in range(config.schedule_steps + 20)]
    assert max(abs(a - b) for a, b in pairwise(rates)) <= steepest * (1 + 1e-9)


def test_longer_schedule_that_raises_the_rate_is_reported_with_a_remedy() -> None:
    longer = OptimConfig(lr=LR, schedule_steps=240, warmup_steps=20, min_lr_ratio=RATIO)
    warning = rate_jump_warning(120, 120, longer)
    assert warning is not None and "from 3.00e-05 to 1." in warning
    remedy = re.search(r"use optim\.schedule_steps=(\d+)", warning)
    assert remedy is not None
    kept = replace(longer, schedule_steps=int(remedy[1]))
    assert learning_rate(120, kept) == pytest.approx(RATIO * LR)
    assert rate_jump_warning(120, 120, kept) is None
    # Early in the schedule the rates differ little, and during warm-up not at all.
    assert rate_jump_warning(40, 120, longer) is None
    assert rate_jump_warning(10, 120, longer) is None
    assert rate_jump_warning(120, 120, replace(longer, schedule="wsd")) is not None
