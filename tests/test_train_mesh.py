"""`train.py` gives the same samples, losses and gradient norms on any mesh."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
from conftest import read_metrics

# Each mesh sums in a different order. Rounding errors of 1e-7 per sum grow over the steps, to 3e-7
# in the losses of `bench.mesh_equality`. Wrong data, a wrong divisor or a missing gradient causes
# differences of 1e-3.
LOSS_TOLERANCE = 1e-6
NORM_TOLERANCE = 1e-5

MESHES = {
    "1x1": (),
    "tp2": ("parallel.tp=2",),
    "dp2": ("parallel.dp_shard=2",),
    "dp2_tp2": ("parallel.dp_shard=2", "parallel.tp=2"),
    "pp2": ("parallel.pp=2", "train.micro_batch_size=2"),
}


@pytest.fixture(scope="module")
def runs(smoke_run: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return the folders of runs of forty steps on every mesh, with a repeated one on tp=2."""
    folder = tmp_path_factory.mktemp("runs")
    for name, overrides in MESHES.items():
        smoke_run(folder / name, *overrides)
    smoke_run(folder / "tp2_again", *MESHES["tp2"])
    return {path.name: path for path in folder.iterdir()}


def curve(folder: Path, key: str) -> list[Any]:
    """Return a metric of every step in order; check that no step is missing."""
    lines = read_metrics(folder)
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    return [line[key] for line in lines]


def assert_close(found: list[float], expected: list[float], tolerance: float) -> None:
    """Check that all values are within the relative tolerance."""
    assert len(found) == len(expected)
    worst = max(abs(a / b - 1) for a, b in zip(found, expected, strict=True))
    assert worst <= tolerance, f"worst relative difference {worst:.2e}"


def truncated_run(run: Path, step: int, target: Path) -> Path:
    """Return a copy of a run as after a kill right after the save of `step`."""
    shutil.copytree(run, target)
    for checkpoint in (target / "checkpoints").iterdir():
        if int(checkpoint.name.removeprefix("step-")) > step:
            shutil.rmtree(checkpoint)
    return target


@pytest.mark.parametrize("mesh", [name for name in MESHES if name != "1x1"])
def test_losses_and_gradient_norms_do_not_depend_on_mesh(runs: dict[str, Path], mesh: str) -> None:
    reference = runs["1x1"]
    assert_close(curve(runs[mesh], "loss"), curve(reference, "loss"), LOSS_TOLERANCE)
    assert_close(curve(runs[mesh], "grad_norm"), curve(reference, "grad_norm"), NORM_TOLERANCE)
    found, expected = (
        [line["val_loss"] for line in read_metrics(run) if "val_loss" in line]
        for run in (runs[mesh], reference)
    )
    assert_close(found, expected, LOSS_TOLERANCE)


def test_samples_do_not_depend_on_mesh(runs: dict[str, Path]) -> None:
    hashes = {mesh: curve(runs[mesh], "batch_hash") for mesh in MESHES}
    assert len(set(hashes["1x1"])) == 40  # no batch is repeated
    assert all(found == hashes["1x1"] for found in hashes.values())


def test_repeated_run_on_same_mesh_is_bit_identical(runs: dict[str, Path]) -> None:
    # For one process, the resume test below checks this.
    for key in ("loss", "grad_norm"):
        assert curve(runs["tp2"], key) == curve(runs["tp2_again"], key)


def test_loss_decreases(runs: dict[str, Path]) -> None:
    losses = curve(runs["1x1"], "loss")
    vocab = 272  # of the byte tokenizer
    # The initial loss is near ln(vocab). Tied embeddings favour the current token by about
    # 0.02 · sqrt(dim) · norm gain, so repetitive text is slightly more likely.
    assert abs(losses[0] - math.log(vocab)) < 0.5
    assert losses[-1] < losses[0] - 1


@pytest.mark.parametrize("mesh", ["1x1", "tp2", "pp2"])
def test_resume_on_same_mesh_is_bit_identical(
    runs: dict[str, Path], smoke_run: Any, tmp_path: Path, mesh: str
) -> None:
    run = truncated_run(runs[mesh], 20, tmp_path / "run")
    smoke_run(run, *MESHES[mesh])
    for key in ("loss", "grad_norm", "batch_hash", "samples"):
        assert curve(run, key) == curve(runs[mesh], key)


def test_resume_on_another_mesh_with_micro_batches_keeps_samples_losses_and_gradient_norms(
    runs: dict[str, Path], smoke_run: Any, tmp_path: Path
) -> None:
    run = truncated_run(runs["dp2"], 20, tmp_path / "run")
    smoke_run(run, *MESHES["tp2"], "train.micro_batch_size=2")
    assert_close(curve(run, "grad_norm"), curve(runs["1x1"], "grad_norm"), NORM_TOLERANCE)
    assert curve(run, "batch_hash") == curve(runs["1x1"], "batch_hash")
    assert_close(curve(run, "loss"), curve(runs["1x1"], "loss"), LOSS_TOLERANCE)


def test_resumes_on_each_mesh_keep_samples_and_losses(
    runs: dict[str, Path], smoke_run: Any, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    for mesh, last_step in (("dp2", 9), ("pp2", 18), ("tp2", 27), ("1x1", 40)):
        smoke_run(run, *MESHES[mesh], f"train.max_steps={last_step}", "optim.schedule_steps=40")
    for key in ("batch_hash", "samples", "lr"):
        assert curve(run, key) == curve(runs["1x1"], key)
    assert_close(curve(run, "loss"), curve(runs["1x1"], "loss"), LOSS_TOLERANCE)
    starts = [
        json.loads(line)["step"]
        for line in (run / "ledger.jsonl").read_text().splitlines()
        if json.loads(line)["event"] == "start"
    ]
    assert starts == [0, 9, 18, 27]
