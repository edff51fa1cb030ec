"""Warnings before launch: each names key, value and a remedy after which it is not printed."""

import re
from dataclasses import replace
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from run_config import default

from cli.arguments import CONF
from cli.config import load_train_config
from model.flops import parameter_count
from training.config import JobConfig
from training.config_warnings import config_warnings, recipe_learning_rate


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
    [warning] = warnings_of(**{name: 23601})
    assert warning.startswith(f"{key}=23601 exceeds train.max_steps=23600: ")
    assert "use a number up to 23600, or null" in warning
    assert warnings_of(**{name: 23600}) == warnings_of(**{name: None}) == []


def test_intervals_without_effect_are_not_reported() -> None:
    assert warnings_of(checkpoint__interval=99999, checkpoint__interval_minutes=5.0) == []
    short = {"train__max_steps": 49, "optim__schedule_steps": 49, "optim__warmup_steps": 1}
    assert warnings_of(**short) == []
    unused = {"validation__samples": 0, "validation__sample_tokens": 0}
    assert warnings_of(validation__interval=99999, **unused) == []


@pytest.mark.parametrize(("warmup", "steps"), [(160, 160), (8000, 160), (1, 1)])
def test_warmup_that_takes_the_entire_schedule_is_reported(warmup: int, steps: int) -> None:
    values = {"optim__schedule_steps": steps}
    [warning] = warnings_of(optim__warmup_steps=warmup, **values)
    assert f"optim.warmup_steps={warmup} is not below optim.schedule_steps={steps}" in warning
    remedy = re.findall(r"use optim.warmup_steps=(\d+)", warning)
    assert warnings_of(optim__warmup_steps=int(remedy[0]), **values) == []


@pytest.mark.parametrize(
    ("lr", "init_from", "warns"),
    [
        (4e-3, None, True),  # the smallest model's rate
        (1.6e-3, None, True),
        (1.4e-3, None, False),
        (3e-4, "weights", False),
        (4e-4, "weights", True),
    ],
)
def test_learning_rate_far_above_the_recipe_is_reported(
    lr: float, init_from: str | None, warns: bool
) -> None:
    messages = warnings_of(optim__lr=lr, run__init_from=init_from)
    assert [message.startswith(f"optim.lr={lr:g} is ") for message in messages] == [True] * warns
    if warns:
        remedy = float(re.findall(r"use optim.lr=(.+)", messages[0])[0])
        assert warnings_of(optim__lr=remedy, run__init_from=init_from) == []


def test_recipe_rates_are_those_of_the_model_files() -> None:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        for path in (CONF / "model").glob("*.yaml"):
            tokenizer = "bpe" if path.stem == "llama3_tiny" else "llama3"
            config = load_train_config(
                compose("train", [f"model={path.stem}", f"tokenizer={tokenizer}"])
            )
            rate = recipe_learning_rate(parameter_count(config.model))
            assert config.optim.lr == pytest.approx(rate, rel=0.01), path.stem
            assert list(config_warnings(config)) == [], path.stem


def test_async_tp_with_one_sequence_per_micro_batch_is_reported() -> None:
    [warning] = warnings_of(parallel__async_tp=True, train__micro_batch_size=1)
    assert "2 of the 8 collectives" in warning
    remedy = re.findall(r"use train.micro_batch_size=(\d+)", warning)
    assert warnings_of(parallel__async_tp=True, train__micro_batch_size=int(remedy[0])) == []
