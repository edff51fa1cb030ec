"""Convert weights with their configuration and tokenizer from any format to any other."""

import json
from pathlib import Path

import torch

from data.tokenizer import Tokenizer
from formats.config_json import generation_config, to_hugging_face
from formats.errors import FormatError
from formats.hugging_face import CONFIG, config_dtype, write_hugging_face
from formats.meta import check_parts, write_meta
from formats.output_folder import atomic_folder, check_free_space, check_target
from formats.stored_tensor import n_bytes
from formats.tokenizers import stop_token_ids
from formats.tokenizers import write_hugging_face as write_tokenizer
from formats.weights import Format, Weights


def convert(
    weights: Weights,
    tokenizer: Tokenizer | None,
    target: Path,
    format: Format,
    *,
    dtype: torch.dtype | None = None,
    parts: int = 1,
    file_bytes: int = 5_000_000_000,
    overwrite: bool = False,
) -> int:
    """Write `weights` as a folder of the given format and return its size in bytes.

    All checks run before anything is written, and a failed conversion leaves no files.

    Args:
        tokenizer: Written with the weights unless None.
        dtype: Data type to write; None keeps the stored values bit for bit.
        parts: Number of tensor-parallel parts of a Meta folder.
        file_bytes: Maximum size of a safetensors file of a Hugging Face folder.
        overwrite: Whether to replace existing weights at `target`.

    Raises:
        FormatError: The target exists, does not fit on the disk, cannot be written, or cannot be
            split into `parts`; the tokenizer has more tokens than the model; the source is damaged
            or cannot be read.
    """
    check_target(target, overwrite)
    if format == "meta":
        check_parts(parts, weights)
    check_vocabulary(weights, tokenizer)
    sizes = [n_bytes(shape, dtype or weights.dtype(name)) for name, shape in weights.shapes.items()]
    check_free_space(target, sum(sizes))
    if damage := weights.damage():
        raise FormatError(f"{weights.folder} is damaged: {damage}; use another checkpoint")
    with atomic_folder(target, overwrite) as folder:
        _write(weights, tokenizer, folder, format, dtype, parts, file_bytes)
    return sum(path.stat().st_size for path in target.iterdir())


def check_vocabulary(weights: Weights, tokenizer: Tokenizer | None) -> None:
    """Check that the model has an embedding for every token.

    Raises:
        FormatError: The tokenizer has more tokens than the model.
    """
    if tokenizer is not None and tokenizer.vocab_size > weights.model.vocab_size:
        raise FormatError(
            f"{weights.folder}: the tokenizer has {tokenizer.vocab_size} tokens, more than "
            f"vocab_size={weights.model.vocab_size} of the model; use the model's own tokenizer"
        )


def _write(
    weights: Weights,
    tokenizer: Tokenizer | None,
    folder: Path,
    format: Format,
    dtype: torch.dtype | None,
    parts: int,
    file_bytes: int,
) -> None:
    tokenizer_files = {} if tokenizer is None else tokenizer.files()
    if format == "native":
        from formats.native import write_native

        description = None
        if tokenizer is not None:
            description = {"name": tokenizer.name, "vocab_size": tokenizer.vocab_size}
        write_native(weights, folder, dtype, description, tokenizer_files)
        return
    if format == "meta":
        write_meta(weights, folder, dtype, parts)
        for name, content in tokenizer_files.items():
            (folder / name).write_bytes(content)
        return
    write_hugging_face(weights, folder, dtype, file_bytes)
    bos_id = None if tokenizer is None else tokenizer.bos_id
    eos_ids = [] if tokenizer is None else stop_token_ids(tokenizer)
    config = to_hugging_face(weights.model, config_dtype(weights, dtype), bos_id, eos_ids)
    for name, values in (
        (CONFIG, config),
        ("generation_config.json", generation_config(bos_id, eos_ids)),
    ):
        (folder / name).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    if tokenizer is not None:
        write_tokenizer(tokenizer, folder, weights.model.max_seq_len)
