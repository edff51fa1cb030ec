"""Closed forms of step time against operations that are counted in a real step."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

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
from parallel.mesh import MeshShape
from planning import plan_json, report
from planning.activations import batch_bytes
from planning.config import PlanJobConfig
from planning.config_warnings import flash_attention_warnings
from planning.fit_check import plan_request
from planning.hardware import FOLDER, load_hardware
from planning.plan import RunPlan, plan_run
from planning.request import configured_choice
from planning.speed import RankCosts, step_time
from planning.step_spec import StepSpec
from resilience.processes import Processes
from training import flash_attention
from training.console import Console

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


def planned_config(*overrides: str) -> Any:
    words = plan_arguments(["experiment=h100x8_8b", *overrides])
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return load_plan_config(compose("plan", words))


@pytest.mark.parametrize(
    ("words", "name", "use"),
    [
        ("flash_attention_impl=FA3", "FlashAttention-3", None),
        ("parallel.dp_shard=4 parallel.cp=2", "FlexAttention", None),
        ("flash_attention_impl=FA3 parallel.dp_shard=4 parallel.cp=2", "FlexAttention", "cp=1"),
        ("flash_attention_impl=FA3 model.attention=sdpa", "SDPA, dense mask", "attention=auto"),
        ("flash_attention_impl=FA3 data.document_mask=false", "SDPA", "document_mask=true"),
        ("flash_attention_impl=FA3 precision.param=fp32", "FlexAttention", "param=bf16"),
        (
            "flash_attention_impl=FA3 model.attention=flex data.document_mask=false "
            "parallel.dp_shard=4 parallel.cp=2",
            "FlexAttention",
            "parallel.cp=1 model.attention=auto data.document_mask=true",
        ),
        ("flash_attention_impl=FA3 model.dim=8320", "SDPA, dense mask", "impl=FA2"),
        ("flash_attention_impl=cuDNN", "FlashAttention-2", "flash_attention_impl=FA2"),
        ("flash_attention_impl=cuDNN framework=nemo", "cuDNN", None),
        ("hardware=cpu precision.fp8=null", "SDPA, dense mask", None),
    ],
)
def test_plan_names_attention_and_warns_if_the_given_kernel_does_not_run(
    words: str, name: str, use: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    def plan(words: str) -> tuple[PlanJobConfig, RunPlan]:
        config = planned_config(*words.split(), "parallel.devices=null")
        choice = configured_choice(config, config.mesh)
        return config, plan_run(config.request.stages(choice), config.device)

    config, run = plan(words)
    assert plan_json.plan_record(config, run)["attention"] == name
    report.print_plan(Console(enabled=True), config, run)
    assert re.search(rf"^  attention +{name}$", capsys.readouterr().out, re.MULTILINE)
    warnings = list(flash_attention_warnings(run.stages[0].spec))
    assert bool(warnings) == (use is not None)
    if use is not None:
        assert warnings[0].startswith("flash_attention_impl=") and use in warnings[0]
        remedies = warnings[0].rpartition("; use ")[2].partition(",")[0]
        for change in remedies.split(" or "):
            change += " parallel.dp_shard=8" if "cp=1" in change else ""
            assert not list(flash_attention_warnings(plan(f"{words} {change}")[1].stages[0].spec))


def test_power_limit_slows_computation_but_not_memory_and_links() -> None:
    """As measured for bf16 products: 585 TFLOP/s at 500 W, 765 at 700 W."""
    full, limited = planned_config().device, planned_config("power_limit_watts=500").device
    ratio = limited.matrix_tflops["bf16"] / full.matrix_tflops["bf16"]
    assert ratio == pytest.approx(585 / 765, rel=0.01)
    assert limited.attention_tflops["bf16"] < full.attention_tflops["bf16"]
    assert (limited.bandwidth_gb_s, limited.link_gb_s) == (full.bandwidth_gb_s, full.link_gb_s)
    assert limited.power_watts == 500


def test_framework_of_a_plan_changes_its_steps() -> None:
    config = planned_config("framework=nemo")
    [(spec, _)] = config.request.stages(configured_choice(config, config.mesh))
    assert spec.framework == "nemo"
    assert step_time(spec, config.device) != step_time(
        replace(spec, framework="llamesh"), config.device
    )


def narrow(model: ModelConfig, tp: int) -> StepSpec:
    """Return a step on a GPU whose products are `tp` times narrower."""
    return StepSpec(
        model=model,
        mesh=MeshShape(1, 1, 1, tp),
        parallel=ParallelConfig(compile=True),
        precision=PrecisionConfig("bf16", "fp32"),
        accelerator="cuda",
        seq_len=8192,
        global_batch_size=2,
        micro_batch_size=2,
    )


def test_narrow_products_are_slower_than_large_ones() -> None:
    """A product of an eighth of the width takes more than an eighth of the time."""
    model = ModelConfig("8b", 4096, 32, 32, 8, 14336, 128256)
    hardware = load_hardware("h100")
    seconds = [step_time(narrow(model, tp), hardware).matrix for tp in (1, 8)]
    assert 1.1 < 8 * seconds[1] / seconds[0] < 1.6


def test_large_product_alone_has_the_rate_of_the_hardware_file() -> None:
    model = ModelConfig("8b", 4096, 32, 32, 8, 14336, 128256)
    costs = RankCosts(narrow(model, 1), load_hardware("h100"))
    costs.efficiency = 1.0
    for dtype in ("bf16", "fp8"):
        rate = 2 * 8192**3 / costs.product(8192, 8192, 8192, dtype) / 1e12
        assert rate == pytest.approx(load_hardware("h100").matrix_tflops[dtype], rel=0.01)


def test_small_eager_steps_wait_for_the_host() -> None:
    small = replace(narrow(ModelConfig("1b", 2048, 16, 32, 8, 8192, 128256), 1), seq_len=256)
    eager = replace(small, parallel=replace(small.parallel, compile=False))
    hardware = load_hardware("h100")
    assert step_time(eager, hardware).host > step_time(small, hardware).host
    large = replace(eager, seq_len=8192)
    assert step_time(large, hardware).host == 0


def test_rowwise_fp8_is_slower_than_tensorwise() -> None:
    """By 10% in Llama 3 8B on 8 H100 (github.com/pytorch/torchtitan/pull/808: 6,468 and 7,186)."""
    model = ModelConfig("8b", 4096, 32, 32, 8, 14336, 128256)
    spec = replace(narrow(model, 1), mesh=MeshShape(1, 8, 1, 1), global_batch_size=8)
    spec = replace(spec, micro_batch_size=1, framework="torchtitan")
    hardware = load_hardware("h100").with_power_limit(500)
    seconds = {}
    for fp8 in ("tensorwise", "rowwise"):
        parallel = replace(spec.parallel, activation_checkpoint="selective")
        precision = PrecisionConfig("bf16", "fp32", fp8=cast(Any, fp8))
        step = replace(spec, parallel=parallel, precision=precision)
        seconds[fp8] = step_time(step, hardware).total
    assert seconds["tensorwise"] / seconds["rowwise"] == pytest.approx(6468 / 7186, abs=0.04)
