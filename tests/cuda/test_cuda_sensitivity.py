"""The checks of this folder fail if the product is broken: each test breaks one place of it.

Kernel choice, streams and threads, dtypes and devices; a step of an unchanged product passes.
"""

import re
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from fake_device import on_fake_device
from step import MODEL, Case, Report, run_cases

from parallel.config import ParallelConfig, PrecisionConfig

CASE = Case(
    model=replace(MODEL, n_layers=1),
    parallel=ParallelConfig(compile=False),
    micro_batches=1,
    batch=1,
    seq=128,
)
FP32 = replace(CASE, precision=PrecisionConfig(param="fp32"))
MASKED = replace(CASE, model=replace(CASE.model, attention="sdpa"))
FP8 = replace(CASE, precision=PrecisionConfig(fp8="rowwise"))


def varlen_in_float32() -> None:
    from model import attention

    setattr(attention, "select_kernel", lambda *_: "varlen")  # noqa: B010


def heads_not_expanded_for_a_mask() -> None:
    import torch.nn.functional as F

    from model import attention

    def sdpa(q: Any, k: Any, v: Any, mask: Any) -> Any:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)

    setattr(attention, "_sdpa", sdpa)  # noqa: B010


def offsets_in_int64() -> None:
    from model import attention

    real = attention._varlen_mask

    def mask(*args: Any) -> Any:
        offsets, longest = real(*args)
        return attention.VarlenMask(offsets.long(), longest)

    setattr(attention, "_varlen_mask", mask)  # noqa: B010


def skip_flag_in_float64() -> None:
    from resilience import loss_monitor

    real = loss_monitor.not_finite
    setattr(loss_monitor, "not_finite", lambda values: real(values).double())  # noqa: B010


def master_weights_in_bf16() -> None:
    import torch

    from model.llama import Llama

    real = Llama.__init__

    def init(self: Any, *args: Any) -> None:
        real(self, *args)
        self.to(torch.bfloat16)

    setattr(Llama, "__init__", init)  # noqa: B010


def scalars_on_the_first_gpu() -> None:
    from parallel.step_scalars import StepRequests

    real = StepRequests.to_tensor
    setattr(StepRequests, "to_tensor", lambda self, device: real(self, "cuda:0"))  # noqa: B010


def frequencies_on_the_cpu() -> None:
    from model import llama

    real = llama.rope_frequencies
    setattr(llama, "rope_frequencies", lambda config, device: real(config, "cpu"))  # noqa: B010


def skip_flag_read_by_the_host() -> None:
    from resilience import loss_monitor

    real = loss_monitor.not_finite

    def not_finite(values: Any) -> Any:
        flag = real(values)
        assert flag.item() == 0
        return flag

    setattr(loss_monitor, "not_finite", not_finite)  # noqa: B010


def blocking_copy_to_the_device() -> None:
    from lightning_fabric import Fabric

    def to_device(self: Any, batch: Any) -> Any:
        if isinstance(batch, tuple):
            return tuple(each if each is None else each.to(self.device) for each in batch)
        return real(self, batch)

    real = Fabric.to_device
    setattr(Fabric, "to_device", to_device)  # noqa: B010


def weights_read_in_a_thread_without_a_device() -> None:
    from training.optimizer import AdamW

    real, raised = AdamW.step, []

    def step(self: Any, closure: Any = None) -> None:
        def read() -> None:
            try:
                self.param_groups[0]["params"][0].detach().clone()
            except RuntimeError as error:
                raised.append(error)

        thread = threading.Thread(target=read, name="reader")
        thread.start()
        thread.join()
        if raised:
            raise raised[0]
        real(self)

    setattr(AdamW, "step", step)  # noqa: B010


def gradients_reduced_in_int16() -> None:
    from parallel.strategy import MeshStrategy

    real = MeshStrategy.sum_over_data
    setattr(  # noqa: B010
        MeshStrategy, "sum_over_data", lambda self, values: real(self, values.short())
    )


def fp8_operand_in_row_order() -> None:
    import torch
    from torchao.float8 import float8_ops

    real = torch._scaled_mm

    def scaled_mm(a: Any, b: Any, *args: Any, **kwargs: Any) -> Any:
        return real(a, b.contiguous(), *args, **kwargs)

    setattr(torch, "_scaled_mm", scaled_mm)  # noqa: B010
    assert float8_ops.torch is torch


def break_and_run(break_product: Callable[[], None] | None, case: Case) -> Report | str:
    if break_product is not None:
        break_product()
    (report,) = run_cases({"case": case}).values()
    return report


@pytest.mark.parametrize("case", [CASE, FP32, MASKED, FP8], ids=["bf16", "fp32", "mask", "fp8"])
def test_unchanged_product_passes(case: Case) -> None:
    report = on_fake_device(break_and_run, None, case)
    assert isinstance(report, Report), report
    assert not report.sdpa.get("math")


@pytest.mark.parametrize(
    ("break_product", "case", "message"),
    [
        (varlen_in_float32, FP32, "FlashAttention only support fp16 and bf16"),
        (offsets_in_int64, CASE, "cu_seqlens must have dtype int32"),
        (skip_flag_in_float64, CASE, "found_inf must be float32"),
        (master_weights_in_bf16, CASE, "assert"),
        (scalars_on_the_first_gpu, CASE, "cuda:6"),
        (frequencies_on_the_cpu, CASE, "copy.*cpu|device"),
        (skip_flag_read_by_the_host, CASE, "wait for a value"),
        (blocking_copy_to_the_device, CASE, "name='copy'"),
        (weights_read_in_a_thread_without_a_device, CASE, "has not called torch.cuda.set_device"),
        (gradients_reduced_in_int16, replace(CASE, mesh=(1, 2, 1, 1)), "Unconvertible NCCL type"),
        (fp8_operand_in_row_order, FP8, "col_major"),
    ],
)
def test_broken_product_fails(break_product: Callable[[], None], case: Case, message: str) -> None:
    report = on_fake_device(break_and_run, break_product, case)
    assert isinstance(report, str)
    assert re.search(message, report), report


def test_unexpanded_heads_fall_to_math_attention() -> None:
    broken = heads_not_expanded_for_a_mask
    report = on_fake_device(break_and_run, broken, MASKED, capability=(8, 0))
    assert isinstance(report, Report) and report.sdpa.keys() == {"math"}
