"""Packed windows contain each target once; an incomplete or damaged packing index is not used."""

import json
import os
import re
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

from data import files, packing
from data.config import DataConfig, SourceConfig
from data.dataset import Dataset
from data.errors import DataError
from data.files import is_locked
from data.loader import IGNORE_INDEX, TrainLoader, make_batch
from data.manifest import Manifest
from data.packing import PackedStream, is_packed, pack, wait_until_packed
from data.stages import plan_stages
from data.verification import verify_dataset

ROOT = Path(__file__).parents[2]
LENGTHS = [5, 1, 30, 7, 7, 12, 40, 3, 9, 9, 2, 16, 17, 18]
SEQ_LEN = 16
EOS = 257


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Write three shards of documents without a packing index."""
    write(tmp_path / "shards", LENGTHS, per_shard=5)
    return tmp_path / "shards"


def stream(folder: Path, verify: bool = True) -> PackedStream:
    return PackedStream(folder, Manifest.read(folder), "source", verify)


def listing(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def index_folder(folder: Path, seq_len: int = SEQ_LEN) -> Path:
    return folder / "source" / f"pack-{seq_len}"


@settings(deadline=None, max_examples=40)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=20),
    per_shard=st.integers(1, 8),
    seq_len=st.integers(1, 25),
)
def test_batches_contain_each_target_of_each_document_once_and_no_other(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], per_shard: int, seq_len: int
) -> None:
    """Token ids increase by one through all documents, so an id identifies its position."""
    folder = tmp_path_factory.mktemp("shards")
    write(folder, lengths, per_shard)
    pack(folder, seq_len, progress=False)
    packed = stream(folder)
    windows = [packed.window(index, seq_len) for index in range(packed.n_windows(seq_len))]
    batch = make_batch(windows, document_mask=True, seq_len=seq_len)
    is_target = batch.labels != IGNORE_INDEX
    assert batch.tokens[is_target].tolist() == (batch.labels[is_target] - 1).tolist()
    starts = {0, *np.cumsum(lengths)[:-1].tolist()}
    targets = [token for token in range(sum(lengths)) if token not in starts]
    assert sorted(batch.labels[is_target].tolist()) == targets
    assert packed.n_tokens == sum(lengths)
    for index in (-1, len(windows)):
        with pytest.raises(IndexError):
            packed.window(index, seq_len)


def test_window_returns_the_starts_of_its_documents_and_padding(folder: Path) -> None:
    pack(folder, SEQ_LEN, progress=False)
    packed = stream(folder)
    n_padding = 0
    for index in range(packed.n_windows(SEQ_LEN)):
        tokens, starts = packed.window(index, SEQ_LEN)
        assert (tokens.dtype, tokens.shape) == (np.uint32, (SEQ_LEN + 1,))
        assert starts.dtype == np.int64
        segments = np.split(tokens, starts[1:])
        real = [segment.tolist() for segment in segments if segment[0] != EOS]
        assert all(len(segment) == 1 for segment in segments[len(real) :])
        assert all(s == list(range(s[0], s[0] + len(s))) for s in real)
        n_padding += len(segments) - len(real)
        positions = make_batch([(tokens, starts)], document_mask=True).positions
        expected = [position for segment in segments for position in range(len(segment))]
        assert positions is not None and positions[0].tolist() == expected[:SEQ_LEN]
    shards = json.loads((index_folder(folder) / "index.json").read_text())["shards"]
    assert n_padding == sum(shard["n_padding"] for shard in shards) > 0
    assert sum(shard["n_cut"] for shard in shards) == sum(n > SEQ_LEN + 1 for n in LENGTHS)
    assert sum(shard["n_bins"] for shard in shards) == packed.n_windows(SEQ_LEN)


def test_packing_is_deterministic_and_writes_nothing_if_already_packed(folder: Path) -> None:
    pack(folder, SEQ_LEN, progress=False)
    first = listing(folder)
    shutil.rmtree(index_folder(folder))
    pack(folder, SEQ_LEN, progress=False)
    assert listing(folder) == first
    times = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    pack(folder, SEQ_LEN, progress=False)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == times


def test_order_of_packed_windows_depends_on_seed_and_position_only(
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
    unread = [row for row in stored if row not in epoch]
    assert sorted(epoch + unread) == sorted(stored)
    assert len(unread) == n_windows % 2
    assert epoch != stored[: len(epoch)]
    batches = loader().steps(0)
    for one, actual in zip(expected, batches, strict=False):
        assert actual.digest == one.digest
        targets = sum(int((batch.labels != IGNORE_INDEX).sum()) for batch in actual.micro_batches)
        assert actual.n_targets == targets
    batches.close()


def test_validation_data_is_not_packed(folder: Path) -> None:
    packed = Dataset.open(folder, packing="best_fit")
    assert packed.n_validation_windows(SEQ_LEN) == Dataset.open(folder).n_validation_windows(
        SEQ_LEN
    )


def test_error_for_a_sequence_length_without_index_names_the_command(folder: Path) -> None:
    pack(folder, SEQ_LEN, progress=False)
    with pytest.raises(DataError, match=r"python prepare.py … pack=8192"):
        Dataset.open(folder, packing="best_fit").train["source"].n_windows(8192)


def flip_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def replace_text(old: str, new: str) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        text = path.read_text()
        assert old in text
        # As written by version 0.2, whose index has no hash of its content.
        path.write_text(re.sub(r',\n "sha256": .*', "", text.replace(old, new)))

    return change


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("train-00000-001.pieces", flip_bit, "checksum of MiB 0 "),
        ("train-00000-001.pieces", Path.unlink, "No such file"),
        ("train-00000-001.pieces", lambda path: path.write_bytes(b""), "has 0 bytes"),
        ("index.json", Path.unlink, "is missing"),
        ("index.json", lambda path: path.write_text("{"), "cannot read"),
        ("index.json", lambda path: path.write_text("[1]"), "is damaged"),
        (
            "index.json",
            replace_text('"version": 1', '"version": 2'),
            "version=2 is not supported, only",
        ),
        ("index.json", replace_text('"n_bins"', '"bins"'), "is damaged"),
        (
            "index.json",
            replace_text('"shards": [', '"shards": [], "others": ['),
            "is damaged (at shards)",
        ),
        (
            "index.json",
            lambda path: path.write_text(path.read_text().replace('"n_cut": ', '"n_cut": 1')),
            "is damaged (its content differs from its sha256)",
        ),
        ("index.json", replace_text('"n_pieces": ', '"n_pieces": 1'), "numbers in"),
        ("index.json", replace_text('"seq_len": 16', '"seq_len": 15'), "has seq_len=15"),
    ],
)
def test_damaged_index_is_rejected(
    folder: Path, name: str, damage: Callable[[Path], None], message: str
) -> None:
    pack(folder, SEQ_LEN, progress=False)
    intact = listing(folder)
    damage(index_folder(folder) / name)
    with pytest.raises(DataError) as error:
        packed = stream(folder)
        for index in range(packed.n_windows(SEQ_LEN)):
            packed.window(index, SEQ_LEN)
    assert message in str(error.value)
    problems = verify_dataset(folder)
    if name == "index.json" and damage is Path.unlink:
        assert problems == []  # without index.json the folder counts as not packed
    else:
        assert len(problems) == 1 and str(index_folder(folder)) in problems[0]
    assert f"pack={SEQ_LEN}" in str(error.value)
    assert str(index_folder(folder)) in str(error.value)
    shutil.rmtree(index_folder(folder))  # the remedy given in the message
    pack(folder, SEQ_LEN, progress=False)
    assert listing(folder) == intact
    assert verify_dataset(folder) == []


def test_index_of_other_shards_is_rejected_and_replaced_by_packing(
    folder: Path, tmp_path: Path
) -> None:
    pack(folder, SEQ_LEN, progress=False)
    write(tmp_path / "other", LENGTHS[::-1], per_shard=5)
    shutil.copytree(index_folder(folder), index_folder(tmp_path / "other"))
    with pytest.raises(DataError, match="other shards"):
        stream(tmp_path / "other").n_windows(SEQ_LEN)
    pack(tmp_path / "other", SEQ_LEN, progress=False)
    assert stream(tmp_path / "other").n_windows(SEQ_LEN) > 0


def test_index_truncated_while_it_is_read_is_detected(folder: Path) -> None:
    pack(folder, SEQ_LEN, progress=False)
    packed = stream(folder)
    packed.window(0, SEQ_LEN)
    for path in index_folder(folder).glob("*.pieces"):
        os.truncate(path, 0)
    with pytest.raises(DataError, match=r"was truncated while it was in use; "):
        packed.window(1, SEQ_LEN)


def test_damaged_shard_is_detected_when_packed_windows_are_read(folder: Path) -> None:
    pack(folder, SEQ_LEN, progress=False)
    flip_bit(folder / "source" / "train-00000-001.tokens")
    packed = stream(folder)
    with pytest.raises(DataError, match=r"train-00000-001\.tokens is damaged"):
        for index in range(packed.n_windows(SEQ_LEN)):
            packed.window(index, SEQ_LEN)


def test_error_names_a_folder_that_cannot_be_written(folder: Path) -> None:
    index_folder(folder).write_text("a file with the name of the index folder")
    with pytest.raises(DataError, match=r"cannot be written .* not packed for seq_len=16"):
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


def test_packing_killed_before_any_file_operation_leaves_no_index_that_counts_as_valid(
    folder: Path, tmp_path: Path
) -> None:
    pack(folder, SEQ_LEN, progress=False)
    complete = listing(folder)
    manifest = Manifest.read(folder)
    for limit in range(1, 30):
        copy = tmp_path / str(limit)
        write(copy, LENGTHS, per_shard=5)
        command = [sys.executable, "-c", KILLED, str(copy), str(SEQ_LEN), str(limit)]
        process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        assert process.stderr == ""
        if process.stdout:
            break
        remaining = listing(copy)
        assert not is_packed(copy, manifest, SEQ_LEN) or remaining.keys() >= complete.keys()
        pack(copy, SEQ_LEN, progress=False)
        assert listing(copy) == complete
    assert process.stdout == f"{limit - 1}\n"  # a process was killed at each of the calls
    assert limit > 10


def test_other_processes_wait_until_the_first_one_has_packed(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "POLL_SECONDS", 0.01)
    with monkeypatch.context() as patch, pytest.raises(DataError, match="no process has worked"):
        patch.setattr(files, "IDLE_SECONDS", 0.05)
        wait_until_packed(folder, SEQ_LEN)
    program = "import sys; from data.packing import pack; pack(sys.argv[1], int(sys.argv[2]))"
    command = [sys.executable, "-c", program, str(folder), str(SEQ_LEN)]
    processes = [
        subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) for _ in range(2)
    ]
    wait_until_packed(folder, SEQ_LEN)
    outputs = [process.communicate()[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert "".join(outputs).count("for seq_len=16:") == 1
    assert not list(folder.glob("*.lock"))


def test_folder_is_locked_while_it_is_packed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pack_source, locked = packing._pack_source, []

    def record_lock(*arguments: Any) -> None:
        locked.append(is_locked(packing._lock_file(folder, SEQ_LEN)))
        pack_source(*arguments)

    monkeypatch.setattr(packing, "_pack_source", record_lock)
    pack(folder, SEQ_LEN, progress=False)
    assert locked == [True]
    assert not is_locked(packing._lock_file(folder, SEQ_LEN))
