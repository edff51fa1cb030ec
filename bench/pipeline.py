"""Step time of two pipeline stages on CPU: measured, predicted from the stages' times, and next to
tensor and data parallelism.

    python -m bench.pipeline [rounds]

Two processes with one thread each hold the model on three meshes and run their steps in turn, with
4 and 16 micro-batches. A pipeline runs two steps in a row. The times of the forwards and backwards
of one of them, without the waits for the other stage, and the order of
`parallel.pipeline_schedule` predict the other one. Claim: the median of the errors is within 2%.
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from lightning_fabric import Fabric

from bench.measurement import spread, write
from model.config import ModelConfig
from model.llama import Llama
from parallel.config import ParallelConfig, PrecisionConfig
from parallel.gradients import clip_grad_norm
from parallel.mesh import MeshShape
from parallel.parallelize import initialize_weights, parallelize
from parallel.pipeline_schedule import Transfer, bubble, operations
from parallel.strategy import MeshStrategy
from resilience.host_memory import keep_freed_memory
from training.config import OptimConfig
from training.optimizer import build_optimizer

RANKS, WARM_UP, ROUNDS = 2, 2, 15
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
    """Return the predicted seconds of a step and its error: medians over the steps."""
    timings = list(zip(*(rank["stages"] for rank in ranks), strict=True))
    parts = len(timings[0][0])
    spans = [makespan(times, parts, count) for times in timings]
    busy = [max(sum(sum(map(sum, part)) for part in rank) for rank in times) for times in timings]
    predicted = [span + u for span, u in zip(spans, ranks[0]["updates"], strict=True)]
    steps = ranks[0]["steps"]
    # Each step is predicted from the other one of its round.
    errors = [predicted[i ^ 1] / step - 1 for i, step in enumerate(steps)]
    return {
        "predicted": statistics.median(predicted),
        "error": statistics.median(errors),
        "bubble": statistics.median(1 - b / span for b, span in zip(busy, spans, strict=True)),
        "bubble_of_equal_stages": bubble(RANKS, parts, count),
    }


def makespan(times: Sequence[list[tuple[Any, Any]]], parts: int, count: int) -> float:
    """Return when the last rank has computed a step, if values arrive as soon as they are sent.

    Args:
        times: Of each rank and part, the seconds of its forwards and backwards by micro-batch.
    """
    clocks, arrived = [0.0] * RANKS, dict[Transfer, float]()
    waiting = [list(operations(rank, RANKS, parts, count)) for rank in range(RANKS)]
    while any(waiting):
        for rank, left in enumerate(waiting):
            while left:
                kind, values, action = left[0]
                if kind == "wait" and values not in arrived:
                    break
                if values is not None and kind == "wait":
                    clocks[rank] = max(clocks[rank], arrived[values])
                elif values is not None and kind == "send":
                    arrived[values] = clocks[rank]
                elif action is not None:
                    stage = times[rank][action.part]
                    clocks[rank] += stage[not action.forward][action.micro_batch]
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
        self.ends = [time.perf_counter()]
        with mock.patch.object(
            torch.autograd, "backward", self._noting_ends(torch.autograd.backward)
        ):
            module = self._noting_ends(self.model)
            self.strategy.accumulate(module, local, lambda batch: batch, torch.tensor(1e3))
        start = time.perf_counter()
        clip_grad_norm(self.llama, 1.0, torch.zeros(3), self.strategy.tied_weight)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return time.perf_counter() - start

    def _noting_ends(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return a forward or backward that appends its end to `ends`."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            result = function(*args, **kwargs)
            self.ends.append(time.perf_counter())
            return result

        return timed

    def stage_times(self, count: int) -> list[tuple[list[float], list[float]]]:
        """Return the seconds of the last step's forwards and backwards, by part and micro-batch."""
        pipeline = self.strategy.pipeline
        assert pipeline is not None
        parts = len(self.llama.parts)
        order = operations(pipeline.rank, RANKS, parts, count)
        actions = [each.action for each in order if each.action is not None]
        seconds = [([0.0] * count, [0.0] * count) for _ in range(parts)]
        for action, (start, end) in zip(actions, pairwise(self.ends), strict=True):
            waited = [w.end - w.start for w in pipeline.links.waits if start <= w.start < end]
            part = seconds[action.part]
            part[not action.forward][action.micro_batch] = end - start - sum(waited)
        return seconds


def measure(folder: Path) -> None:
    """Measure in one process and write its seconds to `RANK.json`."""
    torch.set_num_threads(1)
    keep_freed_memory()  # as every run on CPU does
    dist.init_process_group("gloo")
    rounds = int((folder / "rounds").read_text())
    runs = {name: Run(shape, 1 + name.endswith("two parts")) for name, shape in MESHES.items()}
    tokens = torch.randint(0, MODEL.vocab_size, (1, SEQ_LEN), generator=torch.manual_seed(0))
    batch = (tokens, torch.arange(SEQ_LEN).view(1, -1), tokens)
    found: dict[str, dict[str, Any]] = {}
    for turn in range(WARM_UP + rounds):
        for name, count in ((name, count) for count in MICRO_BATCHES for name in MESHES):
            run = runs[name]
            record = found.setdefault(f"{name}, {count} micro-batches", {})
            if turn <= WARM_UP:  # nothing yet, or only the warm-up
                record.update(steps=[], updates=[], stages=[])
            for _ in range(1 if run.strategy.pipeline is None else 2):
                dist.barrier()
                start = time.perf_counter()
                record["updates"].append(run.step([(batch, 1)] * count))
                record["steps"].append(time.perf_counter() - start)
                if run.strategy.pipeline is not None:
                    record["stages"].append(run.stage_times(count))
    (folder / f"{dist.get_rank()}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
