"""Verification of every byte of a prepared folder against its manifest.

Collects all damage instead of stopping at the first error.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn

from data.errors import DataError
from data.files import CRC_BLOCK, Checksums
from data.manifest import OFFSET, SPLITS, TOKEN, FileEntry, Manifest, Shard
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
    errors = _tokenizer_errors(folder, manifest)
    shards = [shard for split in SPLITS for shard in manifest.shards(split)]
    total = sum(shard.tokens.n_bytes + shard.offsets.n_bytes for shard in shards)
    done = 0
    for shard in shards:
        errors += _shard_errors(folder, shard, manifest.tokenizer.vocab_size)
        done += shard.tokens.n_bytes + shard.offsets.n_bytes
        update(done, total)
    return errors + _packing_errors(folder, manifest)


def print_verification(folder: Path) -> bool:
    """Verify a folder, print the result and return whether it is intact."""
    reporter = ProgressReporter(enabled=True)
    columns = (TextColumn("verifying"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    n_bytes = 0
    with reporter.bar("", *columns) as update_bar:

        def update(done: int, total: int) -> None:
            nonlocal n_bytes
            n_bytes = total
            update_bar(done, total)

        errors = verify_dataset(folder, update)
    if not errors:
        print(f"{folder}: verified {n_bytes:,} bytes of shards, no damage found.")
        return True
    n_files = f"{len(errors)} files differ" if len(errors) > 1 else "1 file differs"
    reporter.log(
        "\n".join(
            [
                f"{folder} is damaged; {n_files} from the manifest:",
                *(f"  {error}" for error in errors),
                "Restore the files from a copy, or delete the folder and prepare it again.",
            ]
        )
    )
    return False


def _tokenizer_errors(folder: Path, manifest: Manifest) -> list[str]:
    path = folder / MODEL_FILE
    try:
        tokenizer = read_tokenizer(path, manifest.tokenizer.name)
    except DataError as error:
        return [f"{path}: cannot read: {error}"]
    if tokenizer.hash != manifest.tokenizer.hash:
        return [f"{path} is not the tokenizer that produced the tokens"]
    return []


def _packing_errors(folder: Path, manifest: Manifest) -> list[str]:
    errors = []
    for source in manifest.sources:
        for seq_len in packed_lengths(folder, source):
            try:
                index = PackIndex.read(folder, source, seq_len, manifest.hash)
            except DataError as error:
                errors.append(str(error))
                continue
            found = (_file_error(folder, shard.pieces) for shard in index.shards)
            errors += [error for error in found if error]
    return errors


def _shard_errors(folder: Path, shard: Shard, vocab_size: int) -> list[str]:
    found = (_file_error(folder, entry) for entry in (shard.tokens, shard.offsets))
    errors = [error for error in found if error]
    if errors:
        return errors
    # The files are as written; check that their content agrees with the manifest.
    tokens = np.memmap(folder / shard.tokens.file, dtype=TOKEN, mode="r")
    offsets = np.fromfile(folder / shard.offsets.file, dtype=OFFSET)
    largest_id = int(tokens.max(initial=0))
    if largest_id != shard.largest_id or shard.largest_id >= vocab_size:
        errors.append(
            f"{folder / shard.tokens.file} contains ids up to {largest_id}, but the manifest "
            f"records {shard.largest_id} and vocab_size={vocab_size}"
        )
    if (
        len(offsets) != shard.n_documents + 1
        or [int(offsets[0]), int(offsets[-1])] != [0, shard.n_tokens]
        or (np.diff(offsets) <= 0).any()
    ):
        errors.append(
            f"{folder / shard.offsets.file} does not increase from 0 to {shard.n_tokens} tokens "
            f"over {shard.n_documents} documents"
        )
    return errors


def _file_error(folder: Path, entry: FileEntry) -> str | None:
    """Return how a file differs from its manifest entry, or None."""
    path = folder / entry.file
    actual = Checksums()
    try:
        with open(path, "rb") as file:
            while chunk := file.read(8 * CRC_BLOCK):
                actual.update(chunk)
    except OSError as error:
        return f"{path}: cannot read ({error.strerror})"
    if actual.n_bytes != entry.n_bytes:
        return f"{path} has {actual.n_bytes:,} bytes, but the manifest records {entry.n_bytes:,}"
    if actual.sha256 == entry.sha256:
        return None
    found = FileEntry.from_checksums(entry.file, actual)
    damaged = [
        str(block)
        for block in range(entry.n_blocks)
        if found.block_crc32(block) != entry.block_crc32(block)
    ]
    return f"{path} is damaged in MiB {', '.join(damaged)} (counted from 0)"
