"""Convert `ModelConfig` to and from Hugging Face's `config.json` and Meta's `params.json`.

Reading rejects architectures and options that Llama 3 does not have; writing produces keys that all
releases of `transformers` accept, or those of Meta's own files.
"""

import json
import math
import reprlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from data.files import parse_json, read_file
from formats.errors import FormatError
from model.config import ModelConfig, RopeScaling

# Options of Hugging Face's Llama that our model lacks, with the values that are accepted.
SUPPORTED_VALUES: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "pretraining_tp": (1,),
    "partial_rotary_factor": (1,),
    "quantization_config": (),
    "compression_config": (),
    "sliding_window": (),
    "transformers_weights": (),
}
REMEDIES = {
    "pretraining_tp": "set it to 1 in the file: it only splits matrix products into slices, and "
    "the weights are the same",
    "quantization_config": "use the weights before quantization",
    "compression_config": "use the weights before quantization",
    "transformers_weights": "remove it, so that the files with their usual names are read",
}
# ffn_dim_multiplier and multiple_of of Meta's published params.json, by dim.
PUBLISHED_FFN_FACTORS = {
    2048: (1.5, 256),
    3072: (1.0, 256),
    4096: (1.3, 1024),
    8192: (1.3, 4096),
    16384: (1.2, 4096),
}
ROPE_SCALING_KEYS = ("factor", "low_freq_factor", "high_freq_factor", "original_max_seq_len")
META_ROPE_SCALING = RopeScaling(8.0, 1.0, 4.0, 8192)
HUGGING_FACE_KEYS = {  # by the field of ModelConfig
    "dim": "hidden_size",
    "ffn_dim": "intermediate_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "vocab_size": "vocab_size",
    "max_seq_len": "max_position_embeddings",
    "norm_eps": "rms_norm_eps",
    "tie_embeddings": "tie_word_embeddings",
}
HUGGING_FACE_ROPE_KEYS = {key: key for key in ROPE_SCALING_KEYS} | {
    "original_max_seq_len": "original_max_position_embeddings"
}
# The same in ModelConfig.
META_KEYS = ("dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "norm_eps", "rope_theta")
META_DEFAULTS = {"multiple_of": 256, "vocab_size": -1, "norm_eps": 1e-5, "rope_theta": 500_000.0}


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file.

    Raises:
        FormatError: The file cannot be read or is not a JSON object.
    """
    try:
        values = parse_json(read_file(path))  # also with a byte order mark
    except (OSError, ValueError) as error:
        raise FormatError(f"{path} cannot be read ({error}); download or copy it again") from None
    if not isinstance(values, dict):
        raise FormatError(f"{path} is not a JSON object; download or copy it again")
    return values


def write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def validated_config(
    path: Path, values: dict[str, Any], keys: Mapping[str, str] = MappingProxyType({})
) -> ModelConfig:
    """Return the `ModelConfig` with these values, read from `path` and named for its folder.

    Args:
        keys: Keys of the file by field, if they differ, for messages.

    Raises:
        FormatError: A key is missing, has the wrong type or an invalid value.
    """
    from pydantic import TypeAdapter, ValidationError

    try:
        return TypeAdapter(ModelConfig).validate_python({"name": path.parent.name, **values})
    except ValidationError as error:
        reasons = "; ".join(
            f"{'.'.join(keys.get(str(each), str(each)) for each in item['loc'])}="
            f"{reprlib.repr(item['input'])}: {item['msg']}"
            if item["loc"]
            else str(item["ctx"]["error"])
            for item in error.errors()
        )
        raise FormatError(
            f"{path} is not a valid Llama 3 configuration: {reasons}; correct it, or download or "
            "copy it again"
        ) from None


# ---------------------------------------------------------------- Hugging Face


def from_hugging_face(path: Path) -> ModelConfig:
    """Read a `config.json` written by any release of transformers.

    Raises:
        FormatError: The architecture is not Llama's, or an option is not supported.
    """
    # LlamaConfig's defaults.
    defaults = {"norm_eps": 1e-6, "tie_embeddings": False, "max_seq_len": 2048}
    values = {HUGGING_FACE_KEYS[key]: value for key, value in defaults.items()} | read_json(path)
    model_type, classes = values.get("model_type"), values.get("architectures")
    names = classes if isinstance(classes, list) and classes else [classes or "LlamaForCausalLM"]
    if model_type != "llama" or "LlamaForCausalLM" not in names:
        raise FormatError(
            f"{path}: model_type={model_type} with architectures={', '.join(map(str, names))} is "
            "not Llama 3; use a model with model_type=llama and architectures=LlamaForCausalLM"
        )
    rope = values.get("rope_scaling") or values.get("rope_parameters") or {}
    if not isinstance(rope, dict):
        raise FormatError(f"{path}: rope_scaling={rope} is not an object; download it again")
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    heads = values.get("num_attention_heads")
    if unsupported := list(_unsupported(values, rope, rope_type)):
        raise FormatError(
            f"{path} sets options that Llama 3 does not have: {'; '.join(unsupported)}; use the "
            "weights of a Llama 3 model"
        )
    model = {key: values.get(theirs) for key, theirs in HUGGING_FACE_KEYS.items()}
    model["n_kv_heads"] = model["n_kv_heads"] or heads
    model["rope_theta"] = rope.get("rope_theta") or values.get("rope_theta", 10_000.0)
    if rope_type == "llama3":
        scaling = {key: rope.get(theirs) for key, theirs in HUGGING_FACE_ROPE_KEYS.items()}
        model["rope_scaling"] = scaling
    return validated_config(path, model, HUGGING_FACE_KEYS | HUGGING_FACE_ROPE_KEYS)


def _unsupported(values: dict[str, Any], rope: dict[str, Any], rope_type: Any) -> Iterator[str]:
    """Yield each key and value that our model cannot compute, and what is supported."""
    for key, supported in SUPPORTED_VALUES.items():
        value = values.get(key)
        if key == "partial_rotary_factor":
            value = rope.get(key, value)
        if value is None or value in supported:
            continue
        if isinstance(value, dict):  # quantization: the method says it, and the rest is long
            method = value.get("quant_method")
            shown = f"{key}.quant_method={method}" if method else f"{key}={str(value)[:80]}"
        else:
            shown = f"{key}={str(value)[:80]}"
        yield f"{shown} ({REMEDIES.get(key) or f'supported: {supported[0]}'})"
    heads, dim, head_dim = (
        values.get(key) for key in ("num_attention_heads", "hidden_size", "head_dim")
    )
    is_size = isinstance(head_dim, int | float)  # a list times a number of heads may be very long
    if (
        head_dim is not None
        and isinstance(heads, int)
        and not (is_size and head_dim * heads == dim)
    ):
        yield f"head_dim={str(head_dim)[:80]} (not hidden_size / num_attention_heads)"
    if rope_type not in ("default", "llama3"):
        yield f"rope_scaling.rope_type={rope_type} (supported: default and llama3)"


def to_hugging_face(model: ModelConfig, dtype: str, ids: Mapping[str, Any]) -> dict[str, Any]:
    """Return the content of a `config.json` that every release of transformers reads.

    Args:
        dtype: Data type of the weights, as in `torch_dtype`.
        ids: Token ids that start, end and pad a text, such as `bos_token_id`.
    """
    scaling: dict[str, Any] | None = None
    if (ours := model.rope_scaling) is not None:
        scaling = {"rope_type": "llama3"}
        scaling |= {theirs: getattr(ours, key) for key, theirs in HUGGING_FACE_ROPE_KEYS.items()}
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **{theirs: getattr(model, key) for key, theirs in HUGGING_FACE_KEYS.items()},
        "head_dim": model.head_dim,
        "rope_theta": model.rope_theta,
        "rope_scaling": scaling,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "torch_dtype": dtype,
        **ids,
        "use_cache": True,
    }


# ---------------------------------------------------------------- Meta


def from_meta(path: Path, vocab_size: int, ffn_dim: int, tied: bool) -> ModelConfig:
    """Read a `params.json`.

    Args:
        vocab_size, ffn_dim: Sizes of the stored tensors; the file may omit the vocabulary size and
            gives the feed-forward width by a formula.
        tied: Whether the output weights equal the embedding.

    Raises:
        FormatError: A value is invalid or contradicts the sizes of the tensors.
    """
    values = META_DEFAULTS | read_json(path)
    scaled = bool(values.get("use_scaled_rope"))
    values = _published_defaults(scaled, tied) | values
    multiplier, multiple_of = values.get("ffn_dim_multiplier"), values["multiple_of"]
    if isinstance(values.get("dim"), int):
        try:
            computed = meta_ffn_dim(values["dim"], multiplier, multiple_of)
        except (TypeError, ValueError, ArithmeticError):  # also infinite, or multiple_of=0
            computed = None
        if computed != ffn_dim:
            raise FormatError(
                f"{path}: ffn_dim_multiplier={multiplier} and multiple_of={multiple_of} give a "
                f"feed-forward width of {computed}, but the tensors have {ffn_dim}; download or "
                "copy the folder again"
            )
    if values["vocab_size"] == -1:
        values["vocab_size"] = vocab_size
    values["n_kv_heads"] = values.get("n_kv_heads") or values.get("n_heads")
    model = {key: values.get(key) for key in META_KEYS}
    if scaled:
        model["rope_scaling"] = {key: values[f"rope_{key}"] for key in ROPE_SCALING_KEYS}
    sizes = {"ffn_dim": ffn_dim, "tie_embeddings": tied, "max_seq_len": values["context_length"]}
    return validated_config(path, model | sizes)


def meta_rope_warning(model: ModelConfig) -> str | None:
    """Return a warning if Meta's own code computes another model from these weights.

    `apply_scaling` in llama_models' model.py has the scaling of Llama 3.1 built in; `params.json`
    only turns it on.
    """
    scaling = model.rope_scaling
    if scaling is None or scaling == META_ROPE_SCALING:
        return None
    values = ", ".join(f"{key}={getattr(scaling, key):g}" for key in ROPE_SCALING_KEYS)
    return (
        f"model.rope_scaling ({values}) cannot be expressed in Meta's format: Meta's own code uses "
        "factor=8, low_freq_factor=1, high_freq_factor=4, original_max_seq_len=8192 for all models "
        "and computes other logits from this folder. params.json has the values as additional "
        "keys (unless they are those of a published model), which this program reads; use "
        "format=hf for other programs"
    )


def to_meta(model: ModelConfig) -> dict[str, Any]:
    """Return the content of a `params.json`.

    For a published model these are exactly the published keys, since some of Meta's programs reject
    unknown ones.
    """
    multiplier, multiple_of = _meta_ffn_factors(model.dim, model.ffn_dim)
    scaling = model.rope_scaling
    values = {
        **{key: getattr(model, key) for key in META_KEYS},
        "ffn_dim_multiplier": multiplier,
        "multiple_of": multiple_of,
        "use_scaled_rope": scaling is not None,
    }
    optional: dict[str, Any] = {"context_length": model.max_seq_len}
    if scaling is not None:
        optional |= {f"rope_{key}": getattr(scaling, key) for key in ROPE_SCALING_KEYS}
    defaults = _published_defaults(scaling is not None, model.tie_embeddings)
    return values | {key: value for key, value in optional.items() if value != defaults[key]}


def _published_defaults(scaled: bool, tied: bool) -> dict[str, Any]:
    """Return the values that published `params.json` files omit.

    `rope_factor` is 32 in release 3.2, whose text models are the only ones with tied embeddings,
    and 8 in all other releases with RoPE scaling.
    """
    return {
        "context_length": 131_072 if scaled else 8192,
        "rope_factor": 32.0 if tied else 8.0,
        "rope_low_freq_factor": 1.0,
        "rope_high_freq_factor": 4.0,
        "rope_original_max_seq_len": 8192,
    }


def meta_ffn_dim(dim: int, multiplier: float | None, multiple_of: int) -> int:
    """Return the feed-forward width: `FeedForward` in Meta's llama-models, model.py."""
    width = int(2 * (4 * dim) / 3)
    if multiplier is not None:
        width = int(float(multiplier) * width)  # a list would be repeated
    return multiple_of * -(-width // multiple_of)


def _meta_ffn_factors(dim: int, ffn_dim: int) -> tuple[float, int]:
    """Return an ffn_dim_multiplier and multiple_of for which Meta's formula yields `ffn_dim`.

    Published factors are preferred.
    """
    published = PUBLISHED_FFN_FACTORS.get(dim)
    if published is not None and meta_ffn_dim(dim, *published) == ffn_dim:
        return published
    multiple_of = math.gcd(ffn_dim, 256)
    # The middle of the interval that rounds up to ffn_dim, so float rounding has no effect.
    return (ffn_dim - multiple_of // 2 + 0.5) / int(2 * (4 * dim) / 3), multiple_of
