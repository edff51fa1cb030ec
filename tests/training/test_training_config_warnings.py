"""Warnings before launch: each names key, value and a remedy after which it is not printed."""

import re
from dataclasses import replace
from typing import Any

import pytest
from run_config import default

from training.config import JobConfig
from training.config_warnings import config_warnings


def with_values(config: JobConfig, values: dict[str, Any]) -> JobConfig:
    """Return the configuration with the values of dotted keys."""
    for key, value in values.items():
        section, name = key.split(".")
        config = replace(config, **{section: replace(getattr(config, section), **{name: value})})
    return config


def warnings_of(**values: Any) -> list[str]:
    named = {key.replace("__", "."): value for key, value in values.items()}
    return list(config_warnings(with_values(default(), named)))


def test_default_run_has_no_warnings() -> None:
    assert warnings_of() == []


@pytest.mark.parametrize("key", ["checkpoint.interval", "validation.interval"])
def test_interval_longer_than_the_run_is_reported(key: str) -> None:
    name = key.replace(".", "__")
    [warning] = warnings_of(**{name: 161})
    assert warning.startswith(f"{key}=161 exceeds train.max_steps=160: ")
    assert "use a number up to 160, or null" in warning
    assert warnings_of(**{name: 160}) == warnings_of(**{name: None}) == []


def test_intervals_without_effect_are_not_reported() -> None:
    assert warnings_of(checkpoint__interval=999, checkpoint__interval_minutes=5.0) == []
    unused = {"validation__samples": 0, "validation__sample_tokens": 0}
    assert warnings_of(validation__interval=999, **unused) == []


@pytest.mark.parametrize(("warmup", "steps"), [(160, 160), (8000, 160), (1, 1)])
def test_warmup_that_takes_the_entire_schedule_is_reported(warmup: int, steps: int) -> None:
    values = {"optim__schedule_steps": steps}
    [warning] = warnings_of(optim__warmup_steps=warmup, **values)
    assert f"optim.warmup_steps={warmup} is not below optim.schedule_steps={steps}" in warning
    remedy = re.findall(r"use optim.warmup_steps=(\d+)", warning)
    assert warnings_of(optim__warmup_steps=int(remedy[0]), **values) == []
