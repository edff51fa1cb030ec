"""Closed forms of step time against operations that are counted in a real step."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hydra import compose, initialize_config_dir
from torch.utils.flop_counter import FlopCounterMode

from cli.arguments import CONF, hydra_arguments, plan_arguments
from cli.config import load_plan_config, load_train_config
from model.config import ModelConfig
from model.init import initialize
from model.llama import Llama
from parallel.activation_checkpoint import apply_activation_checkpoint
from parallel.config import ParallelConfig, PrecisionConfig
from parallel.float8 import apply_float8
from parallel.mesh import MeshShape, Processes
from planning.activations import batch_bytes
from planning.fit_check import plan_request
from planning.hardware import FOLDER, load_hardware
from planning.request import configured_choice
from planning.speed import step_time
from planning.step_spec import StepSpec
from training import flash_attention

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


def test_turing_is_planned_in_float32_with_a_dense_document_mask(tmp_path: Path) -> None:
    """As `train.py` runs there; `auto` is bf16 and varlen on newer GPUs."""
    specs = []
    for capability in (7.5, 8.0):
        path = tmp_path / "gpu.yaml"
        values = yaml.safe_load((FOLDER / "a100.yaml").read_text()) | {"capability": capability}
        path.write_text(yaml.safe_dump(values))
        overrides = ["experiment=smoke", f"hardware={path}", "devices=1"]
        with initialize_config_dir(str(CONF), version_base="1.3"):
            config = load_plan_config(compose("plan", plan_arguments(overrides)))
        [(spec, _)] = config.request.stages(configured_choice(config, config.mesh))
        specs.append(spec)
    turing, ampere = specs
    assert (turing.precision.param, turing.attention) == ("fp32", "sdpa")
    assert (ampere.precision.param, ampere.attention) == ("bf16", "varlen")
    mask = turing.local_tokens * turing.seq_len * 4
    assert turing.has_dense_mask and batch_bytes(turing) == batch_bytes(ampere) + mask
    assert turing.expanded_kv_heads == turing.model.n_heads > ampere.expanded_kv_heads


def test_planned_kernel_is_the_one_that_runs() -> None:
    """Without a mask, all kernels are replaced by scaled_dot_product_attention."""
    spec = replace(small_spec(), accelerator="cuda", precision=PrecisionConfig("bf16", "fp32"))
    kernels: dict[str, Any] = {
        "varlen": {},
        "flex": {"mesh": MeshShape(1, 1, 2, 1)},
        "sdpa": {"document_mask": False},
    }
    for kernel, change in kernels.items():
        assert replace(spec, **change).attention == kernel


def test_dense_mask_doubles_the_flops_of_attention() -> None:
    spec = replace(small_spec(), accelerator="cuda")
    dense = replace(spec, model=replace(MODEL, attention="sdpa"))
    times = [step_time(each, HARDWARE).attention for each in (spec, dense)]
    assert times[1] == 2 * times[0]


def test_capability_of_older_hardware_files_follows_from_their_rates() -> None:
    for name, capability in (("h200", (9, 0)), ("a100", (8, 0))):
        assert load_hardware(name).compute_capability == capability
        assert replace(load_hardware(name), capability=None).compute_capability == capability


def test_rate_of_flash_attention_follows_the_version_where_it_runs() -> None:
    """FlexAttention and scaled_dot_product_attention do not use the packages."""
    hardware = load_hardware("h200")
    spec = replace(small_spec(), accelerator="cuda", precision=PrecisionConfig("bf16", "fp32"))
    ratio = hardware.flash_attention_tflops["FA3"] / hardware.attention_tflops["bf16"]
    for mesh, factor in ((MeshShape(1, 1, 1, 1), ratio), (MeshShape(1, 1, 2, 1), 1)):
        second, third = (
            step_time(replace(spec, mesh=mesh, flash_attention=name), hardware).attention
            for name in ("FA2", "FA3")
        )
        assert second == pytest.approx(factor * third)
    without = replace(hardware, flash_attention_tflops={})  # a file of an older version
    newer = replace(spec, flash_attention="FA3")
    assert step_time(newer, without).attention == step_time(spec, hardware).attention


@pytest.mark.parametrize("installed", ["FA2", "FA3"])
def test_plan_of_a_run_uses_the_installed_flash_attention(
    installed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = installed == "FA3"
    monkeypatch.setattr(flash_attention, "_is_installed", lambda _: found)
    with initialize_config_dir(str(CONF), version_base="1.3"):
        words = hydra_arguments(["experiment=h200_8b"], "train")
        config = load_train_config(compose("train", words))
    mesh, processes = MeshShape(1, 1, 1, 1), Processes("cuda", 1, 1, "self", (9, 0))
    request, choice = plan_request(config, processes, mesh)
    assert {spec.flash_attention for spec, _ in request.stages(choice)} == {installed}
