"""Preparation: each format end to end, repeated, killed, refused, and every bad input told."""

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Literal

import pyarrow
import pyarrow.parquet
import pytest

from data import prepare as preparation
from data.config import DataConfig, SourceConfig, TokenizerConfig
from data.corpora import documents, source_files
from data.errors import DataError
from data.loader import Dataset
from data.prepare import is_validation, prepare, wait_until_prepared
from data.tokenizer import ready_tokenizer

BYTE = TokenizerConfig("byte", 272)
TEXTS = [f"Document {i}, naïve:\n" + f"line {i} 🙂\n" * (i % 7) for i in range(40)]
Format = Literal["text", "jsonl", "parquet", "huggingface"]
ROOT = Path(__file__).parents[2]


def write_texts(folder: Path, texts: list[str] = TEXTS) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    for i, text in enumerate(texts):
        (folder / f"{i:03d}.txt").write_bytes(text.encode())
    return str(folder)


def write_jsonl(path: Path, texts: list[str] = TEXTS) -> str:
    # The second column changes its type half way, which must be of no interest.
    rows = [{"text": text, "meta": i if i < 20 else {"a": [i]}} for i, text in enumerate(texts)]
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return str(path)


def write_parquet(path: Path, texts: list[str] = TEXTS) -> str:
    table = pyarrow.table({"id": list(range(len(texts))), "text": texts})
    pyarrow.parquet.write_table(table, path, row_group_size=7)
    return str(path)


def source_of(format_: str, folder: Path) -> SourceConfig:
    if format_ == "text":
        return SourceConfig("text", write_texts(folder / "texts"))
    if format_ == "jsonl":
        return SourceConfig("jsonl", write_jsonl(folder / "rows[1].jsonl"))
    path = write_parquet(folder / "rows.parquet")
    if format_ == "parquet":
        return SourceConfig("parquet", str(folder / "*.parquet"))
    return SourceConfig("huggingface", str(Path(path).parent), split="train")


def data_of(folder: Path, *sources: SourceConfig) -> DataConfig:
    named = {f"s{i}": source for i, source in enumerate(sources)}
    return DataConfig("corpus", str(folder / "shards"), named, validation_fraction=0.2)


def listing(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("format_", ["text", "jsonl", "parquet", "huggingface"])
def test_each_format_ends_as_the_tokens_of_its_documents(format_: str, tmp_path: Path) -> None:
    data = data_of(tmp_path, source_of(format_, tmp_path))
    manifest = prepare(data, BYTE, progress=False)
    dataset = Dataset.open(data.folder)
    tokenizer = dataset.tokenizer()
    for split, streams in (("train", dataset.train), ("validation", dataset.validation)):
        expected = [text for text in TEXTS if is_validation(text, 0.2) == (split == "validation")]
        stream = streams["s0"]
        tokens, starts = stream.window(0, stream.n_tokens - 1)  # all of them
        cuts = [*starts.tolist(), stream.n_tokens]
        parts = [tokens[a:b] for a, b in pairwise(cuts)]
        assert [tokenizer.decode(part[1:-1]) for part in parts] == expected
        assert {(part[0], part[-1]) for part in parts} == {(tokenizer.bos_id, tokenizer.eos_id)}
        assert manifest.n_documents(split) == len(expected) > 0
    assert sorted(path.name for path in Path(data.folder).iterdir()) == [
        "manifest.json",
        "s0",
        "tokenizer.model",
    ]


def test_the_standard_library_is_read_without_its_tests(tmp_path: Path) -> None:
    source = SourceConfig("stdlib")
    files = source_files(source)
    names = {file.name for file in files}
    assert {"argparse.py", "__future__.py"} <= names
    assert not [f for f in files if {"test", "tests", "site-packages"} & set(f.parts[-4:])]
    first = next(documents(source))
    assert first == files[0].read_text(encoding="utf-8")


def test_preparing_twice_gives_the_same_bytes_and_the_second_time_nothing_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = source_of("text", tmp_path)
    bpe = TokenizerConfig("bpe", 300)
    one, two = data_of(tmp_path / "a", source), data_of(tmp_path / "b", source)
    manifest = prepare(one, bpe, progress=False)
    assert manifest.tokenizer.vocab_size == 300
    monkeypatch.setattr(preparation, "BATCH_CHARACTERS", 100)  # batches must not show
    prepare(two, bpe, progress=False)
    assert listing(Path(one.folder)) == listing(Path(two.folder))

    before = {p: p.stat().st_mtime_ns for p in Path(one.folder).rglob("*")}
    weighted = {"s0": replace(source, weight=3.0)}  # weights are for reading, not for preparing
    assert prepare(replace(one, sources=weighted), bpe, progress=False) == manifest
    assert before == {p: p.stat().st_mtime_ns for p in Path(one.folder).rglob("*")}
    assert wait_until_prepared(one.folder) == manifest


def test_another_configuration_of_a_prepared_folder_is_refused_with_the_difference(
    tmp_path: Path,
) -> None:
    data = data_of(tmp_path, source_of("text", tmp_path))
    prepare(data, BYTE, progress=False)
    before = listing(Path(data.folder))
    with pytest.raises(DataError, match=r"data\.validation_fraction: 0\.2 there, 0\.3 now"):
        prepare(replace(data, validation_fraction=0.3), BYTE, progress=False)
    with pytest.raises(DataError, match=r"tokenizer\.name: byte there, bpe now"):
        prepare(data, TokenizerConfig("bpe", 300), progress=False)
    assert listing(Path(data.folder)) == before


def test_a_killed_preparation_is_replaced_and_ends_as_an_undisturbed_one(tmp_path: Path) -> None:
    source = source_of("text", tmp_path)
    undisturbed, killed = data_of(tmp_path / "a", source), data_of(tmp_path / "b", source)
    prepare(undisturbed, BYTE, progress=False)
    program = (
        "import time; from data import prepare as p; from data.config import *\n"
        "p.BATCH_CHARACTERS = 100\n"
        "advance = p.PreparationProgress.advance\n"
        "p.PreparationProgress.advance = lambda *a: (advance(*a), time.sleep(0.2))\n"
        f"p.prepare({killed!r}, {BYTE!r}, False)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program], env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    folder = Path(killed.folder)
    deadline = time.monotonic() + 60
    while not list(folder.glob("s0/*.tmp")) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert list(folder.glob("s0/*.tmp"))
    with pytest.raises(DataError, match=r"run prepare\.py"):
        Dataset.open(folder)
    (folder / "s0/train-00007.tokens").touch()  # a shard that the next one does not write
    prepare(killed, BYTE, progress=False)
    assert listing(folder) == listing(Path(undisturbed.folder))


def test_a_folder_that_is_being_prepared_or_is_not_ours_is_left_alone(tmp_path: Path) -> None:
    data = data_of(tmp_path, source_of("text", tmp_path))
    folder = Path(data.folder)
    folder.mkdir()
    (folder / "preparing.json").touch()
    with open(folder / "preparing.json") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(DataError, match="being prepared by another process"):
            prepare(data, BYTE, progress=False)
    (folder / "preparing.json").unlink()
    (folder / "tokenizer.model").write_text("someone's own")
    with pytest.raises(DataError, match=r"no preparation made \(tokenizer\.model"):
        prepare(data, BYTE, progress=False)
    assert (folder / "tokenizer.model").read_text() == "someone's own"


def test_the_validation_split_holds_its_share_and_no_document_moves_when_the_corpus_grows() -> None:
    texts = [f"text {i}" for i in range(4000)]
    held_out = [is_validation(text, 0.1) for text in texts]
    # Binomial: 400 expected, standard deviation 19; five of them.
    assert abs(sum(held_out) - 400) < 95
    assert [is_validation(text, 0.2) for text in texts].count(True) > sum(held_out)
    wider = [is_validation(text, 0.2) for text in texts]
    assert all(b for a, b in zip(held_out, wider, strict=True) if a)
    assert not any(is_validation(text, 0.0) for text in texts)


def test_empty_documents_are_skipped_and_counted(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": ""}\n{"text": null}\n\n{"text": "some text"}\n')
    source = SourceConfig("jsonl", str(path))
    data = replace(data_of(tmp_path, source), validation_fraction=0.0)
    manifest = prepare(data, BYTE, progress=False)
    assert manifest.empty_documents == {"s0": 2}
    assert manifest.n_documents("train") == 1
    path.write_text('{"text": ""}\n')
    with pytest.raises(DataError, match=r"data\.sources\.s0 has no token to train on"):
        prepare(replace(data, folder=str(tmp_path / "other")), BYTE, progress=False)


def test_two_sources_lie_side_by_side(tmp_path: Path) -> None:
    data = data_of(tmp_path, source_of("text", tmp_path), source_of("jsonl", tmp_path))
    manifest = prepare(data, BYTE, progress=False)
    assert manifest.n_tokens("train", "s0") == manifest.n_tokens("train", "s1") > 0


def bad_inputs(folder: Path) -> dict[str, tuple[SourceConfig, str]]:
    """Sources that must be refused, with what the message must tell."""
    (folder / "empty").mkdir()
    (folder / "empty.jsonl").touch()
    write_texts(folder / "latin")
    (folder / "latin" / "000.txt").write_bytes(b"fine\nna\xefve\n")
    lines = {
        "latin.jsonl": b'{"text": "na\xefve"}\n',
        "broken.jsonl": b'{"text": "a"\n',
        "list.jsonl": b'["a"]\n',
        "number.jsonl": b'{"text": 3}\n',
        "half.jsonl": b'{"text": "\\ud800"}\n',
        "column.jsonl": b'{"content": "a", "id": 1}\n',
    }
    for name, content in lines.items():
        (folder / name).write_bytes(content)
    parquet = write_parquet(folder / "rows.parquet")
    (folder / "cut.parquet").write_bytes(Path(parquet).read_bytes()[:-20])
    local = folder / "local"
    local.mkdir()
    write_parquet(local / "rows.parquet")

    def at(format_: Format, name: str, column: str = "text", split: str = "train") -> SourceConfig:
        return SourceConfig(format_, str(folder / name), text_column=column, split=split)

    return {
        "missing path": (at("text", "nowhere"), "no file, folder or glob"),
        "empty folder": (at("text", "empty"), "a folder without"),
        "folder of others": (at("parquet", "latin"), r"a folder without a \.parquet file"),
        "empty file": (at("jsonl", "empty.jsonl"), "holds no document"),
        "text not UTF-8": (at("text", "latin"), r"line 2 of .*000\.txt is not UTF-8 \(byte 0xef\)"),
        "JSONL not UTF-8": (at("jsonl", "latin.jsonl"), "line 1 of .* is not UTF-8"),
        "not JSON": (at("jsonl", "broken.jsonl"), "line 1 of .* is not JSON"),
        "not an object": (at("jsonl", "list.jsonl"), "is a list, not a JSON object"),
        "not text": (at("jsonl", "number.jsonl"), "holds a int in text, not text"),
        "half a surrogate": (at("jsonl", "half.jsonl"), "not Unicode text"),
        "JSONL column": (at("jsonl", "column.jsonl"), r"\(text\) is no column .*content, id"),
        "Parquet column": (
            at("parquet", "rows.parquet", "body"),
            r"\(body\) .*use one of id, text",
        ),
        "cut Parquet": (at("parquet", "cut.parquet"), "is not a whole Parquet file"),
        "dataset split": (at("huggingface", "local", split="no"), "cannot be read as a dataset"),
        "dataset column": (at("huggingface", "local", "body"), r"\(body\) .*use one of id, text"),
    }


def test_bad_input_is_told_with_its_key_and_nothing_is_written(tmp_path: Path) -> None:
    for name, (source, message) in bad_inputs(tmp_path).items():
        data = data_of(tmp_path, source)
        with pytest.raises(DataError, match=message) as caught:
            prepare(data, BYTE, progress=False)
        assert "data.sources.s0." in str(caught.value), name
        assert not Path(data.folder).exists(), name


def test_an_unwritable_folder_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    data = replace(data_of(tmp_path, source_of("text", tmp_path)), folder=str(tmp_path / "file/x"))
    with pytest.raises(DataError, match=r"data\.folder .* cannot be written"):
        prepare(data, BYTE, progress=False)


def test_waiting_for_a_preparation_that_never_comes_ends(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no process has been at it"):
        wait_until_prepared(tmp_path, poll_seconds=0.01, idle_seconds=0.05)


def test_configuration_problems_are_told_all_at_once() -> None:
    source = SourceConfig("text", weight=0.0, revision="main")
    data = DataConfig("x", "", {"a/b": source}, validation_fraction=1.0, shard_tokens=0)
    for key in ("folder", "sources (a/b)", "a/b.path", "a/b.weight", "a/b.revision"):
        assert any(
            problem.startswith(f"data.{key}") or key in problem for problem in data.problems()
        )
    assert len(data.problems()) == 8
    assert TokenizerConfig("byte", 256).problems() == [
        "tokenizer.vocab_size (256) is not that of byte: use 272"
    ]
    assert len(TokenizerConfig("bpe", 100, training_characters=0).problems()) == 2
    assert ready_tokenizer(TokenizerConfig("bpe", 300)) is None


def test_the_program_prepares_and_tells_errors_without_a_traceback(tmp_path: Path) -> None:
    texts = write_texts(tmp_path / "texts")

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        shards = f"data.folder={tmp_path / 'shards'}"
        command = [sys.executable, "prepare.py", "data=text", "data.name=mine", shards, *arguments]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)

    wrong = run("tokenizer=byte", f"data.sources.text.path={tmp_path / 'nowhere'}")
    assert wrong.returncode == 1
    assert wrong.stderr.startswith("data.sources.text.path")
    assert "Traceback" not in wrong.stderr
    good = run("tokenizer=byte", f"data.sources.text.path={texts}")
    assert good.returncode == 0, good.stderr
    assert "training and" in good.stdout
    assert Dataset.open(tmp_path / "shards").manifest.tokenizer.name == "byte"
