"""Locating sources and splitting them into parts: each row is in one part, in order."""

import gzip
import json
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from data.config import SourceConfig
from data.errors import DataError
from data.sources import corpora
from data.sources.corpora import Corpus, find_corpus, source_files
from data.sources.rows import rows

TEXTS = [f"Document {i}, naïve 🙂 " + "line\n" * (i % 9) for i in range(200)]
LOCAL = [
    "rows.jsonl",
    "rows.jsonl.gz",
    "rows.jsonl.zst",
    "rows.parquet",
    "file.arrow",
    "stream.arrow",
]


def write(path: Path, texts: list[str] = TEXTS) -> SourceConfig:
    """Write a file in the format and compression given by its name; return its source."""
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    table = pyarrow.table({"id": list(range(len(texts))), "text": texts})
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(lines))
    elif path.suffix == ".zst":
        path.write_bytes(pyarrow.Codec("zstd").compress(lines, asbytes=True))
    elif path.suffix == ".parquet":
        pyarrow.parquet.write_table(table, path, row_group_size=7)
    elif path.suffix == ".arrow":
        new = pyarrow.ipc.new_file if path.stem == "file" else pyarrow.ipc.new_stream
        with new(path, table.schema) as writer:
            writer.write_table(table, max_chunksize=9)
    else:
        path.write_bytes(lines)
    format_ = path.suffix[1:] if path.suffix in (".parquet", ".arrow") else "jsonl"
    return SourceConfig(format_, str(path))  # type: ignore[arg-type]


def texts_of(corpus: Corpus, source: SourceConfig) -> list[str]:
    return [r.text for part in corpus.parts for r in rows(part, source, dataset=corpus.dataset)]


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpora, "MIN_PART_BYTES", 300)


@pytest.mark.parametrize("name", LOCAL)
def test_parts_of_a_file_contain_each_row_once_in_order(
    name: str, tmp_path: Path, small_parts: None
) -> None:
    source = write(tmp_path / name)
    corpus = find_corpus("s", source)
    assert texts_of(corpus, source) == TEXTS
    assert [part.number for part in corpus.parts] == list(range(len(corpus.parts)))
    compressed = name.endswith((".gz", ".zst"))
    assert len(corpus.parts) == 1 if compressed else len(corpus.parts) > 10
    size = (tmp_path / name).stat().st_size
    assert abs(sum(part.n_bytes for part in corpus.parts) - size) <= len(corpus.parts)  # rounding


def test_folder_is_read_in_sorted_order_with_every_compression(
    tmp_path: Path, small_parts: None
) -> None:
    for i, name in enumerate(["a.jsonl", "b.jsonl.gz", "c.jsonl.zst", "d.ndjson"]):
        write(tmp_path / name, TEXTS[i * 50 : (i + 1) * 50])
    (tmp_path / "notes.md").write_text("not a data file")
    source = SourceConfig("jsonl", str(tmp_path))
    assert texts_of(find_corpus("s", source), source) == TEXTS


def test_small_files_are_grouped_into_a_part_and_a_large_one_is_split(tmp_path: Path) -> None:
    for i in range(50):
        (tmp_path / f"{i:02}.txt").write_text(f"text {i}")
    source = SourceConfig("text", str(tmp_path))
    corpus = find_corpus("s", source)
    assert [len(part.ranges) for part in corpus.parts] == [50]
    assert texts_of(corpus, source) == [f"text {i}" for i in range(50)]
    large = tmp_path / "large.jsonl"
    row = json.dumps({"text": "x" * 1000}) + "\n"
    large.write_text(row * 5000)
    source = SourceConfig("jsonl", str(large))
    parts = find_corpus("s", source).parts
    assert len(parts) == 5  # one MiB each
    assert all(part.n_bytes % len(row) == 0 for part in parts)


def test_line_longer_than_a_part_is_not_split(tmp_path: Path, small_parts: None) -> None:
    texts = ["a" * 10, "b" * 5000, "", "c", "d" * 301]
    source = write(tmp_path / "rows.jsonl", texts)
    assert texts_of(find_corpus("s", source), source) == texts
    path = tmp_path / "no-end.jsonl"
    path.write_bytes((tmp_path / "rows.jsonl").read_bytes().rstrip())
    source = SourceConfig("jsonl", str(path))
    assert texts_of(find_corpus("s", source), source) == texts


def test_revision_of_files_depends_on_names_and_sizes_but_not_on_the_folder(tmp_path: Path) -> None:
    def revision(folder: str, files: dict[str, str]) -> str:
        for name, content in files.items():
            path = tmp_path / folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content)
        return find_corpus("s", SourceConfig("text", str(tmp_path / folder))).revision

    one = revision("one", {"a.txt": "aa", "b/c.txt": "c"})
    assert revision("two", {"a.txt": "aa", "b/c.txt": "c"}) == one
    assert revision("three", {"a.txt": "aa", "b/d.txt": "c"}) != one
    assert revision("four", {"a.txt": "a", "b/c.txt": "cc"}) != one


@pytest.mark.parametrize("streaming", [False, True])
def test_dataset_can_be_downloaded_or_streamed(
    streaming: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / ".cache"))
    for i in range(4):
        write(tmp_path / f"{i}.parquet", TEXTS[i * 50 : (i + 1) * 50])
    source = SourceConfig("huggingface", str(tmp_path), streaming=streaming)
    corpus = find_corpus("s", source)
    assert texts_of(corpus, source) == TEXTS
    assert len(corpus.parts) == (4 if streaming else 1)
    assert corpus.revision == find_corpus("s", source).revision


def test_dataset_saved_to_disk_is_read_as_arrow(tmp_path: Path) -> None:
    datasets.Dataset.from_dict({"text": TEXTS}).save_to_disk(str(tmp_path / "saved"), num_shards=3)
    source = SourceConfig("arrow", str(tmp_path / "saved"))
    assert texts_of(find_corpus("s", source), source) == TEXTS


def test_standard_library_source_excludes_its_tests() -> None:
    source = SourceConfig("stdlib")
    files = source_files(source)
    assert {"argparse.py", "__future__.py"} <= {file.name for file in files}
    assert not [f for f in files if {"test", "tests", "site-packages"} & set(f.parts[-4:])]
    first = next(rows(find_corpus("s", source).parts[0], source))
    assert first.text == files[0].read_text(encoding="utf-8")


def test_truncated_large_file_is_reported(tmp_path: Path, small_parts: None) -> None:
    for name in ("rows.parquet", "file.arrow"):
        source = write(tmp_path / name)
        content = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(content[: len(content) // 2])
        with pytest.raises(DataError, match=rf"data\.sources\.s\.path: .*{name} is not a complete"):
            find_corpus("s", source)


def test_parquet_file_without_the_text_column_is_rejected_before_any_is_read(
    tmp_path: Path,
) -> None:
    for name, column in (("a", "text"), ("b", "content")):
        pyarrow.parquet.write_table(pyarrow.table({column: ["x"]}), tmp_path / f"{name}.parquet")
    source = SourceConfig("parquet", str(tmp_path))
    with pytest.raises(
        DataError, match=r"text is not a column at row 1 of .*b\.parquet; .* content$"
    ):
        find_corpus("s", source)
    find_corpus("s", source, "skip")  # drops its rows
    empty = pyarrow.table({"content": pyarrow.array([], pyarrow.string())})
    pyarrow.parquet.write_table(empty, tmp_path / "b.parquet")
    find_corpus("s", source)
