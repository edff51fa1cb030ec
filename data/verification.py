"""Verification of every byte of a prepared folder against its manifest.

Collects all damage instead of stopping at the first error.
"""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn

from data.errors import DataError
from data.files import CRC_BLOCK, Checksums, FileEntry, check_regular
from data.manifest import OFFSET, TOKEN, Manifest, Shard
from data.packing import PackIndex, packed_lengths
from data.progress import ProgressReporter
from data.tokenizer import MODEL_FILE, read_tokenizer


def verify_dataset(
    folder: Path, update: Callable[[int, int], None] = lambda done, total: None
) -> list[str]:
    """Return one message per damaged file, or an empty list.

    Args:
        update: Called after each shard with the number of bytes checked and in total.

    Raises:
        DataError: The manifest cannot be read.
    """
    manifest = Manifest.read(folder, check_files=False)  # file errors are collected below
    errors = list(_tokenizer_errors(folder, manifest))
    shards = manifest.shards()
    total, done = sum(shard.n_bytes for shard in shards), 0
    for shard in shards:
        errors += _shard_errors(folder, shard, manifest.tokenizer.vocab_size)
        done += shard.n_bytes
        update(done, total)
    return [*errors, *_packing_errors(folder, manifest)]


def print_verification(folder: Path) -> bool:
    """Verify a folder, print the result and return whether it is intact."""
    reporter = ProgressReporter(enabled=True)
    columns = (TextColumn("verifying"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with reporter.bar("", *columns) as update:
        errors = verify_dataset(folder, update)
    if not errors:
        n_bytes = sum(shard.n_bytes for shard in Manifest.read(folder).shards())
        print(f"{folder}: verified {n_bytes:,} bytes of shards, no damage found.")
        return True
    n_files = f"{len(errors)} files differ" if len(errors) > 1 else "1 file differs"
    reporter.log(f"{folder} is damaged; {n_files} from the manifest:")
    for error in errors:
        reporter.log(f"  {error}")
    reporter.log("Restore the files from a copy, or delete the folder and prepare it again.")
    return False


def _tokenizer_errors(folder: Path, manifest: Manifest) -> Iterator[str]:
    path = folder / MODEL_FILE
    try:
        if read_tokenizer(path, manifest.tokenizer.name).hash != manifest.tokenizer.hash:
            yield f"{path} is not the tokenizer that produced the tokens"
    except DataError as error:
        yield f"{path}: cannot read: {error}"


def _packing_errors(folder: Path, manifest: Manifest) -> Iterator[str]:
    for source in manifest.sources:
        for seq_len in packed_lengths(folder, source):
            try:
                index = PackIndex.read(folder, source, seq_len, manifest.hash)
            except DataError as error:
                yield str(error)
            else:
                yield from _file_errors(folder, [shard.pieces for shard in index.shards])


def _shard_errors(folder: Path, shard: Shard, vocab_size: int) -> Iterator[str]:
    errors = list(_file_errors(folder, shard.files))
    yield from errors
    if errors:
        return
    # The files are as written; check that their content agrees with the manifest.
    tokens = np.memmap(folder / shard.tokens.file, dtype=TOKEN, mode="r")
    offsets = np.fromfile(folder / shard.offsets.file, dtype=OFFSET)
    largest_id = int(tokens.max(initial=0))
    if largest_id != shard.largest_id or shard.largest_id >= vocab_size:
        yield (
            f"{folder / shard.tokens.file} contains ids up to {largest_id}, but the manifest "
            f"records {shard.largest_id} and vocab_size={vocab_size}"
        )
    ends = len(offsets) - 1, *offsets[[0, -1]].tolist()
    if ends != (shard.n_documents, 0, shard.n_tokens) or (np.diff(offsets) <= 0).any():
        yield (
            f"{folder / shard.offsets.file} does not increase from 0 to {shard.n_tokens} tokens "
            f"over {shard.n_documents} documents"
        )


def _file_errors(folder: Path, entries: Iterable[FileEntry]) -> Iterator[str]:
    """Yield how each file differs from its manifest entry."""
    for entry in entries:
        path, actual = folder / entry.file, Checksums()
        try:
            check_regular(path)
            with open(path, "rb") as file:
                while chunk := file.read(8 * CRC_BLOCK):
                    actual.update(chunk)
        except OSError as error:
            yield f"{path}: cannot read ({error.strerror})"
            continue
        found = actual.entry(entry.file)
        if found.n_bytes != entry.n_bytes:
            yield f"{path} has {found.n_bytes:,} bytes, but the manifest records {entry.n_bytes:,}"
        elif found != entry:
            blocks = range(entry.n_blocks)
            damaged = [str(i) for i in blocks if found.block_crc32(i) != entry.block_crc32(i)]
            yield f"{path} is damaged in MiB {', '.join(damaged)} (counted from 0)"
