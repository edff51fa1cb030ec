"""Which files of a folder or glob are data: links, splits, indexes, leftovers of other programs."""

import gzip
import json
import os
import shutil
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from data.config import DataConfig, SourceConfig, TokenizerConfig
from data.errors import DataError
from data.preparation.pipeline import prepare
from data.sources.corpora import Corpus, find_corpus
from data.sources.rows import rows


def corpus_of(format_: str, path: Path | str, split: str = "train") -> tuple[Corpus, list[str]]:
    """Return a source and its texts."""
    source = SourceConfig(format_, str(path), split=split)  # type: ignore[arg-type]
    corpus = find_corpus("s", source)
    return corpus, [row.text for part in corpus.parts for row in rows(part, source)]


def texts(format_: str, path: Path | str, split: str = "train") -> list[str]:
    return corpus_of(format_, path, split)[1]


def write(folder: Path, *names: str) -> Path:
    """Write files, each with one document: its name without suffixes."""
    for name in names:
        path, text = folder / name, Path(name).name.split(".")[0]
        path.parent.mkdir(parents=True, exist_ok=True)
        if name.lower().endswith(".parquet"):
            pyarrow.parquet.write_table(pyarrow.table({"text": [text]}), path)
        elif ".jsonl" in name:
            line = json.dumps({"text": text}).encode()
            path.write_bytes(gzip.compress(line) if name.endswith(".gz") else line)
        else:
            path.write_text(text)
    return folder


def test_linked_folders_are_followed_and_each_file_is_read_once(tmp_path: Path) -> None:
    write(tmp_path / "other", "b.txt", "deep/c.txt")
    folder = write(tmp_path / "folder", "a.txt", "sub/d.txt")
    (folder / "link").symlink_to(tmp_path / "other")
    (folder / "again").symlink_to(tmp_path / "other")
    (folder / "sub" / "up").symlink_to("..")
    (folder / "sub" / "cycle").symlink_to(folder)
    (folder / "file.txt").symlink_to(folder / "a.txt")
    for path in (folder, f"{folder}/**/*.txt", f"{folder}/**"):
        corpus, found = corpus_of("text", path)
        assert sorted(found) == ["a", "b", "c", "d"]
        assert "each file is read once" in corpus.notes[-1]


@pytest.mark.parametrize("path", ["", "*.txt", "**/*.txt"])
def test_dangling_link_is_rejected_with_its_target(path: str, tmp_path: Path) -> None:
    write(tmp_path, "a.txt")
    (tmp_path / "b.txt").symlink_to("/nowhere/b.txt")
    with pytest.raises(DataError, match=r"b\.txt is a link to /nowhere/b\.txt, which does not"):
        corpus_of("text", tmp_path / path)
    (tmp_path / "b.txt").rename(tmp_path / ".#b.txt")  # like the lock of an editor
    assert texts("text", tmp_path) == ["a"]


def test_folder_that_cannot_be_read_is_rejected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, "a.txt", "closed/b.txt")

    def scandir(folder: Path) -> object:
        if folder.name == "closed":  # the tests may run as root, who can read everything
            raise PermissionError(13, "Permission denied")
        return original(folder)

    original = os.scandir
    monkeypatch.setattr("data.sources.listing.os.scandir", scandir)
    for path in (tmp_path, tmp_path / "closed" / "*.txt"):
        with pytest.raises(DataError, match=r"cannot read folder .*closed \(Permission denied\)"):
            corpus_of("text", path)


LEFTOVERS = [
    *("_SUCCESS", ".a.jsonl.crc", "a.jsonl.part", "a.jsonl.tmp", "a.jsonl~", "a.jsonl.incomplete"),
    *(".~lock.a.jsonl#", ".DS_Store", "README.md", "dataset_info.json", "a.jsonl.gz"),
    *("_temporary/0/bad.jsonl", "__MACOSX/bad.jsonl", ".ipynb_checkpoints/bad.jsonl"),
]


@pytest.mark.parametrize("path", ["", "**/*.jsonl*"])
def test_leftovers_of_other_programs_are_ignored_and_reported(path: str, tmp_path: Path) -> None:
    write(tmp_path, "a.jsonl", "sub/b.jsonl.gz", *LEFTOVERS)
    corpus, found = corpus_of("jsonl", tmp_path / path)
    assert found == ["a", "b"]
    assert "s: not read as jsonl: " + ("" if path else ".DS_Store, ") + ".a.json" in corpus.notes[0]
    assert "a.jsonl.gz" in corpus_of("jsonl", tmp_path / "*.jsonl*")[0].notes[0]


def test_ignored_file_is_read_if_the_path_names_it(tmp_path: Path) -> None:
    write(tmp_path, "a.txt", "b.bak", "c.txt~")
    assert texts("text", tmp_path) == ["a"]
    assert texts("text", tmp_path / "b.bak") == texts("text", tmp_path / "*.bak") == ["b"]
    (tmp_path / "a.txt").unlink()
    with pytest.raises(
        DataError, match=r"to read such files, use data\.sources\.s\.path=(.*)$"
    ) as e:
        corpus_of("text", tmp_path)
    assert texts("text", str(e.value).rpartition("=")[2]) == ["b"]  # the remedy works


def test_folders_of_datasets_and_runs_in_the_path_are_ignored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, "a.txt", "runs/x/config.yaml", "runs/x/ledger.jsonl")
    monkeypatch.chdir(tmp_path)
    data = DataConfig("x", "shards/x", {"s": SourceConfig("text", ".")}, validation_fraction=0)
    manifest = prepare(data, TokenizerConfig("byte", 272), progress=False)
    assert manifest.sources["s"].documents["read"] == 1
    assert prepare(data, TokenizerConfig("byte", 272), progress=False) == manifest
    for path in (".", "*", "**"):
        corpus, found = corpus_of("text", path)
        assert found == ["a"] and "runs/x, shards/x" in corpus.notes[0]


def test_source_path_that_is_not_utf8_is_prepared(tmp_path: Path) -> None:
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff"))
    (write(folder, "a.txt") / "a.txt").rename(folder / os.fsdecode(b"\xfe.txt"))
    data = DataConfig("x", str(tmp_path / "x"), {"s": SourceConfig("text", str(folder))})
    manifest = prepare(data, TokenizerConfig("byte", 272), progress=False)
    assert prepare(data, TokenizerConfig("byte", 272), progress=False) == manifest


def test_several_paths_and_braces_are_explained(tmp_path: Path) -> None:
    folder = write(tmp_path, "a.txt", "b.txt")
    for path in ("{0}/a.txt,{0}/b.txt", "[{0}/a.txt, {0}/b.txt]", "{0}/a.txt {0}/b.txt"):
        remedy = rf"\.path={folder}/a\.txt and another source .*more\.path={folder}/b\.txt$"
        with pytest.raises(DataError, match=f"is several paths, .*{remedy}"):
            corpus_of("text", path.format(folder))
    with pytest.raises(DataError, match=r"matches no file .* but no \{a,b\}"):
        corpus_of("text", f"{folder}/{{a,b}}.txt")


def test_remedy_for_compressed_tables_is_to_decompress_them(tmp_path: Path) -> None:
    write(tmp_path, "a.parquet")
    (tmp_path / "a.parquet.gz").write_bytes(gzip.compress((tmp_path / "a.parquet").read_bytes()))
    (tmp_path / "a.parquet").unlink()
    with pytest.raises(DataError, match=r"decompress a\.parquet\.gz with `gzip -d`"):
        corpus_of("parquet", tmp_path)


def test_folder_written_by_spark_is_read(tmp_path: Path) -> None:
    write(tmp_path, "out.parquet/part-0.parquet", "out.parquet/_SUCCESS", "B.PARQUET")
    for path in ("", "*.[pP]*", "**/*.[pP]*"):
        assert texts("parquet", tmp_path / path) == ["B", "part-0"]
    assert texts("parquet", tmp_path / "*.parquet") == ["part-0"]


def test_split_selects_the_files_that_carry_it(tmp_path: Path) -> None:
    shards = [f"data/{split}-00000-of-00001.parquet" for split in ("train", "validation", "extra")]
    folder = write(tmp_path / "hub", *shards)
    corpus, found = corpus_of("parquet", folder)
    assert found == ["train-00000-of-00001"]
    assert "split=train: reads 1 of 3 files; other splits: extra, validation" in corpus.notes[0]
    assert texts("parquet", folder, "val") == ["validation-00000-of-00001"]
    assert texts("parquet", folder, "extra") == ["extra-00000-of-00001"]
    assert len(texts("parquet", folder, "train+extra")) == 2
    assert len(texts("parquet", folder, "all")) == 3
    with pytest.raises(DataError, match=r"split=test: .* has no split test; use extra, train, val"):
        corpus_of("parquet", folder, "test")
    text = write(tmp_path / "text", "wiki.train.tokens", "wiki.valid.tokens")
    assert texts("text", text, "validation") == texts("text", f"{text}/*", "valid") == ["wiki"]
    write(text, "README.md", "LICENSE")  # no reason to train on the other splits
    corpus, found = corpus_of("text", text)
    assert found == ["wiki"] and "other splits: validation (" in corpus.notes[0]
    folders = write(tmp_path / "folders", "train/a.jsonl", "dev/b.jsonl")
    assert (texts("jsonl", folders), texts("jsonl", folders, "dev")) == (["a"], ["b"])


def test_split_is_rejected_where_no_file_carries_one(tmp_path: Path) -> None:
    folder = write(tmp_path, "books-00000-of-00002.txt", "wiki-00000-of-00002.txt")
    assert len(texts("text", folder)) == len(texts("text", folder, "all")) == 2
    for path in (folder, folder / "books-00000-of-00002.txt", folder / "*.txt"):
        with pytest.raises(DataError, match=r"split=validation does not apply to .* remove data\."):
            corpus_of("text", path, "validation")
    # Files of one split only, or not all named for a split: there is nothing to separate.
    assert texts("jsonl", write(tmp_path / "one", "test-1.jsonl", "test-2.jsonl")) != []
    corpus, found = corpus_of(
        "jsonl", write(tmp_path / "mixed", *("train.jsonl", "dev.jsonl", "x.jsonl"))
    )
    assert len(found) == 3 and "also those named for the splits validation" in corpus.notes[0]


def test_saved_dataset_is_read_by_its_index(tmp_path: Path) -> None:
    saved = tmp_path / "saved"
    dataset = datasets.Dataset.from_dict({"text": ["a", "b"]})
    dataset.save_to_disk(str(saved))
    for name in ("cache-0123456789abcdef.arrow", "other.arrow"):  # as `map` and `filter` write
        shutil.copy(saved / "data-00000-of-00001.arrow", saved / name)
    for path in (saved, tmp_path):
        corpus, found = corpus_of("arrow", path)
        assert found == ["a", "b"]
        assert "cache-0123456789abcdef.arrow" in corpus.notes[0]
    with pytest.raises(DataError, match=r"save_to_disk.*; use data\.sources\.s\.format=arrow"):
        corpus_of("huggingface", saved)
    (saved / "data-00000-of-00001.arrow").unlink()
    with pytest.raises(DataError, match=r"state\.json lists data-00000-of-00001\.arrow, which"):
        corpus_of("arrow", saved)


def test_split_of_a_saved_dataset_dict(tmp_path: Path) -> None:
    dataset = datasets.Dataset.from_dict({"text": ["a", "b"]})
    parts = {"train": dataset, "held": dataset.select([1])}
    datasets.DatasetDict(parts).save_to_disk(str(tmp_path))
    assert texts("arrow", tmp_path) == ["a", "b"]
    assert texts("arrow", tmp_path, "held") == ["b"]
    with pytest.raises(DataError, match="has no split validation; use held, train, or all"):
        corpus_of("arrow", tmp_path, "validation")
