"""Published model configurations, their validation, and closed forms of size and FLOPs."""

import dataclasses
from pathlib import Path

import pytest
import torch
from model_configs import FILES, read
from omegaconf import OmegaConf
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from model.config import ModelConfig, RopeScaling
from model.flops import flops_per_token, parameter_count
from model.llama import Llama
from training.config_validation import ConfigError, validate

SMALL = ModelConfig(
    name="small",
    dim=24,
    n_layers=3,
    n_heads=6,
    n_kv_heads=2,
    ffn_dim=40,
    vocab_size=50,
    rope_scaling=RopeScaling(factor=8.0),
)
PUBLISHED_COUNTS = {
    "llama3_8b": 8_030_261_248,
    "llama3_1_8b": 8_030_261_248,
    "llama3_70b": 70_553_706_496,
    "llama3_1_70b": 70_553_706_496,
    "llama3_3_70b": 70_553_706_496,
    "llama3_1_405b": 405_853_388_800,
    "llama3_2_1b": 1_235_814_400,
    "llama3_2_3b": 3_212_749_824,
}


def test_conf_has_a_file_for_each_published_model_and_the_default() -> None:
    assert {path.stem for path in FILES} == {*PUBLISHED_COUNTS, "llama3_tiny"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_file_sets_every_key_and_is_valid(path: Path) -> None:
    written = OmegaConf.load(path).model
    # train.yaml sets the attention kernel, which is a property of the run.
    fields = {field.name for field in dataclasses.fields(ModelConfig)} - {"attention"}
    assert set(written) == fields
    if written.rope_scaling is not None:
        assert set(written.rope_scaling) == {f.name for f in dataclasses.fields(RopeScaling)}
    assert written.name == path.stem
    assert read(path).n_layers


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_parameter_count_equals_published_count_and_sum_over_modules(path: Path) -> None:
    config = read(path)
    with torch.device("meta"):
        counted = sum(parameter.numel() for parameter in Llama(config).parameters())
    assert parameter_count(config) == counted
    assert counted == PUBLISHED_COUNTS.get(path.stem, counted)


@pytest.mark.parametrize("tie", [False, True])
def test_flops_per_token_equal_pytorch_flop_counter(tie: bool) -> None:
    config = dataclasses.replace(SMALL, tie_embeddings=tie)
    model, seq = Llama(config), 16
    tokens = torch.zeros(2, seq, dtype=torch.int64)
    # The math kernel does not skip the masked half, so PyTorch counts by the full convention.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(tokens, labels=tokens).backward()
    # 6·N includes the norm weights; PyTorch counts matrix products only.
    norms = sum(p.numel() for n, p in model.named_parameters() if n.endswith("norm.weight"))
    matrix_flops = counter.get_total_flops() // tokens.numel()
    full = flops_per_token(config, seq, causal=False)
    assert full == matrix_flops + 6 * norms
    score_flops = full - flops_per_token(config, 0, causal=False)
    assert flops_per_token(config, seq, causal=True) == full - score_flops // 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_kv_heads": 4}, "model.n_heads=6 is not a multiple of model.n_kv_heads=4; use model"),
        (  # without a search for divisors that takes minutes
            {"n_heads": 10**12, "dim": 2 * 10**12, "n_kv_heads": 3},
            "model.n_heads=1000000000000 is not a multiple of model.n_kv_heads=3; use model.n_kv_",
        ),
        ({"dim": 30}, "model.dim=30 is not a multiple of twice model.n_heads=6; use 24 or 36"),
        ({"n_layers": 0}, "model.n_layers=0 is below 1; use at least 1"),
        ({"n_heads": 0}, "model.n_heads=0 is below 1; use at least 1"),
        ({"vocab_size": -1}, "model.vocab_size=-1 is below 1; use at least 1"),
        ({"norm_eps": 0.0}, "model.norm_eps=0.0 is not above 0; use a number above 0"),
        ({"rope_theta": 1.0}, "model.rope_theta=1.0 is not above 1; use a number above 1"),
        (
            {"rope_scaling": {"factor": 0.5}},
            "model.rope_scaling.factor=0.5 is below 1; use ",
        ),
        (
            {"rope_scaling": {"factor": 8.0, "low_freq_factor": 4.0}},
            "model.rope_scaling.high_freq_factor=4.0 is not above model.rope_scaling.low_freq",
        ),
    ],
)
def test_broken_rule_names_key_value_rule_and_remedy(change: dict, message: str) -> None:
    values = dataclasses.asdict(SMALL)
    assert validate(values, ModelConfig, prefix="model.") == SMALL
    with pytest.raises(ConfigError) as error:
        validate(values | change, ModelConfig, prefix="model.")
    assert [each.startswith(message) for each in error.value.errors] == [True], error.value


def test_all_model_errors_are_reported_together() -> None:
    with pytest.raises(ValueError, match=r"model.n_heads=6.*\n.*model.dim=30"):
        dataclasses.replace(SMALL, n_kv_heads=4, dim=30)
