"""What a pack index is, as its `index.json` tells: which pieces fill which window.

<folder>/<source>/pack-<seq_len>/train-PPPPP-KKK.pieces   int64, little-endian: where the pieces of
                                  each bin begin, then their number; the place of each piece in its
                                  shard; its length in tokens
<folder>/<source>/pack-<seq_len>/index.json               last: without it there is no index
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data.errors import DataError
from data.files import write_atomically
from data.manifest import OFFSET, FileEntry

FORMAT = "llamesh-packing"
FORMAT_VERSION = 1
INDEX_FILE = "index.json"


def index_folder(folder: Path, source: str, seq_len: int) -> Path:
    """Where the index of a source's training windows lies."""
    return folder / source / f"pack-{seq_len}"


def packed_lengths(folder: Path, source: str) -> list[int]:
    """The lengths that a source is packed for; a packing that was killed does not count."""
    found = (folder / source).glob(f"pack-*/{INDEX_FILE}")
    lengths = (path.parent.name.removeprefix("pack-") for path in found)
    return sorted(int(length) for length in lengths if length.isdecimal())


@dataclass(frozen=True)
class PackedShard:
    """The bins of one shard: their file, and what they hold."""

    pieces: FileEntry
    n_bins: int
    n_pieces: int
    n_padding: int  # tokens
    n_cut: int  # documents


@dataclass(frozen=True)
class PackIndex:
    """The index of a source's training windows of one length; `shards` as in the manifest."""

    seq_len: int
    shards_hash: str  # the manifest's
    shards: list[PackedShard]
    format: str = FORMAT
    version: int = FORMAT_VERSION

    def write(self, folder: Path, source: str) -> None:
        """Writes `index.json`, which makes the index a whole one."""
        text = json.dumps(asdict(self), indent=1) + "\n"
        write_atomically(index_folder(folder, source, self.seq_len) / INDEX_FILE, text.encode())

    @classmethod
    def read(cls, folder: Path, source: str, seq_len: int, shards_hash: str) -> "PackIndex":
        """The index, verified against the sizes of its files.

        Raises:
            DataError: there is none, or it is damaged, of another version or of other shards.
        """
        path = index_folder(folder, source, seq_len) / INDEX_FILE
        try:
            values = json.loads(path.read_bytes())
        except FileNotFoundError:
            raise DataError(
                f"data.packing (best_fit): data.sources.{source} is not packed for a length of "
                f"{seq_len} ({path} is missing): run `python prepare.py … pack={seq_len}` with "
                "the same data and tokenizer"
            ) from None
        except (OSError, ValueError) as error:
            raise DataError(f"{path} cannot be read ({error}): {anew(path, seq_len)}") from None
        try:
            index = cls._from_json(values)
            found = index._problems(folder, seq_len, shards_hash)
        except (KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{path} is damaged (at {error}): {anew(path, seq_len)}") from None
        if found:
            raise DataError(f"{path} {found[0]}: {anew(path, seq_len)}")
        return index

    @classmethod
    def _from_json(cls, values: dict[str, Any]) -> "PackIndex":
        """An index from what `write` wrote."""
        shards = [
            PackedShard(**{**shard, "pieces": FileEntry(**shard["pieces"])})
            for shard in values["shards"]
        ]
        return cls(**{**values, "shards": shards})

    def _problems(self, folder: Path, seq_len: int, shards_hash: str) -> list[str]:
        """Why this is not the index that is asked for."""
        if (self.format, self.version) != (FORMAT, FORMAT_VERSION):
            return [f"is {self.format} {self.version}, this program reads {FORMAT_VERSION}"]
        if self.shards_hash != shards_hash:
            return [
                f"belongs to other shards (hash {self.shards_hash[:12]}) than those of {folder} "
                f"({shards_hash[:12]})"
            ]
        if self.seq_len != seq_len:
            return [f"tells a length of {self.seq_len}"]
        found = []
        for shard in self.shards:
            path = folder / shard.pieces.file
            n_bytes = path.stat().st_size if path.exists() else 0
            n_numbers = shard.n_bins + 1 + 2 * shard.n_pieces
            if not n_bytes == shard.pieces.n_bytes == n_numbers * OFFSET.itemsize:
                found.append(
                    f"tells of {n_numbers} numbers in {shard.pieces.n_bytes:,} bytes of {path}, "
                    f"which has {n_bytes:,}"
                )
        return found


def anew(path: Path, seq_len: int) -> str:
    """What mends an index that cannot be used."""
    return f"delete {path.parent}, then run `python prepare.py … pack={seq_len}`"
