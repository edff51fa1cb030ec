"""Golden values: what each model trains with, from scratch and from existing weights."""

import json
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir

from cli.arguments import CONF, hydra_arguments
from cli.config import load_train_config
from model.flops import parameter_count
from training.config import JobConfig
from training.config_validation import ConfigError, plain

GOLDEN = Path(__file__).with_name("recipes.json")
SECTIONS = ("model", "train", "optim")
MODELS = sorted(path.stem for path in (CONF / "model").glob("*.yaml"))


def load(*arguments: str) -> JobConfig:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return load_train_config(compose("train", hydra_arguments(list(arguments), "train")))


def recipe(model: str, *arguments: str) -> dict[str, Any]:
    """Return the composed values that depend on the size of the model."""
    data = () if model == "llama3_tiny" else ("data=fineweb_edu", "tokenizer=llama3")
    values = plain(load(f"model={model}", *data, *arguments))
    sections = {name: values[name] for name in SECTIONS}
    return sections | {
        f"{name}.interval": values[name]["interval"] for name in ("checkpoint", "validation")
    }


def recipes() -> dict[str, Any]:
    return {
        model: {"scratch": recipe(model), "continued": recipe(model, "run.init_from=weights")}
        for model in MODELS
    }


def test_composed_values_of_all_models_are_the_golden_ones() -> None:
    assert len(MODELS) == 9
    assert recipes() == json.loads(GOLDEN.read_text())


@pytest.mark.parametrize("model", [name for name in MODELS if name != "llama3_tiny"])
def test_recipe_trains_on_20_tokens_per_parameter(model: str) -> None:
    config = load(f"model={model}", "tokenizer=llama3")
    tokens = config.stages().first_token(config.train.max_steps)
    assert tokens / parameter_count(config.model) == pytest.approx(20, rel=0.005)
    continued = load(f"model={model}", "tokenizer=llama3", "run.init_from=weights")
    assert continued.optim.lr == pytest.approx(config.optim.lr / 10)


def test_explicit_values_and_experiments_override_the_recipe() -> None:
    config = load("model=llama3_8b", "tokenizer=llama3", "optim.lr=1e-5", "train.seq_len=512")
    assert (config.optim.lr, config.train.seq_len) == (1e-5, 512)
    assert load("experiment=h100x8_8b").train.max_steps == 9500


@pytest.mark.parametrize(
    ("arguments", "steps"),
    [
        (["train.max_tokens=40960"], 10),  # 16 sequences of 256 tokens per step
        (["train.max_tokens=40961"], 11),
        (["train.max_tokens=1"], 1),
        (["train.max_tokens=40960", "train.max_steps=null"], 10),
        (["train.max_tokens=10e9", "train.global_batch_size=64"], 610_352),
        (["experiment=llama3_405b_paper", "train.max_tokens=15.6e12"], 1_100_928),
        (["experiment=llama3_405b_paper", "train.max_tokens=251658240"], 60),  # end of a stage
        (["train.max_steps=7"], 7),
    ],
)
def test_length_in_tokens_sets_steps_and_schedule(arguments: list[str], steps: int) -> None:
    config = load(*arguments)
    assert config.train.max_steps == steps
    if "experiment" not in arguments[0]:
        assert config.optim.schedule_steps == steps


def test_steps_on_the_command_line_replace_a_length_in_tokens() -> None:
    assert hydra_arguments(["train.max_steps=7"], "train")[-1] == "++train.max_tokens=null"
    with pytest.raises(ConfigError) as error:
        hydra_arguments(["train.max_steps=7", "train.max_tokens=8"], "train")
    assert "train.max_steps=7 and train.max_tokens=8 are both given" in str(error.value)
    assert load("train.max_steps=7", "train.max_tokens=null").train.max_steps == 7


if __name__ == "__main__":
    GOLDEN.write_text(json.dumps(recipes(), indent=1) + "\n")
