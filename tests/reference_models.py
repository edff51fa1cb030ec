"""Scaled-down versions of the published models, ours and `transformers`', with equal weights."""

import dataclasses
from pathlib import Path

import torch
from model_configs import read
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from model.config import ModelConfig
from model.llama import Llama

LENGTH_DIVISOR = 128  # applied to all sequence lengths


def scaled_down(path: Path) -> ModelConfig:
    """Return a small config with equal flags, theta and kind of head groups, and short lengths."""
    config = read(path)
    group = min(config.n_heads // config.n_kv_heads, 4)
    scaling = config.rope_scaling
    if scaling is not None:
        short = scaling.original_max_seq_len // LENGTH_DIVISOR
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
        max_seq_len=config.max_seq_len // LENGTH_DIVISOR,
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
    """Convert Meta's names and rotary pairs to Hugging Face's.

    Rows 2i and 2i+1 of a head become rows i and i + head_dim/2.
    """
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


def paired_models(config: ModelConfig) -> tuple[Llama, LlamaForCausalLM]:
    """Return both models with equal weights, large enough for attention to be far from uniform."""
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
