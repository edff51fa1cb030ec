"""Time and memory to trace the largest published model on 512 ranks, including imports.

    python -m bench.plan_trace

Claims: less than 30 s and 1 GB on two cores; the closed forms are within 5% of the trace.
"""

import json
import resource
import subprocess
import sys
import time
from pathlib import Path

from hydra import compose, initialize_config_dir

from bench.measurement import write
from cli.arguments import CONF
from cli.config import load_train_config
from parallel.config import ParallelConfig, PrecisionConfig
from parallel.mesh import MeshShape
from planning.memory import step_memory
from planning.step_spec import StepSpec

RUNS = 3
SECONDS, GB, TOLERANCE = 30, 1.0, 0.05


def main() -> None:
    """Run the benchmark and write `bench/results/plan_trace.json`; with `--trace`, trace once."""
    if sys.argv[1:] == ["--trace"]:
        print(json.dumps(trace()))
        return
    command = [sys.executable, "-m", "bench.plan_trace", "--trace"]
    runs = []
    for _ in range(RUNS):
        start = time.perf_counter()
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        runs.append({"seconds": time.perf_counter() - start, **json.loads(output)})
    write(Path(__file__).stem, {"runs": runs})
    for run in runs:
        assert run["seconds"] < SECONDS and run["peak_gb"] < GB, run
        assert abs(run["analytic_over_traced"] - 1) <= TOLERANCE, run


def trace() -> dict[str, float]:
    """Trace a step of Llama 3.1 405B, with full activation checkpointing, on dp_shard=64 × tp=8."""
    from planning.tracing import trace_memory

    overrides = [
        "model=llama3_1_405b",
        "data=fineweb_edu",
        "tokenizer=llama3",
        "train.seq_len=8192",
    ]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = load_train_config(compose("train", overrides))
    spec = StepSpec(
        model=config.model,
        mesh=MeshShape(1, 64, 1, 8),
        parallel=ParallelConfig(activation_checkpoint="full"),
        precision=PrecisionConfig("bf16", "fp32"),
        accelerator="cuda",
        seq_len=8192,
        global_batch_size=64,
        micro_batch_size=1,
    )
    traced = trace_memory(spec).peak
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {
        "traced_gib": traced / 2**30,
        "analytic_over_traced": step_memory(spec).peak / traced,
        "peak_gb": peak / 1e9,
    }


if __name__ == "__main__":
    main()
