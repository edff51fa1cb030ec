"""Activation checkpointing lowers peak memory in the expected order and does not change losses.

Memory is measured with PyTorch's profiler on the CPU allocator, which includes compiled code.
"""

from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import small_run
import torch
import torch.nn.functional as F
from distributed import on_ranks
from small_run import Case, build
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import _disable_current_modes

from data.loader import Batch, StepBatches
from model.config import ModelConfig
from model.init import initialize
from model.llama import Llama
from parallel.activation_checkpoint import apply_activation_checkpoint
from parallel.config import ParallelConfig, PrecisionConfig
from parallel.mesh import MeshShape
from planning.step_spec import StepSpec
from train import train_step

# Activations outweigh weights: 2 × 256 tokens in 6 layers.
CONFIG = ModelConfig("deep", 128, 6, 4, 2, 352, 256)
EAGER = ("none", "selective", "full")
BUDGETS = (1.0, 0.5, 0.0)


def measure(cases: list[Case]) -> list[tuple[float, int]]:
    """Return the loss of each case and the peak memory of its third step in bytes."""
    small_run.model_config = lambda tied, n_layers: CONFIG
    tokens = torch.randint(0, CONFIG.vocab_size, (2, 256), generator=torch.manual_seed(0))
    results = []
    for case in cases:
        torch._dynamo.reset()  # the memory budget is not part of the compile cache key
        run = build(case)

        def step(run: Any = run) -> float:
            loss = run.model(tokens, None, tokens)
            run.fabric.backward(loss)
            return loss.item()

        step()
        step()
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            loss = step()
        results.append((loss, peak_bytes(profiler)))
    return results


def peak_bytes(profiler: Any) -> int:
    """Return the peak of the bytes allocated since the profiler started."""
    events = profiler.profiler.kineto_results.events()
    memory = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    allocated = peak = 0
    for _, size in memory:
        allocated += size
        peak = max(peak, allocated)
    return peak


@pytest.fixture(scope="module")
def measured() -> dict[Case, tuple[float, int]]:
    eager = [Case(activation_checkpoint=mode) for mode in EAGER]
    compiled = [Case(activation_checkpoint=mode, compile=True) for mode in (*BUDGETS, *EAGER)]
    cases = eager + compiled
    return dict(zip(cases, on_ranks(1, measure, cases)[0], strict=True))


@pytest.mark.parametrize("compile", [False, True])
def test_selective_uses_less_memory_than_none_and_full_less_than_selective(
    measured: Any, compile: bool
) -> None:
    """The margin of 10% is far larger than the effect of a single allocation."""
    peaks = [measured[Case(activation_checkpoint=m, compile=compile)][1] for m in EAGER]
    assert peaks[1] < 0.9 * peaks[0] and peaks[2] < 0.9 * peaks[1]


def test_memory_decreases_with_the_compiler_memory_budget(measured: Any) -> None:
    """A budget of 1 matches no checkpointing; a budget of 0 roughly matches eager `full`."""
    peaks = [measured[Case(activation_checkpoint=m, compile=True)][1] for m in BUDGETS]
    assert peaks[1] < 0.9 * peaks[0] and peaks[2] < 0.9 * peaks[1]
    assert peaks[0] == pytest.approx(measured[Case(compile=True)][1], rel=0.02)
    # Fused operations need fewer temporaries, which are small compared with saved activations.
    assert peaks[2] == pytest.approx(measured[Case(activation_checkpoint="full")][1], rel=0.2)


def test_losses_do_not_change(measured: Any) -> None:
    """Eager losses are bit-identical; fused operations round differently, by some float32 ulps."""
    expected = measured[Case()][0]
    for case, (loss, _) in measured.items():
        if not case.compile:
            assert loss == expected
        assert loss == pytest.approx(expected, rel=1e-6)


def test_checkpointing_compiles_under_tensor_parallelism() -> None:
    modes = ("full", "selective", 0.5)
    cases = [Case(tp=2, activation_checkpoint=mode, compile=True) for mode in modes]
    (expected, peak_without), *measured = on_ranks(2, measure, [Case(tp=2), *cases])[0]
    for mode, (loss, peak) in zip(modes, measured, strict=True):
        assert loss == pytest.approx(expected, rel=1e-6), mode
        assert peak < 0.9 * peak_without, mode


def run_stages(case: Case) -> dict[str, Any]:
    """Return loss and norm of two steps, and the peak of the saved activations on this rank."""
    torch._dynamo.reset()
    small_run.model_config = lambda tied, n_layers: CONFIG
    run: Any = build(case)
    measured: dict[str, Any] = {"statistics": []}
    tokens = torch.randint(0, CONFIG.vocab_size, (4, 256), generator=torch.manual_seed(0))
    batches = StepBatches(
        [Batch(rows, torch.zeros_like(rows) + torch.arange(256), rows) for rows in tokens.chunk(2)],
        [2, 2],
        tokens.numel(),
        digest=1,
    )
    for _ in range(2):
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            tensors = train_step(run, batches, 1e-3)
        measured["statistics"].append(tensors["scalars"][:2].tolist())
    return measured | {"peak": peak_bytes(profiler)}


def test_pipeline_ranks_may_differ_in_checkpointing_without_a_change_of_results() -> None:
    """The first rank, which holds two micro-batches, needs less memory; losses are equal."""
    case = Case(pp=2, n_layers=6)
    modes = (None, ("full", "none"), ("selective", "full"))
    same, full, selective = (
        on_ranks(2, run_stages, replace(case, pp_checkpoint=each)) for each in modes
    )
    for measured in (*full, *selective):
        assert measured["statistics"] == same[0]["statistics"]
    peaks = [[rank["peak"] for rank in each] for each in (same, full, selective)]
    assert peaks[1][0] < 0.7 * peaks[0][0] and peaks[1][1] == pytest.approx(peaks[0][1], rel=0.02)
    assert peaks[1][0] < peaks[2][0] < 0.9 * peaks[0][0] and peaks[2][1] < 0.9 * peaks[0][1]


def test_compiled_pipeline_ranks_may_have_memory_budgets() -> None:
    case = Case(pp=2, n_layers=6, compile=True)
    same, budgets = (
        on_ranks(2, run_stages, replace(case, pp_checkpoint=each)) for each in (None, (0.0, "none"))
    )
    for expected, found in zip(same, budgets, strict=True):
        # The compiler fuses other operations, which rounds differently.
        for step, found_step in zip(expected["statistics"], found["statistics"], strict=True):
            assert found_step == pytest.approx(step, rel=1e-5)
    assert budgets[0]["peak"] < 0.9 * same[0]["peak"]


def test_plan_of_a_pipeline_rank_has_its_checkpointing() -> None:
    parallel = ParallelConfig(pp=2, pp_checkpoint=("full", "none"))
    precision = PrecisionConfig(param="fp32", reduce="fp32")
    spec = StepSpec(CONFIG, MeshShape(1, 1, 1, 1, 2), parallel, precision, "cpu", 256, 4, 2)
    for stages in (spec.stages, spec.stages[1].stages):
        assert [each.parallel.activation_checkpoint for each in stages] == ["full", "none"]


def test_selective_calls_a_compiled_attention_kernel_once() -> None:
    """FlexAttention's compiled code is one node, whose operators the policy does not see."""
    config = ModelConfig("small", 16, 2, 2, 1, 24, 20, attention="flex")
    tokens = torch.arange(16).view(2, 8)
    results = []

    @torch._dynamo.disable
    def attend(q: Tensor, k: Tensor, v: Tensor, _: Any) -> Tensor:
        calls.append(1)
        return Attend.apply(q, k, v)

    # As in a pipeline, both forwards may precede both backwards, the first one first.
    for mode, in_flight in product(("none", "selective"), (1, 2)):
        calls: list[int] = []
        model = Llama(config)
        initialize(model, config, seed=0)
        model.kernel.flex = attend
        if mode != "none":
            apply_activation_checkpoint(model, mode)
        losses = []
        for micro_batch in (tokens, tokens.flip(0)):
            losses.append(model(micro_batch, torch.zeros_like(tokens), micro_batch))
            while len(losses) >= in_flight:
                losses.pop(0).backward()
        for loss in losses:
            loss.backward()
        results.append([parameter.grad for parameter in model.parameters()])
        assert len(calls) == 2 * config.n_layers
    for gradients in results[1:]:
        torch.testing.assert_close(gradients, results[0], rtol=0, atol=0)


class Attend(torch.autograd.Function):
    """Attention without a mask, which saves what FlexAttention does: inputs and output."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with _disable_current_modes():
            out = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        ctx.save_for_backward(q, k, v, out)
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:
        q, k, v, out = ctx.saved_tensors
        with _disable_current_modes(), torch.enable_grad():
            given = q, k, v = tuple(each.detach().requires_grad_() for each in (q, k, v))
            again = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
            assert torch.equal(again, out)
            return torch.autograd.grad(again, given, gradient)
