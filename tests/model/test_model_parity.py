"""Logits, gradients and frequencies equal those of `transformers`, for each conf/model file."""

import dataclasses
from pathlib import Path

import pytest
import torch
from model_configs import FILES, read
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from model.config import ModelConfig
from model.llama import Llama
from model.rope import rope_frequencies

SHRINK = 128  # of all lengths in the twins
SEQ = 160  # beyond the twins' original context of 8192 / SHRINK tokens

# Both sides compute in float32 in a different order: measured 3e-6 of the largest logit. A mistake
# in the frequencies changes the twins' logits by a quarter of it or more, even where the blend only
# begins 3% off its place.
TOLERANCE = 1e-5


def twin(path: Path) -> ModelConfig:
    """The same flags, theta and kind of head groups, small, and all lengths divided by SHRINK."""
    config = read(path)
    group = min(config.n_heads // config.n_kv_heads, 4)
    scaling = config.rope_scaling
    if scaling is not None:
        short = scaling.original_max_seq_len // SHRINK
        scaling = dataclasses.replace(scaling, original_max_seq_len=short)
    return dataclasses.replace(
        config,
        dim=16 * 2 * group,
        n_layers=2,
        n_heads=2 * group,
        n_kv_heads=2,
        ffn_dim=64,
        vocab_size=97,
        rope_scaling=scaling,
        max_seq_len=config.max_seq_len // SHRINK,
    )


def hugging_face_config(config: ModelConfig) -> LlamaConfig:
    rope: dict[str, object] = {"rope_type": "default", "rope_theta": config.rope_theta}
    if config.rope_scaling is not None:
        rope |= dataclasses.asdict(config.rope_scaling) | {"rope_type": "llama3"}
        rope["original_max_position_embeddings"] = rope.pop("original_max_seq_len")
    result = LlamaConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.dim,
        intermediate_size=config.ffn_dim,
        num_hidden_layers=config.n_layers,
        num_attention_heads=config.n_heads,
        num_key_value_heads=config.n_kv_heads,
        max_position_embeddings=config.max_seq_len,
        rms_norm_eps=config.norm_eps,
        tie_word_embeddings=config.tie_embeddings,
        rope_parameters=rope,
    )
    result._attn_implementation = "eager"
    return result


def hugging_face_tensors(named: dict[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Meta's names and pairing to Hugging Face's: rows 2i, 2i+1 of a head to i, i + head_dim/2."""
    names = {
        "tok_embeddings": "model.embed_tokens",
        "norm": "model.norm",
        "output": "lm_head",
        "attention.wq": "self_attn.q_proj",
        "attention.wk": "self_attn.k_proj",
        "attention.wv": "self_attn.v_proj",
        "attention.wo": "self_attn.o_proj",
        "feed_forward.w1": "mlp.gate_proj",
        "feed_forward.w2": "mlp.down_proj",
        "feed_forward.w3": "mlp.up_proj",
        "attention_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
    }
    result = {}
    for name, tensor in named.items():
        stem = name.removesuffix(".weight")
        prefix = ""
        if stem.startswith("layers."):
            _, number, stem = stem.split(".", 2)
            prefix = f"model.layers.{number}."
        if stem in ("attention.wq", "attention.wk"):
            pairs = tensor.view(-1, config.head_dim // 2, 2, config.dim)  # (heads, pair, 2, dim)
            tensor = pairs.transpose(1, 2).reshape(tensor.shape)
        result[f"{prefix}{names[stem]}.weight"] = tensor
    return result


def both_models(config: ModelConfig) -> tuple[Llama, LlamaForCausalLM]:
    """The same weights in both, large enough for attention to be far from uniform."""
    generator = torch.Generator().manual_seed(0)
    ours, theirs = Llama(config), LlamaForCausalLM(hugging_face_config(config))
    with torch.no_grad():
        for parameter in ours.parameters():
            mean = 1.0 if parameter.dim() == 1 else 0.0
            parameter.normal_(mean, 0.2, generator=generator)
    missing, unexpected = theirs.load_state_dict(
        hugging_face_tensors(dict(ours.named_parameters()), config), strict=False
    )
    assert not unexpected
    assert missing == (["lm_head.weight"] if config.tie_embeddings else [])
    return ours, theirs


def random_tokens(config: ModelConfig) -> Tensor:
    return torch.randint(
        config.vocab_size, (2, SEQ), generator=torch.Generator().manual_seed(1)
    )  # (batch, seq)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_logits_equal_transformers_beyond_the_original_context(path: Path) -> None:
    config = twin(path)
    ours, theirs = both_models(config)
    tokens = random_tokens(config)
    with torch.no_grad():
        expected = theirs(tokens).logits  # (batch, seq, vocab)
        actual = ours(tokens)
    scale = expected.abs().max().item()
    torch.testing.assert_close(actual, expected, rtol=0, atol=TOLERANCE * scale)


@pytest.mark.parametrize("name", ["llama3_1_8b", "llama3_2_1b"])
def test_gradients_equal_transformers(name: str) -> None:
    """One untied and one tied model, whose embedding gathers gradients of two uses."""
    config = twin(next(path for path in FILES if path.stem == name))
    ours, theirs = both_models(config)
    tokens = random_tokens(config)
    inputs, labels = tokens[:, :-1], tokens[:, 1:]
    ours(inputs, labels=labels).backward()
    logits = theirs(inputs).logits
    log_probabilities = logits.log_softmax(-1)  # (batch, seq, vocab)
    (-log_probabilities.gather(-1, labels.unsqueeze(-1)).sum()).backward()
    gradients = {n: p.grad for n, p in ours.named_parameters() if p.grad is not None}
    expected = dict(theirs.named_parameters())
    renamed = hugging_face_tensors(gradients, config)
    assert renamed.keys() == expected.keys()
    for key, actual in renamed.items():
        reference = expected[key].grad
        assert reference is not None
        # Backward sums over all tokens as well: measured 5e-6 of the largest element.
        atol = 5 * TOLERANCE * reference.abs().max().item()
        torch.testing.assert_close(actual, reference, rtol=0, atol=atol)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_rope_frequencies_equal_transformers_at_full_size(path: Path) -> None:
    config = read(path)
    if config.rope_scaling is None:
        theirs = LlamaForCausalLM(hugging_face_config(twin(path)))
        expected = theirs.model.rotary_emb.inv_freq
        actual = rope_frequencies(twin(path))
    else:
        expected, attention_factor = ROPE_INIT_FUNCTIONS["llama3"](
            hugging_face_config(config), torch.device("cpu")
        )
        assert attention_factor == 1.0
        actual = rope_frequencies(config)
    # A few float32 roundings of 6e-8 each; the blend subtracts, which grows them a little.
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=0)
