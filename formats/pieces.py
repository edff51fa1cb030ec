"""Tensors in files: where their bytes lie, and how a block of one is read without the rest.

Every format comes down to this: a tensor is cut into pieces, each of which is a range of bytes of
a file. Reads go straight into the block that is asked for. Nothing is mapped into memory, so what
has been read does not stay there, and a file that shrinks is an error, not a dead process.
"""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from formats.errors import FormatError

MAX_READ = 2**30  # bytes; Linux reads at most 2 GiB less a page at a time
DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}  # safetensors' words
DTYPE_OF = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}  # ours


class Piece:
    """A part of a tensor: contiguous bytes of a file, row by row.

    Args:
        offsets: Of its first element in the whole tensor, one a dim.
        shape: Of the piece.
        path: The file.
        start: The place of its first byte in the file.
    """

    def __init__(
        self, offsets: Sequence[int], shape: Sequence[int], path: Path, start: int = 0
    ) -> None:
        self.offsets, self.shape, self.path = tuple(offsets), tuple(shape), path
        self._start = start

    def start(self) -> int:
        """The place of its first byte in the file."""
        return self._start


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of one or two dims on the disk."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    pieces: Sequence[Piece]

    def read(self, offsets: Sequence[int], sizes: Sequence[int]) -> Tensor:
        """A block of it, on the CPU.

        Args:
            offsets: Of the block's first element, one a dim.
            sizes: Of the block.

        Raises:
            FormatError: a file cannot be read, or ends too early.
        """
        block = torch.empty(tuple(sizes), dtype=self.dtype)
        if block.numel() == 0:
            return block
        covered = 0
        for piece in self.pieces:
            covered += _read_overlap(piece, block, tuple(offsets))
        assert covered == block.numel(), "pieces cover a tensor once"
        return block


def _read_overlap(piece: Piece, block: Tensor, offsets: tuple[int, ...]) -> int:
    """Reads what a piece and a block have in common; returns the number of elements."""
    begins = [max(a, b) for a, b in zip(piece.offsets, offsets, strict=True)]
    ends = [
        min(a + n, b + m)
        for a, n, b, m in zip(piece.offsets, piece.shape, offsets, block.shape, strict=True)
    ]
    if any(begin >= end for begin, end in zip(begins, ends, strict=True)):
        return 0
    # A vector is a matrix of one row.
    width = piece.shape[-1]
    row, rows = (begins[0] - piece.offsets[0], ends[0] - begins[0]) if len(begins) == 2 else (0, 1)
    column, columns = begins[-1] - piece.offsets[-1], ends[-1] - begins[-1]
    target = block.view(-1, block.shape[-1])
    target = target[begins[0] - offsets[0] :][:rows] if len(begins) == 2 else target
    target = target[:, begins[-1] - offsets[-1] :][:, :columns]
    size = block.element_size()
    start = piece.start() + (row * width + column) * size
    with _opened(piece.path) as file:
        if columns == width == block.shape[-1]:
            _read_into(file, piece.path, target, start)
        else:
            for place in range(rows):
                _read_into(file, piece.path, target[place], start + place * width * size)
    return rows * columns


class _opened:
    """A file's descriptor; errors are FormatErrors."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> int:
        try:
            self.descriptor = os.open(self.path, os.O_RDONLY)
        except OSError as error:
            raise unreadable(self.path, error) from None
        return self.descriptor

    def __exit__(self, *_: object) -> None:
        os.close(self.descriptor)


def _read_into(file: int, path: Path, target: Tensor, start: int) -> None:
    """Fills a contiguous tensor from a place of the file on."""
    buffer = bytes_of(target)
    done = 0
    while done < len(buffer):
        try:
            count = os.preadv(file, [buffer[done : done + MAX_READ]], start + done)
        except OSError as error:
            raise unreadable(path, error) from None
        if count == 0:
            raise FormatError(f"{path} ends before its tensors do: get the file again")
        done += count


def unreadable(path: Path, error: OSError) -> FormatError:
    """What to say of a file that the system does not give."""
    return FormatError(f"{path} cannot be read ({error.strerror}): get it again, or make it so")


def bytes_of(values: Tensor) -> memoryview:
    """The bytes of a contiguous tensor on the CPU, not copied."""
    array: Any = values.view(torch.uint8).numpy()
    return memoryview(array).cast("B")


def n_bytes(shape: Sequence[int], dtype: torch.dtype) -> int:
    """The size of a tensor in bytes."""
    return math.prod(shape) * dtype.itemsize
