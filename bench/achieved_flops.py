"""Fraction of a matrix product's rate that a training step achieves, eager and compiled.

    python -m bench.achieved_flops

Runs `train.py` steps of a 49M-parameter model in fp32 and bf16, with a large product of the same
data type before each. FLOPs are those of `model.flops`, causal. Target: at least 65% compiled in
bf16 on CPUs with bf16 tiles (AMX); results of other CPUs are only reported.
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir

from bench.measurement import spread, write
from cli.arguments import CONF
from cli.config import check_config
from model.flops import flops_per_token, parameter_count
from planning.calibration import matrix_tflops
from train import set_up, train_step
from training.preflight import prepare_data
from training.resume_policy import Changes

WARM_UP, STEPS, SIZE, PRODUCT_SECONDS = 2, 9, 2048, 0.1
TARGET = 0.65
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
MODEL = (
    *("model.dim=640", "model.n_layers=10", "model.n_heads=10", "model.n_kv_heads=5"),
    *("model.ffn_dim=1792", "model.max_seq_len=512", "train.seq_len=512"),
    *("train.global_batch_size=4", "data.document_mask=false", "parallel.accelerator=cpu"),
    *("log.tensorboard=false", "run.plan_check=off", "validation.samples=0"),
)


def main() -> None:
    """Run the benchmark and write `bench/results/achieved_flops.json`; with `--case`, run one."""
    if sys.argv[1:2] == ["--case"]:
        results = measure(*sys.argv[2:4])
        Path(sys.argv[4]).write_text(json.dumps(results))
        return
    amx = "amx_bf16" in Path("/proc/cpuinfo").read_text()
    cases: dict[str, Any] = {"amx": amx}
    for compiled in ("false", "true"):
        for dtype in DTYPES:  # one process each, without compiled code of other cases
            with tempfile.NamedTemporaryFile() as file:
                command = [sys.executable, "-m", "bench.achieved_flops", "--case"]
                subprocess.run([*command, dtype, compiled, file.name], check=True)
                kind = "compiled" if compiled == "true" else "eager"
                cases[f"{kind}_{dtype}"] = json.loads(Path(file.name).read_text())
    write(Path(__file__).stem, cases)
    share = cases["compiled_bf16"]["share"]["median"]
    assert share >= TARGET or not amx, share


def measure(dtype: str, compiled: str) -> dict[str, Any]:
    """Return TFLOP/s of alternating steps and products, and the ratio of each pair."""
    with initialize_config_dir(str(CONF), version_base="1.3"), tempfile.TemporaryDirectory() as run:
        overrides = [*MODEL, f"run.dir={run}", f"precision.param={dtype}"]
        overrides.append(f"parallel.compile={compiled}")
        config, processes, mesh = check_config(compose("train", overrides))
        dataset = prepare_data(config)
        trained = set_up(config, processes, mesh, dataset, Changes())
        tokens = config.train.global_batch_size * config.train.seq_len
        step_flops = flops_per_token(config.model, config.train.seq_len, causal=True) * tokens
        rates: dict[str, list[float]] = {"step": [], "product": []}
        for number, batch in zip(range(WARM_UP + STEPS), trained.batches(), strict=False):
            product = matrix_tflops("cpu", DTYPES[dtype], SIZE, PRODUCT_SECONDS)
            start = time.perf_counter()
            train_step(trained, batch, config.optim.lr)
            step = step_flops / (time.perf_counter() - start) / 1e12
            if number >= WARM_UP:
                rates["step"].append(step)
                rates["product"].append(product)
    pairs = zip(rates["step"], rates["product"], strict=True)
    return {
        "parameters": parameter_count(config.model),
        "step_tflops": spread(rates["step"]),
        "product_tflops": spread(rates["product"]),
        "share": spread([step / product for step, product in pairs]),
    }


if __name__ == "__main__":
    main()
