"""Shards: what was written is what is read, across borders; damage is told, never read."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.errors import DataError
from data.shards import SPLITS, Manifest, ShardWriter, TokenizerEntry, TokenStream

LENGTHS = [5, 1, 30, 7, 7, 12, 40, 3]


def documents(lengths: list[int]) -> list[np.ndarray]:
    """Documents of given lengths, all tokens different."""
    ends = np.cumsum(lengths)
    return [np.arange(end - n, end, dtype=np.uint32) for n, end in zip(lengths, ends, strict=True)]


def write(folder: Path, lengths: list[int], shard_tokens: int) -> Manifest:
    shards = {}
    for split in SPLITS:
        writer = ShardWriter(folder, "source", split, shard_tokens)
        for document in documents(lengths if split == "train" else []):
            writer.add(document)
        shards[split] = writer.close()
    manifest = Manifest(TokenizerEntry("byte", "0", 272, 256, 257), {}, {"source": shards})
    manifest.write(folder)
    return manifest


@settings(deadline=None, max_examples=20)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=20),
    shard_tokens=st.integers(1, 60),
    seq_len=st.integers(1, 25),
)
def test_windows_are_those_of_the_concatenated_documents(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], shard_tokens: int, seq_len: int
) -> None:
    folder = tmp_path_factory.mktemp("shards")
    manifest = write(folder, lengths, shard_tokens)
    stream = TokenStream(folder, manifest.shards["source"]["train"])
    whole = np.concatenate(documents(lengths))
    begins = np.cumsum([0, *lengths[:-1]])
    assert stream.n_tokens == len(whole) == manifest.n_tokens("train")
    assert stream.n_windows(seq_len) == (len(whole) - 1) // seq_len
    for index in range(stream.n_windows(seq_len)):
        tokens, starts = stream.window(index, seq_len)
        span = range(index * seq_len, index * seq_len + seq_len + 1)
        assert tokens.dtype == np.uint32
        assert tokens.tolist() == whole[span.start : span.stop].tolist()
        assert starts.tolist() == [begin - span.start for begin in begins if begin in span]
    with pytest.raises(IndexError):
        stream.window(stream.n_windows(seq_len), seq_len)


def test_a_shard_is_closed_before_it_grows_over_its_size(tmp_path: Path) -> None:
    shards = write(tmp_path, LENGTHS, 32).shards["source"]["train"]
    assert [shard.n_tokens for shard in shards] == [6, 30, 26, 40, 3]
    assert [shard.n_documents for shard in shards] == [2, 1, 3, 1, 1]


def test_files_have_the_documented_layout_and_hashes(tmp_path: Path) -> None:
    shard = write(tmp_path, LENGTHS, 10**6).shards["source"]["train"][0]
    tokens = (tmp_path / "source/train-00000.tokens").read_bytes()
    offsets = (tmp_path / "source/train-00000.offsets").read_bytes()
    assert np.frombuffer(tokens, "<u4").tolist() == list(range(sum(LENGTHS)))
    assert np.frombuffer(offsets, "<i8").tolist() == np.cumsum([0, *LENGTHS]).tolist()
    assert shard.tokens.sha256 == hashlib.sha256(tokens).hexdigest()
    assert shard.offsets.sha256 == hashlib.sha256(offsets).hexdigest()
    assert shard.largest_id == sum(LENGTHS) - 1
    assert not list(tmp_path.rglob("*.tmp"))


def test_manifest_comes_back_equal(tmp_path: Path) -> None:
    assert write(tmp_path, LENGTHS, 32) == Manifest.read(tmp_path)


def test_a_shard_has_its_name_only_when_it_is_whole(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, "source", "train", 100)
    writer.add(documents([3])[0])
    assert [path.name for path in (tmp_path / "source").iterdir()] == ["train-00000.tokens.tmp"]
    writer.abandon()


def test_damaged_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data\.folder .* run prepare\.py"):
        Manifest.read(tmp_path)
    write(tmp_path, LENGTHS, 32)
    shard, manifest = tmp_path / "source/train-00001.tokens", tmp_path / "manifest.json"
    whole, described = shard.read_bytes(), json.loads(manifest.read_bytes())

    shard.write_bytes(whole[:-4])
    with pytest.raises(DataError, match=r"train-00001\.tokens has 116 bytes, .* says 120"):
        Manifest.read(tmp_path)
    shard.unlink()
    with pytest.raises(DataError, match=r"train-00001\.tokens is missing"):
        Manifest.read(tmp_path)
    shard.write_bytes(whole)
    assert Manifest.read(tmp_path).n_tokens("train") == sum(LENGTHS)

    def refused(values: object, message: str) -> None:
        manifest.write_text(json.dumps(values))
        with pytest.raises(DataError, match=message):
            Manifest.read(tmp_path)

    refused({**described, "version": 99}, "has version 99, this program reads 1")
    refused({**described, "format": "other"}, "is not the manifest")
    refused({**described, "shards": {"source": {}}}, "is damaged")
    small = {**described["tokenizer"], "vocab_size": 100}
    refused({**described, "tokenizer": small}, "holds the id 101, beyond the tokenizer's 100")
    manifest.write_text(json.dumps(described)[:-9])
    with pytest.raises(DataError, match="cannot be read"):
        Manifest.read(tmp_path)
