"""A run that starts from weights takes their model, and the recipe of that size."""

import dataclasses
import json
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from cli.arguments import CONF, hydra_arguments, plan_arguments
from cli.config import load_plan_config, load_train_config
from formats.config_json import to_hugging_face
from formats.errors import FormatError
from formats.file_names import CONFIG, SINGLE
from formats.hugging_face import hugging_face_name
from formats.weights import parameter_shapes
from model.config import ModelConfig
from training.config import JobConfig
from training.config_validation import ConfigError


@pytest.fixture(scope="module", autouse=True)
def _hydra() -> Iterator[None]:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        yield


def load(*arguments: str) -> JobConfig:
    return load_train_config(compose("train", hydra_arguments(list(arguments), "train")))


def published(name: str) -> ModelConfig:
    return load(f"model={name}", "tokenizer=llama3").model


def write_hugging_face(folder: Path, model: ModelConfig) -> str:
    """Write `config.json` and a sparse safetensors file, whose values take no disk space."""
    folder.mkdir()
    config = to_hugging_face(model, "bfloat16", {})
    (folder / CONFIG).write_text(json.dumps(config))
    header, end = {}, 0
    for name, shape in parameter_shapes(model).items():
        start, end = end, end + 2 * math.prod(shape)
        header[hugging_face_name(name)] = {
            "dtype": "BF16",
            "shape": shape,
            "data_offsets": [start, end],
        }
    text = json.dumps(header).encode()
    with (folder / SINGLE).open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    return f"run.init_from={folder}"


@pytest.mark.parametrize("name", ["llama3_2_1b", "llama3_8b", "llama3_1_8b"])
def test_published_weights_select_their_model_and_a_recipe_for_continuing(
    name: str, tmp_path: Path
) -> None:
    weights = write_hugging_face(tmp_path / "downloaded", published(name))
    config, scratch = load(weights, "tokenizer=llama3"), load(f"model={name}", "tokenizer=llama3")
    assert config.model == scratch.model
    assert config.train.seq_len == scratch.train.seq_len == 8192
    assert config.optim.lr == pytest.approx(scratch.optim.lr / 10)
    assert config.optim.warmup_steps < scratch.optim.warmup_steps


def test_weights_of_another_shape_take_the_recipe_of_the_nearest_size(tmp_path: Path) -> None:
    shape = dataclasses.replace(
        published("llama3_2_1b"), name="x", dim=1536, n_heads=24, tie_embeddings=False
    )
    config = load(write_hugging_face(tmp_path / "my model", shape), "tokenizer=llama3")
    assert config.model == dataclasses.replace(shape, name=config.model.name)
    assert config.run.name == config.model.name == "my-model"
    assert config.optim.lr == 3e-5


def test_sequences_are_no_longer_than_the_weights_admit(tmp_path: Path) -> None:
    shape = dataclasses.replace(published("llama3_tiny"), max_seq_len=128, vocab_size=272)
    weights = write_hugging_face(tmp_path / "short", shape)
    assert load(weights, "tokenizer=byte").train.seq_len == 128
    assert load(weights, "tokenizer=byte", "train.seq_len=64").train.seq_len == 64


def test_explicit_values_override_the_model_of_the_weights(tmp_path: Path) -> None:
    weights = write_hugging_face(tmp_path / "weights", published("llama3_2_1b"))
    config = load(weights, "tokenizer=llama3", "optim.lr=1e-3", "model.rope_theta=1e6")
    assert (config.optim.lr, config.model.rope_theta) == (1e-3, 1e6)
    assert load(weights, "model=llama3_8b", "tokenizer=llama3").model.n_layers == 32
    assert load(weights, "run.init_from=null").model.n_layers == 4


def test_missing_weights_are_left_to_the_check_of_the_folder(tmp_path: Path) -> None:
    config = load(f"run.init_from={tmp_path / 'absent'}")
    assert config.run.init_from == str(tmp_path / "absent")


def test_sequence_length_of_the_recipe_is_limited_to_that_of_the_weights(tmp_path: Path) -> None:
    model = dataclasses.replace(published("llama3_2_1b"), max_seq_len=2048, rope_scaling=None)
    weights = write_hugging_face(tmp_path / "short", model)
    config = load(weights, "tokenizer=llama3")
    recipe = load("model=llama3_2_1b", "tokenizer=llama3")
    assert config.train.seq_len == 2048
    assert config.train.global_batch_size == 4 * recipe.train.global_batch_size
    assert load(weights, "tokenizer=llama3", "train.seq_len=512").train.seq_len == 512


def test_experiment_without_a_model_keeps_the_model_of_the_weights(tmp_path: Path) -> None:
    weights = write_hugging_face(tmp_path / "weights", published("llama3_2_1b"))
    file = tmp_path / "experiment" / "mine.yaml"
    file.parent.mkdir()
    file.write_text("# @package _global_\noptim:\n  lr: 1e-5\n")
    words = [weights, "tokenizer=llama3", "experiment=mine"]
    assert "model=llama3_2_1b" in hydra_arguments(words, "train", [CONF, tmp_path])
    words[-1] = "experiment=smoke"
    assert "model=llama3_2_1b" not in hydra_arguments(words, "train", [CONF, tmp_path])


def test_plan_rejects_weights_that_do_not_exist_or_cannot_be_read(tmp_path: Path) -> None:
    def plan(weights: Path) -> None:
        load_plan_config(compose("plan", plan_arguments([f"run.init_from={weights}"])))

    with pytest.raises(ConfigError, match="does not exist"):
        plan(tmp_path / "absent")
    with pytest.raises(FormatError, match="contains no weights"):
        plan(tmp_path)
