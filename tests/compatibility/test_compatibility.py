"""Run folders, checkpoints and datasets of version 0.1 resume in this version.

`v0_1.tar.gz` was written by commit 5fd8e6f: text, prepared shards and a run of 6 steps with a
checkpoint. `v0_1_metrics.jsonl` is what the same commit logged when it trained on to step 12.
"""

import json
import tarfile
from pathlib import Path

import pytest
from conftest import ROOT, read_metrics, start_program

HERE = Path(__file__).parent
COMMAND = (
    *("experiment=smoke", "tokenizer=byte", "data=text", "data.name=words"),
    *("data.sources.text.path=text", "data.folder=shards/words", "data.validation_fraction=0.2"),
    *("model.dim=16", "model.n_layers=1", "model.n_heads=2", "model.n_kv_heads=1"),
    *("model.ffn_dim=32", "train.seq_len=32", "train.global_batch_size=4"),
    *("checkpoint.interval=3", "checkpoint.keep_last=1", "validation.interval=4"),
    *("validation.samples=4", "validation.sample_tokens=4", "log.interval=1"),
    *("log.tensorboard=false", "parallel.accelerator=cpu", "run.name=old"),
    *("faults.max_in_a_row=4", "train.max_steps=12", "optim.schedule_steps=12"),
)
RENAMED = {"memory_gib": "peak_memory_gib", "data_seconds": "data_wait_seconds"}


@pytest.fixture(scope="module")
def resumed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, float]], str]:
    """Resume the old run; return its folder, its metrics before, and the console output."""
    folder = tmp_path_factory.mktemp("v0_1")
    with tarfile.open(HERE / "v0_1.tar.gz") as archive:
        archive.extractall(folder, filter="data")
    before = read_metrics(folder / "runs/old")
    done = start_program([str(ROOT / "train.py"), *COMMAND], cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder, before, done.stdout + done.stderr


def test_old_run_resumes_with_the_same_samples_and_losses(
    resumed: tuple[Path, list[dict[str, float]], str],
) -> None:
    expected = [json.loads(line) for line in (HERE / "v0_1_metrics.jsonl").read_text().splitlines()]
    metrics = read_metrics(resumed[0] / "runs/old")
    assert len(metrics) == len(expected)
    for line, old in zip(metrics, expected, strict=True):
        for key in ("step", "samples", "tokens", "batch_hash", "lr"):
            assert line[key] == old[key], key
        # Bit for bit on the CPU that wrote the archive; another one rounds products differently.
        assert line["loss"] == pytest.approx(old["loss"], rel=1e-6)
        assert line["grad_norm"] == pytest.approx(old["grad_norm"], rel=1e-5)


def test_old_metrics_are_continued_under_the_new_names(
    resumed: tuple[Path, list[dict[str, float]], str],
) -> None:
    folder, before, _ = resumed
    metrics = read_metrics(folder / "runs/old")
    assert {frozenset(line) - {"val_loss"} for line in metrics} == {
        frozenset(metrics[0]) - {"val_loss"}
    }
    assert metrics[: len(before)] == [
        {RENAMED.get(key, key): value for key, value in line.items()} for line in before
    ]


def test_renamed_key_gives_one_warning_and_does_not_change_the_run(
    resumed: tuple[Path, list[dict[str, float]], str],
) -> None:
    output = resumed[2]
    assert output.count("is deprecated") == 1
    assert "faults.max_in_a_row is deprecated; use faults.max_consecutive_skips" in output
    [changed] = [line for line in output.splitlines() if line.split()[:1] == ["changed"]]
    assert changed.split(maxsplit=1)[1] == "train.max_steps: 6 -> 12"
