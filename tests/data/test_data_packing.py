"""Packed windows: every target once, nothing across documents; an index is whole or none."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_data_shards import write

from data import packing
from data.config import DataConfig, SourceConfig
from data.dataset import Dataset
from data.errors import DataError
from data.loader import IGNORE, TrainLoader, make_batch
from data.manifest import Manifest
from data.packing import PackedStream, is_packed, pack, wait_until_packed
from data.stages import plan_stages
from data.verification import verify

ROOT = Path(__file__).parents[2]
LENGTHS = [5, 1, 30, 7, 7, 12, 40, 3, 9, 9, 2, 16, 17, 18]
SEQ_LEN = 16
EOS = 257


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three shards of documents, not packed yet."""
    write(tmp_path / "shards", LENGTHS, per_shard=5)
    return tmp_path / "shards"


def stream(folder: Path, verify: bool = True) -> PackedStream:
    return PackedStream(folder, Manifest.read(folder), "source", verify)


def listing(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def index_of(folder: Path, seq_len: int = SEQ_LEN) -> Path:
    return folder / "source" / f"pack-{seq_len}"


@settings(deadline=None, max_examples=40)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=20),
    per_shard=st.integers(1, 8),
    seq_len=st.integers(1, 25),
)
def test_batches_have_each_target_of_each_document_once_and_no_other(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], per_shard: int, seq_len: int
) -> None:
    """Document tokens count up from one to the next, so a token names its place."""
    folder = tmp_path_factory.mktemp("shards")
    write(folder, lengths, per_shard)
    pack(folder, seq_len, progress=False)
    packed = stream(folder)
    windows = [packed.window(index, seq_len) for index in range(packed.n_windows(seq_len))]
    batch = make_batch(windows, document_mask=True, seq_len=seq_len)
    trained = batch.labels != IGNORE
    assert batch.tokens[trained].tolist() == (batch.labels[trained] - 1).tolist()
    begins = {0, *np.cumsum(lengths)[:-1].tolist()}
    inside = [token for token in range(sum(lengths)) if token not in begins]
    assert sorted(batch.labels[trained].tolist()) == inside
    assert packed.n_tokens == sum(lengths)
    for index in (-1, len(windows)):
        with pytest.raises(IndexError):
            packed.window(index, seq_len)


def test_a_window_tells_where_its_documents_and_its_padding_begin(folder: Path) -> None:
    pack(folder, SEQ_LEN, progress=False)
    packed = stream(folder)
    n_padding = 0
    for index in range(packed.n_windows(SEQ_LEN)):
        tokens, starts = packed.window(index, SEQ_LEN)
        assert (tokens.dtype, tokens.shape) == (np.uint32, (SEQ_LEN + 1,))
        assert starts.dtype == np.int64
        parts = np.split(tokens, starts[1:])
        real = [part.tolist() for part in parts if part[0] != EOS]
        assert all(len(part) == 1 for part in parts[len(real) :])
        assert all(part == list(range(part[0], part[0] + len(part))) for part in real)
        n_padding += len(parts) - len(real)
        positions = make_batch([(tokens, starts)], document_mask=True).positions
        within = [place for part in parts for place in range(len(part))]
        assert positions is not None and positions[0].tolist() == within[:SEQ_LEN]
    told = json.loads((index_of(folder) / "index.json").read_text())["shards"]
    assert n_padding == sum(shard["n_padding"] for shard in told) > 0
    assert sum(shard["n_cut"] for shard in told) == sum(n > SEQ_LEN + 1 for n in LENGTHS)
    assert sum(shard["n_bins"] for shard in told) == packed.n_windows(SEQ_LEN)


def test_a_second_packing_writes_the_same_bytes_and_a_third_nothing(folder: Path) -> None:
    pack(folder, SEQ_LEN, progress=False)
    first = listing(folder)
    shutil.rmtree(index_of(folder))
    pack(folder, SEQ_LEN, progress=False)
    assert listing(folder) == first
    times = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    pack(folder, SEQ_LEN, progress=False)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == times


def test_training_reads_the_packed_windows_in_an_order_of_seed_and_position_alone(
    folder: Path,
) -> None:
    pack(folder, SEQ_LEN, progress=False)
    data = DataConfig("x", "x", {"source": SourceConfig("stdlib")})
    stages, _ = plan_stages(data, seq_len=SEQ_LEN, global_batch_size=2, micro_batch_size=2)

    def loader() -> TrainLoader:
        dataset = Dataset.open(folder, packing="best_fit")
        return TrainLoader(dataset, stages, seed=3, rank=0, size=1)

    packed = stream(folder)
    n_windows = packed.n_windows(SEQ_LEN)
    stored = [packed.window(index, SEQ_LEN)[0][:-1].tolist() for index in range(n_windows)]
    expected = [loader().step(step) for step in reversed(range(n_windows // 2))][::-1]
    epoch = [row for step in expected for row in step.micro_batches[0].tokens.tolist()]
    left = [row for row in stored if row not in epoch]
    assert sorted(epoch + left) == sorted(stored)
    assert len(left) == n_windows % 2
    assert epoch != stored[: len(epoch)]
    batches = loader().steps(0)
    for one, found in zip(expected, batches, strict=False):
        assert found.digest == one.digest
        targets = sum(int((batch.labels != IGNORE).sum()) for batch in found.micro_batches)
        assert found.n_targets == targets
    batches.close()


def test_validation_stays_concatenated(folder: Path) -> None:
    opened = Dataset.open(folder, packing="best_fit")
    assert opened.n_validation_windows(SEQ_LEN) == Dataset.open(folder).n_validation_windows(
        SEQ_LEN
    )


def test_a_length_that_is_not_packed_names_the_command(folder: Path) -> None:
    pack(folder, SEQ_LEN, progress=False)
    with pytest.raises(DataError, match=r"python prepare.py … pack=8192"):
        Dataset.open(folder, packing="best_fit").train["source"].n_windows(8192)


def flipped(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def replaced(old: str, new: str) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new))

    return change


@pytest.mark.parametrize(
    ("name", "damage", "told"),
    [
        ("train-00000-001.pieces", flipped, "MiB 0 of it"),
        ("train-00000-001.pieces", Path.unlink, "which has 0"),
        ("train-00000-001.pieces", lambda path: path.write_bytes(b""), "which has 0"),
        ("index.json", Path.unlink, "is missing"),
        ("index.json", lambda path: path.write_text("{"), "cannot be read"),
        ("index.json", lambda path: path.write_text("[1]"), "is damaged"),
        ("index.json", replaced('"version": 1', '"version": 2'), "this program reads 1"),
        ("index.json", replaced('"n_bins"', '"bins"'), "is damaged"),
        ("index.json", replaced('"n_pieces": ', '"n_pieces": 1'), "numbers in"),
        ("index.json", replaced('"seq_len": 16', '"seq_len": 15'), "tells a length of 15"),
    ],
)
def test_a_damaged_index_is_told_and_not_read(
    folder: Path, name: str, damage: Callable[[Path], None], told: str
) -> None:
    pack(folder, SEQ_LEN, progress=False)
    whole = listing(folder)
    damage(index_of(folder) / name)
    with pytest.raises(DataError) as error:
        packed = stream(folder)
        for index in range(packed.n_windows(SEQ_LEN)):
            packed.window(index, SEQ_LEN)
    assert told in str(error.value)
    problems = verify(folder)
    if name == "index.json" and damage is Path.unlink:
        assert problems == []  # not packed: nothing that could be damaged
    else:
        assert len(problems) == 1 and str(index_of(folder)) in problems[0]
    assert f"pack={SEQ_LEN}" in str(error.value)
    assert str(index_of(folder)) in str(error.value)
    shutil.rmtree(index_of(folder))  # as the message says
    pack(folder, SEQ_LEN, progress=False)
    assert listing(folder) == whole
    assert verify(folder) == []


def test_an_index_of_other_shards_is_refused_and_packing_replaces_it(
    folder: Path, tmp_path: Path
) -> None:
    pack(folder, SEQ_LEN, progress=False)
    write(tmp_path / "other", LENGTHS[::-1], per_shard=5)
    shutil.copytree(index_of(folder), index_of(tmp_path / "other"))
    with pytest.raises(DataError, match="other shards"):
        stream(tmp_path / "other").n_windows(SEQ_LEN)
    pack(tmp_path / "other", SEQ_LEN, progress=False)
    assert stream(tmp_path / "other").n_windows(SEQ_LEN) > 0


def test_damaged_shards_are_told_while_packed_windows_are_read(folder: Path) -> None:
    pack(folder, SEQ_LEN, progress=False)
    flipped(folder / "source" / "train-00000-001.tokens")
    packed = stream(folder)
    with pytest.raises(DataError, match=r"train-00000-001\.tokens is damaged"):
        for index in range(packed.n_windows(SEQ_LEN)):
            packed.window(index, SEQ_LEN)


def test_a_folder_that_cannot_be_written_is_told(folder: Path) -> None:
    index_of(folder).write_text("a file in the place of the index")
    with pytest.raises(DataError, match=r"cannot be written .* not packed for a length of 16"):
        pack(folder, SEQ_LEN, progress=False)


KILLED = """
import os, signal, sys
from data.packing import pack
folder, seq_len, limit = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
calls = 0
def counted(change):
    def call(*arguments, **options):
        global calls
        calls += 1
        if calls == limit:
            os.kill(os.getpid(), signal.SIGKILL)
        return change(*arguments, **options)
    return call
for name in ("fsync", "replace", "unlink", "mkdir"):
    setattr(os, name, counted(getattr(os, name)))
if os.fork() == 0:
    pack(folder, seq_len, progress=False)
    print(calls, flush=True)
    os._exit(0)
os.wait()
"""


def test_killed_before_any_change_on_the_disk_it_leaves_nothing_that_counts_as_whole(
    folder: Path, tmp_path: Path
) -> None:
    pack(folder, SEQ_LEN, progress=False)
    whole = listing(folder)
    manifest = Manifest.read(folder)
    for limit in range(1, 30):
        copy = tmp_path / str(limit)
        write(copy, LENGTHS, per_shard=5)
        words = [sys.executable, "-c", KILLED, str(copy), str(SEQ_LEN), str(limit)]
        done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True)
        assert done.stderr == ""
        if done.stdout:
            break
        left = listing(copy)
        assert not is_packed(copy, manifest, SEQ_LEN) or left.keys() >= whole.keys()
        pack(copy, SEQ_LEN, progress=False)
        assert listing(copy) == whole
    assert done.stdout == f"{limit - 1}\n"  # every one of its calls was the last of a process
    assert limit > 10


def test_others_wait_until_the_first_process_has_packed(folder: Path) -> None:
    with pytest.raises(DataError, match="no process has been at it"):
        wait_until_packed(folder, SEQ_LEN, poll_seconds=0.01, idle_seconds=0.05)
    program = "import sys; from data.packing import pack; pack(sys.argv[1], int(sys.argv[2]))"
    words = [sys.executable, "-c", program, str(folder), str(SEQ_LEN)]
    processes = [
        subprocess.Popen(words, cwd=ROOT, stderr=subprocess.PIPE, text=True) for _ in range(2)
    ]
    wait_until_packed(folder, SEQ_LEN, poll_seconds=0.01)
    told = [process.communicate()[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert "".join(told).count("packed for a length of 16") == 1
    assert not list(folder.glob("*.lock"))


def test_a_folder_is_held_while_it_is_packed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_index, held = packing._pack_source, []

    def look(*arguments: Any) -> None:
        held.append(packing._is_claimed(folder, SEQ_LEN))
        write_index(*arguments)

    monkeypatch.setattr(packing, "_pack_source", look)
    pack(folder, SEQ_LEN, progress=False)
    assert held == [True]
    assert not packing._is_claimed(folder, SEQ_LEN)
