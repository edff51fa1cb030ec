"""Closed forms of memory against the traced step, over a grid of settings and random jobs.

The tolerance of 3% covers small buffers of a single phase, which matter in a model this small; it
is 5% where a compiler's memory budget is interpolated. Constants copied from other packages are
compared with their originals.
"""

from dataclasses import replace
from typing import Any

import pytest
import torch
from random_jobs import overrides, random_jobs

import model.loss
import training.optimizer
from model.config import ModelConfig
from model.flops import parameter_count
from parallel.config import ParallelConfig, PrecisionConfig
from parallel.mesh import MeshShape
from planning import allocations, tracing
from planning.memory import step_memory
from planning.step_spec import HEAD_CHUNK, MOMENT_BLOCK, StepSpec
from planning.tracing import FakeAdamW, trace_memory
from training.config import OptimConfig
from training.moments import BLOCK

TOLERANCE, TOLERANCE_OF_BUDGET = 0.03, 0.05
MODEL = ModelConfig("small", 128, 4, 8, 4, 352, 1024)
SHAPES = ("n_layers", "n_kv_heads", "vocab_size", "tie_embeddings", "attention")
PARALLEL = {key for key in ParallelConfig.__dataclass_fields__}

LARGE_VOCABULARY = {"vocab_size": 65_536, "n_layers": 1, "seq_len": 32}
EACH_REDUCED = {"reduce_gradients": "micro_batch", "micro_batches": 3}
DEEP: dict[str, Any] = {"n_layers": 32, "seq_len": 64, "activation_checkpoint": "full"}
DEEP |= {"param": "fp32", "reduce": "bf16", **EACH_REDUCED}

# accelerator, (dp_replicate, dp_shard, cp, tp), other settings
GRID: list[tuple[str, tuple[int, int, int, int], dict[str, Any]]] = [
    ("cpu", (1, 1, 1, 1), {}),
    ("cpu", (1, 1, 1, 1), {"activation_checkpoint": "selective", "document_mask": False}),
    ("cpu", (1, 1, 1, 1), {"seq_len": 16, "tie_embeddings": True}),
    ("cpu", (1, 2, 1, 1), {"param": "bf16"}),
    ("cpu", (1, 2, 1, 2), {"loss_parallel": False, "tie_embeddings": True}),
    ("cpu", (1, 1, 1, 2), {"activation_checkpoint": "full", "param": "bf16"}),
    ("cpu", (1, 1, 1, 1), {"activation_checkpoint": "selective", "compile": True}),
    ("cuda", (1, 4, 1, 1), {"activation_checkpoint": 0.5, "compile": True}),
    ("cuda", (1, 2, 1, 2), {"activation_checkpoint": 0.25, "compile": True}),
    ("cuda", (1, 1, 2, 1), {"activation_checkpoint": "selective", "compile": True}),
    ("cuda", (1, 64, 1, 4), {"compile": True}),
    ("cuda", (2, 2, 1, 2), {"activation_checkpoint": "full", "micro_batches": 3, "seq_len": 64}),
    (
        "cuda",
        (2, 4, 1, 1),
        {"reduce_gradients": "micro_batch", "micro_batches": 3, "optimizer_state": "bf16"},
    ),
    ("cuda", (1, 2, 2, 2), {"sequence_parallel": False, "reshard_after_forward": True}),
    ("cuda", (1, 1, 1, 1), {"optimizer_state": "int8", "compile": True, "seq_len": 32}),
    ("cuda", (1, 1, 1, 1), {"seq_len": 32, "micro_batches": 3, "tie_embeddings": True}),
    ("cuda", (1, 4, 1, 1), {"reshard_after_forward": False, "n_layers": 5, "seq_len": 128}),
    # Kernels that take no grouped heads, without and with a dense mask.
    ("cuda", (1, 1, 1, 1), {"param": "fp32", "document_mask": False}),
    ("cuda", (1, 2, 1, 1), {"attention": "sdpa", "param": "fp32"}),
    ("cuda", (1, 1, 2, 1), {"attention": "sdpa", "activation_checkpoint": "full"}),
    ("cpu", (1, 1, 1, 1), {"attention": "sdpa", "seq_len": 4096, "n_layers": 1}),
    # Conversions between the data types of weights and reductions.
    ("cuda", (2, 1, 1, 1), {**LARGE_VOCABULARY, "param": "bf16"}),
    ("cpu", (2, 1, 1, 1), {**LARGE_VOCABULARY, "reduce": "bf16", "micro_batches": 3}),
    ("cpu", (1, 2, 1, 1), {**LARGE_VOCABULARY, "reduce": "bf16", **EACH_REDUCED}),
    ("cpu", (2, 1, 1, 1), {**LARGE_VOCABULARY, "param": "bf16", "reduce": "bf16", **EACH_REDUCED}),
    ("cpu", (1, 1, 1, 1), {**LARGE_VOCABULARY, "param": "bf16", "micro_batches": 3}),
    # Of a deep model, another micro-batch is the fullest than of a shallow one.
    ("cuda", (4, 2, 2, 1), DEEP),
    # The end of a micro-batch whose gradients are not reduced.
    ("cpu", (1, 2, 1, 2), {**LARGE_VOCABULARY, "tie_embeddings": True, "micro_batches": 2}),
    # Gathers of sequence parallelism around a recomputation.
    ("cuda", (1, 1, 1, 8), {"n_kv_heads": 8, "activation_checkpoint": "selective"}),
    ("cpu", (1, 1, 1, 8), {"n_kv_heads": 8, "activation_checkpoint": "full", "param": "bf16"}),
    ("cuda", (1, 2, 1, 1), {"fp8": "tensorwise", "reshard_after_forward": False, "seq_len": 32}),
    (
        "cuda",
        (1, 2, 1, 1),
        {"fp8": "tensorwise", "reshard_after_forward": False, "seq_len": 32, "micro_batches": 3},
    ),
]


def make_spec(
    accelerator: str, sizes: tuple[int, int, int, int], settings: dict[str, Any]
) -> StepSpec:
    param = settings.get("param", "bf16" if accelerator == "cuda" else "fp32")
    state = settings.get("optimizer_state", "fp32")
    mesh = MeshShape(*sizes)
    shapes = {key: settings[key] for key in SHAPES if key in settings}
    return StepSpec(
        model=replace(MODEL, **shapes),
        mesh=mesh,
        parallel=ParallelConfig(
            **{"compile": False} | {key: settings[key] for key in settings.keys() & PARALLEL}
        ),
        precision=PrecisionConfig(
            param, settings.get("reduce", "fp32"), state, fp8=settings.get("fp8")
        ),
        accelerator="cuda" if accelerator == "cuda" else "cpu",
        seq_len=settings.get("seq_len", 512),
        global_batch_size=2 * mesh.dp * settings.get("micro_batches", 1),
        micro_batch_size=2,
        document_mask=settings.get("document_mask", True),
    )


@pytest.mark.parametrize(("accelerator", "sizes", "settings"), GRID)
def test_closed_forms_match_traced_step(
    accelerator: str, sizes: tuple[int, int, int, int], settings: dict[str, Any]
) -> None:
    spec = make_spec(accelerator, sizes, settings)
    traced, analytic = trace_memory(spec), step_memory(spec)
    assert analytic.peak == pytest.approx(traced.peak, rel=TOLERANCE)
    assert analytic.parameters == traced.parameters
    assert analytic.optimizer == pytest.approx(traced.optimizer, rel=1e-3)  # blocks of 256 values


def check_random_jobs(count: int, seed: int, **bounds: Any) -> None:
    errors = {}
    for settings, spec in random_jobs(count, seed, **bounds):
        error = step_memory(spec).peak / trace_memory(spec).peak - 1
        budget = isinstance(spec.parallel.activation_checkpoint, float)
        if abs(error) > (TOLERANCE_OF_BUDGET if budget else TOLERANCE):
            errors[" ".join(overrides(settings))] = error
    assert not errors


@pytest.mark.parametrize("seed", range(3))
def test_closed_forms_match_trace_of_random_jobs(seed: int) -> None:
    check_random_jobs(20, seed, depths=(1, 1, 2), max_tokens=2048)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(100, 104))
def test_closed_forms_match_trace_of_more_random_jobs(seed: int) -> None:
    check_random_jobs(20, seed)


def test_deep_model_extrapolates_linearly_from_two_depths(monkeypatch: pytest.MonkeyPatch) -> None:
    deep = make_spec("cuda", (1, 2, 1, 1), {"n_layers": 7, "seq_len": 64})
    extrapolated = trace_memory(deep)
    monkeypatch.setattr(tracing, "DEPTHS", (4, 7))
    traced = trace_memory(deep)
    assert extrapolated.peak == pytest.approx(traced.peak, rel=1e-3)  # padding of a block


def test_unreduced_gradients_count_as_gathered() -> None:
    """In both tiers. They prevent large models from accumulating over micro-batches."""
    spec = make_spec("cuda", (1, 8, 1, 1), {"micro_batches": 3, "seq_len": 32})
    gradients = parameter_count(spec.model) * 4  # bytes, float32
    for breakdown in (trace_memory(spec), step_memory(spec)):
        assert breakdown.gathered >= gradients > breakdown.activations


def test_compiler_memory_budget_interpolates_between_full_and_no_recomputation() -> None:
    def peak(checkpoint: str | float) -> int:
        settings = {"activation_checkpoint": checkpoint, "compile": True}
        return step_memory(make_spec("cuda", (1, 2, 1, 1), settings)).peak

    peaks = [peak(budget) for budget in (0.0, 0.25, 0.5, 1.0)]
    assert peaks == sorted(peaks) and len({*peaks}) == 4
    assert (peaks[0], peaks[-1]) == (peak("full"), peak("none"))


def test_constants_match_their_originals() -> None:
    assert HEAD_CHUNK == model.loss.CHUNK
    assert allocations.HEAD_BLOCK == model.loss.BLOCK
    chunks = (training.optimizer._CHUNK_CPU, training.optimizer._CHUNK_DEVICE)
    assert tuple(allocations.MOMENT_CHUNK.values()) == chunks
    assert MOMENT_BLOCK == BLOCK


@pytest.mark.parametrize("state", ["fp32", "bf16", "int8"])
def test_fake_optimizer_allocates_same_bytes_as_real_one(state: Any) -> None:
    def state_bytes(optimizer: Any) -> int:
        total = 0
        for state in optimizer.state.values():
            for name, moment in state.items():
                parts = [moment] if isinstance(moment, torch.Tensor) else vars(moment).items()
                for part in parts:
                    # Excludes the step count and the quantization levels shared by all moments.
                    key, tensor = part if isinstance(part, tuple) else (name, part)
                    if isinstance(tensor, torch.Tensor) and key not in ("step", "levels"):
                        total += tensor.nbytes
        return total

    module = torch.nn.Sequential(torch.nn.Linear(37, 19), torch.nn.Linear(19, 5))
    for parameter in module.parameters():
        parameter.grad = torch.ones_like(parameter)
    real = training.optimizer.build_optimizer(module, OptimConfig(lr=1e-3), state)
    fake = FakeAdamW(module, state, "cpu")
    real.step()
    fake.step()
    assert state_bytes(fake) == state_bytes(real)
