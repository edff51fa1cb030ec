"""Communication of a step: closed forms match a traced step, which matches real processes."""

from dataclasses import replace
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
from distributed import on_ranks
from recorded_traffic import Recorder, traced_step
from small_run import BATCH, OPTIM, SEQ, Case, batch, build, local_batches, model_config
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel

import parallel.tensor_parallel
from model.config import ModelConfig
from model.llama import Llama
from model.loss import CHUNK
from parallel.config import ParallelConfig, PrecisionConfig
from parallel.mesh import AXES, MeshShape
from parallel.parallelize import parallelize
from parallel.traffic import Collective, Step, step_traffic, totals
from planning.fake_model import fake_processes
from train import train_step

BYTES = {"fp32": 4, "bf16": 2}
# tp=8 divides its dims; the rows per tp rank are not divisible by most dp_shard, and fewer than 64.
MODEL = ModelConfig("small", 96, 2, 16, 8, 88, 136)

# dp_replicate × dp_shard × cp × tp
MESHES = [
    MeshShape(*sizes)
    for sizes in [
        (1, 1, 1, 1),
        (1, 2, 1, 1),
        (1, 64, 1, 1),
        (1, 1, 1, 2),
        (1, 1, 1, 8),
        (1, 7, 1, 2),
        (1, 3, 1, 4),
        (1, 64, 1, 8),
        (2, 1, 1, 1),
        (2, 3, 1, 1),
        (8, 8, 1, 8),
        (1, 1, 2, 1),
        (1, 3, 2, 1),
        (2, 1, 4, 1),
        (1, 1, 2, 2),
        (4, 4, 4, 8),
    ]
]
CHANGES: list[dict[str, Any]] = [
    {"sequence_parallel": False},
    {"loss_parallel": False},
    {"sequence_parallel": False, "loss_parallel": False},
    {"reshard_after_forward": True},
    {"reshard_after_forward": False},
    {"activation_checkpoint": "full"},
    {"activation_checkpoint": "full", "sequence_parallel": False},
    {"activation_checkpoint": "selective"},
    {"activation_checkpoint": "selective", "sequence_parallel": False, "micro_batches": 2},
    {"micro_batches": 3},
    {"micro_batches": 3, "reshard_after_forward": False},
    {"micro_batches": 3, "reduce_gradients": "micro_batch"},
    {"micro_batches": 3, "reduce_gradients": "micro_batch", "param": "fp32"},
    {"seq_len": 4608},  # the output projection takes several chunks; the last one is shorter
    {"seq_len": 4608, "loss_parallel": False},
    {"tie_embeddings": True},
    {"param": "fp32"},
    {"reduce": "bf16", "micro_batches": 3},
]
# fp8 needs multiples of 16. Six shards divide 384 evenly, but not 128 and 64 (gathered in bf16).
FP8_MODEL = ModelConfig("fp8", 128, 2, 8, 4, 384, 136)
FP8_MESHES = [MeshShape(*s) for s in [(1, 2, 1, 1), (2, 3, 2, 1), (2, 2, 2, 2), (2, 1, 1, 1)]]
CASES: list[tuple[MeshShape, dict[str, Any]]] = [
    *((mesh, {}) for mesh in MESHES),
    *((MeshShape(1, 64, 1, 8), change) for change in CHANGES),
    *((MeshShape(2, 2, 2, 2), change) for change in CHANGES),
    (MeshShape(1, 2, 16, 8), {"seq_len": 131_072, "activation_checkpoint": "full"}),
]

PIPELINE_OPTIONS: list[dict[str, Any]] = [
    {"reshard_after_forward": True},
    {"reshard_after_forward": False},
    {"reduce_gradients": "micro_batch"},
    {"reduce_gradients": "micro_batch", "reshard_after_forward": True, "pp_parts": 2},
    {"activation_checkpoint": "full"},
    {"activation_checkpoint": "selective", "pp_parts": 2},
    {"sequence_parallel": False},
    {"loss_parallel": False, "tie_embeddings": True},
    {"param": "fp32"},
    {"seq_len": 4608},
]
ALL_AXES = MeshShape(2, 3, 2, 2, pp=2)
PIPELINES: list[tuple[MeshShape, dict[str, Any]]] = [
    (MeshShape(1, 1, 1, 1, pp=3), {"n_layers": 2, "micro_batches": 1}),
    (MeshShape(1, 1, 1, 1, pp=4), {"n_layers": 4, "micro_batches": 3, "tie_embeddings": True}),
    (MeshShape(1, 1, 1, 1, pp=3), {"n_layers": 6, "micro_batches": 3, "pp_parts": 2}),
    (MeshShape(1, 2, 1, 1, pp=3), {"n_layers": 6, "micro_batches": 3, **PIPELINE_OPTIONS[0]}),
    (ALL_AXES, {"n_layers": 3, "micro_batches": 2, "tie_embeddings": True}),
    *((ALL_AXES, {"n_layers": 4, "micro_batches": 2} | PIPELINE_OPTIONS[n]) for n in (2, 3, 5)),
]
MORE_PIPELINES: list[tuple[MeshShape, dict[str, Any]]] = [
    *(
        (MeshShape(1, 1, 1, 1, pp), {"n_layers": 9, "micro_batches": 12, **change})
        for pp in (2, 3, 4)
        for change in ({}, {"tie_embeddings": True}, {"tie_embeddings": True, "pp_parts": 2})
    ),
    *(
        (mesh, {"n_layers": 6, "micro_batches": 2 * mesh.pp, **change})
        for mesh in [
            *(
                MeshShape(*s, pp=2)
                for s in [(2, 1, 1, 1), (1, 3, 1, 1), (1, 1, 2, 1), (1, 1, 1, 2)]
            ),
            *(ALL_AXES, MeshShape(2, 3, 2, 2, pp=3)),
        ]
        for change in (*PIPELINE_OPTIONS, {"pp_parts": 2, "tie_embeddings": True})
    ),
    (MeshShape(1, 8, 1, 8, pp=16), {"n_layers": 30, "micro_batches": 20, "reduce": "bf16"}),
]


def stages_of(pipelines: list[tuple[MeshShape, dict[str, Any]]], *marks: Any) -> list[Any]:
    return [
        pytest.param(mesh, change, stage, marks=marks)
        for mesh, change in pipelines
        for stage in range(mesh.pp)
    ]


def traced_and_closed_form(
    mesh: MeshShape,
    *,
    model: ModelConfig = MODEL,
    fp8: Any = None,
    micro_batches: int = 1,
    seq_len: int = 128,
    tie_embeddings: bool = False,
    param: Any = "bf16",
    reduce: Any = "fp32",
    n_layers: int = 2,
    stage: int = 0,
    **parallel: Any,
) -> tuple[Any, Any]:
    """Return count and payload by axis and kind, from a traced step and from the closed forms."""
    model = replace(model, tie_embeddings=tie_embeddings, n_layers=n_layers)
    config = ParallelConfig(**vars(mesh), **parallel)
    step = Step(micro_batches, 2, seq_len, BYTES[param], BYTES[reduce], CHUNK, norm_bytes=8)
    step = replace(step, fp8_gather=fp8 == "tensorwise" and mesh.tp == 1)
    traced = traced_step(model, mesh, config, PrecisionConfig(param, reduce, fp8=fp8), step, stage)
    return totals(traced), totals(step_traffic(model, mesh, config, step, stage))


@pytest.mark.parametrize(("mesh", "change"), CASES, ids=str)
def test_closed_forms_equal_the_traffic_of_a_traced_step(
    mesh: MeshShape, change: dict[str, Any]
) -> None:
    traced, closed_form = traced_and_closed_form(mesh, **change)
    assert traced == closed_form
    assert bool(traced) == (mesh.world_size > 1)


@pytest.mark.parametrize(
    ("mesh", "change", "stage"),
    [*stages_of(PIPELINES), *stages_of(MORE_PIPELINES, pytest.mark.slow)],
    ids=str,
)
def test_closed_forms_equal_the_traffic_of_every_pipeline_stage(
    mesh: MeshShape, change: dict[str, Any], stage: int
) -> None:
    traced, closed_form = traced_and_closed_form(mesh, stage=stage, **change)
    assert traced == closed_form
    assert ("pp", "send") in traced


@pytest.mark.parametrize("mesh", FP8_MESHES, ids=str)
def test_closed_forms_equal_the_traffic_of_weights_gathered_in_fp8(mesh: MeshShape) -> None:
    """The closed forms exclude all-reduces of scales."""
    change: dict[str, Any] = {"model": FP8_MODEL, "micro_batches": 2}
    results = [
        *traced_and_closed_form(mesh, fp8="tensorwise", **change),
        traced_and_closed_form(mesh, **change)[1],
    ]
    traced, closed_form, wide = (
        {key: value for key, value in result.items() if key[1] != "all_reduce"}
        for result in results
    )
    assert traced == closed_form
    assert (closed_form == wide) == (mesh.dp_shard * mesh.cp == 1 or mesh.tp > 1)


def test_tracing_detects_a_plan_with_equal_results_and_more_communication(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """w2 is sharded by rows instead of columns, so its input and output must be gathered."""
    apply = parallel.tensor_parallel.parallelize_module

    def other_plan(module: nn.Module, mesh: Any, plan: dict[str, Any]) -> nn.Module:
        assert "layers.*.feed_forward.w2" in plan
        style = ColwiseParallel(input_layouts=Shard(-1), output_layouts=Replicate())
        return apply(module, mesh, plan | {"layers.*.feed_forward.w2": style})

    monkeypatch.setattr(parallel.tensor_parallel, "parallelize_module", other_plan)
    traced, closed_form = traced_and_closed_form(MeshShape(1, 2, 1, 2), sequence_parallel=False)
    assert ("tp", "all_gather") in traced.keys() - closed_form.keys()


# Together these cases use every kind of collective.
REAL = [
    Case(dp=2, tp=2, n_layers=2, param="bf16", activation_checkpoint="full"),
    Case(dp_replicate=2, cp=2, n_layers=2, tied=True, activation_checkpoint="selective"),
    Case(cp=2, tp=2, n_layers=2, n_micro=1, sequence_parallel=False, loss_parallel=False),
    Case(pp=4, tied=True, n_layers=3, n_micro=6),
    Case(pp=2, tp=2, n_layers=2, n_micro=2, param="bf16", activation_checkpoint="full"),
    Case(pp=2, dp=2, tied=True, n_layers=4, n_micro=2, pp_parts=2, reshard_after_forward=True),
]


def real_steps() -> list[list[Collective]]:
    """Return the collectives of this rank in a step of train.py, by case."""
    collectives = []
    for case in REAL:
        run = build(case)
        batches = local_batches(batch(0), run.data_rank, case.mesh.dp, case.n_micro)
        with Recorder(case.mesh) as recorder:
            train_step(cast(Any, run), batches, OPTIM.lr)
        collectives.append(recorder.collectives)
    return collectives


@pytest.fixture(scope="module")
def real_traffic() -> list[list[list[Collective]]]:
    return on_ranks(4, real_steps)


@pytest.mark.parametrize("case", REAL, ids=lambda case: f"{case.mesh}-{case.n_layers}-{case.tied}")
def test_traced_step_issues_the_collectives_of_four_real_processes_in_order(
    real_traffic: Any, case: Case
) -> None:
    sequences = BATCH // case.mesh.dp // case.n_micro
    step = Step(case.n_micro, sequences, SEQ, BYTES[case.param], 4, CHUNK, norm_bytes=8)
    model, precision = model_config(case.tied, case.n_layers), PrecisionConfig(param=case.param)
    traced = [
        traced_step(model, case.mesh, case.parallel, precision, step, stage)
        for stage in range(case.pp)
    ]
    assert all(traced)
    for rank, by_case in enumerate(real_traffic):
        assert by_case[REAL.index(case)] == traced[case.mesh.stage(rank)]


def test_recorder_rejects_unknown_collectives() -> None:
    with fake_processes(2), Recorder(MeshShape(1, 2, 1, 1)), pytest.raises(KeyError, match="broad"):
        dist.broadcast(torch.zeros(3), src=0)


def test_bytes_sent_follow_the_ring_algorithm() -> None:
    """400 bytes on four ranks: three steps of 100 bytes; an all-reduce needs two such passes."""
    gathered, reduced = (Collective("tp", 4, kind, 1, 400) for kind in ("all_gather", "all_reduce"))
    assert (gathered.sent, reduced.sent) == (300, 600)


def gathers_before_the_first_block(mesh: MeshShape) -> int:
    """Return the number of weight groups rank 0 has gathered when the first block starts."""
    with fake_processes(mesh.world_size):
        device_mesh = init_device_mesh("cpu", mesh.sizes, mesh_dim_names=AXES)
        with torch.device("meta"):
            llama = Llama(MODEL)
        parallelize(llama, device_mesh, ParallelConfig(**vars(mesh)), PrecisionConfig())
        with FakeTensorMode(allow_non_fake_inputs=True), Recorder(mesh) as recorder:
            llama.to_empty(device="cpu")
            n_gathers: list[int] = []
            first = llama.get_submodule("layers.0.attention")
            first.register_forward_pre_hook(lambda *_: n_gathers.append(len(recorder.collectives)))
            tokens = torch.empty(1, 16, dtype=torch.int64)
            llama(tokens, tokens, tokens)
    return n_gathers[0]


def test_weights_of_a_block_are_gathered_while_the_previous_block_computes() -> None:
    """Before the first block: the weights of the root, the first and the second block."""
    assert gathers_before_the_first_block(MeshShape(1, 2, 1, 1)) == 3
