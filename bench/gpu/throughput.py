"""Throughput and memory of training on one GPU: 1B, 3B and 8B, the latter also in fp8.

Runs the steps of the recipes, compiled, with document masks, on mock data. Fewer micro-batches per
step give AdamW a larger weight. 8B uses int8 optimizer state to fit. Each step alternates with a
large matrix product, whose rate shows the state of the GPU. One more step is profiled: its rows
explain a missed target. In reduced form tiny eager models run on CPU with emulated fp8.
"""

import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

from bench.gpu.parts import Rows
from bench.measurement import spread
from cli.arguments import CONF, hydra_arguments
from cli.config import check_config
from parallel.float8 import apply_float8
from parallel.mesh import MeshShape
from planning.calibration import SIZES, matrix_tflops
from planning.fit_check import check_plan, plan_request, this_machine
from planning.hardware import hardware_of, load_hardware
from planning.memory import GIB, step_memory
from planning.speed import step_time
from resilience.processes import Processes
from train import set_up, train_step
from training.config import JobConfig
from training.config_validation import ConfigError
from training.preflight import prepare_data
from training.profile import TRACE, profile_step, read_breakdown
from training.resume_policy import Changes
from training.run import Run
from training.schedule import learning_rate
from training.throughput import build_throughput, peak_memory_gib

CASES: dict[str, tuple[str, ...]] = {
    "1b": ("experiment=h200_1b",),
    "3b": ("experiment=h200_3b",),
    "8b": ("experiment=h200_8b",),
    "8b_fp8": ("experiment=h200_8b", "precision.fp8=tensorwise"),  # the faster recipe
}
# Tokens/s on one H200, with FlashAttention-2 and with a later one.
TARGETS = {
    "1b": (52_000, 52_000),
    "3b": (21_000, 21_000),
    "8b": (9_800, 10_700),
    "8b_fp8": (12_000, 12_000),
}
MEMORY_ERROR = 0.1  # of the planned peak against the allocator's
LOCAL = (
    *("data=mock", "validation.samples=0", "validation.sample_tokens=0", "log.tensorboard=false"),
)
TINY = (
    *("model.dim=64", "model.n_layers=2", "model.n_heads=4", "model.n_kv_heads=2"),
    *("model.ffn_dim=192", "model.vocab_size=512", "train.seq_len=64", "train.micro_batch_size=2"),
    "tokenizer=byte",
    *("parallel.accelerator=cpu", "parallel.compile=false", "precision.param=bf16"),
)
MICRO_BATCHES = 4  # per step, which takes seconds on an H200
WARM_UP, STEPS = 2, {"cuda": 7, "cpu": 3}
PRODUCT_SECONDS = {"cuda": 0.3, "cpu": 0.02}
PRODUCT_SIZE = {"cuda": SIZES["cuda"]["product"], "cpu": 128}
METRICS = (
    *("tokens_per_second", "tflops", "mfu_causal", "step_seconds"),
    *("product_tflops", "share"),
)


def case_1b(reduced: bool) -> Rows:
    return measure_case("1b", reduced)


def case_3b(reduced: bool) -> Rows:
    return measure_case("3b", reduced)


def case_8b(reduced: bool) -> Rows:
    return measure_case("8b", reduced)


def case_8b_fp8(reduced: bool) -> Rows:
    return measure_case("8b_fp8", reduced)


def measure_case(case: str, reduced: bool) -> Rows:
    """Yield speed and memory of a case, each against its target, and the profile of a step."""
    with tempfile.TemporaryDirectory() as folder, fp8_on_cpu() if reduced else nullcontext():
        try:
            given = compose_case(case, reduced, [f"run.dir={folder}"])
            config, processes, mesh = check_config(given)
            check_plan(config, processes, mesh)
        except ConfigError as error:
            yield "speed", {"skipped": str(error)}
            return
        run = set_up(config, processes, mesh, prepare_data(config), Changes())
        found = measure_steps(run)
        found |= compare_plan(config, processes, mesh, found)
        yield "speed", found | compare_target(case, found)
        yield "memory", compare_memory(found)
        yield "profile", profile(run)


def compare_target(case: str, found: dict[str, Any]) -> dict[str, Any]:
    """Return the target of a case and whether it is met, on the GPU that it applies to."""
    if not is_h200():
        return {}
    implementation = flash_implementation()
    target = TARGETS[case][implementation != "FA2"]
    met = found["tokens_per_second"]["median"] >= target
    return {"flash_attention": implementation, "target": target, "passed": met}


def flash_implementation() -> str:
    """Return the FlashAttention implementation that runs."""
    current = getattr(torch.nn.attention, "current_flash_attention_impl", lambda: None)
    return current() or "FA2"


def compare_memory(found: dict[str, Any]) -> dict[str, Any]:
    """Return the planned peak and the allocator's, which agree within `MEMORY_ERROR` on a GPU."""
    planned, actual = found["planned"]["peak_memory_gib"], found["peak_memory_gib"]
    row = {"planned_gib": planned, "peak_gib": actual, "error": planned / actual - 1}
    on_gpu = found["reserved_gib"] is not None
    return row | ({"passed": abs(row["error"]) < MEMORY_ERROR} if on_gpu else {})


def profile(run: Run) -> dict[str, Any]:
    """Return seconds and fraction of one step by category, longest first."""
    batches = run.batches()
    batch = next(batches)
    batches.close()
    step = run.position.step + 1
    with profile_step(run, step):
        train_step(run, batch, learning_rate(step, run.config.optim))
    found = read_breakdown(run.folder.path / "profile" / f"step-{step:08d}" / TRACE)
    rows = sorted(found.rows.items(), key=lambda row: -row[1])
    seconds = {name: round(value, 4) for name, value in rows}
    fractions = {name: round(value / found.total, 3) for name, value in rows}
    return {"seconds": seconds, "fractions": fractions, "total_seconds": round(found.total, 4)}


def is_h200() -> bool:
    """Return whether the GPU is the one that the targets apply to."""
    if not torch.cuda.is_available():
        return False
    known = hardware_of(torch.cuda.get_device_name())
    return known is not None and known.name == "h200"


def compose_case(case: str, reduced: bool, overrides: Sequence[str] = ()) -> DictConfig:
    """Compose the configuration of a case, with few micro-batches of the recipe's size."""
    given = [*CASES[case], *LOCAL, *(TINY if reduced else ()), *overrides]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose("train", hydra_arguments(given, "train"))
    config.train.global_batch_size = MICRO_BATCHES * config.train.micro_batch_size
    return config


def measure_steps(run: Run) -> dict[str, Any]:
    """Return the speed of alternating steps and large products, and the memory of the steps."""
    config, mesh = run.config, run.mesh
    device, tokens = run.fabric.device, config.train.global_batch_size * config.train.seq_len
    kind, on_gpu = device.type, device.type == "cuda"
    throughput = build_throughput(config, mesh, device, config.train.seq_len)
    rows = []
    batches = run.batches()
    run.garbage.disable()
    for number in range(WARM_UP + STEPS[kind]):
        if number == WARM_UP and on_gpu:
            torch.cuda.reset_peak_memory_stats()
        rate = learning_rate(number, config.optim)
        size, seconds = PRODUCT_SIZE[kind], PRODUCT_SECONDS[kind]
        product = matrix_tflops(kind, torch.bfloat16, size, seconds)
        start = time.perf_counter()
        batch = next(batches)
        data_wait_seconds = time.perf_counter() - start
        scalars = train_step(run, batch, rate)["scalars"]
        if on_gpu:
            torch.cuda.synchronize()
        row = throughput.metrics(tokens, time.perf_counter() - start, data_wait_seconds, steps=1)
        assert scalars.isfinite().all(), "an update was skipped"
        assert row["tflops"] is not None
        rows.append(row | {"product_tflops": product, "share": row["tflops"] / product})
        run.garbage.run(number + 1)
    columns: dict[str, list[Any]] = {
        name: [row[name] for row in rows[WARM_UP:]] for name in METRICS
    }
    return {
        "micro_batch_size": config.train.micro_batch_size,
        "optimizer_state": config.precision.optimizer_state,
        "fp8": config.precision.fp8,
        # MFU is None under fp8 and without a known peak.
        **{name: None if None in found else spread(found) for name, found in columns.items()},
        "peak_memory_gib": peak_memory_gib(device),
        "reserved_gib": torch.cuda.max_memory_reserved() / GIB if on_gpu else None,
    }


def compare_plan(
    config: JobConfig, processes: Processes, mesh: MeshShape, found: dict[str, Any]
) -> dict[str, Any]:
    """Return the planner's prediction of the step and its error; on CPU, that of an H200."""
    on_gpu = processes.accelerator == "cuda"
    hardware = this_machine(processes)[0] if on_gpu else load_hardware("h200")
    request, choice = plan_request(config, processes, mesh)
    spec, _ = request.stages(choice)[0]
    planned = {"peak_memory_gib": step_memory(spec).peak / GIB}
    if hardware is not None:
        planned["step_seconds"] = step_time(spec, hardware).total
    actual = {
        "peak_memory_gib": found["peak_memory_gib"],
        "step_seconds": found["step_seconds"]["median"],
    }
    errors = {name: value / actual[name] - 1 for name, value in planned.items()}
    name = hardware.name if hardware is not None else None
    return {"planned": planned, "plan_error": errors, "planned_hardware": name}


@contextmanager
def fp8_on_cpu() -> Iterator[None]:
    """Skip the rule that rejects fp8 on CPU; torchao emulates it in float32."""
    emulated = partial(apply_float8, emulate=True)
    with (
        patch("training.config_rules.fp8_errors", lambda *_: []),
        patch("parallel.float8.apply_float8", emulated),
    ):
        yield
