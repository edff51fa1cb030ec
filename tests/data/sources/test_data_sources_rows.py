"""Rows are read, repaired, filtered, skipped or rejected, and reading resumes after any row."""

import json
import struct
from pathlib import Path
from typing import Any, get_args

import pyarrow
import pyarrow.parquet
import pytest
from test_data_sources_corpora import LOCAL, TEXTS, write

from data.config import SourceConfig
from data.errors import DataError
from data.sources import corpora
from data.sources.corpora import find_corpus
from data.sources.rows import Outcome, Policy, Row, rows

SURROGATE, REPLACED = "a\ud800b", "a\ufffdb"


def read(source: SourceConfig, policy: Policy = "strict") -> list[Row]:
    corpus = find_corpus("s", source, policy)
    return [r for part in corpus.parts for r in rows(part, source, policy, corpus.dataset)]


def outcomes(source: SourceConfig, policy: Policy) -> list[tuple[str, str]]:
    result = read(source, policy)
    assert all(row.content == row.text.encode() for row in result)
    assert {row.outcome for row in result} <= set(get_args(Outcome))
    return [(row.outcome, row.text) for row in result]


def json_lines(path: Path, *lines: bytes) -> SourceConfig:
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    return SourceConfig("jsonl", str(path))


def table(path: Path, columns: dict[str, Any]) -> SourceConfig:
    """Write a Parquet or Arrow file, depending on the suffix."""
    values = pyarrow.table(columns)
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(values, path)
        return SourceConfig("parquet", str(path))
    with pyarrow.ipc.new_stream(path, values.schema) as writer:
        writer.write_table(values)
    return SourceConfig("arrow", str(path))


def not_utf8(*texts: bytes) -> pyarrow.Array:
    """Return strings that Arrow does not validate as UTF-8, as when reading a file."""
    raw = pyarrow.array(texts, pyarrow.binary())
    return pyarrow.StringArray.from_buffers(len(raw), raw.buffers()[1], raw.buffers()[2])


@pytest.mark.parametrize("name", [*LOCAL, "huggingface", "streaming"])
def test_reading_resumes_after_any_row(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / ".cache"))
    monkeypatch.setattr(corpora, "MIN_PART_BYTES", 5000)
    if name in LOCAL:
        source = write(tmp_path / name)
    else:
        write(tmp_path / "rows.parquet")
        source = SourceConfig("huggingface", str(tmp_path), streaming=name == "streaming")
    corpus = find_corpus("s", source)
    total = 0
    for part in corpus.parts:
        expected = list(rows(part, source, dataset=corpus.dataset))
        total += len(expected)
        for number, row in enumerate(expected[::17]):
            rest = list(rows(part, source, "strict", corpus.dataset, row.after))
            assert rest == expected[number * 17 + 1 :]  # positions included
    assert total == len(TEXTS)


def test_reading_a_group_of_files_resumes_within_and_between_files(tmp_path: Path) -> None:
    for i in range(3):
        write(tmp_path / f"{i}.jsonl", TEXTS[i * 3 : i * 3 + 3])
    source = SourceConfig("jsonl", str(tmp_path))
    (part,) = find_corpus("s", source).parts
    expected = list(rows(part, source))
    for number, row in enumerate(expected):
        assert list(rows(part, source, start=row.after)) == expected[number + 1 :]


BAD_LINES = [
    (b'{"text": "na\xefve"}', "line 2 of .* is not UTF-8 .byte 0xef", "na\ufffdve"),
    (b'{"text": "a\\u0000b"}', "line 2 of .* has a NUL character in text", REPLACED),
    (b'{"text": "a\\ud800b"}', "line 2 of .* unpaired surrogate in text", REPLACED),
    (b'{"text": 3}', "line 2 of .* has a int in text, not text", None),
    (b'{"text": ["a"]}', "line 2 of .* has a list in text", None),
    (b'{"other": "a", "id": 1}', r"text_column=text is not a column at line 2 .*other, id", None),
    (b"{}", r"text_column=text is not a column at line 2 ", None),
    (b'{"text": "a"', "line 2 of .* is not JSON", None),
    (b"\xff\xfe", "line 2 of .* is not UTF-8", None),
    (b'["a"]', "line 2 of .* is a list, not a JSON object", None),
    (b'{"n": ' + b"9" * 5000 + b', "text": "a"}', "line 2 of .* is not JSON", None),
    (b"[" * 100_000, "line 2 of .* is not JSON", None),
]


@pytest.mark.parametrize(("line", "message", "repaired"), BAD_LINES)
def test_invalid_line_is_rejected_repaired_or_skipped(
    line: bytes, message: str, repaired: str | None, tmp_path: Path
) -> None:
    source = json_lines(tmp_path / "a.jsonl", b'{"text": "one"}', line, b'{"text": "two"}')
    with pytest.raises(DataError, match=message) as caught:
        read(source)
    assert str(caught.value).startswith("data.sources.s.")
    good = [("text", "one"), ("text", "two")]
    skipped = ("skipped", "")
    expected = skipped if repaired is None else ("replaced", repaired)
    assert outcomes(source, "replace") == [good[0], expected, good[1]]
    assert outcomes(source, "skip") == [good[0], skipped, good[1]]


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow"])
def test_invalid_text_in_a_table_is_rejected_repaired_or_skipped(name: str, tmp_path: Path) -> None:
    source = table(tmp_path / name, {"text": not_utf8(b"one", b"a\xffb", b"a\0b", b"")})
    with pytest.raises(DataError, match=rf"row 2 of .*{name} is not UTF-8 .byte 0xff"):
        read(source)
    rest = [("replaced", REPLACED), ("replaced", REPLACED), ("empty", "")]
    assert outcomes(source, "replace") == [("text", "one"), *rest]
    assert [outcome for outcome, _ in outcomes(source, "skip")] == [
        *("text", "skipped", "skipped", "empty")
    ]
    numbers = table(tmp_path / name, {"text": [1, None]})
    with pytest.raises(DataError, match=rf"row 1 of .*{name} has a int in text, not text"):
        read(numbers)
    assert outcomes(numbers, "replace") == [("skipped", ""), ("empty", "")]
    other = table(tmp_path / name, {"id": [1, 2], "body": ["a", "b"]})
    with pytest.raises(
        DataError, match=rf"text_column=text is not a column at row 1 of .*{name}; .* id, body"
    ):
        read(other)
    assert outcomes(other, "skip") == [("skipped", "")] * 2


def test_utf8_bytes_in_a_table_are_read_as_text(tmp_path: Path) -> None:
    source = table(tmp_path / "a.parquet", {"text": pyarrow.array(["ü".encode(), None])})
    assert outcomes(source, "strict") == [("text", "ü"), ("empty", "")]


def test_invalid_text_file_is_rejected_with_its_line_repaired_or_skipped(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"fine\r\nna\xefve\n")
    (tmp_path / "b.txt").write_bytes(b"a\0b")
    (tmp_path / "c.txt").write_bytes(b"one\r\ntwo\rthree\n")
    source = SourceConfig("text", str(tmp_path))
    with pytest.raises(DataError, match=r"a\.txt is not UTF-8 \(byte 0xef in line 2"):
        read(source)
    replaced = [("replaced", "fine\nna\ufffdve\n"), ("replaced", REPLACED)]
    good = ("text", "one\ntwo\nthree\n")
    assert outcomes(source, "replace") == [*replaced, good]
    assert outcomes(source, "skip") == [("skipped", ""), ("skipped", ""), good]


def test_blank_lines_are_ignored_and_null_is_empty(tmp_path: Path) -> None:
    source = json_lines(tmp_path / "a.jsonl", b"", b'{"text": null}', b"  ", b'{"text": ""}')
    assert outcomes(source, "strict") == [("empty", "")] * 2


FILTERED = {"n": [1, 2, 3, None], "tag": ["a", "b", None, "c"], "good": [True, False, True, False]}


@pytest.mark.parametrize(
    ("conditions", "kept"),
    [
        ([("n", ">=", 2)], [2, 3]),
        ([("n", "<", 2.5)], [1, 2]),
        ([("n", "==", 2)], [2]),
        ([("n", "!=", 2)], [1, 3, 4]),  # null differs from 2
        ([("tag", "in", ["a", "c"])], [1, 4]),
        ([("tag", "not in", ["a", "c"])], [2, 3]),
        ([("tag", "<=", "b")], [1, 2]),
        ([("good", "==", True), ("n", ">", 1)], [3]),
        ([("tag", "in", [])], []),
    ],
)
@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl"])
def test_filter_keeps_the_rows_that_meet_all_conditions(
    name: str, conditions: list[Any], kept: list[int], tmp_path: Path
) -> None:
    columns = {"text": ["t1", "t2", "t3", "t4"], **FILTERED}
    if name == "a.jsonl":
        each = zip(*columns.values(), strict=True)
        lines = [json.dumps(dict(zip(columns, row, strict=True))).encode() for row in each]
        source = json_lines(tmp_path / name, *lines)
    else:
        source = table(tmp_path / name, columns)
    source = SourceConfig(source.format, source.path, filter=conditions)
    expected = [("text", f"t{n}") if n in kept else ("filtered", "") for n in range(1, 5)]
    assert outcomes(source, "strict") == expected


@pytest.mark.parametrize(
    ("condition", "message"),
    [
        (("score", ">", 1), r"score is not a column at row 1 of .*; use one of text, n, tag, good"),
        (("tag", ">", 1), "row 1 of .* has a text in tag, which cannot be compared with a number"),
        (("n", "==", "1"), "has a number in n, which cannot be compared with a text"),
        (("good", "==", 1), "has a boolean in good"),
        (("n", "in", ["a", "b"]), "has a number in n"),
    ],
)
@pytest.mark.parametrize("policy", get_args(Policy))
def test_filter_with_an_invalid_column_or_type_is_rejected_under_every_policy(
    condition: Any, message: str, policy: Policy, tmp_path: Path
) -> None:
    columns = {"text": ["t1", "t2", "t3", "t4"], **FILTERED}
    source = table(tmp_path / "a.parquet", columns)
    source = SourceConfig(source.format, source.path, filter=[condition])
    with pytest.raises(DataError, match=rf"data\.sources\.s\.filter=.*{message}"):
        read(source, policy)


def test_filter_treats_a_missing_json_key_as_null(tmp_path: Path) -> None:
    source = json_lines(tmp_path / "a.jsonl", b'{"text": "t1"}', b'{"text": "t2", "n": 2}')
    above = SourceConfig("jsonl", source.path, filter=[("n", ">", 1)])
    assert outcomes(above, "strict") == [("filtered", ""), ("text", "t2")]
    other = SourceConfig("jsonl", source.path, filter=[("n", "!=", 1)])
    assert outcomes(other, "strict") == [("text", "t1"), ("text", "t2")]


def test_filtered_row_may_have_invalid_text(tmp_path: Path) -> None:
    lines = [b'{"text": 3, "n": 1}', b'{"text": "a\xff", "n": 1}', b'{"text": "good", "n": 2}']
    source = json_lines(tmp_path / "a.jsonl", *lines)
    source = SourceConfig("jsonl", source.path, filter=[("n", ">", 1)])
    assert outcomes(source, "strict") == [("filtered", ""), ("filtered", ""), ("text", "good")]


@pytest.mark.parametrize("name", [name for name in LOCAL if name != "rows.jsonl"])
def test_truncated_file_is_reported(name: str, tmp_path: Path) -> None:
    source = write(tmp_path / name)
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match=rf"data\.sources\.s\.path: .*{name}: cannot read"):
        read(source)


@pytest.mark.parametrize(
    ("kind", "offset"), [(pyarrow.string(), "i"), (pyarrow.large_string(), "q")]
)
def test_arrow_offsets_outside_of_the_buffer_are_rejected(
    kind: Any, offset: str, tmp_path: Path
) -> None:
    """pyarrow would read other memory of the process, or crash."""
    path = tmp_path / "a.arrow"
    source = table(path, {"text": pyarrow.array(["a", "b", "c"], kind)})
    valid, content = struct.pack(f"<4{offset}", 0, 1, 2, 3), path.read_bytes()
    assert content.count(valid) == 1
    path.write_bytes(content.replace(valid, struct.pack(f"<4{offset}", 0, 1, 2, 2**30)))
    with pytest.raises(DataError, match=r"a\.arrow: cannot read after row 0 .*out of bounds"):
        read(source)


def test_line_numbers_count_from_the_start_of_the_file_not_of_the_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(corpora, "MIN_PART_BYTES", 100)
    good = [json.dumps({"text": text}).encode() for text in TEXTS[:50]]
    source = json_lines(tmp_path / "a.jsonl", *good, b'{"text": 3}')
    with pytest.raises(DataError, match="line 51 of"):
        read(source)
    table_ = pyarrow.table({"text": not_utf8(*[b"one"] * 50, b"\xff")})
    pyarrow.parquet.write_table(table_, tmp_path / "a.parquet", row_group_size=4)
    with pytest.raises(DataError, match="row 51 of"):
        read(SourceConfig("parquet", str(tmp_path / "a.parquet")))
