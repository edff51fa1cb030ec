"""Memory per process of tensor parallelism on 1, 2, 4 and 8 processes, counted exactly.

    python -m bench.tp_memory

Trains the SwiGLU block of Lightning Fabric's tensor-parallel guide like the guide does, and a Llama
with our own parallelization, in real processes on CPU (8 GB of memory). Claims: sharded state
(weights, gradients, optimizer state) is within 2% of its fraction; and the counted bytes, with the
cuBLAS workspaces of a GPU, reproduce the guide's table to the last digit.
https://lightning.ai/docs/fabric/stable/advanced/model_parallel/tp.html
"""

import json
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning_fabric import Fabric
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from bench.measurement import write
from model.config import ModelConfig
from model.llama import FeedForward, Llama
from parallel.config import ParallelConfig, PrecisionConfig
from parallel.gradients import clip_grad_norm
from parallel.mesh import MeshShape
from parallel.parallelize import initialize_weights, parallelize
from parallel.strategy import MeshStrategy
from planning.memory_tracker import MemoryTracker
from training.config import OptimConfig
from training.optimizer import build_optimizer

PROCESSES = (1, 2, 4, 8)
MODELS = ("block", "llama")
STEPS = 2  # the first creates the optimizer state
TOLERANCE = 0.02
SHARDED = ("parameters", "gradients", "optimizer")
BLOCK = ModelConfig("block", 8192, 1, 64, 64, 8192, 1)
BLOCK_BATCH = 8
LLAMA = ModelConfig("llama", 1024, 4, 16, 8, 2816, 8192)
LLAMA_BATCH, LLAMA_SEQ = 2, 512
GUIDE_GB = {1: 4.04, 2: 2.03, 4: 1.02, 8: 0.60}
# GPU only: PyTorch's default before Hopper (:4096:2:16:8, in KiB), once per thread (forward and
# backward). CublasHandlePool.cpp; pytorch/pytorch#95668.
CUBLAS_BYTES = 2 * (4096 * 2 + 16 * 8) * 1024

Peaks = dict[str, dict[str, int]]


def main() -> None:
    """Run the benchmark and write `bench/results/tp_memory.json`.

    With an argument, run one process.
    """
    if len(sys.argv) > 1:
        measure(Path(sys.argv[1]))
        return
    ranks = {n: run(n) for n in PROCESSES}
    # The guide prints its first process as well; sharded state is equal on all.
    block, llama = ({n: found[0][model] for n, found in ranks.items()} for model in MODELS)
    for n, found in ranks.items():
        for peaks in found:
            for model in MODELS:
                share = sharded_bytes(peaks[model]) / sharded_bytes(ranks[1][0][model])
                assert abs(share * n - 1) <= TOLERANCE, (model, n, share)
        assert round(on_gpu(block[n]) / 1e9, 2) == GUIDE_GB[n], n
    results = {
        "block_cut_share": {
            n: sharded_bytes(block[n]) / sharded_bytes(block[1]) for n in PROCESSES
        },
        "llama_cut_share": {
            n: sharded_bytes(llama[n]) / sharded_bytes(llama[1]) for n in PROCESSES
        },
        "block_on_gpu_gb": {n: on_gpu(block[n]) / 1e9 for n in PROCESSES},
        "guide_gb": GUIDE_GB,
        "block_peak_bytes": block,
        "llama_peak_bytes": llama,
    }
    write(Path(__file__).stem, results)
    print(block_table(block))
    print(llama_table(llama))


def run(processes: int) -> list[dict[str, Peaks]]:
    """Run the processes and return the peaks of each by model."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += [f"--nproc-per-node={processes}", "-m", "bench.tp_memory", folder]
        subprocess.run(command, cwd=Path(__file__).parent.parent, check=True)
        files = [Path(folder) / f"{rank}.json" for rank in range(processes)]
        return [json.loads(file.read_text()) for file in files]


def measure(folder: Path) -> None:
    """Train both models in one process and write the peaks to `RANK.json`."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    found = {}
    for name, train in zip(MODELS, (train_block, train_llama), strict=True):
        with MemoryTracker() as tracker:
            train(tracker)
        found[name] = tracker.peaks
    (folder / f"{dist.get_rank()}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def train_block(tracker: MemoryTracker) -> None:
    """Train as in the guide: same plan, optimizer, batch, loss and variable lifetimes."""
    with torch.device("meta"):
        block = FeedForward(BLOCK)
    styles = {"w1": ColwiseParallel(), "w2": RowwiseParallel(), "w3": ColwiseParallel()}
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for name, style in styles.items():
        # As in the guide, each matrix is copied from the host and sharded before the next one.
        matrix = block.get_submodule(name).to_empty(device="cpu")
        matrix.reset_parameters()  # type: ignore[operator]
        if mesh.size() > 1:
            parallelize_module(matrix, mesh, style)
        del matrix
    optimizer = torch.optim.AdamW(block.parameters(), lr=3e-3, foreach=True)
    tracker.model, tracker.optimizer = block, optimizer
    for _ in range(STEPS):
        tracker.phase = "forward"
        batch = torch.randn(BLOCK_BATCH, BLOCK.dim)
        output = block(batch)
        loss = output.sum()
        tracker.phase = "backward"
        loss.backward()
        tracker.phase = "update"
        optimizer.step()
        optimizer.zero_grad()


def train_llama(tracker: MemoryTracker) -> None:
    """Train with the step of `train.py` on a mesh with `tp` only."""
    tp = dist.get_world_size()
    plan = partial(
        parallelize, parallel=ParallelConfig(tp=tp), precision=PrecisionConfig(param="fp32")
    )
    strategy = MeshStrategy(MeshShape(1, 1, 1, tp), plan)
    fabric = Fabric(accelerator="cpu", devices=tp, strategy=strategy)
    fabric.launch()
    with torch.device("meta"):
        llama = Llama(LLAMA)
    model = fabric.setup_module(llama)
    adamw = build_optimizer(llama, OptimConfig(lr=3e-4))
    optimizer: Any = fabric.setup_optimizers(adamw)
    tracker.model, tracker.optimizer = llama, adamw
    initialize_weights(llama, LLAMA, seed=0)
    tokens = torch.randint(0, LLAMA.vocab_size, (LLAMA_BATCH, LLAMA_SEQ))
    positions = torch.arange(LLAMA_SEQ).expand(LLAMA_BATCH, -1)
    for _ in range(STEPS):
        tracker.phase = "forward"
        loss = model(tokens, positions, tokens) / tokens.numel()
        tracker.phase = "backward"
        fabric.backward(loss)
        tracker.phase = "update"
        clip_grad_norm(llama, max_norm=1.0, extra_scalars=torch.empty(0))
        optimizer.step()
        optimizer.zero_grad()


def sharded_bytes(peaks: Peaks) -> int:
    """Return the bytes of weights, gradients and optimizer state during the update."""
    return sum(peaks["update"][category] for category in SHARDED)


def on_gpu(block: Peaks) -> int:
    """Return the expected `torch.cuda.max_memory_allocated` after the guide's program."""
    setup, *step = (sum(block[phase].values()) for phase in ("setup", "backward", "update"))
    return max(setup, max(step) + CUBLAS_BYTES)


def block_table(block: dict[int, Peaks]) -> str:
    """Return the block's memory in GB compared with the guide, with notes on replicated parts."""
    update = {n: peaks["update"] for n, peaks in block.items()}
    collected = {n: held.get("collectives", 0) for n, held in update.items()}
    rows = [
        ("weights, gradients, moments", {n: sharded_bytes(block[n]) for n in block}),
        ("AdamW's copies (1)", {n: held["update"] for n, held in update.items()}),
        (
            "batch, output (2)",
            {n: held["forward"] + collected[n] for n, held in update.items()},
        ),
        ("peak of a step", {n: sum(held.values()) for n, held in update.items()}),
        ("cuBLAS's workspaces (3)", dict.fromkeys(block, CUBLAS_BYTES)),
        ("peak while sharding (4)", {n: sum(block[n]["setup"].values()) for n in block}),
        ("the larger, with (3)", {n: on_gpu(block[n]) for n in block}),
    ]
    return "\n".join(
        [
            "\nSwiGLU block, dim 8,192, hidden 8,192, batch 8, float32: GB per process",
            *table(rows, 1e9, 4),
            f"{'the guide':<30}" + "".join(f"{gb:>10.2f}" for gb in GUIDE_GB.values()),
            "(1) foreach AdamW computes the square roots of all second moments at once; sharded.",
            "(2) Not sharded: each process has the full batch and the full, reduced output.",
            "(3) Not sharded and not measured (no GPU): 8.5 MB in each of the forward and the",
            "    backward thread, according to PyTorch's source.",
            "(4) A full matrix, and a contiguous copy of w2's column shards for sending: twice the",
            "    matrix, plus the shards created before. With 8 processes more than a step.",
        ]
    )


def llama_table(llama: dict[int, Peaks]) -> str:
    """Return the Llama's memory in MB: sharded state, and the peak of the backward."""
    peak = {n: peaks["backward"] for n, peaks in llama.items()}
    categories = sorted(peak[2], key=lambda category: -peak[2][category])
    gathered = (2 * LLAMA.n_layers + 1) * LLAMA_BATCH * LLAMA_SEQ * LLAMA.dim * 4 / 1e6
    rows = [
        ("weights, gradients, moments", {n: sharded_bytes(llama[n]) for n in llama}),
        *(("  " + c, {n: llama[n]["update"][c] for n in llama}) for c in SHARDED),
        ("peak, in the backward", {n: sum(held.values()) for n, held in peak.items()}),
        *(("  " + c, {n: held.get(c, 0) for n, held in peak.items()}) for c in categories),
    ]
    return "\n".join(
        [
            f"\nLlama, dim {LLAMA.dim}, {LLAMA.n_layers} layers, vocab {LLAMA.vocab_size}, "
            f"{LLAMA_BATCH} x {LLAMA_SEQ} tokens, float32: MB per process",
            *table(rows, 1e6, 2),
            "Gathered weights: FSDP2's copy, even for an axis of size 1; none in one process.",
            "Not sharded: norm weights, and the gathered inputs of the matrix products (two per",
            f"layer and one of the head), {gathered:.1f} MB by their shapes.",
        ]
    )


def table(rows: list[tuple[str, dict[int, int]]], unit: float, digits: int) -> list[str]:
    """Return aligned lines, one column per number of processes."""
    lines = [f"{'processes':<30}" + "".join(f"{n:>10}" for n in PROCESSES)]
    for label, values in rows:
        results = "".join(f"{values[n] / unit:>10.{digits}f}" for n in PROCESSES)
        lines.append(f"{label.replace('_', ' '):<30}{results}")
    return lines


if __name__ == "__main__":
    main()
