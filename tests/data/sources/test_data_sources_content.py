"""Files are recognised by their content: other formats are rejected, compression is read."""

import bz2
import csv
import gzip
import io
import json
import lzma
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from data.config import SourceConfig
from data.errors import DataError
from data.sources.content import NAMES
from data.sources.corpora import find_corpus
from data.sources.rows import Policy, rows

TABLE = pyarrow.table({"text": ["one", "two"]})
LINES = b'{"text": "one"}\n{"text": "two"}\n'


def texts(format_: str, path: Path | str, policy: Policy = "strict", name: str = "") -> list[str]:
    source = SourceConfig(format_, str(path))  # type: ignore[arg-type]
    corpus = find_corpus(name or format_, source, policy)
    return [row.text for part in corpus.parts for row in rows(part, source, policy)]


def parquet() -> bytes:
    sink = io.BytesIO()
    pyarrow.parquet.write_table(TABLE, sink)
    return sink.getvalue()


def arrow(new: Callable[..., pyarrow.ipc.RecordBatchStreamWriter]) -> bytes:
    sink = io.BytesIO()
    with new(sink, TABLE.schema) as writer:
        writer.write_table(TABLE)
    return sink.getvalue()


CONTENTS = {
    "jsonl": LINES,
    "parquet": parquet(),
    "arrow": arrow(pyarrow.ipc.new_file),
    "arrow-stream": arrow(pyarrow.ipc.new_stream),
    "text": b"Once upon a time\nthere was a file.\n",
}


@pytest.mark.parametrize("in_folder", [False, True])
@pytest.mark.parametrize("content", CONTENTS)
@pytest.mark.parametrize("format_", ["text", "jsonl", "parquet", "arrow"])
def test_other_format_is_rejected_with_a_remedy_that_works(
    format_: str, content: str, in_folder: bool, tmp_path: Path
) -> None:
    right = content.split("-")[0]
    if right == format_:
        return
    suffix = {"text": "txt"}.get(format_, format_)
    file = tmp_path / f"a.{suffix}"
    file.write_bytes(CONTENTS[content])
    path = tmp_path if in_folder else file
    with pytest.raises(DataError, match=rf"a\.{suffix} is .*, not .*; use data={right} ") as caught:
        texts(format_, path)
    remedy = str(caught.value).rpartition(f"data.sources.{right}.path=")[2]
    assert "".join(texts(right, remedy)).startswith(("onetwo", "Once"))
    with pytest.raises(DataError, match=rf"; use data\.sources\.web\.format={right}"):
        texts(format_, path, name="web")
    if in_folder:  # the file has the suffix of its content
        file.rename(tmp_path / f"b.{right}")
        with pytest.raises(DataError, match=rf"b\.{right}.*; use data={right}") as caught:
            texts(format_, path)
        remedy = str(caught.value).rpartition(f"data.sources.{right}.path=")[2]
        assert len("".join(texts(right, remedy))) > 5


def tar_gz() -> bytes:
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w:gz") as archive:
        archive.addfile(tarfile.TarInfo("a.txt"))
    return sink.getvalue()


def zip_() -> bytes:
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w") as archive:
        archive.writestr("a.txt", "text")
    return sink.getvalue()


@pytest.mark.parametrize(
    ("content", "description"),
    [
        (b"%PDF-1.7\n", "is a PDF document.*extract its text"),
        (zip_(), "is a ZIP archive.*extract its files"),
        (tar_gz(), "is a tar archive.*extract its files"),
        (b"\x04\x22\x4d\x18" + bytes(20), "is LZ4-compressed.*lz4 -d"),
        (b"\x89PNG\r\n\x1a\n", "is a PNG image"),
        (bytes(range(256)), "is a binary file"),
        (b"version https://git-lfs.github.com/spec/v1\n", "is a Git LFS pointer.*git lfs pull"),
        (
            "long enough to tell ".encode("utf-16-le") * 3,
            "is UTF-16LE text, not UTF-8.*iconv -f UTF-16LE",
        ),
        (
            "long enough ".encode("utf-32-be") * 3,
            "is UTF-32BE text, not UTF-8.*iconv -f UTF-32BE",
        ),
    ],
    ids=[
        "pdf",
        "zip",
        "tar",
        "lz4",
        "png",
        "binary",
        "lfs",
        "utf-16",
        "utf-32",
    ],  # contents have times
)
@pytest.mark.parametrize("format_", ["text", "jsonl", "parquet"])
def test_file_that_no_format_reads_is_rejected(
    format_: str, content: bytes, description: str, tmp_path: Path
) -> None:
    (tmp_path / f"a.{format_}").write_bytes(content)
    for policy in ("strict", "replace"):
        with pytest.raises(DataError, match=rf"a\.{format_} {description}"):
            texts(format_, tmp_path, policy)
    (tmp_path / f"b.{format_}").write_bytes(CONTENTS[format_])
    if format_ != "parquet":  # files without valid text are dropped with invalid_text=skip
        assert texts(format_, tmp_path, "skip")[-1].endswith(("two", "file.\n"))


@pytest.mark.parametrize(
    ("format_", "content", "message"),
    [
        ("jsonl", json.dumps([{"text": "one"}]), "is a JSON array"),
        ("jsonl", json.dumps([{"text": "one"}] * 9, indent=1), "is a JSON array"),
        ("jsonl", json.dumps({"text": "one", "n": 1}, indent=1), "is JSON over several lines"),
        ("parquet", "", "is empty"),
        ("arrow", "", "is empty"),
        ("parquet", "\n", "is empty"),
        ("parquet", "<!DOCTYPE html>\n<html>", "is an HTML page"),
    ],
)
def test_unreadable_content_is_named(
    format_: str, content: str, message: str, tmp_path: Path
) -> None:
    (tmp_path / f"a.{format_}").write_text(content)
    with pytest.raises(DataError, match=message):
        texts(format_, tmp_path)


ROWS = [{"id": str(i), "text": f'one, "two"\n{i}'} for i in range(3)]


def table(separator: str, name: str = "text") -> bytes:
    """Return rows as `csv` writes them."""
    sink = io.StringIO()
    writer = csv.writer(sink, delimiter=separator)
    writer.writerows([("id", name), *(row.values() for row in ROWS)])
    return sink.getvalue().encode()


TABLES = {
    "a.json": json.dumps(ROWS).encode(),
    "b c.json": json.dumps(ROWS * 100, indent=2).encode(),
    "d.txt": b"\xef\xbb\xbf" + json.dumps([row["text"] for row in ROWS]).encode(),
    "e.csv": table(","),
    "f.tsv": table("\t"),
    "g.csv": b"\xef\xbb\xbf" + table(";"),
    "h.txt": table(","),
    "i.csv.gz": gzip.compress(table(",")),
    "j.json": b"".join(json.dumps(row).encode() + b",\n" for row in ROWS),
}


@pytest.mark.parametrize("name", TABLES)
def test_rows_are_not_read_as_text_and_the_remedy_converts_them(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(TABLES[name])
    for extra in ("README.md", "a.lock"):  # neither makes it a corpus of text
        (tmp_path / extra).write_text("# Rows" if extra.endswith("md") else "")
    for format_ in ("text", "jsonl"):
        with pytest.raises(DataError, match=f"is .*, not {NAMES[format_]}; convert it with `(.*)`"):
            texts(format_, tmp_path / name)
    with pytest.raises(DataError, match="and use data=jsonl, or move it out of") as caught:
        texts("text", tmp_path)
    command = str(caught.value).split("`")[1].replace("python ", f"{sys.executable} ", 1)
    subprocess.run(command, shell=True, check=True, cwd=tmp_path)
    converted = texts("jsonl", next(tmp_path.glob("*.lines.jsonl")))
    assert [text.replace("\r", "") for text in converted[:3]] == [row["text"] for row in ROWS]
    # Among other text, such as code, they are text.
    (tmp_path / "z.py").write_text("print(1)\n")
    notes = find_corpus("text", SourceConfig("text", str(tmp_path))).notes
    assert "reads 2 of 5 files as plain text although they hold rows of JSON or CSV" in notes[0]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.txt", "[Illustration]\n\nEmma\n"),
        ("a.txt", '["Hello", she said.]\n'),
        ("a.txt", "Hello, world\nlast, line\n"),
        ("a.txt", "text\nmore\n"),
        ("a.txt", "Some, text, here\nand, text, there\n"),
        ("a.md", "# text, and more\n\n- a, b\n"),
        ("a.py", "import text, sys\nprint(text, sys)\n"),
        ("a.csv", "0,first\n1,second\n"),
        ("a.csv", "id,text\n1,2,3\n"),
        ("a.tex", "{\\bf text}\n{\n"),
        ("a.json", json.dumps({"name": "a", "version": 1}, indent=1)),
        ("a.json", "[1, 2]"),
    ],
)
def test_text_that_resembles_rows_is_read(name: str, text: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    assert texts("text", tmp_path) == [text]


def zstd(content: bytes) -> bytes:
    """Compress with a window of 1 GiB, as `zstd --ultra --long=30` does."""
    parameters = zstandard.ZstdCompressionParameters(window_log=30, hash_log=10, chain_log=10)
    compressor = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    return compressor.compress(content) + compressor.flush()


@pytest.mark.parametrize("compress", [gzip.compress, zstd, lzma.compress, bz2.compress])
@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_compressed_members_with_zeros_after_them_are_read(
    compress: Callable[[bytes], bytes], name: str, tmp_path: Path
) -> None:
    members = [compress(LINES[:9]), compress(LINES[9:])]
    padding = bytes(5000) if compress in (gzip.compress, zstd) else b""
    (tmp_path / name).write_bytes(b"".join(members) + padding)
    assert texts("jsonl", tmp_path) == ["one", "two"]
    (tmp_path / name).write_bytes(b"".join(members)[:-6])
    with pytest.raises(DataError, match=r"a\.jsonl.*: cannot read"):
        texts("jsonl", tmp_path)


@pytest.mark.parametrize("policy", ["strict", "replace", "skip"])
def test_byte_order_mark_is_not_text(policy: Policy, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + LINES)
    assert texts("jsonl", tmp_path / "a.jsonl", policy) == ["one", "two"]
    for encoding in ("utf-8-sig", "utf-16", "utf-32"):
        (tmp_path / "a.txt").write_bytes("naïve\r\n🙂".encode(encoding))
        assert texts("text", tmp_path / "a.txt", policy) == ["naïve\n🙂"]
    (tmp_path / "a.txt").write_bytes("ab".encode("utf-16") + b"c")
    if policy == "replace":
        assert texts("text", tmp_path / "a.txt", policy) == ["ab\ufffd"]


def test_json_lines_among_source_code_are_text(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("print(1)\n")
    (tmp_path / "b.jsonl").write_bytes(LINES)
    assert texts("text", tmp_path) == ["print(1)\n", LINES.decode()]
