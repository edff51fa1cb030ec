"""One run, any mesh: every combination of the axes trains like one process, and goes on from any.

Each mesh trains twenty steps of AdamW in float32 on packed documents, two micro-batches a step,
with other numbers of targets on every data rank, and saves in the middle. Then each loads what each
of the others saved, and goes on from the one before it in the list.
"""

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from distributed import on_ranks
from small_run import OPTIM, Case, batch, build, full_tensor, local_batches
from torch import Tensor
from torch._dynamo.utils import counters

from checkpoint.position import Position
from checkpoint.restore import load
from checkpoint.saving import save
from parallel.compilation import compiled_graphs
from parallel.parallelize import local_block
from resilience.run_folder import RunFolder
from train import train_step

STEPS, MIDDLE = 20, 10
# dp_replicate, dp_shard, cp, tp
SIZES = (
    *("1111", "2111", "1211", "1121", "1112"),
    *("2211", "1212", "1122", "1221", "2112", "2121"),
    *("2212", "1222", "2122"),
)
COMPILED = ("1122", "1212")


def case_of(sizes: str) -> Case:
    replicate, shard, cp, tp = map(int, sizes)
    return Case(dp_replicate=replicate, dp=shard, cp=cp, tp=tp, n_layers=2)


CASES = {sizes: case_of(sizes) for sizes in SIZES}


# ---------------------------------------------------------------- on the ranks


def train(run: Any, case: Case, steps: range) -> list[tuple[float, float]]:
    """The loss and the gradient norm of each step."""
    found = []
    for step in steps:
        batches = local_batches(batch(step), run.data_rank, case.mesh.dp, case.n_micro)
        tensors = train_step(cast(Any, run), batches, OPTIM.lr)
        loss, norm, *_ = tensors["vitals"].tolist()
        found.append((loss, norm))
    return found


def tensors_of(run: Any) -> dict[str, Any]:
    """Every parameter and both Adam moments."""
    found = {}
    for name, parameter in run.llama.named_parameters():
        found[name] = parameter
        for moment in ("exp_avg", "exp_avg_sq"):
            found[f"{name} {moment}"] = run.adamw.state[parameter][moment]
    return found


def train_and_save(folder: Path, chosen: dict[str, Case]) -> dict[str, Any]:
    found = {}
    for name, case in chosen.items():
        run = build(case)
        first = train(run, case, range(MIDDLE))
        position = Position(MIDDLE, 0, 0, "of the test")
        save(RunFolder(folder / name), run.llama, run.adamw, position, {})
        state = {key: full_tensor(tensor) for key, tensor in tensors_of(run).items()}
        if run.fabric.is_global_zero:
            torch.save(state, folder / name / "state.pt")
        found[name] = first + train(run, case, range(MIDDLE, STEPS))
    return found


def load_and_go_on(folder: Path, chosen: dict[str, Case]) -> dict[str, Any]:
    """What differs after each load, and the steps after the last load, by mesh."""
    found = {}
    for name, case in chosen.items():
        run = build(case)
        train(run, case, range(1))  # so that there are moments
        before = SIZES[SIZES.index(name) - 1]
        differing = []
        for source in [*(other for other in SIZES if other != before), before]:
            for tensor in tensors_of(run).values():
                local_block(tensor.detach())[0].fill_(torch.nan)
            load(RunFolder(folder / source).step_folder(MIDDLE), run.llama, run.adamw)
            expected = torch.load(folder / source / "state.pt")
            differing += [
                f"{key} from {source}"
                for key, tensor in tensors_of(run).items()
                if not holds_its_part(tensor, expected[key])
            ]
        found[name] = differing, train(run, case, range(MIDDLE, STEPS))
    return found


def holds_its_part(tensor: Any, expected: Tensor) -> bool:
    """Whether a tensor's local shard is, bit for bit, that part of the whole."""
    local, offsets = local_block(tensor.detach())
    for dim, (offset, size) in enumerate(zip(offsets, local.shape, strict=True)):
        expected = expected.narrow(dim, offset, size)
    return torch.equal(local, expected)


def train_compiled(folder: Path, chosen: dict[str, Case]) -> dict[str, Any]:
    """Compiled to the middle, then eagerly from that checkpoint, then compiled from the eager one.

    Returns the steps of each part, how many graphs were compiled in the first step and in all,
    the graph breaks and the names of the parameters.
    """
    found = {}
    for name, case in chosen.items():
        counters.clear()
        run = build(case)
        steps = train(run, case, range(1))
        first_graphs = compiled_graphs()
        steps += train(run, case, range(1, MIDDLE))
        saved = RunFolder(folder / f"compiled {name}")
        save(saved, run.llama, run.adamw, Position(MIDDLE, 0, 0, "of the test"), {})
        load(RunFolder(folder / name).step_folder(MIDDLE), run.llama, run.adamw)
        rest = train(run, case, range(MIDDLE, STEPS))
        graphs = first_graphs, compiled_graphs()
        eager = build(CASES[name])
        load(saved.step_folder(MIDDLE), eager.llama, eager.adamw)
        rest_eagerly = train(eager, case, range(MIDDLE, STEPS))
        names = [[key for key, _ in each.llama.named_parameters()] for each in (run, eager)]
        found[name] = steps, rest, rest_eagerly, graphs, dict(counters["graph_break"]), names
    return found


# ---------------------------------------------------------------- the claims


def by_world(cases: dict[str, Case]) -> list[tuple[int, dict[str, Case]]]:
    worlds = sorted({case.world for case in cases.values()})
    return [(w, {name: c for name, c in cases.items() if c.world == w}) for w in worlds]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Where the checkpoints are, and the steps of each mesh on rank 0."""
    folder = tmp_path_factory.mktemp("runs")
    found: dict[str, Any] = {}
    for world, chosen in by_world(CASES):
        found |= on_ranks(world, train_and_save, folder, chosen)[0]
    return folder, found


@pytest.fixture(scope="module")
def resumed(trained: tuple[Path, dict[str, Any]]) -> dict[str, list[Any]]:
    """What each rank found after loading, by mesh."""
    found: dict[str, list[Any]] = {}
    for world, chosen in by_world(CASES):
        ranks = on_ranks(world, load_and_go_on, trained[0], chosen)
        found |= {name: [rank[name] for rank in ranks] for name in chosen}
    return found


@pytest.fixture(scope="module")
def compiled(trained: tuple[Path, dict[str, Any]]) -> dict[str, Any]:
    cases = {
        name: replace(CASES[name], compile=True, activation_checkpoint="selective")
        for name in COMPILED
    }
    found: dict[str, Any] = {}
    for world, chosen in by_world(cases):
        found |= on_ranks(world, train_compiled, trained[0], chosen)[0]
    return found


def assert_same_steps(own: list[tuple[float, float]], one: list[tuple[float, float]]) -> None:
    """Sums in another order round differently, by a few float32 units of 1e-7 in each step."""
    for (loss, norm), (expected_loss, expected_norm) in zip(own, one, strict=True):
        assert loss == pytest.approx(expected_loss, rel=1e-6)
        assert norm == pytest.approx(expected_norm, rel=1e-5)


@pytest.mark.parametrize("sizes", SIZES)
def test_mesh_trains_like_one_process(trained: Any, sizes: str) -> None:
    _, steps = trained
    assert_same_steps(steps[sizes], steps["1111"])


def test_the_steps_are_no_standstill(trained: Any) -> None:
    """Losses fall by much more than the tolerance, so a lost update would be seen."""
    losses = [loss for loss, _ in trained[1]["1111"]]
    assert all(abs(a - b) > 1e-4 for a, b in itertools.pairwise(losses))


@pytest.mark.parametrize("sizes", SIZES)
def test_mesh_holds_what_any_other_saved_and_goes_on_alike(
    trained: Any, resumed: Any, sizes: str
) -> None:
    for differing, steps in resumed[sizes]:
        assert differing == []
        assert_same_steps(steps, trained[1]["1111"][MIDDLE:])


@pytest.mark.parametrize("sizes", COMPILED)
def test_compiled_blocks_with_selective_checkpointing_train_like_one_process(
    trained: Any, compiled: Any, sizes: str
) -> None:
    steps, rest, rest_eagerly, (first_graphs, graphs), breaks, names = compiled[sizes]
    one = trained[1]["1111"]
    assert_same_steps(steps + rest, one)
    assert_same_steps(rest_eagerly, one[MIDDLE:])
    assert 0 < first_graphs == graphs  # none after the first step
    assert breaks == {} and names[0] == names[1]
