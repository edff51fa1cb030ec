"""A checkpoint restores bit for bit on any other mesh, and all ranks agree on its validity."""

from pathlib import Path
from typing import Any, cast

import pytest
import torch
from distributed import on_ranks
from save_checkpoint import save
from small_run import OPTIM, Case, batch, build, full_tensor, local_batches
from torch import Tensor

from checkpoint.position import Position
from checkpoint.restore import restore
from resilience.run_folder import COMMITTED, RunFolder, RunFolderError
from train import train_step

POSITION = Position(step=2, samples=24, tokens=384, data_hash="of the test", batches=2)
MESHES = {"dp2": Case(dp=2), "tp2": Case(tp=2), "dp2_tied": Case(dp=2, tied=True)}
ONE_PROCESS = Case(), Case(tied=True)


def state(run: Any) -> dict[str, Tensor]:
    """Return all parameters, Adam moments and step counts as full tensors."""
    results = {}
    for name, parameter in run.llama.named_parameters():
        results[name] = full_tensor(parameter)
        adam = run.adamw.state[parameter]
        results |= {f"{name} {key}": full_tensor(adam[key]) for key in ("exp_avg", "exp_avg_sq")}
        results[f"{name} step"] = adam["step"].clone()
    return results


def trained(case: Case) -> Any:
    """Build a run and train it for two steps."""
    run = build(case)
    for step in range(2):
        train_step(cast(Any, run), local_batches(batch(step), run.data_rank, case.dp, 2), OPTIM.lr)
    return run


def saved(run: Any, folder: Path) -> dict[str, Tensor]:
    save(RunFolder(folder), run.llama, run.adamw, POSITION, {"some": "configuration"})
    return state(run)


def loaded(case: Case, folder: Path) -> dict[str, Tensor]:
    """Return the state of a new run on the mesh of `case` after restoring from `folder`."""
    run = build(case)
    assert restore(RunFolder(folder), "auto", run.llama, run.adamw, print) == POSITION
    groups = run.adamw.param_groups
    assert [group["weight_decay"] for group in groups] == [OPTIM.weight_decay, 0.0]
    assert run.llama.config.tie_embeddings == (
        run.llama.output.weight is run.llama.tok_embeddings.weight
    )
    return state(run)


def save_on_one_process(folder: Path) -> dict[str, dict[str, Tensor]]:
    return {
        f"one{'_tied' * case.tied}": saved(trained(case), folder / f"one{'_tied' * case.tied}")
        for case in ONE_PROCESS
    }


def save_and_load_on_two_ranks(folder: Path) -> dict[str, Any]:
    """Save on each mesh of two ranks and load checkpoints across meshes, one process included."""
    results: dict[str, Any] = {
        name: saved(trained(case), folder / name) for name, case in MESHES.items()
    }
    for source, target in (
        ("dp2", "tp2"),
        ("tp2", "dp2"),
        ("tp2", "tp2"),
        ("one", "tp2"),
        ("one", "dp2"),
        ("one_tied", "dp2_tied"),
    ):
        results[f"{source} on {target}"] = loaded(MESHES[target], folder / source)
    # A second save of the same step does not modify the committed checkpoint.
    run = build(MESHES["dp2"])
    committed = RunFolder(folder / "dp2").step_folder(2)
    before = {path.name: path.read_bytes() for path in committed.iterdir()}
    assert save(RunFolder(folder / "dp2"), run.llama, run.adamw, POSITION, {}) == committed
    results["unmodified"] = before == {path.name: path.read_bytes() for path in committed.iterdir()}
    results["errors"] = []
    damaged = RunFolder(folder / "tp2").step_folder(2)
    torch.distributed.barrier()
    if torch.distributed.get_rank() == 0:
        (damaged / "manifest.json").write_text("{")
    for resume in ("auto", str(damaged)):
        try:
            restore(RunFolder(folder / "tp2"), resume, run.llama, run.adamw, print)
        except RunFolderError as error:
            results["errors"].append(str(error))
    return results


def load_on_one_process(folder: Path) -> dict[str, dict[str, Tensor]]:
    return {
        "dp2 on one": loaded(ONE_PROCESS[0], folder / "dp2"),
        "dp2_tied on one_tied": loaded(ONE_PROCESS[1], folder / "dp2_tied"),
    }


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Return, per rank, the saved state of each mesh and the states restored from it."""
    folder = tmp_path_factory.mktemp("runs")
    [saved_by_one] = on_ranks(1, save_on_one_process, folder)
    by_rank = on_ranks(2, save_and_load_on_two_ranks, folder)
    [loaded_by_one] = on_ranks(1, load_on_one_process, folder)
    return [{**saved_by_one, **rank, **loaded_by_one} for rank in by_rank]


@pytest.mark.parametrize(
    "transfer",
    [
        "dp2 on tp2",
        "tp2 on dp2",
        "tp2 on tp2",
        "one on tp2",
        "one on dp2",
        "dp2 on one",
        "one_tied on dp2_tied",
        "dp2_tied on one_tied",
    ],
)
def test_parameters_moments_and_steps_are_identical_on_the_other_mesh(
    results: Any, transfer: str
) -> None:
    source, _, _ = transfer.partition(" on ")
    for rank in results:
        assert rank[transfer].keys() == rank[source].keys()
        for name, tensor in rank[source].items():
            assert torch.equal(rank[transfer][name], tensor), name
        moments = [tensor for name, tensor in rank[source].items() if name.endswith("exp_avg_sq")]
        assert moments and all(moment.any() for moment in moments)


def test_saving_a_step_again_does_not_modify_the_committed_checkpoint(results: Any) -> None:
    assert all(rank["unmodified"] for rank in results)


def test_every_rank_reports_that_no_checkpoint_is_valid(results: Any) -> None:
    for rank in results:
        assert len(rank["errors"]) == 2
        assert all("manifest.json" in message for message in rank["errors"])


def test_checkpoint_is_listed_only_if_the_committed_file_exists(
    results: Any, tmp_path: Path
) -> None:
    (tmp_path / "checkpoints" / "step-00000009").mkdir(parents=True)
    assert RunFolder(tmp_path).committed_steps() == []
    (tmp_path / "checkpoints" / "step-00000009" / COMMITTED).touch()
    assert RunFolder(tmp_path).committed_steps() == [9]
