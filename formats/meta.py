"""Meta folders: `consolidated.NN.pth`, one per tensor-parallel part, and `params.json`.

Opening a folder reads names, shapes and file offsets; values are read on demand.
"""

import dataclasses
import errno
import math
from collections.abc import Mapping
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from data.errors import first_line
from data.tokenizer import Tokenizer
from formats.config_json import from_meta, read_json, to_meta, write_json
from formats.errors import FormatError
from formats.file_names import PARAMS, PART
from formats.stored_tensor import StoredTensor, bytes_of, equal_values
from formats.torch_file import read_torch_file
from formats.weights import Weights, check_tensors
from model.config import ModelConfig

# Dim that Meta's tensor parallelism shards (model.py in llama-models); norms are replicated.
SHARD_DIMS = {
    **dict.fromkeys(("wq", "wk", "wv", "w1", "w3", "output", "tok_embeddings"), 0),
    **dict.fromkeys(("wo", "w2"), 1),
}


def shard_dim(name: str) -> int | None:
    """Return the dim along which a parameter is split into parts; None if it is replicated."""
    return SHARD_DIMS.get(name.removesuffix(".weight").rpartition(".")[2])


def open_meta(folder: Path) -> Weights:
    """Open a folder with a `params.json` and any number of parts.

    Raises:
        FormatError: A part is missing, damaged, contains code, or is inconsistent with the others.
    """
    paths = sorted(path for path in folder.iterdir() if PART.fullmatch(path.name))
    numbers = [int(PART.fullmatch(path.name)[1]) for path in paths]  # type: ignore[index]
    if numbers != list(range(len(numbers))):
        raise FormatError(
            f"{folder} contains {', '.join(path.name for path in paths)}, which are not numbered "
            "consecutively from consolidated.00.pth; download or copy the missing parts"
        )
    stored = _merge(folder, [_read_part(path) for path in paths])
    required = ("tok_embeddings.weight", "output.weight", "layers.0.feed_forward.w1.weight")
    if absent := [name for name in required if name not in stored]:
        raise FormatError(
            f"{folder} does not contain {', '.join(absent)}; download or copy the folder again"
        )
    embedding, output, w1 = (stored[name] for name in required)
    tied = equal_values(embedding, output)
    config = from_meta(folder / PARAMS, embedding.shape[0], w1.shape[0], tied)
    return Weights("meta", folder, *check_tensors(folder, config, stored))


def _read_part(path: Path) -> dict[str, StoredTensor]:
    """Return the tensors of a part, reading only names, shapes and file offsets."""
    stored = read_torch_file(path)
    stored.pop("rope.freqs", None)  # stored by old releases; our model computes it
    return stored


def _merge(folder: Path, parts: list[dict[str, StoredTensor]]) -> dict[str, StoredTensor]:
    """Return the full tensors, whose slices lie in the parts."""
    for index, part in enumerate(parts):
        if other := sorted(set(part) ^ set(parts[0])):
            raise FormatError(
                f"{folder}: consolidated.{index:02d}.pth and consolidated.00.pth contain different "
                f"tensors ({', '.join(other[:8])}); download or copy the folder again"
            )
    values = read_json(folder / PARAMS)
    n_kv_heads = values.get("n_kv_heads") or values.get("n_heads")
    if not isinstance(n_kv_heads, int) or n_kv_heads < 1:
        raise FormatError(f"{folder / PARAMS}: n_kv_heads={n_kv_heads} is not a positive integer")
    stored = {}
    for name, first in parts[0].items():
        tensors = [part[name] for part in parts]
        for index, tensor in enumerate(tensors):
            if (tensor.shape, tensor.dtype) != (first.shape, first.dtype):
                raise FormatError(
                    f"{folder}: {name} is {list(first.shape)} ({first.dtype}) in "
                    f"consolidated.00.pth and {list(tensor.shape)} ({tensor.dtype}) in "
                    f"consolidated.{index:02d}.pth, so the parts are of different conversions; "
                    f"remove those of one, or download or copy the folder again"
                )
        dim = shard_dim(name)
        if dim is None or len(first.shape) <= dim:
            stored[name] = first
            continue
        if name.endswith(("attention.wk.weight", "attention.wv.weight")):
            # With more parts than kv heads, consecutive parts store the same head.
            tensors = tensors[:: max(1, len(parts) // n_kv_heads)]
        slices = [
            dataclasses.replace(tensor.slices[0], offsets=_offsets(first.shape, dim, part))
            for part, tensor in enumerate(tensors)
        ]
        shape = (n * len(tensors) if i == dim else n for i, n in enumerate(first.shape))
        stored[name] = StoredTensor(first.dtype, tuple(shape), slices)
    return stored


def _offsets(shape: tuple[int, ...], dim: int | None, part: int) -> tuple[int, ...]:
    """Return the offsets in the full tensor of a part of this shape."""
    return tuple(n * part if i == dim else 0 for i, n in enumerate(shape))


def check_parts(parts: int, model: ModelConfig) -> None:
    """Check that the model can be split into this number of parts.

    Raises:
        FormatError: A size is not divisible.
    """
    sizes = {key: getattr(model, key) for key in ("n_heads", "n_kv_heads", "ffn_dim", "vocab_size")}
    indivisible = [f"model.{key}={size}" for key, size in sizes.items() if size % parts]
    if indivisible:
        common = math.gcd(*sizes.values())
        divisors = [str(n) for n in range(1, common + 1) if common % n == 0]
        raise FormatError(
            f"parts={parts} does not divide {', '.join(indivisible)}; use {' or '.join(divisors)}"
        )


def write_meta(
    model: ModelConfig,
    tensors: Mapping[str, StoredTensor],
    tokenizer: Tokenizer | None,
    folder: Path,
    parts: int,
) -> None:
    """Write the parts slab by slab, `params.json` and the tokenizer.

    `torch.save` writes each file with space reserved for its values, which are filled in later. The
    checksums in the zip are those of the empty space; `torch.load` does not check them.
    """
    if model.tie_embeddings:  # Meta's model stores both
        tensors = {**tensors, "output.weight": tensors["tok_embeddings.weight"]}
    shapes = {}  # of a part
    for name, tensor in tensors.items():
        dim = shard_dim(name)
        shapes[name] = tuple(n // parts if i == dim else n for i, n in enumerate(tensor.shape))
    for part in range(parts):
        path = folder / f"consolidated.{part:02d}.pth"
        with FakeTensorMode():
            empty = {name: torch.empty(shapes[name], dtype=tensors[name].dtype) for name in tensors}
            try:
                with torch.serialization.skip_data(materialize_fake_tensors=True):
                    torch.save(empty, path)
            except RuntimeError as error:  # raised by PyTorch when the disk is full
                raise OSError(errno.EIO, first_line(error)) from None
        with path.open("r+b") as file:
            for name, space in _read_part(path).items():
                offsets = _offsets(space.shape, shard_dim(name), part)
                file.seek(space.slices[0].start)
                for slab in tensors[name].slabs(offsets, space.shape):
                    file.write(bytes_of(slab))
    write_json(folder / PARAMS, to_meta(model))
    for name, content in ({} if tokenizer is None else tokenizer.files()).items():
        (folder / name).write_bytes(content)
