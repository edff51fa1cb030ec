"""Killed workers and main processes lose no data and leave no processes (real signals)."""

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
from processes import DEADLINE

from data.config import DataConfig, SourceConfig, TokenizerConfig
from data.errors import DataError
from data.preparation import pool, state
from data.preparation.pipeline import prepare
from data.preparation.pool import PreparePart
from data.sources import corpora

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")

BYTE = TokenizerConfig("byte", 272)
ROOT = Path(__file__).parents[3]
PART_BYTES = 50_000
N_WORKERS = 3


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpora, "MIN_PART_BYTES", PART_BYTES)


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write three million characters in sixty parts."""
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    texts = (f"Document {i}, naïve 🙂 " + f"line {i}\n" * (i % 90) for i in range(7500))
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


@pytest.fixture(scope="module")
def expected(rows: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Return the files of an uninterrupted preparation by one process."""
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
    """Prepare in a process with a new session; `before` is Python code to run first."""
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


def wait_until(condition: Callable[[], bool], seconds: float = DEADLINE) -> None:
    """Wait until the condition is true; fail after `seconds`."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def n_records(data: DataConfig) -> int:
    return len(list(Path(data.folder).glob("*/part-*.json")))


def session_processes(process: subprocess.Popen[str]) -> dict[int, str]:
    """Return pid and command of the live processes in the session: main process and workers."""
    commands = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                state, _, _, session = (folder / "stat").read_text().rpartition(")")[2].split()[:4]
                command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            except (FileNotFoundError, ProcessLookupError):
                continue
            if int(session) == process.pid and state != "Z":
                commands[int(folder.name)] = command
    return commands


def workers(process: subprocess.Popen[str]) -> list[int]:
    return [pid for pid, command in session_processes(process).items() if "spawn_main" in command]


def test_preparation_killed_at_random_times_leaves_no_process_and_resumes_byte_identical(
    tmp_path: Path, rows: Path, expected: dict[str, bytes]
) -> None:
    rng = random.Random(1)
    interrupted = 0
    data = data_of(tmp_path, rows)
    for _ in range(4):
        with preparing(data) as process:
            target = n_records(data) + rng.randrange(1, 15)
            while n_records(data) < target and process.poll() is None:
                time.sleep(0.002)
            process.kill()
            process.wait()
            wait_until(lambda: not session_processes(process), seconds=10)
        interrupted += not (Path(data.folder) / "manifest.json").exists()
    assert interrupted > 1
    prepare(replace(data, workers=2), BYTE, progress=False)
    assert listing(data.folder) == expected


def test_dead_worker_is_reported_and_the_next_launch_resumes(
    tmp_path: Path, rows: Path, expected: dict[str, bytes]
) -> None:
    data = data_of(tmp_path, rows)
    with preparing(data) as process:
        wait_until(lambda: n_records(data) > 3 or process.poll() is not None)
        os.kill(workers(process)[0], signal.SIGKILL)
        _, stderr = process.communicate(timeout=DEADLINE)
        assert "DataError: A worker process of the preparation died" in stderr
        assert "Finished parts are kept" in stderr
        wait_until(lambda: not session_processes(process), seconds=10)
    done = n_records(data)
    assert done > 3
    prepare(data, BYTE, progress=False)
    assert listing(data.folder) == expected


def test_ctrl_c_stops_all_processes_and_the_next_launch_resumes(
    tmp_path: Path, rows: Path, expected: dict[str, bytes]
) -> None:
    data = data_of(tmp_path, rows)
    with preparing(data) as process:
        wait_until(lambda: n_records(data) > 3 or process.poll() is not None)
        os.killpg(process.pid, signal.SIGINT)  # a terminal signals the whole process group
        _, stderr = process.communicate(timeout=DEADLINE)
        # Only the main process prints a traceback.
        assert stderr.count("Traceback") == 1 and "KeyboardInterrupt" in stderr
        wait_until(lambda: not session_processes(process), seconds=10)
    assert not list(Path(data.folder).glob("*/*.tmp"))
    prepare(data, BYTE, progress=False)
    assert listing(data.folder) == expected


def initialize_detached_worker(
    prepare: PreparePart, counters: Any, workers_end: Any, lock: Any
) -> None:
    """Initialize a worker that does not notice the death of its main process."""
    pool._worker_state.update(prepare=prepare, counters=counters, kept=(workers_end, lock))


def test_second_preparation_is_rejected_while_the_first_or_one_of_its_workers_is_alive(
    tmp_path: Path, rows: Path, expected: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(state, "LOCK_TIMEOUT_SECONDS", 0.1)
    data = data_of(tmp_path, rows)
    detach_workers = (
        f"import sys; sys.path[:0] = {[str(Path(__file__).parent), str(ROOT / 'tests')]!r}\n"
        "import test_data_preparation_pool as this_module; from data.preparation import pool\n"
        "pool._init_worker = this_module.initialize_detached_worker"
    )
    with preparing(data, detach_workers) as process:
        wait_until(lambda: n_records(data) > 1 or process.poll() is not None)
        with pytest.raises(DataError, match="is being prepared by another process"):
            prepare(data, BYTE, progress=False)
        process.kill()
        process.wait()
        remaining = workers(process)
        assert len(remaining) == N_WORKERS
        for worker in remaining:
            with pytest.raises(DataError, match="is being prepared by another process"):
                prepare(data, BYTE, progress=False)
            os.kill(worker, signal.SIGKILL)
        wait_until(lambda: not session_processes(process), seconds=10)
    prepare(data, BYTE, progress=False)
    assert listing(data.folder) == expected


def test_lock_on_a_removed_marker_file_does_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The previous process may exit and remove the marker between our open and our lock."""
    marker_path = tmp_path / state.MARKER_FILE
    lock = state.lock_descriptor
    removed: list[bool] = []

    def remove_then_lock(descriptor: int, blocking: bool) -> bool:
        if not removed:
            marker_path.unlink()
            removed.append(True)
        return lock(descriptor, blocking=blocking)

    monkeypatch.setattr(state, "lock_descriptor", remove_then_lock)
    with state.lock_folder(tmp_path) as marker:
        assert os.path.samestat(os.fstat(marker.fileno()), marker_path.stat())


def test_workers_prepare_downloaded_and_streamed_datasets(
    tmp_path: Path, rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Datasets objects are sent to workers; tokens and order equal those of the files."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / ".cache"))
    lines = rows.read_text().splitlines(keepends=True)
    folder = tmp_path / "set"
    folder.mkdir()
    for i in range(3):
        (folder / f"{i}.jsonl").write_text("".join(lines[i * 400 : (i + 1) * 400]))
    tokens = []
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
        tokens.append(b"".join(shard.read_bytes() for shard in shards))
    assert tokens[0] == tokens[1] == tokens[2]


def test_two_concurrent_preparations_produce_one_valid_dataset(
    tmp_path: Path, rows: Path, expected: dict[str, bytes]
) -> None:
    data = data_of(tmp_path, rows)
    with preparing(data) as one, preparing(data) as other:
        outputs = [process.communicate(timeout=DEADLINE)[1] for process in (one, other)]
        codes = sorted(process.returncode for process in (one, other))
    assert codes in ([0, 0], [0, 1])
    if codes == [0, 1]:
        assert any("is being prepared by another process" in each for each in outputs)
    assert listing(data.folder) == expected
