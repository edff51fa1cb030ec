"""prepare.py: all source formats, repeated runs, bounded memory, and errors for bad input."""

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
from processes import DEADLINE

from data.config import DataConfig, SourceConfig, StageConfig, TokenizerConfig
from data.errors import DataError
from data.files import is_locked
from data.manifest import SPLITS, Manifest
from data.preparation import state
from data.preparation.identity import dataset_configuration
from data.preparation.pipeline import prepare, wait_until_prepared
from data.preparation.splitting import is_validation
from data.shards import TokenStream
from data.sources.corpora import Corpus, find_corpus
from data.tokenizer import load_tokenizer, ready_tokenizer

BYTE = TokenizerConfig("byte", 272)
TEXTS = [f"Document {i}, naïve:\n" + f"line {i} 🙂\n" * (i % 7) for i in range(40)]
Format = Literal["text", "jsonl", "parquet", "huggingface"]
ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def temporary_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Redirect the Hugging Face datasets cache to a temporary folder."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / ".cache"))


def write_texts(folder: Path, texts: list[str] = TEXTS) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    for i, text in enumerate(texts):
        (folder / f"{i:03d}.txt").write_bytes(text.encode())
    return str(folder)


def write_jsonl(path: Path, texts: list[str] = TEXTS) -> str:
    # The type of the second column changes half way, which must not matter.
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
def test_each_format_is_prepared_as_the_tokens_of_its_documents(
    format_: str, tmp_path: Path
) -> None:
    data = data_of(tmp_path, source_of(format_, tmp_path))
    manifest = prepare(data, BYTE, progress=False)
    tokenizer = load_tokenizer(BYTE, data.folder)
    for split in SPLITS:
        expected = [text for text in TEXTS if is_validation(text, 0.2) == (split == "validation")]
        stream = TokenStream(Path(data.folder), manifest.shards(split))
        tokens, starts = stream.window(0, stream.n_tokens - 1)  # all tokens
        bounds = [*starts.tolist(), stream.n_tokens]
        documents = [tokens[a:b] for a, b in pairwise(bounds)]
        assert [tokenizer.decode(ids[1:-1]) for ids in documents] == expected
        assert {(ids[0], ids[-1]) for ids in documents} == {(tokenizer.bos_id, tokenizer.eos_id)}
        assert manifest.n_documents(split) == len(expected) > 0
    assert sorted(path.name for path in Path(data.folder).iterdir()) == [
        "manifest.json",
        "s0",
        "sources.json",
        "tokenizer.model",
    ]


def test_preparation_is_deterministic_and_does_nothing_if_already_prepared(
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
    weighted = {"s0": replace(source, weight=3.0)}  # weights affect reading only
    assert prepare(replace(one, sources=weighted), bpe, progress=False) == manifest
    assert before == {p: p.stat().st_mtime_ns for p in Path(one.folder).rglob("*")}
    assert wait_until_prepared(one.folder) == manifest


def test_preparing_with_another_configuration_is_rejected_with_the_difference(
    tmp_path: Path,
) -> None:
    data = data_of(tmp_path, source_of("text", tmp_path))
    prepare(data, BYTE, progress=False)
    before = listing(Path(data.folder))
    with pytest.raises(
        DataError, match=r"data\.validation_fraction: 0\.2 in the folder, 0\.3 requested"
    ):
        prepare(replace(data, validation_fraction=0.3), BYTE, progress=False)
    with pytest.raises(DataError, match=r"tokenizer\.name: byte in the folder, bpe requested"):
        prepare(data, TokenizerConfig("bpe", 300), progress=False)
    assert listing(Path(data.folder)) == before


def test_files_not_written_by_prepare_are_not_modified(tmp_path: Path) -> None:
    data = data_of(tmp_path, source_of("text", tmp_path))
    folder = Path(data.folder)
    folder.mkdir()
    (folder / "tokenizer.model").write_text("user file")
    with pytest.raises(DataError, match=r"not written by a preparation \(tokenizer\.model"):
        prepare(data, BYTE, progress=False)
    assert (folder / "tokenizer.model").read_text() == "user file"
    (folder / "tokenizer.model").unlink()
    (folder / state.MARKER_FILE).touch()  # as if a preparation was killed right after its start
    (folder / "s0").mkdir()
    (folder / "s0" / "notes.txt").write_text("user file")
    prepare(data, BYTE, progress=False)
    assert (folder / "s0" / "notes.txt").read_text() == "user file"


def test_validation_split_has_the_configured_fraction_and_depends_on_the_text_only() -> None:
    """A document therefore stays in its split when the corpus grows."""
    texts = [f"text {i}" for i in range(4000)]
    validation = [is_validation(text, 0.1) for text in texts]
    # Binomial distribution: mean 400, standard deviation 19; the bound is five deviations.
    assert abs(sum(validation) - 400) < 95
    assert [is_validation(text, 0.2) for text in texts].count(True) > sum(validation)
    larger = [is_validation(text, 0.2) for text in texts]
    assert all(b for a, b in zip(validation, larger, strict=True) if a)
    assert not any(is_validation(text, 0.0) for text in texts)


def test_empty_filtered_skipped_and_replaced_documents_are_counted_and_printed(
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
    assert manifest.n_documents("train") == 2  # 7 - 2 - 1 - 2
    output = capsys.readouterr().err
    assert "7 read, 2 empty, 1 filtered, 2 skipped, 1 replaced" in output
    source = replace(source, filter=[("n", ">", 1)])
    data = replace(data, folder=str(tmp_path / "other"), sources={"s0": source})
    with pytest.raises(DataError, match=r"data\.sources\.s0\.path=.* no text \(documents: 6 filt"):
        prepare(data, BYTE, progress=False)
    assert not Path(data.folder).exists()


def test_keys_used_only_for_reading_are_not_part_of_the_preparation_configuration(
    tmp_path: Path,
) -> None:
    data = data_of(tmp_path, source_of("jsonl", tmp_path))
    expected = dataset_configuration(data, BYTE)
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
    assert dataset_configuration(reading, BYTE) == expected
    for changed in (
        replace(data, validation_fraction=0.5),
        replace(data, shard_tokens=5),
        replace(data, invalid_text="skip"),
        replace(data, sources={"s0": replace(data.sources["s0"], filter=[("n", "==", 1)])}),
    ):
        assert dataset_configuration(changed, BYTE) != expected


def test_failed_check_of_the_caller_leaves_no_files(tmp_path: Path) -> None:
    data = data_of(tmp_path / "new" / "folder", source_of("text", tmp_path))

    def fail(manifest: Manifest) -> None:
        raise DataError("too small")

    with pytest.raises(DataError, match="too small"):
        prepare(data, BYTE, progress=False, check=fail)
    assert not (tmp_path / "new").exists()


def test_very_long_documents_and_whitespace_runs_are_prepared(tmp_path: Path) -> None:
    """One document has ten million characters; another makes tiktoken panic unless split."""
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
    assert (tokens >= 256).sum() == 2 * len(texts)  # special tokens occur only at the boundaries


def test_two_sources_are_prepared_into_one_dataset(tmp_path: Path) -> None:
    data = data_of(tmp_path, source_of("text", tmp_path), source_of("jsonl", tmp_path))
    manifest = prepare(data, BYTE, progress=False)
    assert manifest.n_tokens("train", "s0") == manifest.n_tokens("train", "s1") > 0


def bad_inputs(folder: Path) -> dict[str, tuple[SourceConfig, str]]:
    """Return sources that must be rejected, with the expected message."""
    (folder / "empty").mkdir()
    (folder / "empty.jsonl").touch()
    write_texts(folder / "latin")
    (folder / "latin" / "000.txt").write_bytes(b"fine\nna\xefve\n")
    lines = {
        "latin.jsonl": b'{"text": "na\xefve"}\n',
        "broken.jsonl": b'{"text": "a"\n',
        "blank.jsonl": b"\n \n",
        "white.jsonl": b'{"text": " \\n"}\n{"text": null}\n',
        "list.jsonl": b'["a"]\n["b"]\n',
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
        "missing path": (at("text", "nowhere"), "matches no file or folder"),
        "empty folder": (at("text", "empty"), "is a folder without"),
        "folder of others": (at("parquet", "latin"), r"is a folder without \.parquet files"),
        "empty file": (at("jsonl", "empty.jsonl"), "contains no document"),
        "blank lines": (at("jsonl", "blank.jsonl"), "contains no document"),
        "whitespace": (
            at("jsonl", "white.jsonl"),
            r"no text \(documents: 1 whitespace, 1 empty\).*text_column",
        ),
        "text not UTF-8": (at("text", "latin"), r"000\.txt is not UTF-8 \(byte 0xef in line 2"),
        "JSONL not UTF-8": (at("jsonl", "latin.jsonl"), "line 1 of .* is not UTF-8"),
        "not JSON": (at("jsonl", "broken.jsonl"), "line 1 of .* is not JSON.*repair it, or set"),
        "not an object": (at("jsonl", "list.jsonl"), "is a list, not a JSON object"),
        "not text": (at("jsonl", "number.jsonl"), "has a int in text, not text"),
        "half a surrogate": (at("jsonl", "half.jsonl"), "not Unicode text"),
        "JSONL column": (
            at("jsonl", "column.jsonl"),
            r"text_column=text is not a column .*content, id",
        ),
        "Parquet column": (
            at("parquet", "rows.parquet", "body"),
            r"text_column=body .*use one of id, text",
        ),
        "cut Parquet": (at("parquet", "cut.parquet"), r"cut\.parquet: cannot read"),
        "dataset split": (at("huggingface", "local", split="no"), "cannot read the dataset"),
        "dataset column": (
            at("huggingface", "local", "body"),
            r"text_column=body .*use one of id, text",
        ),
    }


def test_bad_input_is_reported_with_its_key_and_nothing_is_written(tmp_path: Path) -> None:
    for name, (source, message) in bad_inputs(tmp_path).items():
        data = data_of(tmp_path, source)
        with pytest.raises(DataError, match=message) as caught:
            prepare(data, BYTE, progress=False)
        assert "data.sources.s0." in str(caught.value), name
        assert not Path(data.folder).exists(), name


def test_error_names_a_folder_that_cannot_be_created(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    data = replace(data_of(tmp_path, source_of("text", tmp_path)), folder=str(tmp_path / "file/x"))
    with pytest.raises(DataError, match=r"data\.folder=.* cannot be written"):
        prepare(data, BYTE, progress=False)


@contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """Remount the folder read-only, which also applies to root."""
    steps = ["--bind", str(folder), str(folder)], ["-o", "remount,ro,bind", str(folder)]
    if any(subprocess.run(["mount", *step], capture_output=True).returncode for step in steps):
        pytest.skip("needs permission to mount a file system")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_read_only_folder_is_rejected_unless_it_is_already_prepared(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    data = data_of(tmp_path / "disk", source_of("text", tmp_path))
    with read_only(tmp_path / "disk"), pytest.raises(DataError) as caught:
        prepare(data, BYTE, progress=False)
    assert f"data.folder={data.folder} cannot be written (Read-only file system)" in str(
        caught.value
    )
    manifest = prepare(data, BYTE, progress=False)
    # As if the process was killed after writing the manifest: only the marker remains.
    (Path(data.folder) / state.MARKER_FILE).touch()
    with read_only(tmp_path / "disk"):
        assert prepare(data, BYTE, progress=False) == manifest


PEAK = """
from pathlib import Path
from data.config import *
from data.sources.corpora import find_corpus
from data.preparation.pipeline import prepare
from data.sources.rows import rows
{work}
lines = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
print(lines["VmHWM"].split()[0])  # kB; getrusage would include the memory of the parent process
"""


def peak_mib(work: str) -> float:
    """Return the peak memory of a process that runs the statements `work`."""
    process = subprocess.run(
        [sys.executable, "-c", PEAK.replace("{work}", work)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return int(process.stdout) / 1024


def write_mib(path: Path, n_mib: int) -> SourceConfig:
    """Write documents of 5 kB in the format given by the suffix of `path`."""
    table = pyarrow.table({"text": [f"{i % 7919:04} " * 1000 for i in range(n_mib * 200)]})
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(table, path)  # one row group
    elif path.suffix == ".arrow":
        with pyarrow.ipc.new_file(path, table.schema) as writer:
            writer.write_table(table, max_chunksize=100)
    else:
        with pyarrow.output_stream(path) as stream:  # compressed according to its suffix
            for text in table["text"].to_pylist():
                stream.write(json.dumps({"text": text}).encode() + b"\n")
    format_ = path.suffix[1:] if path.suffix in (".parquet", ".arrow") else "jsonl"
    return SourceConfig(format_, str(path))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.parquet"])
def test_memory_for_reading_does_not_grow_with_the_file(name: str, tmp_path: Path) -> None:
    """The second file is 48 MiB larger. Arrow files are memory-mapped and therefore excluded."""
    peaks = []
    for n_mib in (16, 64):
        source = write_mib(tmp_path / name, n_mib)
        read = (
            f"for part in find_corpus('s', {source!r}).parts: list(map(id, rows(part, {source!r})))"
        )
        peaks.append(peak_mib(read))
    assert peaks[1] - peaks[0] < 8


def test_memory_for_preparation_does_not_grow_with_the_corpus(tmp_path: Path) -> None:
    """The second corpus is 14 MiB larger, and its tokens take four times that."""
    peaks = []
    for n_mib in (2, 16):
        source = write_mib(tmp_path / "a.jsonl", n_mib)
        data = replace(data_of(tmp_path / str(n_mib), source), shard_tokens=10**6, workers=1)
        peaks.append(peak_mib(f"prepare({data!r}, {BYTE!r}, False)"))
    assert peaks[1] - peaks[0] < 7


def test_folder_is_locked_while_sources_are_located(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Locating a source may download a dataset, which can exceed the idle timeout of waiters."""
    data = data_of(tmp_path, source_of("text", tmp_path))
    claimed = []

    def record_claim(name: str, source: SourceConfig, *arguments: str) -> Corpus:
        claimed.append(is_locked(Path(data.folder) / state.MARKER_FILE))
        return find_corpus(name, source, *arguments)

    monkeypatch.setattr("data.preparation.pipeline.find_corpus", record_claim)
    prepare(data, BYTE, progress=False)
    assert claimed == [True]


def test_waiting_for_a_preparation_times_out_if_no_process_prepares(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data.files.POLL_SECONDS", 0.01)
    monkeypatch.setattr("data.files.IDLE_SECONDS", 0.05)
    with pytest.raises(DataError, match="no process has worked on it"):
        wait_until_prepared(tmp_path)


def test_bpe_without_a_path_has_no_existing_tokenizer() -> None:
    assert ready_tokenizer(TokenizerConfig("bpe", 300)) is None


def test_prepare_py_prepares_and_prints_errors_without_a_traceback(tmp_path: Path) -> None:
    texts = write_texts(tmp_path / "texts")

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        shards = f"data.folder={tmp_path / 'shards'}"
        command = [sys.executable, "prepare.py", "data=text", "data.name=mine", shards, *arguments]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)

    wrong = run("tokenizer=byte", f"data.sources.text.path={tmp_path / 'nowhere'}")
    assert wrong.returncode == 1
    assert wrong.stderr.startswith("Error: data.sources.text.path")
    assert "Traceback" not in wrong.stderr
    good = run("tokenizer=byte", f"data.sources.text.path={texts}")
    assert good.returncode == 0, good.stderr
    assert "training and" in good.stdout
    assert Manifest.read(tmp_path / "shards").tokenizer.name == "byte"


def test_ctrl_c_stops_prepare_py_with_one_line(tmp_path: Path) -> None:
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
    deadline = time.monotonic() + DEADLINE
    while not list(shards.glob("*/part-*.json")):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.002)
    os.killpg(process.pid, signal.SIGINT)
    _, output = process.communicate(timeout=DEADLINE)
    assert process.returncode == 130
    *progress, last = output.splitlines()  # a slow machine prints progress
    assert last == "Interrupted; run the same command to resume."
    assert all(line.startswith("preparing mine: ") for line in progress)
