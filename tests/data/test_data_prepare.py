"""Preparation: each format end to end, repeated, refused, bounded in memory, bad input told."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Literal

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from data.config import DataConfig, SourceConfig, StageConfig, TokenizerConfig
from data.errors import DataError
from data.manifest import SPLITS, Manifest
from data.preparation import state
from data.preparation.pipeline import configuration, is_validation, prepare, wait_until_prepared
from data.shards import TokenStream
from data.sources.corpora import Corpus, find
from data.tokenizer import load_tokenizer, ready_tokenizer

BYTE = TokenizerConfig("byte", 272)
TEXTS = [f"Document {i}, naïve:\n" + f"line {i} 🙂\n" * (i % 7) for i in range(40)]
Format = Literal["text", "jsonl", "parquet", "huggingface"]
ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Downloaded datasets go here, not to the user's folder."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / ".cache"))


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
    tokenizer = load_tokenizer(BYTE, data.folder)
    for split in SPLITS:
        expected = [text for text in TEXTS if is_validation(text, 0.2) == (split == "validation")]
        stream = TokenStream(Path(data.folder), manifest.shards(split))
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


def test_preparing_twice_gives_the_same_bytes_and_the_second_time_nothing_is_done(
    tmp_path: Path,
) -> None:
    source = source_of("text", tmp_path)
    bpe = TokenizerConfig("bpe", 300)
    one, two = data_of(tmp_path / "a", source), data_of(tmp_path / "b", source)
    manifest = prepare(one, bpe, progress=False)
    assert manifest.tokenizer.vocab_size == 300
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


def test_a_folder_that_is_not_ours_is_left_alone(tmp_path: Path) -> None:
    data = data_of(tmp_path, source_of("text", tmp_path))
    folder = Path(data.folder)
    folder.mkdir()
    (folder / "tokenizer.model").write_text("someone's own")
    with pytest.raises(DataError, match=r"no preparation made \(tokenizer\.model"):
        prepare(data, BYTE, progress=False)
    assert (folder / "tokenizer.model").read_text() == "someone's own"
    (folder / "tokenizer.model").unlink()
    (folder / state.MARKER_FILE).touch()  # as of a preparation that was killed at once
    (folder / "s0").mkdir()
    (folder / "s0" / "notes.txt").write_text("someone's own")
    prepare(data, BYTE, progress=False)
    assert (folder / "s0" / "notes.txt").read_text() == "someone's own"


def test_the_validation_split_holds_its_share_and_no_document_moves_when_the_corpus_grows() -> None:
    texts = [f"text {i}" for i in range(4000)]
    held_out = [is_validation(text, 0.1) for text in texts]
    # Binomial: 400 expected, standard deviation 19; five of them.
    assert abs(sum(held_out) - 400) < 95
    assert [is_validation(text, 0.2) for text in texts].count(True) > sum(held_out)
    wider = [is_validation(text, 0.2) for text in texts]
    assert all(b for a, b in zip(held_out, wider, strict=True) if a)
    assert not any(is_validation(text, 0.0) for text in texts)


def test_what_became_of_each_document_is_counted_and_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "rows.jsonl"
    lines = [
        *('{"text": "", "n": 1}', '{"text": null, "n": 1}', "", '{"text": "some text", "n": 1}'),
        *('{"text": "a\\u0000b", "n": 1}', '{"text": 3, "n": 1}', '{"text": "x", "n": 0}', "{"),
    ]
    path.write_text("\n".join(lines))
    source = SourceConfig("jsonl", str(path), filter=[("n", "==", 1)])
    data = replace(data_of(tmp_path, source), validation_fraction=0.0, invalid_text="replace")
    manifest = prepare(data, BYTE)
    counts = {"read": 7, "empty": 2, "filtered": 1, "skipped": 2, "replaced": 1}
    assert manifest.sources["s0"].documents == counts
    assert manifest.n_documents("train") == 2  # nothing is lost: 7 - 2 - 1 - 2
    told = capsys.readouterr().err
    assert "7 read, 2 empty, 1 filtered, 2 skipped, 1 replaced" in told
    source = replace(source, filter=[("n", ">", 1)])
    data = replace(data, folder=str(tmp_path / "other"), sources={"s0": source})
    with pytest.raises(DataError, match=r"data\.sources\.s0 has no token to train on .*6 filtered"):
        prepare(data, BYTE, progress=False)
    assert not Path(data.folder).exists()


def test_what_only_the_reader_uses_is_no_part_of_the_configuration(tmp_path: Path) -> None:
    data = data_of(tmp_path, source_of("jsonl", tmp_path))
    wanted = configuration(data, BYTE)
    source = replace(data.sources["s0"], weight=3.0)
    reading = replace(
        *(data,),
        sources={"s0": source},
        workers=7,
        document_mask=False,
        packing="best_fit",
        shuffle_block_tokens=4096,
        stages=[StageConfig(8)],
        loader_threads=2,
        prefetch=3,
        verify_reads=False,
    )
    assert configuration(reading, BYTE) == wanted
    for changed in (
        replace(data, validation_fraction=0.5),
        replace(data, shard_tokens=5),
        replace(data, invalid_text="skip"),
        replace(data, sources={"s0": replace(data.sources["s0"], filter=[("n", "==", 1)])}),
    ):
        assert configuration(changed, BYTE) != wanted


def test_a_refusal_of_the_caller_leaves_nothing(tmp_path: Path) -> None:
    data = data_of(tmp_path / "new" / "folder", source_of("text", tmp_path))

    def refuse(manifest: Manifest) -> None:
        raise DataError("too small")

    with pytest.raises(DataError, match="too small"):
        prepare(data, BYTE, progress=False, check=refuse)
    assert not (tmp_path / "new").exists()


def test_long_runs_and_one_long_document_are_prepared_in_bounded_memory(tmp_path: Path) -> None:
    """Ten million characters as one document, and what makes tiktoken panic, as Meta cuts it."""
    texts = ["naïve 🙂 " * 1_000_000, " " * 1_000_000 + "a", "<|end_of_text|> is text"]
    source = SourceConfig("jsonl", write_jsonl(tmp_path / "rows.jsonl", texts))
    data = replace(data_of(tmp_path, source), validation_fraction=0.0)
    manifest = prepare(data, BYTE, progress=False)
    stream = TokenStream(Path(data.folder), manifest.shards("train"))
    tokens, starts = stream.window(0, stream.n_tokens - 1)
    expected = [len(text.encode()) + 2 for text in texts]
    assert [b - a for a, b in pairwise([*starts.tolist(), stream.n_tokens])] == expected
    tokenizer = load_tokenizer(BYTE, data.folder)
    assert tokenizer.decode(tokens[starts[2] + 1 : -1]) == texts[2]
    assert (tokens >= 256).sum() == 2 * len(texts)  # no special token but those around


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
        "text not UTF-8": (at("text", "latin"), r"000\.txt is not UTF-8 \(byte 0xef in line 2"),
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
        "cut Parquet": (at("parquet", "cut.parquet"), r"cut\.parquet cannot be read"),
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


@contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """The folder on a file system that cannot be written, whoever we are."""
    steps = ["--bind", str(folder), str(folder)], ["-o", "remount,ro,bind", str(folder)]
    if any(subprocess.run(["mount", *step], capture_output=True).returncode for step in steps):
        pytest.skip("needs the right to mount a file system")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_read_only_folder_is_told_and_read_where_it_is_prepared(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    data = data_of(tmp_path / "disk", source_of("text", tmp_path))
    with read_only(tmp_path / "disk"), pytest.raises(DataError) as caught:
        prepare(data, BYTE, progress=False)
    assert f"data.folder ({data.folder}) cannot be written (Read-only file system)" in str(
        caught.value
    )
    manifest = prepare(data, BYTE, progress=False)
    # As a kill after the manifest leaves it: there, only what is in the way of nobody remains.
    (Path(data.folder) / state.MARKER_FILE).touch()
    with read_only(tmp_path / "disk"):
        assert prepare(data, BYTE, progress=False) == manifest


PEAK = """
from pathlib import Path
from data.config import *
from data.sources.corpora import find
from data.preparation.pipeline import prepare
from data.sources.rows import rows
{work}
lines = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
print(lines["VmHWM"].split()[0])  # kB; what getrusage tells counts our parent's memory too
"""


def peak_mib(work: str) -> float:
    """The most memory that a process needs for some Python."""
    done = subprocess.run(
        [sys.executable, "-c", PEAK.replace("{work}", work)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return int(done.stdout) / 1024


def write_mib(path: Path, n_mib: int) -> SourceConfig:
    """Documents of 5 kB in the format that the name tells."""
    table = pyarrow.table({"text": [f"{i % 7919:04} " * 1000 for i in range(n_mib * 200)]})
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(table, path)  # one row group
    elif path.suffix == ".arrow":
        with pyarrow.ipc.new_file(path, table.schema) as writer:
            writer.write_table(table, max_chunksize=100)
    else:
        with pyarrow.output_stream(path) as stream:  # packed by its suffix
            for text in table["text"].to_pylist():
                stream.write(json.dumps({"text": text}).encode() + b"\n")
    format_ = path.suffix[1:] if path.suffix in (".parquet", ".arrow") else "jsonl"
    return SourceConfig(format_, str(path))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.parquet"])
def test_reading_needs_no_more_memory_for_a_larger_file(name: str, tmp_path: Path) -> None:
    """48 MiB more. Arrow's files are mapped, so that what is read of them may count as memory."""
    peaks = []
    for n_mib in (16, 64):
        source = write_mib(tmp_path / name, n_mib)
        read = f"for part in find('s', {source!r}).parts: list(map(id, rows(part, {source!r})))"
        peaks.append(peak_mib(read))
    assert peaks[1] - peaks[0] < 8


def test_a_preparation_needs_no_more_memory_for_a_larger_corpus(tmp_path: Path) -> None:
    """14 MiB more, whose tokens take four times that."""
    peaks = []
    for n_mib in (2, 16):
        source = write_mib(tmp_path / "a.jsonl", n_mib)
        data = replace(data_of(tmp_path / str(n_mib), source), shard_tokens=10**6, workers=1)
        peaks.append(peak_mib(f"prepare({data!r}, {BYTE!r}, False)"))
    assert peaks[1] - peaks[0] < 7


def test_those_who_wait_see_a_preparation_while_its_sources_are_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A dataset is downloaded meanwhile, for longer than they wait for nobody."""
    data = data_of(tmp_path, source_of("text", tmp_path))
    seen = []

    def looked_at(name: str, source: SourceConfig) -> Corpus:
        seen.append(state.is_claimed(Path(data.folder)))
        return find(name, source)

    monkeypatch.setattr("data.preparation.pipeline.find", looked_at)
    prepare(data, BYTE, progress=False)
    assert seen == [True]


def test_waiting_for_a_preparation_that_never_comes_ends(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no process has been at it"):
        wait_until_prepared(tmp_path, poll_seconds=0.01, idle_seconds=0.05)


def test_bpe_without_a_path_has_no_existing_tokenizer() -> None:
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
    assert Manifest.read(tmp_path / "shards").tokenizer.name == "byte"


def test_ctrl_c_ends_the_program_with_one_line(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"text": "some text " * 100}) * 1 + "\n")
    with path.open("a") as stream:
        for i in range(40_000):
            stream.write(json.dumps({"text": f"line {i} " * 100}) + "\n")
    shards = tmp_path / "shards"
    command = ["prepare.py", "data=jsonl", "data.name=mine", f"data.folder={shards}"]
    process = subprocess.Popen(
        [sys.executable, *command, f"data.sources.jsonl.path={path}", "tokenizer=byte"],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    deadline = time.monotonic() + 60
    while not list(shards.glob("*/part-*.json")):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.002)
    os.killpg(process.pid, signal.SIGINT)
    _, told = process.communicate(timeout=30)
    assert process.returncode == 130
    assert told == "Stopped. What is done is kept: the same command goes on with it.\n"
