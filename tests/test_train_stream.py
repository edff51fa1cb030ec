"""Training on streamed data: kills and mesh changes do not change the samples."""

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import read_metrics, start_program
from fork_server import ForkServer
from processes import linux
from test_train_data import kill_after

STEPS = 30
STREAM_SHARDS = 4


@pytest.fixture(scope="module")
def folder(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a dataset of five JSON Lines files, instead of one from the Hugging Face Hub."""
    folder = tmp_path_factory.mktemp("dataset") / "code"
    folder.mkdir()
    texts = [file.read_text() for file in sorted(corpus.iterdir())]
    for number in range(5):
        # Documents are short, so that each stream shard (3,840 tokens) ends within the run.
        lines = [json.dumps({"text": text[:250]}) + "\n" for text in texts[number::5]]
        (folder / f"part-{number}.jsonl").write_text("".join(lines))
    return folder


@pytest.fixture(scope="module")
def command(folder: Path) -> Any:
    """Return a function from run folder and overrides to the arguments of a streamed run."""

    def arguments(run: Path, *overrides: str) -> list[str]:
        return [
            *(
                "train.py",
                "experiment=smoke",
                "data=fineweb_edu",
                f"data.stream_shards={STREAM_SHARDS}",
            ),
            f"data.sources.fineweb_edu.path={folder}",
            *("data.sources.fineweb_edu.name=null", f"run.dir={run}", f"train.max_steps={STEPS}"),
            *("checkpoint.interval=5", "checkpoint.async_save=false"),
            *("validation.interval=null", "validation.samples=0"),
            *("parallel.accelerator=cpu", "log.tensorboard=false"),
            *overrides,
        ]

    return arguments


@pytest.fixture(scope="module")
def uninterrupted(command: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of the run on one process without interruption."""
    run = tmp_path_factory.mktemp("uninterrupted") / "run"
    done = start_program(command(run))
    assert done.returncode == 0, done.stderr
    header = " ".join(done.stdout.split())  # the console wraps lines
    assert "streamed from 5 files of" in header and f"in {STREAM_SHARDS} stream shards" in header
    return run


def stream_positions(run: Path, step: int) -> dict[str, list[int]]:
    """Return the position in each stream shard, from a checkpoint."""
    manifest = json.loads((run / f"checkpoints/step-{step:08d}/manifest.json").read_text())
    return manifest["position"]["stream_shards"]


@linux
def test_kills_and_mesh_changes_do_not_change_samples(
    command: Any, uninterrupted: Path, fork_server: ForkServer, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    for last, overrides in (
        (11, ("parallel.dp_shard=2", "data.loader_threads=2", "data.prefetch=1")),
        (22, ("parallel.tp=2", "train.micro_batch_size=2", "data.prefetch=7")),
    ):
        kill_after(last, run, fork_server, command(run, *overrides))
    done = start_program(command(run, "parallel.dp_shard=2", "parallel.pp=2"), world_size=4)
    assert done.returncode == 0, done.stderr
    found, expected = read_metrics(run), read_metrics(uninterrupted)
    for key in ("step", "samples", "tokens", "batch_hash"):
        assert [line[key] for line in found] == [line[key] for line in expected]
    assert len({line["batch_hash"] for line in expected}) == STEPS
    assert stream_positions(run, STEPS) == stream_positions(uninterrupted, STEPS)
    assert sorted(stream_positions(run, STEPS)) == [str(index) for index in range(STREAM_SHARDS)]
    assert all(
        position[0] > 0 for position in stream_positions(run, STEPS).values()
    )  # all in their second epoch or later
    starts = [
        json.loads(line)["step"]
        for line in (run / "ledger.jsonl").read_text().splitlines()
        if json.loads(line)["event"] == "start"
    ]
    assert starts[0] == 0 and 10 <= starts[1] < starts[2] and starts[2] >= 20
    # Meshes sum in different orders: rounding errors of 1e-7 per sum, growing over the steps.
    losses = [line["loss"] for line in expected]
    assert [line["loss"] for line in found] == pytest.approx(losses, rel=1e-6, abs=0)
    assert "--- step 30 ---" in (run / "samples.txt").read_text()


def test_changed_stream_is_rejected_on_resume(
    command: Any, uninterrupted: Path, folder: Path
) -> None:
    (folder / "part-5.jsonl").write_text('{"text": "an additional file"}\n')
    try:
        done = start_program(command(uninterrupted, f"train.max_steps={STEPS + 1}"))
    finally:
        (folder / "part-5.jsonl").unlink()
    assert done.returncode == 1
    assert "data.sources has other tokens" in done.stderr and "Traceback" not in done.stderr
    done = start_program(command(uninterrupted, "data.stream_shards=2"))
    assert done.returncode == 1 and "data.stream_shards: 4 -> 2" in done.stderr


def test_evaluation_of_streamed_run_is_rejected(uninterrupted: Path) -> None:
    checkpoint = uninterrupted / "checkpoints" / f"step-{STEPS:08d}"
    done = start_program(["evaluate.py", f"checkpoint={checkpoint}"])
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "data.stream_shards=4" in done.stderr and "no held-out text" in done.stderr


def test_all_stream_errors_are_reported_together_before_launch(
    command: Any, tmp_path: Path
) -> None:
    invalid = ("validation.samples=8", "tokenizer=bpe", "data.stream_shards=3")
    done = start_program(command(tmp_path / "run", *invalid))
    assert done.returncode == 1
    for key in ("validation.samples=8", "tokenizer.path=null", "data.stream_shards=3"):
        assert key in done.stderr
    done = start_program(command(tmp_path / "run", "data.stream_shards=8"))
    assert done.returncode == 1
    assert "data.stream_shards=8 is more than the 5 files" in done.stderr
    assert "use 4, the largest" in done.stderr
    assert not (tmp_path / "run").exists()
