"""Weights on disk in any format, under Meta's parameter names.

`Weights` is the interface used by conversion, evaluation, generation and continued training: a
model configuration and tensors that are read block by block, so that each rank reads only its shard
and no process holds the full model. Opening a folder is the task of `detection`.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import torch
import torch.distributed as dist
import xxhash
from torch import Tensor, nn

from formats.errors import FormatError
from formats.stored_tensor import SAFETENSORS_DTYPES, StoredTensor, bytes_of, n_bytes
from model.config import ModelConfig
from model.llama import Llama

Format = Literal["native", "hf", "meta"]
FORMATS: dict[str, str] = {
    "native": "checkpoint",
    "hf": "Hugging Face folder",
    "meta": "Meta folder",
}
SLAB_BYTES = 2**24  # size of the pieces in which a tensor is streamed
MAX_LISTED = 8  # names of one kind listed in an error message


class Weights(ABC):
    """Weights on disk, whose names and shapes have been checked against their configuration.

    Attributes:
        step: Optimizer step of the training run that saved them, if any.
        config: Configuration of that run as plain dictionaries, or empty.
        shapes: Shape of each parameter, by Meta's name.
    """

    format: Format
    step: int | None = None
    config: Mapping[str, Any] = MappingProxyType({})

    def __init__(
        self, folder: Path, model: ModelConfig, stored: Mapping[str, StoredTensor]
    ) -> None:
        self.folder, self.model, self.stored = folder, model, stored
        self.shapes = parameter_shapes(model)

    @abstractmethod
    def _stored_name(self, name: str) -> str:
        """Return the name of a parameter in the files."""

    def damage(self) -> str | None:
        """Return the first difference from the stored hashes; None if intact or without hashes."""
        return None

    def dtype(self, name: str) -> torch.dtype:
        """Return the data type in which a parameter is stored."""
        return self.stored[self._stored_name(name)].dtype

    def read(self, name: str, offsets: Sequence[int], sizes: Sequence[int]) -> Tensor:
        """Read a block of a parameter to the CPU in its stored data type.

        Args:
            name: Meta's name, a key of `shapes`.
            offsets: Index of the block's first element, per dim.
            sizes: Shape of the block.

        Raises:
            FormatError: A file cannot be read.
        """
        return self.stored[self._stored_name(name)].read(offsets, sizes)

    def slabs(
        self,
        name: str,
        row_multiple: int = 1,
        offsets: Sequence[int] | None = None,
        sizes: Sequence[int] | None = None,
    ) -> Iterator[Tensor]:
        """Yield a block of a parameter in consecutive slabs of rows of bounded size.

        Args:
            row_multiple: The number of rows of a slab is a multiple of this.
            offsets, sizes: The block; the full parameter by default.
        """
        sizes = self.shapes[name] if sizes is None else sizes
        offsets = [0] * len(sizes) if offsets is None else offsets
        row_bytes = n_bytes(sizes[1:], self.dtype(name)) * row_multiple
        n_rows = max(1, SLAB_BYTES // row_bytes) * row_multiple
        for first in range(0, sizes[0], n_rows):
            slab_sizes = (min(n_rows, sizes[0] - first), *sizes[1:])
            yield self.read(name, (offsets[0] + first, *offsets[1:]), slab_sizes)


def parameter_shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return the shape of each parameter by name, in the model's order, without a tied output."""
    with torch.device("meta"):
        llama = Llama(model)
    return {name: tuple(parameter.shape) for name, parameter in llama.named_parameters()}


def check_tensors(
    source: str, found: Mapping[str, StoredTensor], expected: Mapping[str, tuple[int, ...]]
) -> None:
    """Check that exactly the tensors of the configuration are stored.

    Raises:
        FormatError: Lists missing and unknown tensors, wrong shapes and unsupported data types.
    """
    missing = [name for name in expected if name not in found]
    unknown = [name for name in found if name not in expected]
    both = [(name, found[name], shape) for name, shape in expected.items() if name in found]
    shapes = [
        f"{name} {list(tensor.shape)}, not {list(shape)}"
        for name, tensor, shape in both
        if tensor.shape != shape
    ]
    dtypes = [
        f"{name} ({tensor.dtype})"
        for name, tensor, _ in both
        if tensor.dtype not in SAFETENSORS_DTYPES
    ]
    errors = [
        f"{kind}: {_listed(names)}"
        for kind, names in (
            ("missing", missing),
            ("unknown", unknown),
            ("wrong shape", shapes),
            ("data type other than float32, bfloat16 and float16", dtypes),
        )
        if names
    ]
    if errors:
        raise FormatError(
            f"{source}: the tensors do not match the configuration ({'; '.join(errors)}); "
            "download or copy the folder again, or correct its configuration"
        )


def load_weights(model: nn.Module, weights: Weights) -> None:
    """Copy each rank's shard of the weights into a sharded model; a collective call.

    A native checkpoint is verified against its hashes first.

    Args:
        model: Has Meta's parameter names; parameters may be DTensors.
        weights: Have the shapes of the model's full parameters.

    Raises:
        FormatError: On all ranks, if the checkpoint is damaged or any rank cannot read its shard.
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
                local.copy_(weights.read(name, offsets, local.shape))
    except FormatError as caught:
        error = str(caught)
    errors = [f"{each} (rank {rank})" for rank, each in enumerate(_all_gather(error)) if each]
    if errors:
        raise FormatError("; ".join(errors))


def fingerprint(weights: Weights) -> str:
    """Return the XXH3-128 hash of all names, dtypes, shapes and values, equal in every format.

    When a process group is initialized this is a collective call, and each rank reads every n-th
    tensor of n ranks.
    """
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    local_hashes = {}
    for index, (name, shape) in enumerate(weights.shapes.items()):
        if index % world_size == rank:
            dtype = SAFETENSORS_DTYPES[weights.dtype(name)]
            hasher = xxhash.xxh3_128(f"{name} {dtype} {shape}".encode())
            for slab in weights.slabs(name):
                hasher.update(bytes_of(slab))
            local_hashes[name] = hasher.hexdigest()
    hashes = {name: digest for part in _all_gather(local_hashes) for name, digest in part.items()}
    return xxhash.xxh3_128("".join(hashes[name] for name in weights.shapes).encode()).hexdigest()


def _all_gather(value: Any) -> list[Any]:
    """Return the values of all ranks, or `[value]` without a process group."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def _listed(names: Sequence[str]) -> str:
    rest = f" and {len(names) - MAX_LISTED} more" if len(names) > MAX_LISTED else ""
    return ", ".join(names[:MAX_LISTED]) + rest
