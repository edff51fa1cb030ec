"""A model's weights on the disk, by Meta's names, whichever format they are in.

`Weights` is what conversion, evaluation, generation and continued training see: a configuration and
tensors that are read block by block, so that each rank reads its shard and nobody holds the whole.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import torch
import xxhash
from torch import Tensor, nn

from formats.errors import FormatError
from formats.pieces import DTYPES, StoredTensor, bytes_of, n_bytes
from model.config import ModelConfig
from model.init import LocalBlock
from model.llama import Llama

Format = Literal["native", "hf", "meta"]
FORMATS: dict[str, str] = {
    "native": "checkpoint",
    "hf": "Hugging Face folder",
    "meta": "Meta folder",
}
SLAB = 2**24  # bytes of a tensor that are read and passed on at a time
TOLD = 8  # problems of one kind in a message


class Weights(ABC):
    """Weights on the disk. Opening one has compared names, shapes and files with its config."""

    format: Format
    step: int | None = None  # of the run that saved it
    config: Mapping[str, Any] = MappingProxyType({})  # of that run, as plain dictionaries

    def __init__(
        self, folder: Path, model: ModelConfig, stored: Mapping[str, StoredTensor]
    ) -> None:
        self.folder, self.model, self.stored = folder, model, stored
        self.shapes = parameter_shapes(model)

    @abstractmethod
    def _stored_name(self, name: str) -> str:
        """The name of a parameter in the files."""

    def damage(self) -> str | None:
        """What differs from what was written, where the folder holds hashes; None for nothing."""
        return None

    def dtype(self, name: str) -> torch.dtype:
        """The format of a parameter's numbers in the files."""
        return self.stored[self._stored_name(name)].dtype

    def read(self, name: str, offsets: Sequence[int], sizes: Sequence[int]) -> Tensor:
        """A block of a parameter, on the CPU and in its stored dtype.

        Args:
            name: Meta's, as `parameter_shapes` has it.
            offsets: Of the block's first element, one a dim.
            sizes: Of the block.

        Raises:
            FormatError: a file cannot be read.
        """
        return self.stored[self._stored_name(name)].read(offsets, sizes)

    def slabs(
        self,
        name: str,
        rows_at_a_time: int = 1,
        offsets: Sequence[int] | None = None,
        sizes: Sequence[int] | None = None,
    ) -> Iterator[Tensor]:
        """A block of a parameter from its first row to its last, in slabs of bounded size.

        Args:
            rows_at_a_time: A slab has a multiple of so many rows.
            offsets, sizes: The block; by default all of it.
        """
        sizes = self.shapes[name] if sizes is None else sizes
        offsets = [0] * len(sizes) if offsets is None else offsets
        row = n_bytes(sizes[1:], self.dtype(name)) * rows_at_a_time
        rows = max(1, SLAB // row) * rows_at_a_time
        for first in range(0, sizes[0], rows):
            slab = (min(rows, sizes[0] - first), *sizes[1:])
            yield self.read(name, (offsets[0] + first, *offsets[1:]), slab)


def parameter_shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every parameter, in the model's order; a tied head is none."""
    with torch.device("meta"):
        llama = Llama(model)
    return {name: tuple(parameter.shape) for name, parameter in llama.named_parameters()}


def check_tensors(
    where: str, found: Mapping[str, StoredTensor], expected: Mapping[str, tuple[int, ...]]
) -> None:
    """Whether a folder holds the tensors of its configuration, and no others.

    Raises:
        FormatError: every tensor that is missing, unknown, of another shape or of a dtype that is
            none of ours.
    """
    missing = [name for name in expected if name not in found]
    unknown = [name for name in found if name not in expected]
    both = [(name, found[name], shape) for name, shape in expected.items() if name in found]
    shapes = [
        f"{name} {list(tensor.shape)}, not {list(shape)}"
        for name, tensor, shape in both
        if tensor.shape != shape
    ]
    dtypes = [f"{name} ({tensor.dtype})" for name, tensor, _ in both if tensor.dtype not in DTYPES]
    problems = [
        f"{what}: {_some(names)}"
        for what, names in (
            ("missing", missing),
            ("not a Llama's", unknown),
            ("of another shape than the configuration tells", shapes),
            ("in numbers other than float32, bfloat16 and float16", dtypes),
        )
        if names
    ]
    if problems:
        raise FormatError(
            f"{where} does not hold the tensors of its configuration: {'; '.join(problems)}. "
            "Get the folder again, or correct its configuration"
        )


def fill(model: nn.Module, weights: Weights, local_block: LocalBlock) -> None:
    """Gives this rank its shard of every parameter, and reads no more than that.

    Args:
        model: Its parameters' names are Meta's, their values may be shards.
        weights: Of the same shapes.
        local_block: The part of a parameter that this process holds and its place in the whole.
    """
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            local, offsets = local_block(parameter)
            local.copy_(weights.read(name, offsets, local.shape))


def fingerprint(
    weights: Weights,
    rank: int = 0,
    size: int = 1,
    gather: Callable[[dict[str, str]], list[dict[str, str]]] = lambda own: [own],
) -> str:
    """XXH3-128 over names, dtypes, shapes and values: the same in whichever format they lie.

    Args:
        rank, size: Each of `size` ranks reads a share of the tensors.
        gather: Takes a rank's share, and returns the shares of all.
    """
    own = {}
    for place, (name, shape) in enumerate(weights.shapes.items()):
        if place % size == rank:
            hasher = xxhash.xxh3_128(f"{name} {DTYPES[weights.dtype(name)]} {shape}".encode())
            for slab in weights.slabs(name):
                hasher.update(bytes_of(slab))
            own[name] = hasher.hexdigest()
    hashes = {name: digest for part in gather(own) for name, digest in part.items()}
    return xxhash.xxh3_128("".join(hashes[name] for name in weights.shapes).encode()).hexdigest()


def _some(names: Sequence[str]) -> str:
    """The first of them, and how many more."""
    rest = f" and {len(names) - TOLD} more" if len(names) > TOLD else ""
    return ", ".join(names[:TOLD]) + rest
