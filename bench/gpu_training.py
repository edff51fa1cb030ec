"""Training throughput on one GPU: 1B, 3B and 8B, the latter also in fp8.

    python -m bench.gpu_training [reduced] [case …] [key=value …]

Runs the steps of the recipes, compiled, with document masks. The data are bytes of the Python
standard library: token ids do not affect speed, and its files, longer than web pages, leave 92% of
a causal row's attention at 4,096 tokens and 87% at 8,192. Fewer micro-batches per step give AdamW a
larger weight. 8B uses int8 optimizer state to fit. `reduced` runs tiny eager models on CPU with
emulated fp8.
"""

import json
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, nullcontext
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

from bench.measurement import spread, write
from cli.arguments import CONF, hydra_arguments
from cli.config import check_config
from parallel.float8 import apply_float8
from parallel.mesh import MeshShape, Processes
from planning.calibration import SIZES, matrix_tflops
from planning.fit_check import check_plan, this_machine
from planning.hardware import hardware_of, load_hardware
from planning.memory import GIB, step_memory
from planning.request import PlanRequest, configured_choice
from planning.speed import step_time
from train import set_up, train_step
from training.config import JobConfig
from training.config_validation import ConfigError
from training.preflight import prepare_data
from training.resume_policy import Changes
from training.schedule import learning_rate
from training.throughput import build_throughput, peak_memory_gib

CASES: dict[str, tuple[str, ...]] = {
    "1b": ("experiment=h200_1b",),
    "3b": ("experiment=h200_3b",),
    "8b": ("experiment=h200_8b",),
    "8b_fp8": ("experiment=h200_8b", "precision.fp8=tensorwise"),  # the faster recipe
}
# On one H200; `share` is TFLOP/s of the step relative to a large bf16 product.
TARGETS: dict[str, dict[str, float]] = {
    "1b": {"tokens_per_second": 52_000},
    "3b": {"tokens_per_second": 23_000},
    "8b": {"tokens_per_second": 10_000, "share": 0.66},
    "8b_fp8": {"tokens_per_second": 12_200},
}
LOCAL = (
    *("data=stdlib", "tokenizer=byte", "validation.samples=0", "validation.sample_tokens=0"),
    "log.tensorboard=false",
)
TINY = (
    *("model.dim=64", "model.n_layers=2", "model.n_heads=4", "model.n_kv_heads=2"),
    *("model.ffn_dim=192", "model.vocab_size=512", "train.seq_len=64", "train.micro_batch_size=2"),
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
# Imports shared by all cases; the reduced ones fork from a process that has them.
IMPORTED = ["train", "resilience.launch", "checkpoint.restore", "training.throughput"]


def main() -> None:
    """Measure; with all cases, unmodified and on a GPU, write `bench/results/gpu_training.json`."""
    overrides = [word for word in sys.argv[1:] if "=" in word]
    names = [word for word in sys.argv[1:] if "=" not in word]
    reduced = "reduced" in names
    if not reduced and not torch.cuda.is_available():
        sys.exit("no GPU available; use python -m bench.gpu_training reduced")
    cases = [name for name in names if name != "reduced"] or list(CASES)
    results = {case: measure_in_process(case, reduced, overrides) for case in cases}
    failed = [case for case, result in results.items() if "failed" in result]
    target_rows: dict[str, Any] = {}
    if not reduced and is_h200():
        target_rows = {case: compare_targets(results[case], TARGETS[case]) for case in cases}
    record = {"cases": results, "aims": target_rows}
    if reduced or overrides or cases != list(CASES):
        print(json.dumps(record, indent=1))
    else:
        write(Path(__file__).stem, record)
    missed = [
        case for case, each in target_rows.items() if not all(row["met"] for row in each.values())
    ]
    assert not failed and not missed, f"failed: {failed}, targets missed: {missed}"


def is_h200() -> bool:
    """Return whether the GPU is the one that the targets apply to."""
    known = hardware_of(torch.cuda.get_device_name())
    return known is not None and known.name == "h200"


def compare_targets(results: dict[str, Any], targets: dict[str, float]) -> dict[str, Any]:
    """Return each target with the measured median; a missing measurement does not meet it."""
    rows = {}
    for name, target in targets.items():
        found = results[name]["median"] if name in results else None
        rows[name] = {"aim": target, "found": found, "met": found is not None and found >= target}
    return rows


def measure_in_process(case: str, reduced: bool, overrides: list[str]) -> dict[str, Any]:
    """Measure a case in a separate process, without compiled code or allocated memory."""
    context: Any = get_context("forkserver" if reduced else "spawn")  # CUDA does not support fork
    context.set_forkserver_preload(IMPORTED)
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        try:
            return pool.submit(measure, case, reduced, overrides).result()
        except Exception as error:  # continue with the other cases
            traceback.print_exception(error)
            return {"failed": f"{type(error).__name__}: {error}"}


def compose_case(case: str, reduced: bool, overrides: list[str]) -> DictConfig:
    """Compose the configuration of a case, with few micro-batches of the recipe's size."""
    given = [*CASES[case], *LOCAL, *(TINY if reduced else ()), *overrides]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose("train", hydra_arguments(given, "train"))
    config.train.global_batch_size = MICRO_BATCHES * config.train.micro_batch_size
    return config


def measure(case: str, reduced: bool, overrides: list[str]) -> dict[str, Any]:
    """Return the results of a case, or the reason why it cannot run here."""
    with tempfile.TemporaryDirectory() as folder, fp8_on_cpu() if reduced else nullcontext():
        try:
            given = compose_case(case, reduced, [*overrides, f"run.dir={folder}"])
            config, processes, mesh = check_config(given)
            check_plan(config, processes, mesh)
        except ConfigError as error:
            return {"skipped": str(error)}
        found = measure_steps(config, processes, mesh)
    return found | compare_plan(config, processes, mesh, found)


def measure_steps(config: JobConfig, processes: Processes, mesh: MeshShape) -> dict[str, Any]:
    """Return the speed of alternating steps and large products, and the memory of the steps."""
    run = set_up(config, processes, mesh, prepare_data(config), Changes())
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
    tokens = config.train.global_batch_size * config.train.seq_len
    spec, _ = PlanRequest(config, processes.accelerator, tokens).stages(
        configured_choice(config, mesh)
    )[0]
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


if __name__ == "__main__":
    main()
