"""Closed forms of step time against operations that are counted in a real step."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from model.config import ModelConfig
from model.init import initialize
from model.llama import Llama
from parallel.activation_checkpoint import apply_activation_checkpoint
from parallel.config import ParallelConfig, PrecisionConfig
from parallel.float8 import apply_float8
from parallel.mesh import MeshShape
from planning.hardware import load_hardware
from planning.speed import step_time
from planning.step_spec import StepSpec

MODEL = ModelConfig("small", 64, 2, 4, 2, 96, 80)
BATCH, SEQ = 2, 32
# One TFLOP/s in all products, which the bandwidth does not limit.
HARDWARE = replace(
    load_hardware("cpu"), matrix_tflops={"fp32": 1, "bf16": 1, "fp8": 1}, bandwidth_gb_s=1e9
)


def small_spec(fp8: Any = None, **parallel: Any) -> StepSpec:
    """Return a step of one process on CPU, uncompiled."""
    return StepSpec(
        model=MODEL,
        mesh=MeshShape(1, 1, 1, 1),
        parallel=ParallelConfig(compile=False, **parallel),
        precision=PrecisionConfig("fp32", "fp32", fp8=fp8),
        accelerator="cpu",
        seq_len=SEQ,
        global_batch_size=BATCH,
        micro_batch_size=BATCH,
    )


def counted_product_flops(fp8: Any, checkpoint: Any) -> int:
    """Return the FLOPs of matrix products in forward and backward of one batch."""
    model = Llama(MODEL)
    initialize(model, MODEL, 7)
    if fp8:
        apply_float8(model, fp8, emulate=True)
    if checkpoint != "none":
        apply_activation_checkpoint(model, checkpoint)
    tokens = torch.zeros(BATCH, SEQ, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter:
        model(tokens, None, tokens).backward()
    counts = counter.get_flop_counts()["Global"]
    return sum(counts.get(each, 0) for each in (torch.ops.aten.mm, torch.ops.aten.addmm))


@pytest.mark.parametrize("checkpoint", ["none", "selective", "full"])
@pytest.mark.parametrize("fp8", [None, "tensorwise", "rowwise"])
def test_planned_flops_of_products_are_those_of_a_step(fp8: Any, checkpoint: Any) -> None:
    """In fp8, `full` repeats all products of a block, else all but the last."""
    spec = small_spec(fp8, activation_checkpoint=checkpoint)
    planned = step_time(spec, HARDWARE).matrix * 1e12
    assert planned == pytest.approx(counted_product_flops(fp8, checkpoint))
