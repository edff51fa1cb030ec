"""Any mesh loads the checkpoint of any pipeline, and the reverse, bit for bit.

Checkpoints keep global names, and hold a tied weight once, so that neither the number of stages nor
their order changes what a checkpoint contains.
"""

import dataclasses
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
from distributed import on_ranks
from save_checkpoint import save
from small_run import (
    OPTIM,
    Case,
    batch,
    build,
    equals_local_shard,
    full_tensor,
    local_batches,
    model_config,
    of_all_stages,
)
from torch import Tensor

from checkpoint.position import Position
from checkpoint.restore import load
from formats.conversion import convert
from formats.detection import open_weights
from model.llama import Llama
from parallel.parallelize import local_block
from resilience.run_folder import RunFolder
from train import train_step

N_LAYERS = 5  # at most six stages, the last one the head alone
PIPELINES = {
    "one": Case(),
    "dp2": Case(dp=2),
    "pp2": Case(pp=2),
    "pp2x2": Case(pp=2, pp_parts=2),
}
MORE = {
    "tp2": Case(tp=2),
    "cp2": Case(cp=2),
    "pp3": Case(pp=3),
    "pp3x2": Case(pp=3, pp_parts=2, n_micro=3),
    "pp4": Case(pp=4),
    "pp2_dp2": Case(pp=2, dp=2),
    "pp2_dpr2": Case(pp=2, dp_replicate=2),
    "pp2_cp2": Case(pp=2, cp=2),
    "pp2x2_tp2": Case(pp=2, tp=2, pp_parts=2),
}
TIES = {"untied": False, "tied": True}
STEPS = 20
LR = (
    2e-3  # with 1e-2 the norm changes by a factor of two per step, and rounding errors grow with it
)
# The meshes of one run, which resumes four times.
JOURNEY = ("pp2x2", "dp2", "pp3", "one", "pp2")


def case_of(name: str, tie: str, param: str = "fp32") -> Case:
    case = (PIPELINES | MORE)[name]
    return dataclasses.replace(case, tied=TIES[tie], n_layers=N_LAYERS, param=param)


# ---------------------------------------------------------------- on the ranks


def train(run: Any, case: Case, steps: range) -> list[tuple[float, float]]:
    """Return the loss and the gradient norm of each step."""
    stats = []
    for step in steps:
        batches = local_batches(batch(step), run.data_rank, case.mesh.dp, case.n_micro)
        loss, norm, *_ = train_step(cast(Any, run), batches, LR)["scalars"].tolist()
        stats.append((loss, norm))
    return stats


def tensors_of(run: Any) -> dict[str, Any]:
    """Return all parameters and all optimizer state of this rank."""
    results = {}
    for name, parameter in run.llama.named_parameters():
        results[name] = parameter
        for key, value in run.adamw.state[parameter].items():
            results[f"{name} {key}"] = value
    return results


def train_and_save(folder: Path, names: list[str], tie: str) -> None:
    """Train two steps on each mesh, save, and write all tensors to `state.pt`."""
    for name in names:
        case = case_of(name, tie)
        run = build(case)
        train(run, case, range(2))
        config = {"model": dataclasses.asdict(run.llama.config), "tokenizer": None}
        save(RunFolder(folder / name), run.llama, run.adamw, Position(2, 0, 0, ""), config)
        state = of_all_stages((key, full_tensor(value)) for key, value in tensors_of(run).items())
        if dist.get_rank() == 0:
            torch.save(state, folder / name / "state.pt")


def load_all(folder: Path, sources: list[str], names: list[str], tie: str) -> list[str]:
    """Load each checkpoint on each mesh; return the tensors of this rank that differ."""
    differing = []
    for name in names:
        case = case_of(name, tie)
        run = build(case)
        train(run, case, range(1))  # creates the Adam moments
        for source in sources:
            for tensor in tensors_of(run).values():
                local_of(tensor).fill_(torch.nan)
            load(RunFolder(folder / source).step_folder(2), run.llama, run.adamw)
            expected = torch.load(folder / source / "state.pt")
            differing += [
                f"{key} of {source} on {name}"
                for key, tensor in tensors_of(run).items()
                if not equals_local_shard(tensor, expected[key])
            ]
            group = run.adamw.state_dict()["param_groups"][0]
            differing += [name] * (group["weight_decay"] != OPTIM.weight_decay)
    return differing


def local_of(tensor: Any) -> Tensor:
    return local_block(tensor.detach())[0]


def save_weights_of(source: Path, folder: Path, name: str, tie: str) -> None:
    """Load a checkpoint and save it again from another mesh."""
    run = build(case_of(name, tie))
    load(RunFolder(source).step_folder(2), run.llama, run.adamw)
    config = {"model": dataclasses.asdict(run.llama.config), "tokenizer": None}
    save(RunFolder(folder), run.llama, run.adamw, Position(2, 0, 0, ""), config)


def continue_on(
    folder: Path, name: str, steps: range, param: str
) -> tuple[list[tuple[float, float]], dict[str, Tensor]]:
    """Resume from the checkpoint before `steps`, if any, train these steps and save."""
    case = case_of(name, "tied", param)
    run, runs = build(case), RunFolder(folder)
    if steps.start:
        load(runs.step_folder(steps.start), run.llama, run.adamw)
    stats = train(run, case, steps)
    save(runs, run.llama, run.adamw, Position(steps.stop, 0, 0, ""), {})
    return stats, of_all_stages(run.llama.named_parameters())


# ---------------------------------------------------------------- tests


def by_world(names: list[str]) -> dict[int, list[str]]:
    found: dict[int, list[str]] = {}
    for name in names:
        found.setdefault((PIPELINES | MORE)[name].world, []).append(name)
    return found


@pytest.mark.parametrize("tie", TIES)
@pytest.mark.parametrize(
    "names",
    [[*PIPELINES], pytest.param([*PIPELINES, *MORE], marks=pytest.mark.slow)],
    ids=["small", "all"],
)
def test_every_mesh_loads_the_checkpoint_of_every_other_bit_for_bit(
    tmp_path: Path, names: list[str], tie: str
) -> None:
    for world, of_world in by_world(names).items():
        on_ranks(world, train_and_save, tmp_path, of_world, tie)
    states = {name: torch.load(tmp_path / name / "state.pt") for name in names}
    moments = [value for key, value in states["one"].items() if key.endswith("exp_avg_sq")]
    assert len(moments) == len(list(model_parameters(tie))) and all(m.any() for m in moments)
    for state in states.values():
        assert state.keys() == states["one"].keys()
    for world, of_world in by_world(names).items():
        assert on_ranks(world, load_all, tmp_path, names, of_world, tie) == [[]] * world


def model_parameters(tie: str) -> list[str]:
    with torch.device("meta"):
        llama = Llama(model_config(TIES[tie], N_LAYERS))
    return [name for name, _ in llama.named_parameters()]


@pytest.mark.parametrize("tie", TIES)
def test_checkpoints_of_a_pipeline_and_of_one_process_convert_to_the_same_bytes(
    tmp_path: Path, tie: str
) -> None:
    on_ranks(1, train_and_save, tmp_path, ["one"], tie)
    on_ranks(2, save_weights_of, tmp_path / "one", tmp_path / "pp2x2", "pp2x2", tie)
    contents: list[dict[str, bytes]] = []
    for name in ("one", "pp2x2"):
        weights, target = open_weights(RunFolder(tmp_path / name).step_folder(2)), tmp_path / "hf"
        assert weights.model.tie_embeddings == TIES[tie] and not weights.warnings
        convert(weights, None, target, "hf", overwrite=bool(contents))
        contents.append({path.name: path.read_bytes() for path in target.iterdir()})
    assert contents[0] == contents[1]
    assert any(name.endswith(".safetensors") for name in contents[0])


@pytest.mark.parametrize("param", ["fp32", pytest.param("bf16", marks=pytest.mark.slow)])
def test_run_that_changes_its_mesh_four_times_matches_one_process(
    tmp_path: Path, param: str
) -> None:
    """With and without a pipeline, tied, 20 steps of packed documents and two micro-batches.

    Sums in a different order round differently: a few float32 ulps of 1e-7 in each step, or in bf16
    of the activations.
    """
    # Norms in bf16 differ by up to 8e-4, also between one process and dp_shard=2.
    loss_tolerance, norm_tolerance = {"fp32": (1e-6, 3e-6), "bf16": (1e-4, 3e-3)}[param]
    [(expected, _)] = on_ranks(1, continue_on, tmp_path / "one", "one", range(STEPS), param)
    found: list[tuple[float, float]] = []
    for name in JOURNEY:
        steps = range(len(found), len(found) + STEPS // len(JOURNEY))
        world = case_of(name, "tied").world
        ranks = on_ranks(world, continue_on, tmp_path / "run", name, steps, param)
        assert all(stats == ranks[0][0] for stats, _ in ranks)
        found += ranks[0][0]
    for (loss, norm), (expected_loss, expected_norm) in zip(found, expected, strict=True):
        assert loss == pytest.approx(expected_loss, rel=loss_tolerance)
        assert norm == pytest.approx(expected_norm, rel=norm_tolerance)
    assert abs(expected[0][0] - expected[-1][0]) > 1e-2
