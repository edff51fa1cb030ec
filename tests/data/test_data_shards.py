"""Token shards: reading returns what was written, across shard boundaries; damage is detected."""

import hashlib
import json
import os
import shutil
import zlib
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data import shards as data_shards
from data.config import TokenizerConfig
from data.errors import DataError
from data.files import CRC_BLOCK, Checksums
from data.manifest import SPLITS, Manifest, Shard, SourceEntry, TokenizerEntry
from data.mappings import Mappings
from data.shards import ShardWriter, TokenStream
from data.tokenizer import MODEL_FILE, model_file, ready_tokenizer
from data.verification import verify_dataset

LENGTHS = [5, 1, 30, 7, 7, 12, 40, 3]


def documents(lengths: list[int]) -> list[np.ndarray]:
    """Return documents of the given lengths whose tokens are all different."""
    ends = np.cumsum(lengths)
    return [np.arange(end - n, end, dtype=np.uint32) for n, end in zip(lengths, ends, strict=True)]


def write(folder: Path, lengths: list[int], per_shard: int) -> Manifest:
    """Write a dataset with `per_shard` documents per shard and no validation data."""
    shards: list[Shard] = []
    for number, group in groupby(enumerate(documents(lengths)), lambda item: item[0] // per_shard):
        writer = ShardWriter(folder, f"source/train-00000-{number:03d}")
        for _, document in group:
            writer.add(document)
        shard = writer.close()
        assert shard is not None
        shards.append(shard)
    tokenizer = ready_tokenizer(TokenizerConfig("byte", 272))
    assert tokenizer is not None
    vocab_size = max(272, sum(lengths))
    source = SourceEntry("r", {"read": len(lengths)}, dict(zip(SPLITS, (shards, []), strict=True)))
    manifest = Manifest(
        TokenizerEntry("byte", tokenizer.hash, vocab_size, 256, 257), {}, {"source": source}
    )
    (folder / MODEL_FILE).write_bytes(model_file(tokenizer.ranks))
    manifest.write(folder)
    return manifest


@settings(deadline=None, max_examples=30)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=20),
    per_shard=st.integers(1, 8),
    seq_len=st.integers(1, 25),
    checked=st.booleans(),
)
def test_windows_equal_slices_of_the_concatenated_documents(
    tmp_path_factory: pytest.TempPathFactory,
    lengths: list[int],
    per_shard: int,
    seq_len: int,
    checked: bool,
) -> None:
    folder = tmp_path_factory.mktemp("shards")
    manifest = write(folder, lengths, per_shard)
    stream = TokenStream(folder, manifest.shards("train"), checked)
    concatenated = np.concatenate(documents(lengths))
    document_starts = np.cumsum([0, *lengths[:-1]])
    assert stream.n_tokens == len(concatenated) == manifest.n_tokens("train")
    assert stream.n_windows(seq_len) == (len(concatenated) - 1) // seq_len
    for index in range(stream.n_windows(seq_len)):
        tokens, starts = stream.window(index, seq_len)
        span = range(index * seq_len, index * seq_len + seq_len + 1)
        assert tokens.dtype == np.uint32
        assert tokens.tolist() == concatenated[span.start : span.stop].tolist()
        assert starts.tolist() == [s - span.start for s in document_starts if s in span]
    with pytest.raises(IndexError):
        stream.window(stream.n_windows(seq_len), seq_len)


def test_files_have_the_documented_layout_hashes_and_checksums(tmp_path: Path) -> None:
    lengths = [300_000, 1, 299_999]  # more than two MiB of tokens
    (shard,) = write(tmp_path, lengths, 3).shards("train")
    tokens = (tmp_path / "source/train-00000-000.tokens").read_bytes()
    offsets = (tmp_path / "source/train-00000-000.offsets").read_bytes()
    assert np.array_equal(np.frombuffer(tokens, "<u4"), np.arange(600_000))
    assert np.frombuffer(offsets, "<i8").tolist() == np.cumsum([0, *lengths]).tolist()
    for entry, content in ((shard.tokens, tokens), (shard.offsets, offsets)):
        assert entry.sha256 == hashlib.sha256(content).hexdigest()
        blocks = [content[i : i + 2**20] for i in range(0, len(content), 2**20)]
        assert entry.crc32 == "".join(f"{zlib.crc32(block):08x}" for block in blocks)
        assert entry.n_bytes == len(content)
    assert len(shard.tokens.crc32) == 3 * 8
    assert shard.largest_id == 599_999
    assert not list(tmp_path.rglob("*.tmp"))


@settings(deadline=None, max_examples=20)
@given(cuts=st.lists(st.integers(1, 3 * CRC_BLOCK), max_size=4))
def test_checksums_do_not_depend_on_the_sizes_of_the_updates(cuts: list[int]) -> None:
    content = bytes(3 * CRC_BLOCK - 5) + b"end.."
    expected, actual = Checksums(), Checksums()
    expected.update(content)
    bounds = [0, *sorted(cut % len(content) for cut in cuts), len(content)]
    for start, end in pairwise(bounds):
        actual.update(content[start:end])
    assert actual.entry("a") == expected.entry("a")


def test_manifest_round_trip_is_lossless(tmp_path: Path) -> None:
    assert write(tmp_path, LENGTHS, 2) == Manifest.read(tmp_path)


def test_shard_gets_its_final_name_only_when_complete(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, "source/train-00000-000")
    assert writer.close() is None and not list(tmp_path.iterdir())
    writer.add(documents([3])[0])
    files = [path.name for path in (tmp_path / "source").iterdir()]
    assert files == ["train-00000-000.tokens.tmp"]
    writer.abort()


# ---------------------------------------------------------------- damage


def test_damaged_folder_is_rejected_when_opened(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data\.folder=.* run prepare\.py"):
        Manifest.read(tmp_path)
    write(tmp_path, LENGTHS, 2)
    shard, manifest = tmp_path / "source/train-00000-001.tokens", tmp_path / "manifest.json"
    intact, valid = shard.read_bytes(), json.loads(manifest.read_bytes())
    del valid["sha256"]  # of version 0.2, and of other programs

    shard.write_bytes(intact[:-4])
    with pytest.raises(DataError, match=r"train-00000-001\.tokens has 144 bytes, .* records 148"):
        Manifest.read(tmp_path)
    shard.unlink()
    with pytest.raises(DataError, match=r"train-00000-001\.tokens: cannot read \(No such file"):
        Manifest.read(tmp_path)
    shard.write_bytes(intact)
    assert Manifest.read(tmp_path).n_tokens("train") == sum(LENGTHS)

    def assert_rejected(values: object, message: str) -> None:
        manifest.write_text(json.dumps(values))
        with pytest.raises(DataError, match=message):
            Manifest.read(tmp_path)

    assert_rejected(
        {**valid, "version": 1},
        "version=1 is not supported, only format=llamesh-shards, version=2; restore it from a copy",
    )
    assert_rejected({**valid, "format": "other"}, "format=other, version=2 is not supported")
    assert_rejected({**valid, "sources": {"source": {}}}, "is damaged")
    only_train = {"documents": {}, "revision": "", "shards": {"train": [], "other": []}}
    assert_rejected({**valid, "sources": {"source": only_train}}, r"damaged \(at sources\.source")
    settings: Any
    for settings in ({"data.sources": [{}]}, {"data.sources": {"a": 1}}, {"tokenizer": []}):
        assert_rejected({**valid, "configuration": settings}, r"damaged \(at configuration\)")
    small = {**valid["tokenizer"], "vocab_size": 100}
    assert_rejected(
        {**valid, "tokenizer": small},
        "contains token id 104, outside the tokenizer's vocab_size=100",
    )
    manifest.write_text(json.dumps(valid)[:-9])
    with pytest.raises(DataError, match="cannot read"):
        Manifest.read(tmp_path)
    valid["sources"]["source"]["shards"]["train"][0]["tokens"]["crc32"] = "0000000g"
    assert_rejected(valid, r"damaged \(at sources\.source\.shards\.train\.0\.tokens\.crc32\)")


def test_each_flipped_byte_of_a_manifest_is_reported_as_damage_of_the_manifest(
    tmp_path: Path,
) -> None:
    written = write(tmp_path, [5, 1], 2)
    path = tmp_path / "manifest.json"
    intact = path.read_bytes()
    for index, byte in list(enumerate(intact))[::2]:
        path.write_bytes(intact[:index] + bytes([byte ^ 1]) + intact[index + 1 :])
        try:
            found = Manifest.read(tmp_path)
        except DataError as error:
            assert str(error).startswith(str(path)), index
            assert "restore it from a copy, or delete the folder and prepare it" in str(error)
        else:
            assert found == written, f"byte {index} of {intact[index - 40 : index + 40]!r}"


def flip_bit(path: Path, offset: int) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    path.write_bytes(content)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a dataset with one shard of more than two MiB."""
    folder = tmp_path_factory.mktemp("large")
    write(folder, [300_000, 1, 299_999], 3)
    return folder


@pytest.fixture
def copy(large: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(large, tmp_path / "copy"))


def test_flipped_bit_is_detected_by_reads_of_its_mib_only(copy: Path) -> None:
    path = copy / "source/train-00000-000.tokens"
    flip_bit(path, CRC_BLOCK + 77)
    stream = TokenStream(copy, Manifest.read(copy).shards("train"))
    per_block = CRC_BLOCK // 4
    assert stream.window(0, 1000)[0][-1] == 1000
    assert stream.window(2 * per_block // 1000 + 1, 1000)[0].size == 1001
    for index in (per_block // 1000, per_block // 1000 + 9):  # the first one overlaps MiB 1
        with pytest.raises(
            DataError, match=r"train-00000-000\.tokens is damaged: the checksum of MiB 1 .*verify"
        ):
            stream.window(index, 1000)
    unverified = TokenStream(copy, Manifest.read(copy).shards("train"), verify=False)
    assert unverified.window(per_block // 1000 + 9, 1000)[0].size == 1001


def test_flipped_bit_in_offsets_is_detected_when_the_shard_is_opened(copy: Path) -> None:
    flip_bit(copy / "source/train-00000-000.offsets", 9)
    stream = TokenStream(copy, Manifest.read(copy).shards("train"))
    with pytest.raises(
        DataError, match=r"train-00000-000\.offsets is damaged: the checksum of MiB 0 "
    ):
        stream.window(0, 10)


def test_replaced_shard_of_the_same_size_is_detected(copy: Path) -> None:
    path = copy / "source/train-00000-000.tokens"
    path.write_bytes(np.arange(600_000, dtype="<u4")[::-1].tobytes())
    stream = TokenStream(copy, Manifest.read(copy).shards("train"))
    with pytest.raises(DataError, match=r"checksum of MiB . .* differs from the manifest"):
        stream.window(0, 10)


@pytest.mark.parametrize("ending", ["tokens", "offsets"])
def test_file_removed_or_truncated_before_it_is_opened_is_detected(copy: Path, ending: str) -> None:
    path = copy / f"source/train-00000-000.{ending}"
    stream = TokenStream(copy, Manifest.read(copy).shards("train"))
    os.truncate(path, path.stat().st_size - 8)
    with pytest.raises(DataError, match=rf"{ending} has .* bytes, but the manifest records"):
        stream.window(0, 10)
    path.unlink()
    with pytest.raises(DataError, match=rf"{ending}: cannot read \(No such file"):
        stream.window(0, 10)


@pytest.mark.parametrize("ending", ["tokens", "offsets"])
def test_file_truncated_after_opening_is_detected(copy: Path, ending: str) -> None:
    """Reading its lost pages would end the process with SIGBUS."""
    stream = TokenStream(copy, Manifest.read(copy).shards("train"))
    stream.window(0, 1000)
    os.truncate(copy / f"source/train-00000-000.{ending}", 0)
    with pytest.raises(DataError, match=rf"\.{ending} was truncated while it was in use; list all"):
        stream.window(598, 1000)


def test_file_removed_after_opening_remains_readable(copy: Path) -> None:
    stream = TokenStream(copy, Manifest.read(copy).shards("train"))
    before = stream.window(0, 1000)[0].copy()
    shutil.rmtree(copy)
    assert np.array_equal(stream.window(0, 1000)[0], before)
    assert stream.window(598, 1000)[0][0] == 598_000


def test_verify_names_each_damaged_file_and_passes_an_intact_folder(copy: Path) -> None:
    progress: list[tuple[int, int]] = []
    assert verify_dataset(copy, lambda done, total: progress.append((done, total))) == []
    assert progress == [(600_000 * 4 + 4 * 8, 600_000 * 4 + 4 * 8)]
    flip_bit(copy / "source/train-00000-000.tokens", 0)
    flip_bit(copy / "source/train-00000-000.tokens", 2 * CRC_BLOCK)
    flip_bit(copy / "source/train-00000-000.offsets", 30)
    lines = (copy / MODEL_FILE).read_bytes().splitlines(keepends=True)
    (copy / MODEL_FILE).write_bytes(lines[0] + b"".join(lines[1:]).replace(b" 65\n", b" 066\n", 1))
    tokenizer, tokens, offsets = verify_dataset(copy)
    assert MODEL_FILE in tokenizer
    assert "train-00000-000.tokens is damaged in MiB 0, 2 " in tokens
    assert "train-00000-000.offsets is damaged in MiB 0 " in offsets


@pytest.mark.parametrize("file", ["tokens", "offsets"])
def test_verify_also_checks_content_with_valid_checksums(copy: Path, file: str) -> None:
    """A faulty writer computes valid hashes of wrong content."""
    path = copy / f"source/train-00000-000.{file}"
    if file == "tokens":
        content = np.full(600_000, 700_000, dtype="<u4").tobytes()
    else:
        content = np.array([0, 5, 5, 600_000], dtype="<i8").tobytes()
    path.write_bytes(content)
    sums = Checksums(content).entry("")
    manifest = json.loads((copy / "manifest.json").read_bytes())
    del manifest["sha256"]
    entry = manifest["sources"]["source"]["shards"]["train"][0][file]
    entry |= {"sha256": sums.sha256, "crc32": sums.crc32}
    (copy / "manifest.json").write_text(json.dumps(manifest))
    (problem,) = verify_dataset(copy)
    assert ("ids up to 700000" if file == "tokens" else "does not increase") in problem


def test_blocks_verified_concurrently_by_another_thread_are_not_an_error(tmp_path: Path) -> None:
    """The other thread marks all blocks right after this thread's first look-up."""

    class MarkedByAnotherThread(bytearray):
        def __getitem__(self, index):  # type: ignore[no-untyped-def]
            before = super().__getitem__(index)
            self[:] = b"\1" * len(self)
            return before

    manifest = write(tmp_path, [2 * CRC_BLOCK // 4], per_shard=1)
    stream = TokenStream(tmp_path, manifest.shards("train"))
    stream.read(0, 0, 1)
    stream._verified[0] = MarkedByAnotherThread(2)
    tokens, _ = stream.read(0, 0, manifest.n_tokens("train"))
    assert (tokens == np.arange(len(tokens))).all()


def test_verified_blocks_are_not_verified_again_after_their_shard_was_unmapped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = write(tmp_path, [20] * 5, per_shard=1)
    verified: list[str] = []
    verify = data_shards._verify_block

    def recorded_verify(*arguments: Any) -> None:
        verified.append(arguments[1].file)
        verify(*arguments)

    monkeypatch.setattr(data_shards, "_verify_block", recorded_verify)
    stream = TokenStream(tmp_path, manifest.shards("train"), mappings=Mappings(limit=2))
    for _ in range(3):
        for index in range(stream.n_windows(8)):
            stream.window(index, 8)
    assert sorted(verified) == sorted({entry.file for s in stream._shards for entry in s.files})
