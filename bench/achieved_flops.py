"""What of a matrix product's rate a whole training step keeps, eager and compiled, fp32 and bf16.

    python -m bench.achieved_flops

`train.py`'s own steps of a model of 49M parameters; before each, a large product of the same dtype.
The FLOPs are those of `model.flops`, causal. The aim: at least 65% where the CPU has tiles for bf16
(AMX), compiled; what other CPUs keep is told.
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
AIM = 0.65
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
MODEL = (
    *("model.dim=640", "model.n_layers=10", "model.n_heads=10", "model.n_kv_heads=5"),
    *("model.ffn_dim=1792", "model.max_seq_len=512", "train.seq_len=512"),
    *("train.global_batch_size=4", "data.document_mask=false", "parallel.accelerator=cpu"),
    *("log.tensorboard=false", "run.plan_check=off", "validation.samples=0"),
)


def main() -> None:
    """Measures and writes `bench/results/achieved_flops.json`; with `--case`, is one case."""
    if sys.argv[1:2] == ["--case"]:
        figures = measure(*sys.argv[2:4])
        Path(sys.argv[4]).write_text(json.dumps(figures))
        return
    amx = "amx_bf16" in Path("/proc/cpuinfo").read_text()
    found: dict[str, Any] = {"amx": amx}
    for compiled in ("false", "true"):
        for dtype in DTYPES:  # a process each: nothing is compiled yet
            with tempfile.NamedTemporaryFile() as file:
                command = [sys.executable, "-m", "bench.achieved_flops", "--case"]
                subprocess.run([*command, dtype, compiled, file.name], check=True)
                kind = "compiled" if compiled == "true" else "eager"
                found[f"{kind}_{dtype}"] = json.loads(Path(file.name).read_text())
    write(Path(__file__).stem, found)
    share = found["compiled_bf16"]["share"]["median"]
    assert share >= AIM or not amx, share


def measure(dtype: str, compiled: str) -> dict[str, Any]:
    """TFLOP/s of steps and of products that take turns, and the share of each pair."""
    with initialize_config_dir(str(CONF), version_base="1.3"), tempfile.TemporaryDirectory() as run:
        words = [*MODEL, f"run.dir={run}", f"precision.param={dtype}"]
        words.append(f"parallel.compile={compiled}")
        config, processes, mesh = check_config(compose("train", words))
        dataset = prepare_data(config)
        trained = set_up(config, processes, mesh, dataset, Changes())
        tokens = config.train.global_batch_size * config.train.seq_len
        of_step = flops_per_token(config.model, config.train.seq_len, causal=True) * tokens
        rates: dict[str, list[float]] = {"step": [], "product": []}
        for number, batch in zip(range(WARM_UP + STEPS), trained.batches(), strict=False):
            product = matrix_tflops("cpu", DTYPES[dtype], SIZE, PRODUCT_SECONDS)
            begin = time.perf_counter()
            train_step(trained, batch, config.optim.lr)
            step = of_step / (time.perf_counter() - begin) / 1e12
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
