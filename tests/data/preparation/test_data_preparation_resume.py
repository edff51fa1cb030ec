"""A preparation stopped by a kill, invalid text or a full disk resumes with byte-equal results.

All preparations here have many parts and shards, so that an interrupted one has completed parts.
"""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from data.config import DataConfig, SourceConfig, TokenizerConfig
from data.errors import DataError
from data.manifest import Manifest
from data.preparation import part as preparation_part
from data.preparation.part import record_path
from data.preparation.pipeline import prepare
from data.sources import corpora
from data.sources.corpora import Part
from data.sources.rows import Policy, rows

BYTE = TokenizerConfig("byte", 272)
TEXTS = [f"Document {i}, naïve 🙂 " + f"line {i}\n" * (i % 40) for i in range(300)]
ROOT = Path(__file__).parents[3]


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpora, "MIN_PART_BYTES", 8_000)


def write_lines(path: Path, texts: list[str] = TEXTS) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def data_of(folder: Path, path: Path, workers: int = 1) -> DataConfig:
    """Configure two sources of the same file, with about thirty parts of several shards each."""
    sources = {name: SourceConfig("jsonl", str(path)) for name in ("one", "two")}
    return DataConfig(
        "corpus", str(folder), sources, validation_fraction=0.2, shard_tokens=3000, workers=workers
    )


def listing(folder: Path | str) -> dict[str, bytes]:
    folder = Path(folder)
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def records(folder: Path | str) -> list[Path]:
    return sorted(Path(folder).glob("*/part-*.json"))


PROGRAM = """
import os, signal, sys, traceback
from data.sources import corpora
from data.config import *
from data.preparation.pipeline import prepare
from data.sources.rows import Policy
corpora.MIN_PART_BYTES = 8_000
calls = limit = 0
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
for data, limit in {jobs!r}:
    if os.fork() == 0:
        try:
            prepare(data, TokenizerConfig("byte", 272), False)
            print(calls, flush=True)
        except BaseException:
            traceback.print_exc()
        os._exit(0)
    if os.waitstatus_to_exitcode(os.wait()[1]) == -signal.SIGKILL:
        print(0, flush=True)
"""


def run_until_killed(*jobs: tuple[DataConfig, int]) -> list[int]:
    """Prepare each dataset in a process that kills itself before the given file operation.

    Returns:
        The number of file operations of each process, 0 if it was killed.
    """
    program = PROGRAM.replace("{jobs!r}", repr(jobs))
    process = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert process.returncode == 0 and not process.stderr, process.stderr
    return [int(line) for line in process.stdout.splitlines()]


@pytest.mark.parametrize("change", [('"n_tokens": 2', '"n_tokens": 3'), ('"read": 3', '"read": 4')])
def test_damaged_part_record_is_prepared_again(tmp_path: Path, change: tuple[str, str]) -> None:
    path = write_lines(tmp_path / "rows.jsonl")
    data, other = data_of(tmp_path / "a", path), data_of(tmp_path / "b", path)
    with pytest.raises(KeyboardInterrupt), patch.object(Manifest, "write", interrupt):
        prepare(data, BYTE, progress=False)
    record = records(data.folder)[1]
    valid = record.read_text()
    record.write_text(valid.replace(*change, 1))
    assert record.read_text() != valid
    prepare(data, BYTE, progress=False)
    prepare(other, BYTE, progress=False)
    assert listing(data.folder) == listing(other.folder)


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def test_result_does_not_depend_on_workers_or_interruptions(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "rows.jsonl")
    uninterrupted = data_of(tmp_path / "a", path)
    (n_changes,) = run_until_killed((uninterrupted, -1))
    expected = listing(uninterrupted.folder)
    assert len([name for name in expected if "train" in name]) > 60
    assert n_changes > 500
    assert not records(uninterrupted.folder)

    three = data_of(tmp_path / "three", path, workers=3)
    prepare(three, BYTE, progress=False)
    assert listing(three.folder) == expected

    # Kill at every kind of file operation (the first ones, some in the middle, the manifest and the
    # removals after it), twice per folder, then finish with another number of workers.
    limits = [*range(1, 16), *range(16, n_changes - 60, 61), *range(n_changes - 60, n_changes, 6)]
    killed = [data_of(tmp_path / f"killed-{limit}", path) for limit in limits]
    assert not any(run_until_killed(*zip(killed, limits, strict=True)))
    run_until_killed(*((data, 40) for data in killed))
    for number, data in enumerate(killed):
        prepare(replace(data, workers=1 + (number % 4 == 0)), BYTE, progress=False)
        assert listing(data.folder) == expected, data.folder


def test_completed_parts_are_not_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = data_of(tmp_path / "a", write_lines(tmp_path / "rows.jsonl"))
    assert run_until_killed((data, 300)) == [0]
    done = [json.loads(record.read_text()) for record in records(data.folder)]
    assert len(done) > 5
    assert all(each["done"] for each in done[:-1])
    finished = {str(record) for record in records(data.folder)[:-1]}
    before = {file: file.stat().st_mtime_ns for file in Path(data.folder).glob("*/*.tokens")}
    completed = {entry for each in done for entry in _files(each)}
    read: list[Part] = []

    def recorded_rows(part: Part, *rest: Any) -> Any:
        read.append(part)
        return rows(part, *rest)

    monkeypatch.setattr(preparation_part, "rows", recorded_rows)
    prepare(data, BYTE, progress=False)
    assert not {str(record_path(Path(data.folder), part)) for part in read} & finished
    for file, written in before.items():
        if file.relative_to(data.folder).as_posix() in completed:
            assert file.stat().st_mtime_ns == written


def _files(record: dict) -> list[str]:
    shards = [shard for split in record["shards"].values() for shard in split]
    return [shard["tokens"]["file"] for shard in shards]


def changed_input(path: Path, data: DataConfig) -> DataConfig:
    write_lines(path, TEXTS[:200])
    return data


CHANGES: dict[str, Callable[[Path, DataConfig], DataConfig]] = {
    "input": changed_input,
    "configuration": lambda _, data: replace(data, validation_fraction=0.5),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changed_input_or_configuration_restarts_with_a_message(
    change: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_lines(tmp_path / "rows.jsonl")
    data = data_of(tmp_path / "a", path)
    assert run_until_killed((data, 300)) == [0]
    data = CHANGES[change](path, data)
    fresh = replace(data, folder=str(tmp_path / "b"))
    prepare(fresh, BYTE, progress=False)
    prepare(data, BYTE)
    assert f"restarting the preparation; changed: {change}" in capsys.readouterr().err
    assert listing(data.folder) == listing(fresh.folder)


def test_resuming_prints_the_number_of_completed_parts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = data_of(tmp_path / "a", write_lines(tmp_path / "rows.jsonl"))
    assert run_until_killed((data, 300)) == [0]
    n_done = sum(json.loads(record.read_text())["done"] for record in records(data.folder))
    prepare(data, BYTE)
    assert f"resuming; {n_done} of" in capsys.readouterr().err


@pytest.mark.parametrize("tokenizer", [BYTE, TokenizerConfig("bpe", 290, None, 20_000)])
def test_preparation_stopped_by_invalid_text_resumes_with_another_policy(
    tokenizer: TokenizerConfig, tmp_path: Path
) -> None:
    path = write_lines(tmp_path / "rows.jsonl", [*TEXTS[:250], "a\0b", *TEXTS[250:]])
    strict = data_of(tmp_path / "a", path)
    with pytest.raises(DataError, match=r"line 251 .* NUL(.|\n)*Finished parts are kept"):
        prepare(strict, tokenizer, progress=False)
    done = records(strict.folder)
    assert len(done) > 5
    times = {file: file.stat().st_mtime_ns for file in done[:-1]}
    with pytest.raises(DataError, match="line 251"):
        prepare(strict, tokenizer, progress=False)
    assert {file: file.stat().st_mtime_ns for file in done[:-1]} == times
    policies: list[tuple[Policy, str]] = [("skip", "skipped"), ("replace", "replaced")]
    for policy, count in policies:
        fresh = replace(strict, folder=str(tmp_path / policy), invalid_text=policy)
        manifest = prepare(fresh, tokenizer, progress=False)
        assert manifest.sources["two"].documents[count] == 1
        resumed = replace(strict, invalid_text=policy, folder=str(tmp_path / f"{policy}-resumed"))
        shutil.copytree(strict.folder, resumed.folder)
        prepare(resumed, tokenizer, progress=False)
        assert listing(resumed.folder) == listing(fresh.folder)


def test_stricter_policy_does_not_keep_parts_that_it_would_reject(tmp_path: Path) -> None:
    texts = [*TEXTS[:20], "a\0b", *TEXTS[20:250], *TEXTS[250:]]
    path = write_lines(tmp_path / "rows.jsonl", texts)
    for policy in ("strict", "replace"):
        data = replace(data_of(tmp_path / policy, path), invalid_text="skip")
        assert run_until_killed((data, 300)) == [0]
        changed = replace(data, invalid_text=policy)
        if policy == "strict":
            with pytest.raises(DataError, match="line 21 "):
                prepare(changed, BYTE, progress=False)
        else:
            fresh = replace(changed, folder=str(tmp_path / "fresh"))
            prepare(fresh, BYTE, progress=False)
            prepare(changed, BYTE, progress=False)
            assert listing(changed.folder) == listing(fresh.folder)


def test_full_disk_leaves_no_partial_files_and_the_next_launch_resumes(
    tmp_path: Path,
) -> None:
    """The test mounts a file system of 400 kB and enlarges it afterwards."""
    path = write_lines(tmp_path / "rows.jsonl")
    expected = data_of(tmp_path / "expected", path)
    prepare(expected, BYTE, progress=False)
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(small)],
        capture_output=True,
        check=False,
    )
    if mounted.returncode:
        pytest.skip("needs permission to mount a file system")
    try:
        data = data_of(small / "shards", path, workers=2)
        with pytest.raises(
            DataError,
            match=r"data\.folder=.*No space left on device.; free disk space .*KiB needed",
        ):
            prepare(data, BYTE, progress=False)
        done = records(data.folder)
        assert len(done) > 3
        complete = listing(expected.folder)
        for name, content in listing(data.folder).items():
            if name in complete:
                assert content == complete[name]
            else:
                assert name == "preparing.json" or Path(name).name.startswith("part-")
        subprocess.run(["mount", "-o", "remount,size=20m", str(small)], check=True)
        prepare(data, BYTE, progress=False)
        assert listing(data.folder) == complete
    finally:
        subprocess.run(["umount", "-l", str(small)], check=True)


def test_preparation_resumes_after_a_file_size_limit(tmp_path: Path) -> None:
    """The limit acts like a quota and needs no permission to mount."""
    path = write_lines(tmp_path / "rows.jsonl")
    data = replace(data_of(tmp_path / "a", path), shard_tokens=10**6)
    program = (
        "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, -1))\n"
        "from data.sources import corpora; corpora.MIN_PART_BYTES = 8_000\n"
        "from data.config import *; from data.preparation.pipeline import prepare\n"
        f"prepare({data!r}, {BYTE!r}, False)"
    )
    process = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert "cannot be written (File too large); free disk space" in process.stderr
    assert not list(tmp_path.glob("a/*/*.tmp"))
    prepare(data, BYTE, progress=False)
    fresh = replace(data, folder=str(tmp_path / "b"))
    prepare(fresh, BYTE, progress=False)
    assert listing(data.folder) == listing(fresh.folder)
