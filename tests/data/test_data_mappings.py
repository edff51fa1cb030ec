"""Datasets with more shards than the system allows open files or mappings."""

import errno
from functools import partial
from pathlib import Path

import pytest
from conftest import start_python

from data.config import DataConfig, SourceConfig, TokenizerConfig
from data.errors import DataError
from data.mappings import Mappings
from data.preparation.pipeline import prepare

READ_ALL = """
import resource, sys
from pathlib import Path
from data.best_fit import pack_documents
from data.dataset import Dataset
from data.packing import pack
from data.inspection import document_lengths
from data.verification import verify_dataset
resource.setrlimit(resource.RLIMIT_NOFILE, (40, 64))
folder = Path(sys.argv[1])
for packing in (None, "best_fit"):
    if packing:
        pack(folder, 8, progress=False)
    dataset = Dataset.open(folder, packing=packing)
    stream = dataset.train["source"]
    windows = [stream.window(i, 8) for _ in range(2) for i in range(stream.n_windows(8))]
    assert sum(int(tokens[0]) for tokens, _ in windows) > 0
assert verify_dataset(folder) == []
document_lengths(folder, dataset.manifest)
print(len(windows), resource.getrlimit(resource.RLIMIT_NOFILE)[0])
"""


def test_more_shards_than_open_files_are_read(tmp_path: Path) -> None:
    """Reading, packing, verification and inspection of 80 shards, with all windows kept."""
    (tmp_path / "rows.jsonl").write_text('{"text": "eighteen characters"}\n' * 80)
    source = SourceConfig("jsonl", str(tmp_path / "rows.jsonl"))
    data = DataConfig(
        *("many", str(tmp_path / "shards"), {"source": source}),
        validation_fraction=0.0,
        shard_tokens=1,
    )
    prepare(data, TokenizerConfig("byte", 272), progress=False)
    arguments = ["-c", READ_ALL, data.folder]
    done = start_python(arguments)
    assert done.returncode == 0, done.stderr
    n_windows, limit = map(int, done.stdout.split())
    assert n_windows > 400 and limit == 64


def test_mappings_are_dropped_when_the_system_allows_no_more() -> None:
    """Like `vm.max_map_count`, which a test cannot lower."""
    in_use: list[int] = []

    def map_shard(number: int) -> Mapped:
        if len(in_use) == 5:
            raise OSError(errno.ENOMEM, "Cannot allocate memory")
        return Mapped(in_use, number)

    mappings = Mappings()
    for number in (*range(50), 3, 49):
        assert mappings.get(number, partial(map_shard, number)).number == number
    del in_use[:]
    in_use.extend([-1] * 5)
    with pytest.raises(DataError, match=r"vm\.max_map_count.*not damaged"):
        mappings.get(99, partial(map_shard, 99))


class Mapped:
    """Something that is in use until it is garbage."""

    def __init__(self, in_use: list[int], number: int) -> None:
        self.in_use, self.number = in_use, number
        in_use.append(number)

    def __del__(self) -> None:
        if self.number in self.in_use:
            self.in_use.remove(self.number)
