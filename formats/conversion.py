"""Convert weights with their configuration and tokenizer from any format to any other."""

import json
from pathlib import Path

import torch

from data.tokenizer import Tokenizer
from formats.errors import FormatError
from formats.file_names import TRAINING, Format
from formats.hugging_face import write_hugging_face
from formats.meta import check_parts, write_meta
from formats.metadata import kept_files, token_ids, training_settings
from formats.output_folder import atomic_folder, check_free_space, check_target
from formats.stored_tensor import CheckedTensor
from formats.weights import Weights


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
    keep_tokenizer: bool = False,
) -> int:
    """Write `weights` as a folder of the given format and return its size in bytes.

    All checks run before anything is written, and a failed conversion leaves no files.

    Args:
        tokenizer: Written with the weights unless None.
        dtype: Data type to write; None keeps the stored values bit for bit.
        parts: Number of tensor-parallel parts of a Meta folder.
        file_bytes: Maximum size of a safetensors file of a Hugging Face folder.
        overwrite: Whether to replace existing weights at `target`.
        keep_tokenizer: Without `tokenizer`, copy the tokenizer files of the source unread.

    Raises:
        FormatError: The target exists, is or contains the source, does not fit on the disk, cannot
            be written, or cannot be split into `parts`; the tokenizer has more tokens than the
            model; the source is damaged, cannot be read, or has values that are not finite or
            overflow `dtype`.
    """
    check_target(target, overwrite, weights.folder)
    if format == "meta":
        check_parts(parts, weights.model)
    check_vocabulary(weights, tokenizer)
    model = weights.model
    tensors = {
        name: CheckedTensor(t.dtype, t.shape, (), t, f"{weights.folder}: {name}", cast=dtype)
        for name, t in weights.tensors.items()
    }
    files = kept_files(weights, tokenizer, tokenizer is not None or keep_tokenizer)
    if settings := training_settings(weights):
        files[TRAINING] = f"{json.dumps(settings)}\n".encode()
    check_free_space(target, sum(tensor.n_bytes for tensor in tensors.values()))
    if damage := weights.damage():
        raise FormatError(f"{weights.folder} is damaged: {damage}; use another checkpoint")
    with atomic_folder(target) as folder:
        if format == "native":
            from formats.native import write_native

            write_native(model, tensors, tokenizer, folder, files)
        elif format == "hf":
            ids = token_ids(weights, tokenizer, files)
            write_hugging_face(model, tensors, tokenizer, folder, file_bytes, ids, files)
        else:
            write_meta(model, tensors, tokenizer, folder, parts)
            if settings:
                (folder / TRAINING).write_bytes(files[TRAINING])
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
