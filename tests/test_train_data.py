"""Training data in complete runs: stages, kills, mesh changes and damaged shards."""

import json
import os
import shutil
import signal
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from conftest import read_metrics, start_program
from fork_server import ForkServer, read
from processes import linux, wait_for

from data.config import DataConfig, SourceConfig
from data.loader import TrainLoader
from data.mock import MockDataset
from data.stages import plan_stages
from resilience.exit_codes import ExitCode

# 8 × 64 tokens per step until step 12; then the second source is added, then the sequence length
# doubles, then the batch size.
STAGES = (
    "data.stages=[{from_sample:96,weights:{email:0.7}},"
    "{from_sample:192,seq_len:128},{from_sample:256,global_batch_size:16}]"
)
STEPS = 40


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of the shards of both sources."""
    return tmp_path_factory.mktemp("shards") / "two"


@pytest.fixture(scope="module")
def command(corpus: Path, shards: Path) -> Any:
    """Return a function from run folder and overrides to the arguments of a run with stages."""
    data = [
        *("data=text", "data.name=two", f"data.folder={shards}", "data.validation_fraction=0.2"),
        *(f"data.sources.text.path={corpus}/json-*.txt", "data.shard_tokens=20000"),
        *("data.sources.email.format=text", f"data.sources.email.path={corpus}/email-*.txt"),
        "data.sources.email.weight=0",
    ]
    prepared = start_program(["prepare.py", *data, STAGES, "tokenizer=byte"])
    assert prepared.returncode == 0, prepared.stderr

    def arguments(folder: Path, *overrides: str) -> list[str]:
        return [
            *("train.py", "experiment=smoke", *data, STAGES, f"run.dir={folder}"),
            *("checkpoint.interval=5", "validation.interval=null", "validation.samples=0"),
            *("validation.sample_tokens=0", "parallel.accelerator=cpu", "log.tensorboard=false"),
            *overrides,
        ]

    return arguments


@pytest.fixture(scope="module")
def uninterrupted(command: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of the run on one process without interruption."""
    folder = tmp_path_factory.mktemp("uninterrupted") / "run"
    done = start_program(command(folder))
    assert done.returncode == 0, done.stderr
    return folder


def test_stages_change_weights_seq_len_and_batch_size_at_their_samples(uninterrupted: Path) -> None:
    lines = read_metrics(uninterrupted)
    samples = [8 * step for step in range(1, 33)] + [256 + 16 * i for i in range(1, 9)]
    tokens = [512 * step for step in range(1, 25)]
    tokens += [tokens[-1] + 1024 * i for i in range(1, 9)]
    tokens += [tokens[-1] + 2048 * i for i in range(1, 9)]
    assert [line["samples"] for line in lines] == samples
    assert [line["tokens"] for line in lines] == tokens
    assert len({line["batch_hash"] for line in lines}) == STEPS


@linux
def test_kills_and_mesh_changes_do_not_change_samples(
    command: Any, uninterrupted: Path, fork_server: ForkServer, tmp_path: Path
) -> None:
    """Each launch has another mesh, thread count and prefetch; the kills are in two stages.

    Sequence length and batch size change within the launches on pipelines.
    """
    folder = tmp_path / "run"
    for last, overrides in (
        (14, ("parallel.dp_shard=2", "data.loader_threads=3", "data.prefetch=1")),
        (31, ("parallel.pp=2", "train.micro_batch_size=2", "data.prefetch=7")),
    ):
        kill_after(last, folder, fork_server, command(folder, *overrides))
    mesh = ("parallel.pp=2", "parallel.tp=2")
    done = start_program(command(folder, *mesh, "data.verify_reads=false"), world_size=4)
    assert done.returncode == 0, done.stderr
    found, expected = read_metrics(folder), read_metrics(uninterrupted)
    for key in ("step", "samples", "tokens", "batch_hash"):
        assert [line[key] for line in found] == [line[key] for line in expected]
    # Meshes sum in different orders: rounding errors of 1e-7 per sum, growing over the steps.
    losses = [line["loss"] for line in expected]
    assert [line["loss"] for line in found] == pytest.approx(losses, rel=1e-6, abs=0)


def kill_after(step: int, folder: Path, fork_server: ForkServer, arguments: list[str]) -> None:
    """Start a run on two processes and kill both once a step is logged."""
    start = fork_server.start(arguments[1:], 2)
    try:
        wait_for(partial(has_logged, folder, step), f"step {step}")
    finally:
        for pid in start.pids:
            os.kill(pid, signal.SIGKILL)
    assert fork_server.wait(start) == [-signal.SIGKILL] * 2, start.output()


def has_logged(folder: Path, step: int) -> bool:
    """Return whether the metrics of a step have been written."""
    metrics = folder / "metrics.jsonl"
    lines = metrics.read_text().split("\n")[:-1] if metrics.exists() else []
    return any(json.loads(line)["step"] >= step for line in lines)


def assert_reported_and_resumable(
    done: tuple[int, str], arguments: list[str], copy: Path, shards: Path, uninterrupted: Path
) -> None:
    """Check that a run reported its second source as damaged and resumes once it is restored."""
    exit_code, errors = done
    assert exit_code == ExitCode.DATA
    assert "Traceback" not in errors
    assert "Newest checkpoint: step 10. Resume with: python train.py " in errors
    assert str(copy / "email") in errors
    shutil.copytree(shards / "email", copy / "email", dirs_exist_ok=True)
    again = start_program(arguments)
    assert again.returncode == 0, again.stderr
    (run,) = (Path(each[8:]) for each in arguments if each.startswith("run.dir="))
    hashes = [line["batch_hash"] for line in read_metrics(uninterrupted)]
    assert [line["batch_hash"] for line in read_metrics(run)] == hashes


def test_corrupted_shard_stops_run_with_resume_command(
    command: Any, uninterrupted: Path, shards: Path, tmp_path: Path
) -> None:
    """The second source is first read in its stage, from step 13 on."""
    copy = tmp_path / "shards"
    shutil.copytree(shards, copy)
    for path in (copy / "email").glob("train-*.tokens"):
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    arguments = command(tmp_path / "run", f"data.folder={copy}")
    done = start_program(arguments)
    assert_reported_and_resumable(
        (done.returncode, done.stderr), arguments, copy, shards, uninterrupted
    )


@linux
def test_deleted_shards_stop_running_training_with_resume_command(
    command: Any, uninterrupted: Path, shards: Path, fork_server: ForkServer, tmp_path: Path
) -> None:
    """Writing to a pipe blocks the run at step 9 until the files are deleted."""
    copy, folder = tmp_path / "shards", tmp_path / "run"
    shutil.copytree(shards, copy)
    folder.mkdir()
    os.mkfifo(folder / "samples.txt")
    arguments = command(folder, f"data.folder={copy}", "data.prefetch=1")
    samples = ("validation.interval=9", "validation.sample_tokens=1")
    start = fork_server.start([*arguments[1:], *samples], 1, torchrun=False)
    wait_for(partial(has_logged, folder, 9), "step 9")
    shutil.rmtree(copy / "email")
    with open(folder / "samples.txt", encoding="utf-8") as pipe:
        pipe.read()
    (code,) = fork_server.wait(start)
    (folder / "samples.txt").unlink()
    assert_reported_and_resumable(
        (code, read(start.stderr[0])), arguments, copy, shards, uninterrupted
    )


def test_run_started_from_checkpoint_of_other_data_resumes_with_its_own(
    command: Any, uninterrupted: Path, tmp_path: Path
) -> None:
    """The data hash of the first checkpoint must not be compared with the run's own shards."""
    own = (f"data.folder={tmp_path / 'shards'}", "data.validation_fraction=0.3")
    checkpoint = uninterrupted / "checkpoints" / f"step-{STEPS:08d}"
    first = command(
        tmp_path / "run", *own, f"run.resume={checkpoint}", f"train.max_steps={STEPS + 1}"
    )
    again = command(tmp_path / "run", *own, f"train.max_steps={STEPS + 2}")
    for arguments in (first, again):
        done = start_program(arguments)
        assert done.returncode == 0, done.stderr
        assert "run.resume=" not in done.stdout  # the printed commands would be rejected with it
    assert [line["step"] for line in read_metrics(tmp_path / "run")] == [STEPS + 1, STEPS + 2]


def test_mock_data_need_no_tokenizer_and_resume_on_another_mesh(
    fork_server: ForkServer, tmp_path: Path
) -> None:
    words = [
        *("experiment=smoke", "data=mock", "tokenizer=bpe", "model.vocab_size=4096"),
        *("validation.interval=null", "validation.samples=4", "optim.schedule_steps=4"),
        *("parallel.accelerator=cpu", "log.tensorboard=false", f"run.dir={tmp_path}"),
    ]
    for steps, mesh in ((2, ()), (4, ("parallel.cp=2",))):
        launch = fork_server.run([*words, f"train.max_steps={steps}", *mesh], len(mesh) + 1)
        assert set(launch.exit_codes.values()) == {0}, launch.output()
        assert "mock, token ids by formula, vocabulary of 4,096" in launch.output()
    stages, _ = plan_stages(
        DataConfig("mock", "", {"mock": SourceConfig("mock")}),
        seq_len=64,
        global_batch_size=8,
        micro_batch_size=None,
    )
    loader = TrainLoader(MockDataset("mock", 4096, True), stages, seed=0, rank=0, size=1)
    hashes = [f"{loader.step(step).digest % 2**32:08x}" for step in range(4)]
    assert [line["batch_hash"] for line in read_metrics(tmp_path)] == hashes
    assert 0 < read_metrics(tmp_path)[-1]["val_loss"] < 9
    assert not list(tmp_path.rglob("tokenizer.model"))


def test_data_that_all_ranks_cannot_read_are_reported_once(
    command: Any, shards: Path, fork_server: ForkServer, tmp_path: Path
) -> None:
    copy = tmp_path / "shards"
    shutil.copytree(shards, copy)
    for path in copy.glob("*/train-*.offsets"):
        path.write_bytes(bytes(path.stat().st_size))
    arguments = command(tmp_path / "run", f"data.folder={copy}", "parallel.dp_shard=4")
    launch = fork_server.run(arguments[1:], 4, terminate_on_failure=False)
    assert set(launch.exit_codes.values()) == {ExitCode.DATA}
    lines = [line for rank in range(4) for line in launch.output(rank).splitlines()]
    causes = [line for line in lines if "is damaged: the checksum of MiB 0" in line]
    assert causes and len(causes) == len(set(causes)), causes  # ranks may read different files
