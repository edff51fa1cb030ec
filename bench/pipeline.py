"""Step time of two pipeline stages on CPU: measured, predicted from the stages' times, and next to
tensor and data parallelism.

    python -m bench.pipeline [rounds]

Two processes with one thread each hold the model on three meshes and run their steps in turn, with
4 and 16 micro-batches. A stage's forward and backward are timed alone, with both stages computing
at the same time. Claim: the median step is within 2% of the one that follows from these times and
the order of `parallel.pipeline_schedule`.
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning_fabric import Fabric
from torch import Tensor

from bench.measurement import spread, write
from model.config import ModelConfig
from model.llama import Llama
from parallel.config import ParallelConfig, PrecisionConfig
from parallel.data_parallel import hold_gradients
from parallel.gradients import clip_grad_norm
from parallel.mesh import MeshShape
from parallel.parallelize import initialize_weights, parallelize
from parallel.pipeline_schedule import Transfer, bubble, operations
from parallel.strategy import MeshStrategy
from training.config import OptimConfig
from training.optimizer import build_optimizer

RANKS, ROUNDS = 2, 15
MICRO_BATCHES = (4, 16)
MODEL = ModelConfig("bench", 256, 8, 8, 4, 704, 4096)
SEQ_LEN = 512
TOLERANCE = 0.02
MESHES = {
    "pp=2": MeshShape(1, 1, 1, 1, pp=2),
    "pp=2, two parts": MeshShape(1, 1, 1, 1, pp=2),
    "tp=2": MeshShape(1, 1, 1, 2),
    "dp_shard=2": MeshShape(1, 2, 1, 1),
}


def main() -> None:
    """Run the benchmark and write `bench/results/pipeline.json`; with a folder, run one process."""
    argument = sys.argv[1] if len(sys.argv) > 1 else str(ROUNDS)
    if not argument.isdigit():
        measure(Path(argument))
        return
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "rounds").write_text(argument)
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += [f"--nproc-per-node={RANKS}", "-m", "bench.pipeline", folder]
        subprocess.run(command, cwd=Path(__file__).parent.parent, check=True)
        ranks = [json.loads((Path(folder) / f"{r}.json").read_text()) for r in range(RANKS)]
    rows: dict[str, Any] = {}
    for name, count in ((name, count) for count in MICRO_BATCHES for name in MESHES):
        key = f"{name}, {count} micro-batches"
        rows[key] = {"seconds": spread(ranks[0][key]["steps"])}
        if MESHES[name].pp > 1:
            rows[key] |= prediction([rank[key] for rank in ranks], count)
    write(Path(__file__).stem, {"steps": rows})
    for key, row in rows.items():
        error = row.get("error")
        predicted = "" if error is None else f"  predicted {row['predicted']:.3f} s ({error:+.1%})"
        print(f"{key:<34}{row['seconds']['median']:>8.3f} s{predicted}")
        if error is not None and abs(error) > TOLERANCE:
            raise SystemExit(f"{key}: the predicted step is {error:+.1%} off")


def prediction(ranks: list[dict[str, Any]], count: int) -> dict[str, float]:
    """Return the predicted seconds of a step and its error, from the times of all ranks."""
    parts = len(ranks[0]["stages"])
    times = [[_medians(stage) for stage in rank["stages"]] for rank in ranks]
    computed = makespan(lambda rank, part, forward: times[rank][part][not forward], parts, count)
    predicted = computed + statistics.median(ranks[0]["updates"])
    slowest = max(count * sum(sum(stage) for stage in rank) for rank in times)
    return {
        "predicted": predicted,
        "error": predicted / statistics.median(ranks[0]["steps"]) - 1,
        "bubble": 1 - slowest / computed,
        "bubble_of_equal_stages": bubble(RANKS, parts, count),
    }


def _medians(stage: list[list[float]]) -> list[float]:
    """Return the median seconds of a stage's forward and backward."""
    return [statistics.median(each) for each in stage]


def makespan(seconds: Callable[[int, int, bool], float], parts: int, count: int) -> float:
    """Return when the last rank has computed a step, if transfers take no time.

    Args:
        seconds: Of the forward or backward (`True`, `False`) of a part of a rank.
    """
    clocks, arrived = [0.0] * RANKS, dict[Transfer, float]()
    waiting = [list(operations(rank, RANKS, parts, count)) for rank in range(RANKS)]
    while any(waiting):
        for rank, left in enumerate(waiting):
            while left:
                kind, transfer, action = left[0]
                if kind == "wait" and transfer not in arrived:
                    break
                if transfer is not None and kind == "wait":
                    clocks[rank] = max(clocks[rank], arrived[transfer])
                elif transfer is not None and kind == "send":
                    arrived[transfer] = clocks[rank]
                elif action is not None:
                    clocks[rank] += seconds(rank, action.part, action.forward)
                left.pop(0)
    return max(clocks)


class Run:
    """A model on one mesh, with its optimizer."""

    def __init__(self, shape: MeshShape, parts: int) -> None:
        parallel = ParallelConfig(dp_shard=shape.dp_shard, tp=shape.tp, pp=shape.pp, pp_parts=parts)
        transform = partial(parallelize, parallel=parallel, precision=PrecisionConfig(param="fp32"))
        self.strategy = MeshStrategy(shape, transform)
        self.fabric = Fabric(accelerator="cpu", devices=RANKS, strategy=self.strategy)
        self.fabric.launch()
        with torch.device("meta"):
            self.llama = Llama(MODEL)
        self.model = self.fabric.setup_module(self.llama)
        self.optimizer: Any = self.fabric.setup_optimizers(
            build_optimizer(self.llama, OptimConfig(lr=3e-4))
        )
        initialize_weights(self.llama, MODEL, seed=0)
        # Data ranks compute half as many micro-batches.
        self.dp = shape.dp

    def step(self, micro_batches: list[Any]) -> float:
        """Train one step; return the seconds of gradient clipping and update."""
        local = micro_batches[: len(micro_batches) // self.dp]
        self.strategy.accumulate(self.model, local, lambda batch: batch, torch.tensor(1e3))
        start = time.perf_counter()
        clip_grad_norm(self.llama, 1.0, torch.zeros(3), self.strategy.tied_weight)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return time.perf_counter() - start

    def stage_times(self, batch: tuple[Tensor, ...], repeats: int) -> list[tuple[Any, Any]]:
        """Return the seconds of forwards and backwards of each part, without transfers.

        As in a step, only the last backward reduces gradients.
        """
        found = []
        for part in self.llama.parts:
            forwards, backwards = [], []
            for turn in range(1, repeats + 1):
                is_last = part is self.llama.parts[-1] and turn == repeats
                hold_gradients(self.llama, not is_last, replicas_only=False)
                hidden = None
                if not part.has_embedding:
                    hidden = torch.randn(1, SEQ_LEN, MODEL.dim, requires_grad=True)
                start = time.perf_counter()
                out = self.model(*batch, n_documents=1, hidden=hidden, part=part)
                middle = time.perf_counter()
                out.backward(None if part.has_head else torch.ones_like(out))
                forwards.append(middle - start)
                backwards.append(time.perf_counter() - middle)
            found.append((forwards, backwards))
        self.optimizer.zero_grad()
        return found


def measure(folder: Path) -> None:
    """Measure in one process and write its seconds to `RANK.json`."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rounds = int((folder / "rounds").read_text())
    runs = {name: Run(shape, 1 + name.endswith("two parts")) for name, shape in MESHES.items()}
    tokens = torch.randint(0, MODEL.vocab_size, (1, SEQ_LEN), generator=torch.manual_seed(0))
    batch = (tokens, torch.arange(SEQ_LEN).view(1, -1), tokens)
    found: dict[str, dict[str, Any]] = {}
    for turn in range(rounds + 1):  # the first one is warm-up
        for name, count in ((name, count) for count in MICRO_BATCHES for name in MESHES):
            run = runs[name]
            record = found.setdefault(f"{name}, {count} micro-batches", {})
            if turn < 2:  # nothing yet, or only the warm-up
                record.update(steps=[], updates=[], stages=[[[], []] for _ in run.llama.parts])
            if run.strategy.pipeline is not None:
                dist.barrier()
                stages = run.stage_times(batch, count)
                for kept, (forwards, backwards) in zip(record["stages"], stages, strict=True):
                    kept[0] += forwards
                    kept[1] += backwards
            dist.barrier()
            start = time.perf_counter()
            record["updates"].append(run.step([(batch, 1)] * count))
            record["steps"].append(time.perf_counter() - start)
    (folder / f"{dist.get_rank()}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
