"""Published runs as the planner's input: a step and the hardware that it ran on."""

import re
from dataclasses import replace
from typing import Any

from published_runs import MODELS, REPORTS, PublishedRun

from parallel.config import ParallelConfig, PrecisionConfig
from parallel.mesh import MeshShape
from planning.frameworks import FRAMEWORKS
from planning.hardware import Hardware, known_hardware, load_hardware
from planning.plan import Plan
from planning.step_spec import StepSpec

KERNELS = {"fa2": "FA2", "fa3": "FA3", "cudnn": "cuDNN", "triton": "Triton", None: "FA2"}
FP8: dict[str, Any] = {"none": None, "rowwise": "rowwise"}
"""Blockwise and mx scale smaller blocks in the kernels that write a tensor: as `tensorwise`."""
H100_PEAK_GB_S = 3350
NETWORK = 0.9  # of the peak, as in the hardware files


def can_be_planned(run: PublishedRun) -> bool:
    """Return whether a run states all that a plan needs, and its hardware has a file."""
    return run.usable and run.hardware in known_hardware()


def checkpoint_of(run: PublishedRun) -> Any:
    """Return the setting of `parallel.activation_checkpoint` that recomputes as much."""
    mode = run.activation_checkpoint or "none"
    if mode.startswith("layers:"):
        return 1 - int(mode.removeprefix("layers:")) / MODELS[run.model].n_layers
    if mode == "op" or mode.startswith("ops:"):
        return "selective"
    return {"every_2nd_layer": 0.5}.get(mode, mode)


def framework_of(run: PublishedRun) -> str:
    """Return the framework; a variant that recomputes what the run does is added if needed."""
    report = REPORTS[run.report]
    name = report.framework
    if name == "torchtitan" and report.published < "2025-02":  # before its loss was compiled
        name = "torchtitan-2024"
    mode = run.activation_checkpoint or ""
    if not mode.startswith("ops:"):
        return name
    parts = mode.removeprefix("ops:").split("+")
    published, model = MODELS[run.model], MODELS[run.model].config
    square, ffn = model.dim * model.dim, model.dim * model.ffn_dim
    wi = 3 * ffn * (published.ffn_matrices - 1) / published.ffn_matrices
    elements = {"wi": wi, "ffn": wi, "wo": square}  # the last product of a block is not needed
    all_elements = 2 * square + 2 * square * model.n_kv_heads / model.n_heads + 2 * ffn
    products = sum(elements.get(part, 0) for part in parts) / all_elements
    selective = (products, 1.0, float("attention" in parts))
    FRAMEWORKS[f"{name} {mode}"] = replace(FRAMEWORKS[name], selective=selective)
    return f"{name} {mode}"


def step_of(run: PublishedRun) -> StepSpec:
    """Return the step of a run."""
    mesh = MeshShape(run.dp_replicate, run.dp_shard, run.cp, run.tp, run.pp)
    virtual = re.search(r"virtual pipeline (\d+)", run.notes)
    fused = REPORTS[run.report].stack in ("transformer-engine", "c++", "jax")
    assert run.micro_batch_size is not None and run.micro_batches is not None
    return StepSpec(
        model=MODELS[run.model].config,
        mesh=mesh,
        parallel=ParallelConfig(
            pp=run.pp,
            pp_parts=int(virtual[1]) if virtual else 1,
            compile=run.compile or fused,
            activation_checkpoint=checkpoint_of(run),
            async_tp=bool(run.async_tp),
            # KempnerForge gathers the logits (kempnerforge/distributed/tensor_parallel.py).
            loss_parallel=REPORTS[run.report].framework != "kempnerforge",
            reshard_after_forward=None if run.sharding == "fsdp" else False,
        ),
        precision=PrecisionConfig(
            "bf16",
            run.reduce_dtype or "fp32",
            run.optimizer_state or "fp32",
            FP8.get(run.fp8, "tensorwise"),
        ),
        accelerator="cuda",
        seq_len=run.seq_len,
        global_batch_size=run.micro_batch_size * run.micro_batches * mesh.dp,
        micro_batch_size=run.micro_batch_size,
        document_mask=False,
        flash_attention=KERNELS[run.attention],
        framework=framework_of(run),
    )


def hardware_of_run(run: PublishedRun) -> Hardware:
    """Return the hardware file with the differences that the source states."""
    hardware = load_hardware(run.hardware)
    if run.power_watts is not None:
        hardware = hardware.with_power_limit(run.power_watts)
    if run.peak_bandwidth_gb_s is not None:
        hardware = replace(
            hardware,
            bandwidth_gb_s=hardware.bandwidth_gb_s * run.peak_bandwidth_gb_s / H100_PEAK_GB_S,
        )
    if run.network_gb_s is not None:
        hardware = replace(hardware, network_gb_s=NETWORK * run.network_gb_s)
    if run.devices_per_node is not None:
        hardware = replace(hardware, devices_per_node=run.devices_per_node)
    return hardware


def planned_tokens_per_second(run: PublishedRun) -> float:
    """Return the planned tokens/s per device."""
    return Plan(step_of(run), hardware_of_run(run), 0, {}).tokens_per_second_per_device
