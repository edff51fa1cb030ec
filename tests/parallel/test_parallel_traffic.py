"""What a step sends, by formula, is what a traced step sends, and that what real processes send."""

from dataclasses import replace
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
from distributed import on_ranks
from small_run import BATCH, OPTIM, SEQ, Case, batch, build, model_config, share
from torch import nn
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel

import parallel.tensor_parallel
from model.config import ModelConfig
from parallel.config import ParallelConfig, PrecisionConfig
from parallel.mesh import MeshShape
from parallel.trace import Recorder, fake_processes, traced_step
from parallel.traffic import Collective, Step, step_traffic, totals
from train import train_step

BYTES = {"fp32": 4, "bf16": 2}
# Eight tp ranks divide it; its rows over tp are no multiple of most sizes of dp_shard below.
MODEL = ModelConfig("small", 96, 2, 16, 8, 88, 136)

# dp_shard × tp. On 64 the smaller matrices have fewer rows than there are ranks.
MESHES = [(1, 1), (2, 1), (64, 1), (1, 2), (1, 8), (2, 2), (7, 2), (3, 4), (64, 8)]
CHANGES: list[dict[str, Any]] = [
    {"sequence_parallel": False},
    {"loss_parallel": False},
    {"sequence_parallel": False, "loss_parallel": False},
    {"reshard_after_forward": True},
    {"reshard_after_forward": False},
    {"micro_batches": 3},
    {"micro_batches": 3, "reshard_after_forward": False},
    {"tie_embeddings": True},
    {"param": "fp32"},
    {"reduce": "bf16", "micro_batches": 3},
]
CASES: list[tuple[int, int, dict[str, Any]]] = [
    *((*mesh, {}) for mesh in MESHES),
    *((*mesh, change) for mesh in [(1, 2), (3, 1), (64, 8)] for change in CHANGES),
]


def both(
    dp_shard: int,
    tp: int,
    *,
    micro_batches: int = 1,
    tie_embeddings: bool = False,
    param: Any = "bf16",
    reduce: Any = "fp32",
    **parallel: Any,
) -> tuple[Any, Any]:
    """Count and payload by axis and kind: traced, and by formula."""
    model = replace(MODEL, tie_embeddings=tie_embeddings)
    mesh = MeshShape(1, dp_shard, 1, tp)
    config = ParallelConfig(dp_shard=dp_shard, tp=tp, **parallel)
    step = Step(micro_batches, 2, 16, BYTES[param], BYTES[reduce], norm_bytes=8)
    traced = traced_step(model, mesh, config, PrecisionConfig(param, reduce), step)
    return totals(traced), totals(step_traffic(model, mesh, config, step))


@pytest.mark.parametrize(("dp_shard", "tp", "change"), CASES, ids=str)
def test_formulas_give_exactly_what_a_traced_step_sends(
    dp_shard: int, tp: int, change: dict[str, Any]
) -> None:
    traced, by_formula = both(dp_shard, tp, **change)
    assert traced == by_formula
    assert bool(traced) == (dp_shard * tp > 1)


def test_a_plan_that_computes_the_same_and_sends_more_is_noticed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """w2 cut by rows instead of columns: its input and its output have to be gathered."""
    apply = parallel.tensor_parallel.parallelize_module

    def other_plan(module: nn.Module, mesh: Any, plan: dict[str, Any]) -> nn.Module:
        if "feed_forward.w2" in plan:
            style = ColwiseParallel(input_layouts=Shard(-1), output_layouts=Replicate())
            plan = plan | {"feed_forward.w2": style}
        return apply(module, mesh, plan)

    monkeypatch.setattr(parallel.tensor_parallel, "parallelize_module", other_plan)
    traced, by_formula = both(2, 2, sequence_parallel=False)
    assert ("tp", "all_gather") in traced.keys() - by_formula.keys()


REAL = Case(dp=2, tp=2, n_layers=2, param="bf16")


def real_step() -> list[Collective]:
    """What this rank sends in a step of the program, after a first one that set things up."""
    run = build(REAL)
    for number in range(2):
        with Recorder(MeshShape(1, REAL.dp, 1, REAL.tp)) as recorder:
            train_step(
                cast(Any, run),
                share(batch(number), run.data_rank, REAL.dp, REAL.n_micro),
                OPTIM.lr,
            )
    return recorder.collectives


def test_a_traced_step_sends_what_each_of_four_real_processes_sends() -> None:
    """One by one, in the same order."""
    step = Step(REAL.n_micro, BATCH // REAL.dp // REAL.n_micro, SEQ, 2, 4, norm_bytes=8)
    traced = traced_step(
        model_config(REAL.tied, REAL.n_layers),
        MeshShape(1, REAL.dp, 1, REAL.tp),
        ParallelConfig(dp_shard=REAL.dp, tp=REAL.tp),
        PrecisionConfig(param=REAL.param),
        step,
    )
    for sent in on_ranks(REAL.world, real_step):
        assert sent == traced


def test_a_collective_without_a_place_in_the_accounts_is_refused() -> None:
    with fake_processes(2), Recorder(MeshShape(1, 2, 1, 1)), pytest.raises(KeyError, match="broad"):
        dist.broadcast(torch.zeros(3), src=0)


def test_bytes_sent_are_those_of_a_ring() -> None:
    """400 bytes on four ranks: three rounds of a quarter; to reduce to all, one ring each way."""
    gathered, reduced = (Collective("tp", 4, kind, 1, 400) for kind in ("all_gather", "all_reduce"))
    assert (gathered.sent, reduced.sent) == (300, 600)
