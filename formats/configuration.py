"""`config.json` and `params.json`: a model's configuration in the words of other programs."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from formats.errors import FormatError
from model.config import ModelConfig

# What Llama 3 has no place for, and the only value with which a folder is one all the same.
PLAIN = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "pretraining_tp": 1,
    "quantization_config": None,
    "sliding_window": None,
}
# Multiplier and multiple by which Meta's files tell the width of the feed-forward, by dim.
PUBLISHED_FFN = {
    2048: (1.5, 256),
    3072: (1.0, 256),
    4096: (1.3, 1024),
    8192: (1.3, 4096),
    16384: (1.2, 4096),
}
SCALING = ("factor", "low_freq_factor", "high_freq_factor", "original_max_seq_len")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a file.

    Raises:
        FormatError: there is none.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise FormatError(f"{path} cannot be read ({error}): get it again") from None
    if not isinstance(values, dict):
        raise FormatError(f"{path} holds no object: get it again")
    return values


def checked(path: Path, name: str, values: dict[str, Any]) -> ModelConfig:
    """A configuration from keys of ours.

    Raises:
        FormatError: a key is missing, of another type, or breaks a rule.
    """
    from pydantic import TypeAdapter, ValidationError

    try:
        model = TypeAdapter(ModelConfig).validate_python({"name": name, **values})
    except ValidationError as error:
        told = "; ".join(
            f"{'.'.join(map(str, item['loc']))}={item['input']!r}: {item['msg']}"
            if item["loc"]
            else str(item["ctx"]["error"])
            for item in error.errors()
        )
        raise FormatError(f"{path} tells no Llama 3 ({told}): correct it") from None
    return model


# ---------------------------------------------------------------- Hugging Face


def from_hugging_face(path: Path) -> ModelConfig:
    """The configuration in a `config.json`, of old releases of transformers and of new ones.

    Raises:
        FormatError: another architecture, or something that Llama 3 has not.
    """
    values = read_json(path)
    kind, classes = values.get("model_type"), values.get("architectures") or ["LlamaForCausalLM"]
    if kind != "llama" or "LlamaForCausalLM" not in classes:
        raise FormatError(
            f"{path}: model_type ({kind}) with architectures ({', '.join(classes)}) is not "
            "Llama 3's: use a folder of llama with LlamaForCausalLM"
        )
    strange = [
        f"{key} ({values[key]})"
        for key, plain in PLAIN.items()
        if values.get(key, plain) not in (plain, None)
    ]
    heads, dim = values.get("num_attention_heads"), values.get("hidden_size")
    head_dim = values.get("head_dim")
    if head_dim is not None and isinstance(heads, int) and head_dim * heads != dim:
        strange.append(f"head_dim ({head_dim}) other than hidden_size / num_attention_heads")
    rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "llama3"):
        strange.append(f"rope_type ({kind})")
    if strange:
        raise FormatError(
            f"{path} asks for what Llama 3 has not: {', '.join(strange)}. Use another folder"
        )
    scaling = None
    if kind == "llama3":
        scaling = {
            "factor": rope.get("factor"),
            "low_freq_factor": rope.get("low_freq_factor"),
            "high_freq_factor": rope.get("high_freq_factor"),
            "original_max_seq_len": rope.get("original_max_position_embeddings"),
        }
    return checked(
        path,
        path.parent.name,
        {
            "dim": dim,
            "n_layers": values.get("num_hidden_layers"),
            "n_heads": heads,
            "n_kv_heads": values.get("num_key_value_heads") or heads,
            "ffn_dim": values.get("intermediate_size"),
            "vocab_size": values.get("vocab_size"),
            "norm_eps": values.get("rms_norm_eps", 1e-6),  # LlamaConfig's defaults
            "rope_theta": rope.get("rope_theta") or values.get("rope_theta", 10_000.0),
            "rope_scaling": scaling,
            "tie_embeddings": values.get("tie_word_embeddings", False),
            "max_seq_len": values.get("max_position_embeddings", 2048),
        },
    )


def to_hugging_face(
    model: ModelConfig, dtype: str, bos_id: int | None, eos_ids: Sequence[int]
) -> dict[str, Any]:
    """The content of a `config.json`, in words that every release of transformers reads.

    Args:
        dtype: Of the weights, as torch names it.
        bos_id, eos_ids: What begins and ends a text; None and nothing without a tokenizer.
    """
    scaling = model.rope_scaling
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": model.dim,
        "intermediate_size": model.ffn_dim,
        "num_hidden_layers": model.n_layers,
        "num_attention_heads": model.n_heads,
        "num_key_value_heads": model.n_kv_heads,
        "head_dim": model.head_dim,
        "vocab_size": model.vocab_size,
        "max_position_embeddings": model.max_seq_len,
        "rms_norm_eps": model.norm_eps,
        "rope_theta": model.rope_theta,
        "rope_scaling": None
        if scaling is None
        else {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_max_seq_len,
        },
        "tie_word_embeddings": model.tie_embeddings,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "torch_dtype": dtype,
        "bos_token_id": bos_id,
        "eos_token_id": _one_or_many(eos_ids),
        "use_cache": True,
    }


def generation_config(bos_id: int | None, eos_ids: Sequence[int]) -> dict[str, Any]:
    """The content of a `generation_config.json`: where a text begins and ends."""
    return {"bos_token_id": bos_id, "eos_token_id": _one_or_many(eos_ids), "do_sample": False}


def _one_or_many(ids: Sequence[int]) -> int | list[int] | None:
    return (list(ids) if len(ids) > 1 else ids[0]) if ids else None


# ---------------------------------------------------------------- Meta


def from_meta(path: Path, vocab_size: int, ffn_dim: int, tied: bool) -> ModelConfig:
    """The configuration in a `params.json`.

    Args:
        vocab_size, ffn_dim: Of the tensors: the file tells them not always, or by a formula.
        tied: The head's weights are the embedding's.

    Raises:
        FormatError: it tells no Llama 3, or another width than the tensors have.
    """
    values = read_json(path)
    multiplier, multiple_of = values.get("ffn_dim_multiplier"), values.get("multiple_of", 256)
    if isinstance(values.get("dim"), int):
        told = meta_ffn_dim(values["dim"], multiplier, multiple_of)
        if told != ffn_dim:
            raise FormatError(
                f"{path}: ffn_dim_multiplier ({multiplier}) and multiple_of ({multiple_of}) tell a "
                f"feed-forward of {told}, and the tensors have {ffn_dim}: get the folder again"
            )
    untold = _untold(bool(values.get("use_scaled_rope", False)), tied)
    scaling = {key: values.get(f"rope_{key}", untold[f"rope_{key}"]) for key in SCALING}
    return checked(
        path,
        path.parent.name,
        {
            "dim": values.get("dim"),
            "n_layers": values.get("n_layers"),
            "n_heads": values.get("n_heads"),
            "n_kv_heads": values.get("n_kv_heads") or values.get("n_heads"),
            "ffn_dim": ffn_dim,
            "vocab_size": vocab_size
            if values.get("vocab_size", -1) == -1
            else values["vocab_size"],
            "norm_eps": values.get("norm_eps", 1e-5),
            "rope_theta": values.get("rope_theta", 500_000.0),
            "rope_scaling": scaling if values.get("use_scaled_rope", False) else None,
            "tie_embeddings": tied,
            "max_seq_len": values.get("context_length", untold["context_length"]),
        },
    )


def to_meta(model: ModelConfig) -> dict[str, Any]:
    """The content of a `params.json`.

    Of a published model it has the published keys and no other, since some of Meta's programs stop
    at a key that they do not know.
    """
    multiplier, multiple_of = _meta_ffn_factors(model.dim, model.ffn_dim)
    scaling = model.rope_scaling
    values = {
        "dim": model.dim,
        "n_layers": model.n_layers,
        "n_heads": model.n_heads,
        "n_kv_heads": model.n_kv_heads,
        "vocab_size": model.vocab_size,
        "ffn_dim_multiplier": multiplier,
        "multiple_of": multiple_of,
        "norm_eps": model.norm_eps,
        "rope_theta": model.rope_theta,
        "use_scaled_rope": scaling is not None,
    }
    told = {"context_length": model.max_seq_len}
    if scaling is not None:
        told |= {f"rope_{key}": getattr(scaling, key) for key in SCALING}
    untold = _untold(scaling is not None, model.tie_embeddings)
    return values | {key: value for key, value in told.items() if value != untold[key]}


def _untold(scaled: bool, tied: bool) -> dict[str, Any]:
    """What a published `params.json` leaves to those who know.

    The factor is 32 in the releases of 3.2, whose text models are the ones with tied embeddings,
    and 8 in all others that scale.
    """
    return {
        "context_length": 131_072 if scaled else 8192,
        "rope_factor": 32.0 if tied else 8.0,
        "rope_low_freq_factor": 1.0,
        "rope_high_freq_factor": 4.0,
        "rope_original_max_seq_len": 8192,
    }


def meta_ffn_dim(dim: int, multiplier: float | None, multiple_of: int) -> int:
    """The width of the feed-forward: `FeedForward` in Meta's llama-models, model.py."""
    width = int(2 * (4 * dim) / 3)
    if multiplier is not None:
        width = int(multiplier * width)
    return multiple_of * -(-width // multiple_of)


def _meta_ffn_factors(dim: int, ffn_dim: int) -> tuple[float, int]:
    """A multiplier and a multiple with which Meta's formula gives `ffn_dim`.

    The published ones where they do, else others.
    """
    published = PUBLISHED_FFN.get(dim)
    if published is not None and meta_ffn_dim(dim, *published) == ffn_dim:
        return published
    multiple_of = math.gcd(ffn_dim, 256)
    # Amid the numbers that are rounded up to it, so that no last digit matters.
    return (ffn_dim - multiple_of // 2 + 0.5) / int(2 * (4 * dim) / 3), multiple_of
