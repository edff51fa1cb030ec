"""Checks every byte of a prepared folder against its manifest, and names all damage at once."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from data.errors import DataError
from data.files import CRC_BLOCK, Checksums
from data.manifest import OFFSET, SPLITS, TOKEN, FileEntry, Manifest, Shard
from data.pack_index import PackIndex, packed_lengths
from data.tokenizer import MODEL_FILE, read_tokenizer


def verify(folder: Path, tell: Callable[[int, int], None] = lambda done, total: None) -> list[str]:
    """What is damaged in a folder, a line a file; nothing where all is as it was prepared.

    Args:
        tell: is told after each shard how many bytes of how many are checked

    Raises:
        DataError: the folder has no manifest that can be read.
    """
    manifest = Manifest.read(folder, compare=False)  # all damage is told, not the first
    found = _tokenizer_errors(folder, manifest)
    shards = [shard for split in SPLITS for shard in manifest.shards(split)]
    total = sum(shard.tokens.n_bytes + shard.offsets.n_bytes for shard in shards)
    done = 0
    for shard in shards:
        found += _shard_errors(folder, shard, manifest.tokenizer.vocab_size)
        done += shard.tokens.n_bytes + shard.offsets.n_bytes
        tell(done, total)
    return found + _packing_errors(folder, manifest)


def verify_and_tell(folder: Path) -> bool:
    """Checks a folder and tells all damage on standard error; whether there is none."""
    console = Console(stderr=True)
    columns = (TextColumn("checking"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    n_bytes = 0
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as bar:
        task = bar.add_task("", total=None)

        def tell(done: int, total: int) -> None:
            nonlocal n_bytes
            n_bytes = total
            bar.update(task, completed=done, total=total)

        problems = verify(folder, tell)
    if not problems:
        print(f"{folder} is whole: each of its {n_bytes:,} bytes of shards is as it was prepared.")
        return True
    of = f"{len(problems)} of its files are" if len(problems) > 1 else "1 of its files is"
    lines = [f"{folder} is damaged, {of} not as prepared:", *(f"  {each}" for each in problems)]
    remedy = "Restore them from a copy; or delete the folder and prepare it again."
    console.print("\n".join([*lines, remedy]), highlight=False, soft_wrap=True, markup=False)
    return False


def _tokenizer_errors(folder: Path, manifest: Manifest) -> list[str]:
    """Whether `tokenizer.model` is the tokenizer that made the tokens."""
    path = folder / MODEL_FILE
    try:
        found = read_tokenizer(path, manifest.tokenizer.name)
    except DataError as error:
        return [f"{path} cannot be read: {error}"]
    if found.hash != manifest.tokenizer.hash:
        return [f"{path} is not the tokenizer that made the tokens"]
    return []


def _packing_errors(folder: Path, manifest: Manifest) -> list[str]:
    """What is wrong with the pack indexes, where there are some: a small part of the bytes."""
    problems = []
    for source in manifest.sources:
        for seq_len in packed_lengths(folder, source):
            try:
                index = PackIndex.read(folder, source, seq_len, manifest.hash)
            except DataError as error:
                problems.append(str(error))
                continue
            found = (_file_problem(folder, shard.pieces) for shard in index.shards)
            problems += [problem for problem in found if problem]
    return problems


def _shard_errors(folder: Path, shard: Shard, vocab_size: int) -> list[str]:
    """What is wrong with the two files of a shard."""
    problems = []
    for entry in (shard.tokens, shard.offsets):
        problem = _file_problem(folder, entry)
        if problem:
            problems.append(problem)
    if problems:  # what the content says is no news then
        return problems
    tokens = np.memmap(folder / shard.tokens.file, dtype=TOKEN, mode="r")
    offsets = np.fromfile(folder / shard.offsets.file, dtype=OFFSET)
    if int(tokens.max(initial=0)) != shard.largest_id or shard.largest_id >= vocab_size:
        problems.append(
            f"{folder / shard.tokens.file} holds ids up to {int(tokens.max(initial=0))}: the "
            f"manifest says {shard.largest_id}, the vocabulary has {vocab_size}"
        )
    ends = [0, shard.n_tokens]
    if (
        len(offsets) != shard.n_documents + 1
        or [int(offsets[0]), int(offsets[-1])] != ends
        or (np.diff(offsets) <= 0).any()
    ):
        problems.append(
            f"{folder / shard.offsets.file} does not ascend from 0 to the {shard.n_tokens} tokens "
            f"over {shard.n_documents} documents"
        )
    return problems


def _file_problem(folder: Path, entry: FileEntry) -> str | None:
    """Where a file differs from what was written, or None."""
    path = folder / entry.file
    sums = Checksums()
    try:
        with open(path, "rb") as file:
            while piece := file.read(8 * CRC_BLOCK):
                sums.update(piece)
    except OSError as error:
        return f"{path} cannot be read ({error.strerror})"
    if sums.n_bytes != entry.n_bytes:
        return f"{path} has {sums.n_bytes:,} bytes, its manifest says {entry.n_bytes:,}"
    if sums.sha256 == entry.sha256:
        return None
    damaged = [
        str(block)
        for block in range(len(entry.crc32) // 8)
        if sums.crc32[8 * block : 8 * block + 8] != entry.crc32[8 * block : 8 * block + 8]
    ]
    return f"{path} is damaged in MiB {', '.join(damaged)} (counted from 0)"
