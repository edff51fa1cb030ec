"""Every mesh trains like one process and resumes from a checkpoint of any other mesh.

Each mesh trains ten steps of AdamW in float32 on packed documents, with two micro-batches per
step and a different number of targets on each data rank, and saves a checkpoint after five steps.
How a checkpoint is cut into chunks depends on the number of shards per axis only, which one test
asserts. One mesh for each way of cutting loads the checkpoints of all others; in addition, each
mesh loads the checkpoint of its predecessor in the list and resumes from it.
"""

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from distributed import on_ranks
from save_checkpoint import save
from small_run import OPTIM, Case, batch, build, equals_local_shard, local_batches, of_all_stages
from torch._dynamo.utils import counters
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from checkpoint.position import Position
from checkpoint.restore import load
from parallel.compilation import compiled_graphs
from parallel.parallelize import local_block
from resilience.run_folder import RunFolder
from train import train_step

STEPS, MIDDLE = 10, 5
# dp_replicate, dp_shard, cp, tp, and pp if it is not 1. All pipelines: `bench.pipeline_grid`.
SIZES = (
    *("1111", "2111", "1211", "1121", "11112", "1112"),
    *("2211", "1212", "1122", "12112", "1221", "2112", "2121"),
    *("2212", "1222", "2122"),
)
COMPILED = ("1122", "1212")


def case_of(sizes: str) -> Case:
    replicate, shard, cp, tp, pp = map(int, sizes.ljust(5, "1"))
    return Case(dp_replicate=replicate, dp=shard, cp=cp, tp=tp, pp=pp, n_layers=2)


CASES = {sizes: case_of(sizes) for sizes in SIZES}


def n_shards(sizes: str) -> tuple[int, int]:
    """Return the numbers of FSDP and tensor-parallel shards of a mesh; pipelines cut no tensor."""
    case = CASES[sizes]
    return case.dp * case.cp, case.tp


# The first mesh for each pair of shard counts.
REPRESENTATIVES = tuple({n_shards(sizes): sizes for sizes in reversed(SIZES)}.values())


def sources_of(sizes: str) -> list[str]:
    """Return the meshes whose checkpoints a mesh loads, its predecessor last."""
    before = SIZES[SIZES.index(sizes) - 1]
    others = REPRESENTATIVES if sizes in REPRESENTATIVES else ()
    return [*(other for other in others if other != before), before]


# ---------------------------------------------------------------- on the ranks


def train(run: Any, case: Case, steps: range) -> list[tuple[float, float]]:
    """Return the loss and the gradient norm of each step."""
    stats = []
    for step in steps:
        batches = local_batches(batch(step), run.data_rank, case.mesh.dp, case.n_micro)
        tensors = train_step(cast(Any, run), batches, OPTIM.lr)
        loss, norm, *_ = tensors["scalars"].tolist()
        stats.append((loss, norm))
    return stats


def tensors_of(run: Any) -> dict[str, Any]:
    """Return all parameters and Adam moments."""
    results = {}
    for name, parameter in run.llama.named_parameters():
        results[name] = parameter
        for moment in ("exp_avg", "exp_avg_sq"):
            results[f"{name} {moment}"] = run.adamw.state[parameter][moment]
    return results


def train_and_save(folder: Path, cases: dict[str, Case]) -> dict[str, Any]:
    results = {}
    for name, case in cases.items():
        run = build(case)
        first = train(run, case, range(MIDDLE))
        position = Position(MIDDLE, 0, 0, "of the test")
        save(RunFolder(folder / name), run.llama, run.adamw, position, {})
        state = of_all_stages(tensors_of(run).items())
        if run.fabric.is_global_zero:
            torch.save(state, folder / name / "state.pt")
        results[name] = first + train(run, case, range(MIDDLE, STEPS))
    return results


def load_and_resume(folder: Path, cases: dict[str, Case]) -> dict[str, Any]:
    """Return the tensors that differ after each load and the steps after the last load, by mesh."""
    results = {}
    for name, case in cases.items():
        run = build(case)
        train(run, case, range(1))  # creates the Adam moments
        differing = []
        for source in sources_of(name):
            for tensor in tensors_of(run).values():
                local_block(tensor.detach())[0].fill_(torch.nan)
            load(RunFolder(folder / source).step_folder(MIDDLE), run.llama, run.adamw)
            expected = torch.load(folder / source / "state.pt")
            differing += [
                f"{key} from {source}"
                for key, tensor in tensors_of(run).items()
                if not equals_local_shard(tensor, expected[key])
            ]
        results[name] = differing, train(run, case, range(MIDDLE, STEPS))
    return results


def train_compiled(folder: Path, cases: dict[str, Case]) -> dict[str, Any]:
    """Train the first half compiled, then resume compiled from the eager checkpoint and vice versa.

    Returns, by mesh: the steps of the three parts, the number of compiled graphs after the first
    step and in total, the graph breaks and the parameter names.
    """
    results = {}
    for name, case in cases.items():
        counters.clear()
        run = build(case)
        steps = train(run, case, range(1))
        first_graphs = compiled_graphs()
        steps += train(run, case, range(1, MIDDLE))
        run_folder = RunFolder(folder / f"compiled {name}")
        save(run_folder, run.llama, run.adamw, Position(MIDDLE, 0, 0, "of the test"), {})
        load(RunFolder(folder / name).step_folder(MIDDLE), run.llama, run.adamw)
        resumed_compiled = train(run, case, range(MIDDLE, STEPS))
        graphs = first_graphs, compiled_graphs()
        eager = build(CASES[name])
        load(run_folder.step_folder(MIDDLE), eager.llama, eager.adamw)
        resumed_eager = train(eager, case, range(MIDDLE, STEPS))
        names = [[key for key, _ in each.llama.named_parameters()] for each in (run, eager)]
        breaks = dict(counters["graph_break"])
        results[name] = steps, resumed_compiled, resumed_eager, graphs, breaks, names
    return results


# ---------------------------------------------------------------- tests


def by_world(cases: dict[str, Case]) -> list[tuple[int, dict[str, Case]]]:
    worlds = sorted({case.world for case in cases.values()})
    return [(w, {name: c for name, c in cases.items() if c.world == w}) for w in worlds]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Return the folder of the checkpoints and the steps of each mesh on rank 0."""
    folder = tmp_path_factory.mktemp("runs")
    results: dict[str, Any] = {}
    for world, cases_of_world in by_world(CASES):
        results |= on_ranks(world, train_and_save, folder, cases_of_world)[0]
    return folder, results


@pytest.fixture(scope="module")
def resumed(trained: tuple[Path, dict[str, Any]]) -> dict[str, list[Any]]:
    """Return the result of `load_and_resume` on each rank, by mesh."""
    results: dict[str, list[Any]] = {}
    for world, cases_of_world in by_world(CASES):
        ranks = on_ranks(world, load_and_resume, trained[0], cases_of_world)
        results |= {name: [rank[name] for rank in ranks] for name in cases_of_world}
    return results


@pytest.fixture(scope="module")
def compiled(trained: tuple[Path, dict[str, Any]]) -> dict[str, Any]:
    cases = {
        name: replace(CASES[name], compile=True, activation_checkpoint="selective")
        for name in COMPILED
    }
    results: dict[str, Any] = {}
    for world, cases_of_world in by_world(cases):
        results |= on_ranks(world, train_compiled, trained[0], cases_of_world)[0]
    return results


def assert_same_steps(
    actual: list[tuple[float, float]], expected: list[tuple[float, float]]
) -> None:
    """Compare losses and norms.

    Sums in a different order round differently, by a few float32 ulps of 1e-7 in each step.
    """
    for (loss, norm), (expected_loss, expected_norm) in zip(actual, expected, strict=True):
        assert loss == pytest.approx(expected_loss, rel=1e-6)
        assert norm == pytest.approx(expected_norm, rel=1e-5)


@pytest.mark.parametrize("sizes", SIZES)
def test_mesh_trains_like_one_process(trained: Any, sizes: str) -> None:
    _, steps = trained
    assert_same_steps(steps[sizes], steps["1111"])


def test_losses_change_at_every_step_by_more_than_the_tolerance(trained: Any) -> None:
    """A lost update would therefore be detected."""
    losses = [loss for loss, _ in trained[1]["1111"]]
    assert all(abs(a - b) > 1e-4 for a, b in itertools.pairwise(losses))


@pytest.mark.parametrize("sizes", SIZES)
def test_chunks_of_a_checkpoint_depend_on_the_shard_counts_only(trained: Any, sizes: str) -> None:
    folder, _ = trained
    (representative,) = (each for each in REPRESENTATIVES if n_shards(each) == n_shards(sizes))
    assert chunks_of(folder, sizes) == chunks_of(folder, representative)
    assert len(REPRESENTATIVES) == 6


def chunks_of(folder: Path, sizes: str) -> dict[str, list[tuple[Any, Any]]]:
    """Return the offsets and sizes of the chunks of each tensor in a mesh's checkpoint."""
    checkpoint = RunFolder(folder / sizes).step_folder(MIDDLE)
    metadata = FileSystemReader(checkpoint).read_metadata().state_dict_metadata
    return {
        name: sorted((tuple(chunk.offsets), tuple(chunk.sizes)) for chunk in entry.chunks)
        for name, entry in metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }


@pytest.mark.parametrize("sizes", SIZES)
def test_mesh_loads_checkpoints_bit_for_bit_and_resumes(
    trained: Any, resumed: Any, sizes: str
) -> None:
    for differing, steps in resumed[sizes]:
        assert differing == []
        assert_same_steps(steps, trained[1]["1111"][MIDDLE:])


@pytest.mark.parametrize("sizes", COMPILED)
def test_compiled_blocks_with_selective_checkpointing_train_like_one_process(
    trained: Any, compiled: Any, sizes: str
) -> None:
    steps, resumed_compiled, resumed_eager, (first_graphs, graphs), breaks, names = compiled[sizes]
    expected = trained[1]["1111"]
    assert_same_steps(steps + resumed_compiled, expected)
    assert_same_steps(resumed_eager, expected[MIDDLE:])
    assert 0 < first_graphs == graphs  # no compilation after the first step
    assert breaks == {} and names[0] == names[1]
