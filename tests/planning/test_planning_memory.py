"""The closed forms of memory agree with the traced tier, over a grid of what changes them.

Within 3%: what small buffers of one moment make of a model as small as this one, and least where
blocks decide. What both take from elsewhere, as constants, is held against its owner.
"""

from dataclasses import replace
from typing import Any

import pytest
import torch

import model.loss
import planning.memory
import planning.moments
import training.optimizer
from model.config import ModelConfig
from model.flops import parameter_count
from parallel.config import ParallelConfig, PrecisionConfig
from parallel.mesh import MeshShape
from planning.job import HEAD_CHUNK, Job
from planning.memory import step_memory
from planning.traced import traced_memory
from training.config import OptimConfig
from training.moments import BLOCK

TOLERANCE = 0.03
MODEL = ModelConfig("small", 128, 4, 8, 4, 352, 1024)
PARALLEL = {key for key in ParallelConfig.__dataclass_fields__}

# dp_replicate × dp_shard × cp × tp, and what else is chosen
GRID: list[tuple[str, tuple[int, int, int, int], dict[str, Any]]] = [
    ("cpu", (1, 1, 1, 1), {}),
    ("cpu", (1, 1, 1, 1), {"activation_checkpoint": "selective", "document_mask": False}),
    ("cpu", (1, 1, 1, 1), {"param": "bf16", "seq_len": 16}),
    ("cpu", (1, 1, 1, 1), {"seq_len": 16, "tie_embeddings": True}),
    ("cpu", (1, 2, 1, 1), {"param": "bf16"}),
    ("cpu", (1, 2, 1, 2), {"loss_parallel": False, "tie_embeddings": True}),
    ("cpu", (1, 1, 1, 1), {"activation_checkpoint": "full"}),
    ("cpu", (1, 1, 1, 1), {"activation_checkpoint": "full", "param": "bf16"}),
    ("cpu", (1, 1, 1, 2), {"activation_checkpoint": "full", "param": "bf16"}),
    ("cpu", (1, 1, 1, 1), {"activation_checkpoint": "full", "compile": True}),
    ("cpu", (1, 1, 1, 1), {"activation_checkpoint": "selective", "compile": True}),
    ("cpu", (1, 1, 2, 1), {"activation_checkpoint": "full", "compile": True}),
    ("cuda", (1, 4, 1, 1), {"activation_checkpoint": 0.5, "compile": True}),
    ("cuda", (1, 2, 1, 2), {"activation_checkpoint": 0.25, "compile": True}),
    ("cuda", (1, 2, 1, 1), {"activation_checkpoint": 0.75, "compile": True, "param": "bf16"}),
    ("cuda", (1, 1, 2, 1), {"activation_checkpoint": "selective", "compile": True}),
    ("cuda", (1, 1, 1, 2), {"activation_checkpoint": "selective", "compile": True}),
    ("cuda", (1, 1, 2, 2), {"activation_checkpoint": 0.5, "compile": True}),
    ("cuda", (1, 8, 1, 1), {"activation_checkpoint": "selective"}),
    ("cuda", (1, 64, 1, 4), {"compile": True}),
    ("cuda", (2, 2, 1, 2), {"activation_checkpoint": "full", "micro_batches": 3, "seq_len": 64}),
    (
        "cuda",
        (2, 4, 1, 1),
        {"reduce_gradients": "micro_batch", "micro_batches": 3, "optimizer_state": "bf16"},
    ),
    ("cuda", (1, 2, 2, 2), {"sequence_parallel": False, "reshard_after_forward": True}),
    ("cuda", (1, 1, 1, 1), {"optimizer_state": "int8", "compile": True, "seq_len": 32}),
    ("cuda", (1, 1, 1, 1), {"seq_len": 32}),
    ("cuda", (1, 1, 1, 1), {"seq_len": 32, "micro_batches": 3, "tie_embeddings": True}),
    ("cuda", (1, 1, 1, 1), {"activation_checkpoint": "full", "compile": True}),
    ("cuda", (2, 1, 1, 1), {"micro_batches": 3, "seq_len": 32}),
    ("cuda", (1, 4, 1, 1), {"reshard_after_forward": False, "n_layers": 5, "seq_len": 128}),
]


def job_of(accelerator: str, sizes: tuple[int, int, int, int], changes: dict[str, Any]) -> Job:
    """A job of the grid."""
    param = changes.get("param", "bf16" if accelerator == "cuda" else "fp32")
    state = changes.get("optimizer_state", "fp32")
    mesh = MeshShape(*sizes)
    shapes = {key: changes[key] for key in ("n_layers", "tie_embeddings") if key in changes}
    return Job(
        model=replace(MODEL, **shapes),
        mesh=mesh,
        parallel=ParallelConfig(**{key: changes[key] for key in changes.keys() & PARALLEL}),
        precision=PrecisionConfig(param, "fp32", state),
        accelerator="cuda" if accelerator == "cuda" else "cpu",
        seq_len=changes.get("seq_len", 512),
        global_batch_size=2 * mesh.dp * changes.get("micro_batches", 1),
        micro_batch_size=2,
        document_mask=changes.get("document_mask", True),
    )


@pytest.mark.parametrize(("accelerator", "sizes", "changes"), GRID)
def test_closed_forms_are_what_a_traced_step_holds(
    accelerator: str, sizes: tuple[int, int, int, int], changes: dict[str, Any]
) -> None:
    job = job_of(accelerator, sizes, changes)
    traced, analytic = traced_memory(job), step_memory(job)
    assert analytic.peak == pytest.approx(traced.peak, rel=TOLERANCE)
    assert analytic.parameters == traced.parameters
    assert analytic.optimizer == pytest.approx(traced.optimizer, rel=1e-3)  # blocks of 256 values


def test_a_deep_model_lies_on_the_line_through_two_shallow_ones() -> None:
    deep = job_of("cuda", (1, 2, 1, 1), {"n_layers": 7, "seq_len": 64})
    from planning import traced

    line = traced_memory(deep)
    depths, traced.DEPTHS = traced.DEPTHS, (4, 7)
    try:
        whole = traced_memory(deep)
    finally:
        traced.DEPTHS = depths
    assert line.peak == pytest.approx(whole.peak, rel=1e-3)  # a block's padding is rounded


def test_gradients_that_wait_for_the_last_micro_batch_are_told_as_gathered() -> None:
    """Both tiers; they are what keeps large models from several micro-batches."""
    job = job_of("cuda", (1, 8, 1, 1), {"micro_batches": 3, "seq_len": 32})
    whole = parameter_count(job.model) * 4  # bytes, float32
    for memory in (traced_memory(job), step_memory(job)):
        assert memory.gathered >= whole > memory.activations


def test_a_budget_of_the_compiler_lies_between_all_recomputed_and_nothing() -> None:
    def of(checkpoint: str | float) -> int:
        changes = {"activation_checkpoint": checkpoint, "compile": True}
        return step_memory(job_of("cuda", (1, 2, 1, 1), changes)).peak

    budgets = [of(share) for share in (0.0, 0.25, 0.5, 1.0)]
    assert budgets == sorted(budgets) and len({*budgets}) == 4
    assert (budgets[0], budgets[-1]) == (of("full"), of("none"))


def test_what_the_planner_knows_of_others_is_what_they_say() -> None:
    assert HEAD_CHUNK == model.loss.CHUNK
    assert planning.memory.HEAD_BLOCK == model.loss.BLOCK
    pieces = (training.optimizer._CHUNK_CPU, training.optimizer._CHUNK_DEVICE)
    assert tuple(planning.memory.MOMENT_PIECE.values()) == pieces
    assert planning.memory.MOMENT_BLOCK == BLOCK


@pytest.mark.parametrize("state", ["fp32", "bf16", "int8"])
def test_the_traced_optimizer_holds_what_the_optimizer_holds(state: Any) -> None:
    def held(optimizer: Any) -> int:
        found = 0
        for state in optimizer.state.values():
            for name, moment in state.items():
                parts = [moment] if isinstance(moment, torch.Tensor) else vars(moment).items()
                for part in parts:
                    # A step's count and the levels that all 8-bit moments share are left out.
                    key, tensor = part if isinstance(part, tuple) else (name, part)
                    if isinstance(tensor, torch.Tensor) and key not in ("step", "levels"):
                        found += tensor.nbytes
        return found

    module = torch.nn.Sequential(torch.nn.Linear(37, 19), torch.nn.Linear(19, 5))
    for parameter in module.parameters():
        parameter.grad = torch.ones_like(parameter)
    real = training.optimizer.build_optimizer(module, OptimConfig(lr=1e-3), state)
    fake = planning.moments.FakeAdamW(module, state, "cpu")
    real.step()
    fake.step()
    assert held(fake) == held(real)
