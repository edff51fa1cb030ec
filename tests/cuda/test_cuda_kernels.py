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
        ((9, 0), "bf16", 5, 48, {"cudnn"}),  # heads of 12: neither varlen nor flex
        ((8, 6), "bf16", None, 800, {"efficient"}),  # heads of 200: flash has no backward
        ((8, 6), "bf16", 5, 800, {"efficient"}),  # varlen and flex have none either
        ((8, 0), "bf16", 5, 808, set()),  # heads of 202: flex
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


def fused_collectives(case: Case) -> list[tuple[int, int]]:
    """Return for each graph how many collectives async TP fuses, and of how many."""
    import torch._inductor.fx_passes.micro_pipeline_tp as passes
    import torch._inductor.fx_passes.post_grad as post_grad
    import torch.distributed as dist
    import torch.distributed._symmetric_memory as symmetric_memory

    found = []
    fuse = passes.micro_pipeline_tp_pass

    def count(graph: Any, kind: str) -> int:
        names = [str(node.target) for node in graph.nodes]
        return sum(kind in name and "wait_tensor" not in name for name in names)

    def counted(graph: Any) -> None:
        before = count(graph, "_c10d_functional")
        fuse(graph)
        if before:
            found.append((count(graph, "symm_mem"), before))

    def enable(group: str) -> None:
        symmetric_memory._group_name_to_store[group] = None  # type: ignore[assignment]

    for module in (passes, post_grad):
        setattr(module, "micro_pipeline_tp_pass", counted)  # noqa: B010
    setattr(symmetric_memory, "enable_symm_mem_for_group", enable)  # noqa: B010
    setattr(dist, "is_nccl_available", lambda: True)  # noqa: B010
    check_steps(case)
    return found


@pytest.mark.parametrize(("batch", "expected"), [(1, [(2, 4), (0, 4)]), (2, [(4, 4), (2, 4)])])
def test_async_tp_fuses_as_many_collectives_as_the_warning_says(
    batch: int, expected: list[tuple[int, int]]
) -> None:
    """Of a block's forward and backward; `async_tp_warnings` and the planner have the numbers."""
    case = Case(
        mesh=(1, 1, 1, 2),
        parallel=ParallelConfig(async_tp=True),
        documents=None,
        batch=batch,
        micro_batches=1,
        steps=1,
    )
    assert on_fake_device(fused_collectives, case) == expected
