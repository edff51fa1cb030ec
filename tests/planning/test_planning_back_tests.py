"""Planned throughput and memory against published runs: `pytest -s` prints the table.

One constant per framework (`planning.frameworks`) is fitted to the fitted set; the claims are about
the runs that are held out.
"""

import statistics
from collections import defaultdict
from dataclasses import replace

import pytest
from published_plans import can_be_planned, planned_tokens_per_second, step_of
from published_runs import REPORTS, PublishedRun, load_runs

from planning.frameworks import FRAMEWORKS
from planning.hardware import load_hardware
from planning.memory import step_memory
from planning.speed import THROUGHPUT_INTERVAL, step_time

GIB = 2**30
RUNS = {run.id: run for run in load_runs() if can_be_planned(run)}
HELD_OUT = [run for run in RUNS.values() if run.set == "held_out"]


def error(run: PublishedRun) -> float:
    """Return the relative error of the planned tokens/s."""
    return planned_tokens_per_second(run) / run.tokens_per_second - 1


def framework(run: PublishedRun) -> str:
    return REPORTS[run.report].framework


def test_planned_throughput_of_held_out_runs() -> None:
    """Half of the runs are within 8%, nine of ten within 20%, and there is no bias."""
    errors: dict[str, list[float]] = defaultdict(list)
    for run in RUNS.values():
        name = f"{run.set:<9} {framework(run):<13} {run.hardware}"
        errors[name].append(error(run))
        print(f"{run.id:<48}{run.tokens_per_second:>9,.0f} {errors[name][-1]:>+6.1%}")
    for name, values in sorted(errors.items()):
        print(f"{name:<34}{len(values):>3} runs, median error {statistics.median(values):>+6.1%}")
    held_out = [error(run) for run in HELD_OUT]
    sizes = sorted(map(abs, held_out))
    print(f"held out: {len(sizes)} runs, median absolute error {statistics.median(sizes):.1%}")
    assert statistics.median(sizes) <= 0.08
    assert sizes[int(0.9 * (len(sizes) - 1))] <= 0.20
    assert abs(statistics.median(held_out)) <= 0.05


def test_interval_of_the_throughput_covers_four_of_five_held_out_runs() -> None:
    low, high = THROUGHPUT_INTERVAL
    covered = [low <= 1 / (1 + error(run)) <= high for run in HELD_OUT]
    print(f"{statistics.mean(covered):.1%} of {len(covered)} runs")
    assert statistics.mean(covered) >= 0.8
    assert 0.75 <= low < 1 < high <= 1.25


@pytest.mark.parametrize("name", sorted({framework(run) for run in RUNS.values()}))
def test_constant_of_a_framework_is_fitted_to_its_fitted_runs(name: str) -> None:
    """The median error is zero within the two digits of the constant."""
    runs = [run for run in RUNS.values() if run.set == "fit" and framework(run) == name]
    if not runs:
        assert FRAMEWORKS[name].efficiency == FRAMEWORKS["torchtitan"].efficiency
        return
    assert abs(statistics.median(map(error, runs))) <= 0.01


def torchtitan_gib(shards: int) -> float:
    """Return the memory that torchtitan of 2024-12 reserves for Llama 3 8B, 2 sequences at a time.

    Weights and optimizer state are as ours. It saves every other matrix product of a block (wq, wv,
    w1, w2) and the output of attention, and computes the loss uncompiled on all logits: the peak
    holds bf16 logits, their float32 log-softmax and two gradients of that size. It reserves more
    than is allocated: gradients are created on a separate stream, whose memory is not shared.
    """
    spec = step_of(RUNS[f"torchtitan-2024-12-8b-{shards}-eager"])
    model, tokens, memory = spec.model, spec.local_tokens, step_memory(spec)
    kv = model.n_kv_heads * model.head_dim
    saved = 2 * model.dim + kv + model.ffn_dim + model.dim  # the block's input, wq, wv, w1, w2
    block = tokens * (2 * (saved + model.dim) + 4 * model.n_heads)  # attention output, log-sum-exp
    logits = tokens * model.vocab_size * (2 + 3 * 4)
    root, layer = 2 * model.vocab_size * model.dim * 2, 218_112_000 * 2  # gathered, in bf16
    gradients = memory.parameters  # float32, the same size
    parts = memory.parameters + memory.optimizer + gradients + model.n_layers * block + logits
    return (parts + root + 2 * layer) / GIB


@pytest.mark.parametrize(
    ("shards", "published"),
    [(8, 82.4), (8, 77.0), (8, 76.8), (128, 67.0), (128, 62.0), (128, 61.8)],
)
def test_torchtitan_memory_is_within_10_percent(shards: int, published: float) -> None:
    """Published values are eager, compiled, and compiled with fp8; they differ by under 10%."""
    planned = torchtitan_gib(shards)
    print(f"\n{shards} devices: {published} GiB published, {planned:.1f} planned")
    assert planned == pytest.approx(published, rel=0.10)


@pytest.mark.parametrize(("tp", "published"), [(1, 4.04), (2, 2.03), (4, 1.02), (8, 0.60)])
def test_memory_in_fabric_tensor_parallel_guide_is_within_10_percent(
    tp: int, published: float
) -> None:
    """A SwiGLU block of 8,192 × 8,192 under AdamW; two full matrices exist while sharding."""
    matrix = 8192 * 8192 * 4  # bytes, float32
    weights = 3 * matrix / tp
    step = 5 * weights  # gradients, two moments, and the square root of the second
    sharding = 2 * matrix + 2 * matrix / tp
    assert max(step, sharding) / 1e9 == pytest.approx(published, rel=0.10)


def test_float32_products_run_at_the_rate_of_tf32_unless_their_precision_is_highest() -> None:
    spec, hardware = step_of(HELD_OUT[0]), replace(load_hardware("h100"), bandwidth_gb_s=1e9)
    times = []
    for matmul in ("high", "highest"):
        precision = replace(spec.precision, param="fp32", fp8=None, float32_matmul=matmul)
        times.append(step_time(replace(spec, precision=precision), hardware).matrix)
    ratio = hardware.matrix_tflops["tf32"] / hardware.matrix_tflops["fp32"]
    assert times[1] / times[0] == pytest.approx(ratio)
