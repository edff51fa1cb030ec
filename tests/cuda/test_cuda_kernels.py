"""Attention on fake CUDA tensors: which kernel runs, how often, and what checkpointing keeps."""

from dataclasses import replace
from typing import Any

import pytest
from fake_device import on_fake_device
from step import MODEL, Case, check_steps

from parallel.config import ParallelConfig, PrecisionConfig

EAGER = ParallelConfig(compile=False)


def flex_calls(case: Case) -> int:
    """Return how often a step calls FlexAttention's compiled kernel."""
    from model import attention

    calls, kernel = [], attention._compiled_flex()

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return kernel(*args, **kwargs)

    setattr(attention, "_compiled_flex", lambda: counted)  # noqa: B010
    check_steps(case)
    return len(calls)


def test_selective_checkpointing_keeps_the_result_of_flex() -> None:
    """Context parallelism uses FlexAttention; two layers and one micro-batch."""
    parallel = replace(EAGER, activation_checkpoint="selective")
    case = Case(mesh=(1, 1, 2, 1), parallel=parallel, micro_batches=1, steps=1)
    assert on_fake_device(flex_calls, case) == 2


def sdpa_backends(case: Case) -> set[str]:
    import cuda_stubs

    check_steps(case)
    return set(cuda_stubs.sdpa_backends())


@pytest.mark.parametrize(
    ("capability", "param", "documents", "dim", "expected"),
    [
        ((9, 0), "fp32", None, 256, {"efficient"}),
        ((9, 0), "fp32", 5, 256, set()),  # flex
        ((9, 0), "bf16", 5, 48, {"efficient"}),  # heads of 12: neither varlen nor flex
        ((7, 5), "fp32", 5, 256, {"efficient"}),
    ],
)
def test_attention_never_runs_the_math_kernel(
    capability: tuple[int, int], param: Any, documents: int | None, dim: int, expected: set[str]
) -> None:
    case = Case(
        model=replace(MODEL, dim=dim),
        parallel=EAGER,
        precision=PrecisionConfig(param=param),
        documents=documents,
        micro_batches=1,
        steps=1,
    )
    assert on_fake_device(sdpa_backends, case, capability=capability) == expected
