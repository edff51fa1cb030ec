"""Tensors stored in files, and reading a block of one without reading the rest.

A stored tensor consists of slices, each a contiguous byte range of a file. Bytes are read directly
into the destination block. Files are not memory-mapped: a truncated file raises an error instead of
SIGBUS, and data that was read does not stay resident.
"""

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from formats.errors import FormatError

MAX_READ_BYTES = 2**30  # Linux reads at most 2 GiB minus one page per call
SAFETENSORS_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}  # configuration


class TensorSlice:
    """A part of a tensor, stored row by row in a contiguous byte range of a file.

    Args:
        offsets: Index of the first element in the full tensor, per dim.
        shape: Shape of the slice.
        path: The file.
        start: Byte offset of the first element, or a function that determines it on first use.
    """

    def __init__(
        self,
        offsets: Sequence[int],
        shape: Sequence[int],
        path: Path,
        start: int | Callable[[], int],
    ) -> None:
        self.offsets, self.shape, self.path = tuple(offsets), tuple(shape), path
        self._start = start

    @cached_property
    def start(self) -> int:
        """Byte offset of the first element in the file."""
        return self._start if isinstance(self._start, int) else self._start()


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of one or two dims on disk; its slices cover it without overlap."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    slices: Sequence[TensorSlice]

    def read(self, offsets: Sequence[int], sizes: Sequence[int]) -> Tensor:
        """Read a block into a new CPU tensor.

        Args:
            offsets: Index of the block's first element, per dim.
            sizes: Shape of the block.

        Raises:
            FormatError: A file cannot be read or is too short.
        """
        block = torch.empty(tuple(sizes), dtype=self.dtype)
        if block.numel() == 0:
            return block
        n_read = sum(_read_overlap(each, block, tuple(offsets)) for each in self.slices)
        assert n_read == block.numel(), "the slices of a tensor cover it exactly once"
        return block


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
    target = target[
        top - block_row : bottom - block_row, left - block_column : right - block_column
    ]
    row_bytes = n_columns * block.element_size()
    start = stored.start + (top - row) * row_bytes + (left - column) * block.element_size()
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


def n_bytes(shape: Sequence[int], dtype: torch.dtype) -> int:
    """Return the size of a tensor in bytes."""
    return math.prod(shape) * dtype.itemsize
