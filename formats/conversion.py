"""From one format to another: weights, their configuration, and the tokenizer."""

import json
from pathlib import Path

import torch

from data.tokenizer import Tokenizer
from formats.configuration import generation_config, to_hugging_face
from formats.errors import FormatError
from formats.hugging_face import CONFIG, config_dtype, write_hugging_face
from formats.meta import parts_problem, write_meta
from formats.pieces import n_bytes
from formats.target import check_room, check_target, fresh_folder
from formats.tokenizers import stop_ids
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
    """Writes `weights` as a folder of another format, or of the same one; returns its bytes.

    Nothing is written where something is wrong, and nothing is left of what fails half-way.

    Args:
        tokenizer: Travels along; None leaves it out.
        dtype: Of the values; None keeps their bits.
        parts: Of a Meta folder.
        file_bytes: Of a safetensors file of a Hugging Face folder.
        overwrite: Replace the weights under that name.

    Raises:
        FormatError: the target exists, does not fit the disk, cannot be written, or cannot be cut
            into so many parts; the tokenizer has more tokens than the model; the source is damaged
            or cannot be read.
    """
    check_target(target, overwrite)
    if format == "meta" and (problem := parts_problem(parts, weights)):
        raise FormatError(problem)
    check_vocabulary(weights, tokenizer)
    sizes = [n_bytes(shape, dtype or weights.dtype(name)) for name, shape in weights.shapes.items()]
    check_room(target, sum(sizes))
    if damage := weights.damage():
        raise FormatError(f"{weights.folder} is damaged: {damage}. Use another checkpoint")
    with fresh_folder(target, overwrite) as folder:
        write(weights, tokenizer, folder, format, dtype, parts, file_bytes)
    return sum(path.stat().st_size for path in target.iterdir())


def check_vocabulary(weights: Weights, tokenizer: Tokenizer | None) -> None:
    """Whether the model has an embedding for every token.

    Raises:
        FormatError: it has not.
    """
    if tokenizer is not None and tokenizer.vocab_size > weights.model.vocab_size:
        raise FormatError(
            f"{weights.folder}: the tokenizer's {tokenizer.vocab_size} tokens are more than the "
            f"model's vocab_size ({weights.model.vocab_size}): use the model's own tokenizer"
        )


def write(
    weights: Weights,
    tokenizer: Tokenizer | None,
    folder: Path,
    format: Format,
    dtype: torch.dtype | None,
    parts: int,
    file_bytes: int,
) -> None:
    """Writes everything into an empty folder."""
    beside = {} if tokenizer is None else tokenizer.files()
    if format == "native":
        from formats.native import write_native

        told = None
        if tokenizer is not None:
            told = {"name": tokenizer.name, "vocab_size": tokenizer.vocab_size}
        write_native(weights, folder, dtype, told, beside)
        return
    if format == "meta":
        write_meta(weights, folder, dtype, parts)
        for name, content in beside.items():
            (folder / name).write_bytes(content)
        return
    write_hugging_face(weights, folder, dtype, file_bytes)
    bos_id = None if tokenizer is None else tokenizer.bos_id
    eos_ids = [] if tokenizer is None else stop_ids(tokenizer)
    config = to_hugging_face(weights.model, config_dtype(weights, dtype), bos_id, eos_ids)
    for name, values in (
        (CONFIG, config),
        ("generation_config.json", generation_config(bos_id, eos_ids)),
    ):
        (folder / name).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    if tokenizer is not None:
        write_tokenizer(tokenizer, folder, weights.model.max_seq_len)
