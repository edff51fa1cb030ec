"""Weights on disk in any format, under Meta's parameter names.

`Weights` is the interface used by conversion, evaluation, generation and continued training: a
model configuration and tensors that are read block by block, so that each rank reads only its shard
and no process holds the full model. Opening a folder is the task of `detection`.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import xxhash
from torch import nn

from data.errors import first_line
from formats.errors import FormatError
from formats.file_names import Format
from formats.stored_tensor import (
    SAFETENSORS_DTYPES,
    StoredTensor,
    bytes_of,
    check_finite,
    equal_values,
)
from model.config import ModelConfig
from model.llama import Llama

MAX_LISTED = 8  # names of one kind listed in an error message


@dataclass
class Weights:
    """Weights on disk, whose names and shapes have been checked against their configuration.

    Attributes:
        tensors: By Meta's name, in the model's order, without a tied output.
        step: Optimizer step of the training run that saved them, if any.
        config: Configuration of that run as plain dictionaries, or empty.
        damage: Returns the first difference from stored hashes; None if intact or without hashes.
        warnings: What was read differently than a user may expect.
    """

    format: Format
    folder: Path
    model: ModelConfig
    tensors: Mapping[str, StoredTensor]
    step: int | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    damage: Callable[[], str | None] = lambda: None
    warnings: Sequence[str] = ()


def parameter_shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return the shape of each parameter by name, in the model's order, without a tied output."""
    with torch.device("meta"):
        llama = Llama(model)
    return {name: tuple(parameter.shape) for name, parameter in llama.named_parameters()}


def check_tensors(
    folder: Path,
    model: ModelConfig,
    found: Mapping[str, StoredTensor],
    stored_name: Callable[[str], str] = str,
) -> tuple[ModelConfig, dict[str, StoredTensor]]:
    """Return the model and its stored tensors by Meta's name, after checking them against it.

    If the embeddings are tied but the files contain an output with other values, the returned model
    is untied. If they contain only the output, it is also the embedding. transformers does the same
    (`tie_weights`).

    Args:
        found: Tensors by the name in the files; may include a copy of a tied output.
        stored_name: Returns the name in the files of a parameter.

    Raises:
        FormatError: Lists missing and unknown tensors, wrong shapes and unsupported data types.
    """
    names = [stored_name(name) for name in ("tok_embeddings.weight", "output.weight")]
    embedding, output = (found.get(name) for name in names)
    if model.tie_embeddings and output is not None:
        if embedding is None:
            found = {**found, names[0]: output}
        elif not equal_values(embedding, output):
            model = dataclasses.replace(model, tie_embeddings=False)
    expected = _expected_shapes(folder, model, len(found))
    shapes = {stored_name(name): shape for name, shape in expected.items()}
    tied = {stored_name("output.weight")} if model.tie_embeddings else set()
    both = {name: found[name] for name in shapes if name in found}
    kinds = {
        "missing": [name for name in shapes if name not in found],
        "unknown": [name for name in found if name not in shapes and name not in tied],
        "wrong shape": [
            f"{name} {list(tensor.shape)}, not {list(shapes[name])}"
            for name, tensor in both.items()
            if tensor.shape != shapes[name]
        ],
        "data type other than float32, bfloat16 and float16": [
            f"{name} ({tensor.dtype})"
            for name, tensor in both.items()
            if tensor.dtype not in SAFETENSORS_DTYPES
        ],
    }
    if errors := [f"{kind}: {_listed(names)}" for kind, names in kinds.items() if names]:
        remedy = "download or copy the folder again, or correct its configuration"
        if prefix := _common_prefix(shapes, found):
            remedy = f"the names have the prefix {prefix}; save the weights without it"
        raise FormatError(
            f"{folder}: the tensors do not match the configuration ({'; '.join(errors)}); {remedy}"
        )
    return model, {name: found[stored_name(name)] for name in expected}


def _expected_shapes(folder: Path, model: ModelConfig, n_found: int) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a model, which may be too large to build if its file is damaged."""
    if model.n_layers > n_found:
        raise FormatError(
            f"{folder}: the configuration has {model.n_layers} layers, but the files contain only "
            f"{n_found} tensors; download or copy the folder again"
        )
    try:
        return parameter_shapes(model)
    except (RuntimeError, OverflowError, TypeError) as error:
        raise FormatError(
            f"{folder}: a model of this configuration cannot be built ({first_line(error)}); "
            "download or copy the folder again"
        ) from None


def _common_prefix(expected: Iterable[str], found: Iterable[str]) -> str:
    """Return the prefix of all expected names, as of a compiled model; empty if there is none."""
    first, *others = expected
    prefixes = (name.removesuffix(first) for name in found if name.endswith(first))
    names = set(found)
    return next((p for p in prefixes if all(f"{p}{each}" in names for each in others)), "")


def load_weights(model: nn.Module, weights: Weights) -> None:
    """Copy each rank's shard of the weights into a sharded model; a collective call.

    A native checkpoint is verified against its hashes first.

    Args:
        model: Has Meta's parameter names; parameters may be DTensors.
        weights: Have the shapes of the model's full parameters.

    Raises:
        FormatError: On all ranks, if the checkpoint is damaged, or any rank cannot read its shard
            or finds NaN or infinite values in it.
    """
    from checkpoint.restore import find_damage
    from parallel.parallelize import local_block

    if weights.format == "native" and (damage := find_damage(weights.folder)):
        raise FormatError(f"{weights.folder} is damaged: {damage}")
    error = None
    try:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                local, offsets = local_block(parameter)
                values = weights.tensors[name].read(offsets, local.shape)
                check_finite(values, f"{weights.folder}: {name}")
                local.copy_(values)
    except FormatError as caught:
        error = str(caught)
    errors = [f"{each} (rank {rank})" for rank, each in enumerate(all_gather(error)) if each]
    if errors:
        raise FormatError("; ".join(errors))


def fingerprint(weights: Weights) -> str:
    """Return the XXH3-128 hash of all names, dtypes, shapes and values, equal in every format.

    When a process group is initialized this is a collective call, and each rank reads every n-th
    tensor of n ranks.
    """
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    local_hashes = {}
    for name, tensor in list(weights.tensors.items())[rank::world_size]:
        dtype = SAFETENSORS_DTYPES[tensor.dtype]
        hasher = xxhash.xxh3_128(f"{name} {dtype} {tensor.shape}".encode())
        for slab in tensor.slabs():
            hasher.update(bytes_of(slab))
        local_hashes[name] = hasher.hexdigest()
    hashes = {name: digest for part in all_gather(local_hashes) for name, digest in part.items()}
    return xxhash.xxh3_128("".join(hashes[name] for name in weights.tensors).encode()).hexdigest()


def all_gather(value: Any) -> list[Any]:
    """Return the values of all ranks, or `[value]` without a process group."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def _listed(names: Sequence[str]) -> str:
    rest = f" and {len(names) - MAX_LISTED} more" if len(names) > MAX_LISTED else ""
    return ", ".join(names[:MAX_LISTED]) + rest
