"""A checkpoint of one mesh is, on any other, the same run bit for bit; all ranks agree on it."""

from pathlib import Path
from typing import Any, cast

import pytest
import torch
from distributed import on_ranks
from small_run import OPTIM, Case, batch, build, full_tensor, local_batches
from torch import Tensor

from checkpoint.position import Position
from checkpoint.restore import restore
from checkpoint.saving import save
from resilience.run_folder import COMMITTED, RunFolder, RunFolderError
from train import train_step

POSITION = Position(step=2, samples=24, tokens=384, data_hash="of the test", batches=2)
MESHES = {"dp2": Case(dp=2), "tp2": Case(tp=2), "dp2_tied": Case(dp=2, tied=True)}
ONE = Case(), Case(tied=True)


def state(run: Any) -> dict[str, Tensor]:
    """Every parameter, both Adam moments and the step count of each, as whole tensors."""
    found = {}
    for name, parameter in run.llama.named_parameters():
        found[name] = full_tensor(parameter)
        adam = run.adamw.state[parameter]
        found |= {f"{name} {key}": full_tensor(adam[key]) for key in ("exp_avg", "exp_avg_sq")}
        found[f"{name} step"] = adam["step"].clone()
    return found


def trained(case: Case) -> Any:
    """A run after two steps."""
    run = build(case)
    for step in range(2):
        train_step(cast(Any, run), local_batches(batch(step), run.data_rank, case.dp, 2), OPTIM.lr)
    return run


def saved(run: Any, folder: Path) -> dict[str, Tensor]:
    save(RunFolder(folder), run.llama, run.adamw, POSITION, {"some": "configuration"})
    return state(run)


def loaded(case: Case, folder: Path) -> dict[str, Tensor]:
    """The state of a fresh run on the mesh of `case` after loading what is in `folder`."""
    run = build(case)
    assert restore(RunFolder(folder), "auto", run.llama, run.adamw, print) == POSITION
    groups = run.adamw.param_groups
    assert [group["weight_decay"] for group in groups] == [OPTIM.weight_decay, 0.0]
    assert run.llama.config.tie_embeddings == (
        run.llama.output.weight is run.llama.tok_embeddings.weight
    )
    return state(run)


def on_one(folder: Path) -> dict[str, dict[str, Tensor]]:
    return {
        f"one{'_tied' * case.tied}": saved(trained(case), folder / f"one{'_tied' * case.tied}")
        for case in ONE
    }


def on_two(folder: Path) -> dict[str, Any]:
    """Saves on each mesh of two, loads on each of them what every mesh saved, one included."""
    found: dict[str, Any] = {
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
        found[f"{source} on {target}"] = loaded(MESHES[target], folder / source)
    # A second save of the step leaves the committed one as it is.
    run = build(MESHES["dp2"])
    committed = RunFolder(folder / "dp2").step_folder(2)
    before = {path.name: path.read_bytes() for path in committed.iterdir()}
    assert save(RunFolder(folder / "dp2"), run.llama, run.adamw, POSITION, {}) == committed
    found["untouched"] = before == {path.name: path.read_bytes() for path in committed.iterdir()}
    found["agreed"] = []
    damaged = RunFolder(folder / "tp2").step_folder(2)
    torch.distributed.barrier()
    if torch.distributed.get_rank() == 0:
        (damaged / "manifest.json").write_text("{")
    for resume in ("auto", str(damaged)):
        try:
            restore(RunFolder(folder / "tp2"), resume, run.llama, run.adamw, print)
        except RunFolderError as error:
            found["agreed"].append(str(error))
    return found


def back_on_one(folder: Path) -> dict[str, dict[str, Tensor]]:
    return {
        "dp2 on one": loaded(ONE[0], folder / "dp2"),
        "dp2_tied on one_tied": loaded(ONE[1], folder / "dp2_tied"),
    }


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """By rank: what was saved by mesh, and what each mesh made of it."""
    folder = tmp_path_factory.mktemp("runs")
    [one] = on_ranks(1, on_one, folder)
    two = on_ranks(2, on_two, folder)
    [back] = on_ranks(1, back_on_one, folder)
    return [{**one, **rank, **back} for rank in two]


@pytest.mark.parametrize(
    "way",
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
def test_parameters_moments_and_steps_are_the_same_on_the_other_mesh(found: Any, way: str) -> None:
    source, _, _ = way.partition(" on ")
    for rank in found:
        assert rank[way].keys() == rank[source].keys()
        for name, tensor in rank[source].items():
            assert torch.equal(rank[way][name], tensor), name
        moments = [tensor for name, tensor in rank[source].items() if name.endswith("exp_avg_sq")]
        assert moments and all(moment.any() for moment in moments)  # there was something to keep


def test_no_rank_writes_over_a_committed_checkpoint(found: Any) -> None:
    assert all(rank["untouched"] for rank in found)


def test_every_rank_learns_that_no_checkpoint_is_whole(found: Any) -> None:
    for rank in found:
        assert len(rank["agreed"]) == 2
        assert all("manifest.json" in message for message in rank["agreed"])


def test_committed_is_all_that_makes_a_checkpoint(found: Any, tmp_path: Path) -> None:
    (tmp_path / "checkpoints" / "step-00000009").mkdir(parents=True)
    assert RunFolder(tmp_path).committed_steps() == []
    (tmp_path / "checkpoints" / "step-00000009" / COMMITTED).touch()
    assert RunFolder(tmp_path).committed_steps() == [9]
