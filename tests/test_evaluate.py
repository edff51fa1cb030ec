"""`evaluate.py` on a checkpoint of the smoke model: the run's own figure, on any mesh."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import pytest
from conftest import read_metrics, start_program

Smoke = Callable[..., CompletedProcess[str]]


@pytest.fixture(scope="module")
def checkpoint(smoke_run: Smoke, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The last checkpoint of ten steps of the smoke model."""
    run = tmp_path_factory.mktemp("evaluate") / "run"
    smoke_run(run, "train.max_steps=10")
    return run / "checkpoints" / "step-00000010"


def evaluate(checkpoint: Path, *overrides: str, ranks: int = 1) -> CompletedProcess[str]:
    """Runs the program on CPU."""
    return start_program(
        [
            "evaluate.py",
            f"evaluation.checkpoint={checkpoint}",
            "parallel.accelerator=cpu",
            *overrides,
        ],
        ranks=ranks,
    )


def test_loss_is_the_runs_own_and_no_mesh_or_batch_size_changes_it(checkpoint: Path) -> None:
    trained = read_metrics(checkpoint.parent.parent)[-1]["val_loss"]
    for overrides, ranks in (
        ([], 1),
        (["evaluation.micro_batch_size=3"], 1),
        (["parallel.tp=2"], 2),
    ):
        done = evaluate(checkpoint, "evaluation.samples=8", *overrides, ranks=ranks)
        assert done.returncode == 0, done.stderr
        figures = json.loads(done.stdout)
        assert figures == json.loads((checkpoint / "evaluation.json").read_text())
        # Other cuts and meshes sum in another order: a few roundings of float32.
        assert figures["loss"] == pytest.approx(trained, rel=1e-6)
        assert figures["perplexity"] == pytest.approx(math.exp(figures["loss"]))
        # One token is one byte, but for the end of a document, which is predicted and has none.
        per_byte = figures["loss"] / math.log(2)
        assert per_byte <= figures["bits_per_byte"] < 1.05 * per_byte


def test_bad_checkpoints_are_refused_with_a_remedy(checkpoint: Path, tmp_path: Path) -> None:
    missing = evaluate(tmp_path / "step-00000001")
    assert missing.returncode != 0
    assert "is not a committed checkpoint" in missing.stderr
    assert "Traceback" not in missing.stderr
    mesh = evaluate(checkpoint, "parallel.tp=3")
    assert mesh.returncode != 0
    assert "parallel.tp (3) does not divide model.n_heads (4): use 1, 2 or 4" in mesh.stderr


def test_damage_is_told_once_whatever_the_number_of_processes(checkpoint: Path) -> None:
    whole = (checkpoint / "manifest.json").read_bytes()
    (checkpoint / "manifest.json").write_bytes(whole + b"\n")
    try:
        done = evaluate(checkpoint, "parallel.tp=2", ranks=2)
    finally:
        (checkpoint / "manifest.json").write_bytes(whole)
    assert done.returncode != 0
    assert done.stderr.count("manifest.json has another SHA-256") == 1
    assert "Traceback" not in done.stderr
