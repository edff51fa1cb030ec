"""Real workers, real signals: nothing is lost with who dies, and nobody is left behind."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pytest

from data.config import DataConfig, SourceConfig, TokenizerConfig
from data.errors import DataError
from data.preparation import pool, state
from data.preparation.part import PartSettings, load
from data.preparation.pipeline import prepare
from data.sources import corpora

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")

BYTE = TokenizerConfig("byte", 272)
ROOT = Path(__file__).parents[3]
PART_BYTES = 50_000
N_WORKERS = 3


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpora, "MIN_PART_BYTES", PART_BYTES)


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three million characters in sixty parts."""
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    texts = (f"Document {i}, naïve 🙂 " + f"line {i}\n" * (i % 90) for i in range(7500))
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


@pytest.fixture(scope="module")
def expected(rows: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The folder of a preparation by one process that nothing disturbed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpora, "MIN_PART_BYTES", PART_BYTES)
        data = replace(data_of(tmp_path_factory.mktemp("expected"), rows), workers=1)
        prepare(data, BYTE, progress=False)
    return listing(data.folder)


def data_of(folder: Path, rows: Path) -> DataConfig:
    source = SourceConfig("jsonl", str(rows))
    return DataConfig(
        "corpus",
        str(folder / "shards"),
        {"rows": source},
        validation_fraction=0.2,
        shard_tokens=9000,
        workers=N_WORKERS,
    )


def listing(folder: Path | str) -> dict[str, bytes]:
    folder = Path(folder)
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@contextmanager
def preparing(data: DataConfig, before: str = "") -> Iterator[subprocess.Popen[str]]:
    """A process of its own session that prepares; `before` is Python that it runs first."""
    program = (
        f"{before}\n"
        f"from data.sources import corpora; corpora.MIN_PART_BYTES = {PART_BYTES}\n"
        "from data.config import *; from data.preparation.pipeline import prepare\n"
        f"prepare({data!r}, {BYTE!r}, False)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        cwd=ROOT,
        start_new_session=True,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()


def until(condition: Callable[[], bool], seconds: float = 60) -> None:
    """Waits for a condition that is sure to come."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def n_records(data: DataConfig) -> int:
    return len(list(Path(data.folder).glob("*/part-*.json")))


def group(process: subprocess.Popen[str]) -> dict[int, str]:
    """The living processes of its session with their commands: itself, its workers."""
    found = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                state, _, _, session = (folder / "stat").read_text().rpartition(")")[2].split()[:4]
                command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            except (FileNotFoundError, ProcessLookupError):
                continue
            if int(session) == process.pid and state != "Z":
                found[int(folder.name)] = command
    return found


def workers(process: subprocess.Popen[str]) -> list[int]:
    return [pid for pid, command in group(process).items() if "spawn_main" in command]


def test_killed_with_workers_at_any_time_it_leaves_nobody_and_ends_the_same(
    tmp_path: Path, rows: Path, expected: dict[str, bytes]
) -> None:
    chance = random.Random(1)
    interrupted = 0
    data = data_of(tmp_path, rows)
    for _ in range(4):
        with preparing(data) as process:
            goal = n_records(data) + chance.randrange(1, 15)
            while n_records(data) < goal and process.poll() is None:
                time.sleep(0.002)
            process.kill()
            process.wait()
            until(lambda: not group(process), seconds=10)
        interrupted += not (Path(data.folder) / "manifest.json").exists()
    assert interrupted > 1
    prepare(replace(data, workers=2), BYTE, progress=False)
    assert listing(data.folder) == expected


def test_a_worker_that_dies_is_told_and_the_next_start_goes_on(
    tmp_path: Path, rows: Path, expected: dict[str, bytes]
) -> None:
    data = data_of(tmp_path, rows)
    with preparing(data) as process:
        until(lambda: n_records(data) > 3)
        os.kill(workers(process)[0], signal.SIGKILL)
        _, told = process.communicate(timeout=30)
        assert "DataError: a worker process of the preparation died" in told
        assert "keeps what is done" in told
        until(lambda: not group(process), seconds=10)
    done = n_records(data)
    assert done > 3
    prepare(data, BYTE, progress=False)
    assert listing(data.folder) == expected


def test_ctrl_c_ends_all_of_them_and_the_next_start_goes_on(
    tmp_path: Path, rows: Path, expected: dict[str, bytes]
) -> None:
    data = data_of(tmp_path, rows)
    with preparing(data) as process:
        until(lambda: n_records(data) > 3)
        os.killpg(process.pid, signal.SIGINT)  # a terminal sends it to all
        _, told = process.communicate(timeout=30)
        assert told.count("Traceback") == 1 and "KeyboardInterrupt" in told  # of the main process
        until(lambda: not group(process), seconds=10)
    assert not list(Path(data.folder).glob("*/*.tmp"))
    prepare(data, BYTE, progress=False)
    assert listing(data.folder) == expected


def begin_deaf(job: PartSettings, counters: Any, workers_end: Any, lock: Any) -> None:
    """Sets up a worker that does not hear that its main process died."""
    pool._state.update(job=job, tokenizer=load(job), counters=counters, kept=(workers_end, lock))


def test_a_second_preparation_is_refused_while_the_first_or_one_of_its_workers_lives(
    tmp_path: Path, rows: Path, expected: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(state, "PATIENCE_SECONDS", 0.1)
    data = data_of(tmp_path, rows)
    deaf = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "import test_data_preparation_pool as deaf; from data.preparation import pool\n"
        "pool._begin = deaf.begin_deaf"
    )
    with preparing(data, deaf) as process:
        until(lambda: n_records(data) > 1)
        with pytest.raises(DataError, match="is being prepared by another process"):
            prepare(data, BYTE, progress=False)
        process.kill()
        process.wait()
        left = workers(process)
        assert len(left) == N_WORKERS
        for worker in left:
            with pytest.raises(DataError, match="is being prepared by another process"):
                prepare(data, BYTE, progress=False)
            os.kill(worker, signal.SIGKILL)
        until(lambda: not group(process), seconds=10)
    prepare(data, BYTE, progress=False)
    assert listing(data.folder) == expected


def test_a_lock_of_a_marker_that_is_gone_is_no_claim(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one before may end, and remove its marker, between our opening and our locking it."""
    marker_path = tmp_path / state.MARKER_FILE
    lock = state.fcntl.flock
    removed: list[bool] = []

    def late(file: Any, operation: int) -> None:
        if not removed:
            marker_path.unlink()
            removed.append(True)
        lock(file, operation)

    monkeypatch.setattr(state.fcntl, "flock", late)
    with state.claimed(tmp_path) as marker:
        assert os.path.samestat(os.fstat(marker.fileno()), marker_path.stat())


def test_a_downloaded_and_a_streamed_dataset_go_to_workers(
    tmp_path: Path, rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The library's own objects, in other processes: the same tokens as of the files, in order."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / ".cache"))
    lines = rows.read_text().splitlines(keepends=True)
    folder = tmp_path / "set"
    folder.mkdir()
    for i in range(3):
        (folder / f"{i}.jsonl").write_text("".join(lines[i * 400 : (i + 1) * 400]))
    found = []
    for number, source in enumerate(
        (
            SourceConfig("jsonl", str(folder)),
            SourceConfig("huggingface", str(folder)),
            SourceConfig("huggingface", str(folder), streaming=True),
        )
    ):
        data = replace(
            data_of(tmp_path / str(number), rows), sources={"rows": source}, shard_tokens=10**6
        )
        prepare(data, BYTE, progress=False)
        shards = sorted(Path(data.folder).glob("rows/train-*.tokens"))
        assert len(shards) > 2
        found.append(b"".join(shard.read_bytes() for shard in shards))
    assert found[0] == found[1] == found[2]


def test_two_started_together_end_as_one(
    tmp_path: Path, rows: Path, expected: dict[str, bytes]
) -> None:
    data = data_of(tmp_path, rows)
    with preparing(data) as one, preparing(data) as other:
        told = [process.communicate(timeout=60)[1] for process in (one, other)]
        codes = sorted(process.returncode for process in (one, other))
    assert codes in ([0, 0], [0, 1])
    if codes == [0, 1]:
        assert any("is being prepared by another process" in each for each in told)
    assert listing(data.folder) == expected
