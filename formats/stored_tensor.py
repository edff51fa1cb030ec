"""Tensors stored in files, and reading a block of one without reading the rest.

A stored tensor consists of slices, each a contiguous byte range of a file. Bytes are read directly
into the destination block. Files are not memory-mapped: a truncated file raises an error instead of
SIGBUS, and data that was read does not stay resident.
"""

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data.files import check_regular
from formats.errors import FormatError

MAX_READ_BYTES = 2**30  # Linux reads at most 2 GiB minus one page per call
SLAB_BYTES = 2**24  # size of the pieces in which a tensor is streamed
LFS_POINTER = b"version https://git-lfs.github.com"
Dims = Sequence[int] | None  # a number per dim; None for the full tensor
SAFETENSORS_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}  # configuration


@dataclass(frozen=True)
class TensorSlice:
    """A part of a tensor, stored row by row in a contiguous byte range of a file.

    Attributes:
        offsets: Index of the first element in the full tensor, per dim.
        shape: Shape of the slice.
        path: The file.
        start: Byte offset of the slice.
    """

    offsets: tuple[int, ...]
    shape: tuple[int, ...]
    path: Path
    start: int

    @property
    def first_byte(self) -> int:
        """Byte offset of the first element in the file."""
        return self.start


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of one or two dims on disk; its slices cover it without overlap.

    Attributes:
        stored_dtype: Data type in the files.
        cast: Data type to which values are converted when they are read; None to keep them.
    """

    stored_dtype: torch.dtype
    shape: tuple[int, ...]
    slices: Sequence[TensorSlice]
    cast: torch.dtype | None = field(default=None, kw_only=True)

    @property
    def dtype(self) -> torch.dtype:
        """Data type of the values read."""
        return self.cast or self.stored_dtype

    @property
    def n_bytes(self) -> int:
        """Size of the values read."""
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self, offsets: Dims = None, sizes: Dims = None) -> Tensor:
        """Read a block, by default the full tensor, into a new contiguous CPU tensor.

        Args:
            offsets: Index of the block's first element, per dim.
            sizes: Shape of the block.

        Raises:
            FormatError: A file cannot be read or is too short.
        """
        block = torch.empty(self.shape if sizes is None else tuple(sizes), dtype=self.stored_dtype)
        if block.numel() > 0:
            start = (0,) * block.ndim if offsets is None else tuple(offsets)
            n_read = sum(_read_overlap(each, block, start) for each in self.slices)
            if n_read != block.numel():
                raise FormatError(
                    f"{self.slices[0].path.parent}: a tensor of shape {self.shape} is stored in "
                    f"parts with {n_read} of the {block.numel()} values that were read; restore "
                    "the folder of weights"
                )
        return block.to(self.dtype)

    def slabs(self, offsets: Dims = None, sizes: Dims = None) -> Iterator[Tensor]:
        """Yield a block, by default the full tensor, in slabs of rows of bounded size."""
        sizes = self.shape if sizes is None else sizes
        offsets = (0,) * len(sizes) if offsets is None else offsets
        n_rows = max(1, SLAB_BYTES // (math.prod(sizes[1:]) * self.dtype.itemsize))
        for first in range(0, sizes[0], n_rows):
            slab_sizes = (min(n_rows, sizes[0] - first), *sizes[1:])
            yield self.read((offsets[0] + first, *offsets[1:]), slab_sizes)


@dataclass(frozen=True)
class CheckedTensor(StoredTensor):
    """A tensor that raises instead of returning NaN or infinite values.

    Attributes:
        source: The tensor to read, in its own data type.
        name: Named in the error, with its file or folder.
    """

    source: StoredTensor
    name: str

    def read(self, offsets: Dims = None, sizes: Dims = None) -> Tensor:
        """Read a block as `StoredTensor.read` does.

        Raises:
            FormatError: A value is NaN or infinite, or becomes infinite in the target data type.
        """
        values = self.source.read(offsets, sizes)
        check_finite(values, self.name)
        if self.dtype == values.dtype:
            return values
        cast = values.to(self.dtype)
        if not is_finite(cast):
            short = next(name for name, dtype in DTYPES.items() if dtype == self.dtype)
            largest = values.abs().max().item()
            other = "" if short == "bf16" else "dtype=bf16, or "
            raise FormatError(
                f"{self.name} has values up to {largest:.6g}, which dtype={short} cannot represent "
                f"(at most {torch.finfo(self.dtype).max:.6g}); use {other}dtype=null to keep the "
                "stored data type"
            )
        return cast


def equal_values(one: StoredTensor, other: StoredTensor) -> bool:
    """Return whether two stored tensors have equal shapes and values: bits, if of one data type."""
    if one.shape != other.shape:
        return False
    n_rows = max(1, SLAB_BYTES // (math.prod(one.shape[1:]) * 4))
    for first in range(0, one.shape[0], n_rows):
        offsets = (first, *(0 for _ in one.shape[1:]))
        sizes = (min(n_rows, one.shape[0] - first), *one.shape[1:])
        mine, theirs = one.read(offsets, sizes), other.read(offsets, sizes)
        common = torch.uint8 if mine.dtype == theirs.dtype else None
        views = [t.view(common) if common else t.float() for t in (mine, theirs)]
        if not torch.equal(*views):
            return False
    return True


def is_finite(values: Tensor) -> bool:
    """Return whether no value is NaN or infinite."""
    # aminmax propagates NaN, and is 8 to 30 times faster than isfinite().all() on CPU.
    return values.numel() == 0 or all(math.isfinite(each) for each in torch.aminmax(values))


def check_finite(values: Tensor, name: str) -> None:
    """Check that a tensor has no NaN or infinite values.

    Args:
        name: Named in the error: the tensor and its folder.

    Raises:
        FormatError: It has.
    """
    if is_finite(values):
        return
    kinds = [
        kind
        for kind, found in (("NaN", values.isnan()), ("infinite", values.isinf()))
        if found.any()
    ]
    raise FormatError(
        f"{name} contains {' and '.join(kinds)} values; use an earlier checkpoint, or download or "
        "copy the weights again"
    )


def _read_overlap(stored: TensorSlice, block: Tensor, offsets: tuple[int, ...]) -> int:
    """Read the intersection of a slice and a block; return its number of elements."""
    # A vector is handled as a matrix of one row.
    target = block.view(-1, block.shape[-1])
    (row, column), (n_rows, n_columns) = (0, *stored.offsets)[-2:], (1, *stored.shape)[-2:]
    (block_row, block_column), (block_rows, block_columns) = (0, *offsets)[-2:], target.shape
    top, bottom = max(row, block_row), min(row + n_rows, block_row + block_rows)
    left, right = max(column, block_column), min(column + n_columns, block_column + block_columns)
    if top >= bottom or left >= right:
        return 0
    target = target[top - block_row : bottom - block_row]
    target = target[:, left - block_column : right - block_column]
    row_bytes = n_columns * block.element_size()
    start = stored.first_byte + (top - row) * row_bytes + (left - column) * block.element_size()
    is_contiguous = right - left == n_columns == block_columns
    try:
        with stored.path.open("rb", buffering=0) as file:
            for i, part in enumerate([target] if is_contiguous else target):
                _read_into(file.fileno(), stored.path, part, start + i * row_bytes)
    except OSError as error:
        raise unreadable(stored.path, error) from None
    return target.numel()


def _read_into(file: int, path: Path, target: Tensor, start: int) -> None:
    """Fill a contiguous tensor with the bytes of a file from `start`."""
    buffer = bytes_of(target)
    done = 0
    while done < len(buffer):
        count = os.preadv(file, [buffer[done : done + MAX_READ_BYTES]], start + done)
        if count == 0:
            raise FormatError(f"{path} is truncated; download or copy the file again")
        done += count


def reject_lfs_pointer(path: Path) -> None:
    """Raise FormatError if a file is the Git LFS pointer of the file that it should be.

    Raises:
        FormatError: It is, or it cannot be read.
    """
    try:
        check_regular(path)
        with path.open("rb") as file:
            is_pointer = file.read(len(LFS_POINTER)) == LFS_POINTER
    except OSError as error:
        raise unreadable(path, error) from None
    if is_pointer:
        raise FormatError(
            f"{path} is a Git LFS pointer, not the file itself; run git lfs pull in its folder, or "
            "download the file"
        )


def unreadable(path: Path, error: OSError) -> FormatError:
    """Return the error for a file that the operating system cannot open or read."""
    return FormatError(
        f"{path} cannot be read ({error.strerror}); check its permissions, or download or copy it "
        "again"
    )


def bytes_of(values: Tensor) -> memoryview:
    """Return the bytes of a contiguous CPU tensor without copying."""
    array: Any = values.view(torch.uint8).numpy()
    return memoryview(array).cast("B")
