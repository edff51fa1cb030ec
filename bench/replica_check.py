"""Silent data corruption: which flipped bits the comparison of replicas finds, and its cost.

    python -m bench.replica_check [flips=200] [steps=10000] [key=value …]

Two replicas of a small model train on random tokens. Before a step, or between the reduction of
gradients and the update, a random bit of a random tensor of rank 1 is flipped: weights, moments and
gradients in turn. Afterwards the tensors of both ranks are compared byte by byte; every difference
that remains must be reported. Without flips, none may be reported. The cost is that of one
comparison relative to the steps between two.
"""

import hashlib
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from hydra import compose, initialize_config_dir
from torch import Tensor
from torch.distributed.tensor import DTensor

from bench.measurement import spread, write
from cli.arguments import CONF
from cli.config import check_config
from train import set_up, train_step
from training.preflight import prepare_data
from training.resume_policy import Changes
from training.run import Run

SMALL = ["model.dim=32", "model.n_layers=1", "model.n_heads=2", "model.n_kv_heads=1"]
TINY = ["train.seq_len=32", "train.global_batch_size=4", "validation.samples=0"]
MESH = ["parallel.devices=2", "parallel.dp_replicate=2", "parallel.compile=false"]
MESH += ["parallel.accelerator=cpu", "data=mock", "log.tensorboard=false", "run.plan_check=off"]
KINDS = ("weights", "exp_avg", "exp_avg_sq", "gradients")
INTERVAL, COMPARISONS = 100, 30


def main() -> None:
    """Run the benchmark and write `bench/results/replica_check.json`."""
    given = dict(argument.split("=", 1) for argument in sys.argv[1:])
    n_flips, n_steps = int(given.pop("flips", 200)), int(given.pop("steps", 10_000))
    more = [f"{key}={value}" for key, value in given.items()]
    with initialize_config_dir(str(CONF), version_base="1.3"), tempfile.TemporaryDirectory() as run:
        overrides = [*MESH, *SMALL, *TINY, f"run.dir={run}", "train.max_steps=1000000", *more]
        overrides.append("faults.replica_check_interval=1")
        config, processes, mesh = check_config(compose("train", overrides))
        state = set_up(config, processes, mesh, prepare_data(config), Changes())
        figures = measure(state, n_flips, n_steps)
        if dist.get_rank() == 0:
            write(Path(__file__).stem, figures)
        state.watchdog.close()


def measure(run: Run, n_flips: int, n_steps: int) -> dict[str, Any]:
    """Return the figures; all ranks call it."""
    check, batches = run.replica_check, run.batches()
    assert check is not None
    train_step(run, next(batches), lr=1e-3)  # creates the optimizer's state
    found = dict.fromkeys(KINDS, 0)
    persisted, missed = dict(found), []
    for number in range(n_flips):
        kind = KINDS[number % len(KINDS)]
        saved = [tensor.clone() for tensor in tensors(run)]
        check.prepare(1)
        flip_in_step(run, next(batches), kind, number)
        differs = len(set(gather(digest(run)))) > 1
        reported = check.compare() is not None
        persisted[kind] += differs
        found[kind] += reported
        if differs and not reported:
            missed.append([kind, number])
        for tensor, value in zip(tensors(run), saved, strict=True):
            tensor.copy_(value)
    false, seconds, costs = 0, [], []
    for _ in range(n_steps):
        check.prepare(1)
        start = time.perf_counter()
        train_step(run, next(batches), lr=1e-3)
        middle = time.perf_counter()
        false += check.compare() is not None
        seconds.append(middle - start)
        costs.append(time.perf_counter() - middle)
    batches.close()
    pairs = zip(costs, seconds, strict=True)
    return {
        "parameters": sum(weight.numel() for weight in run.model.parameters()),
        "flips": n_flips,
        "persisted_by_kind": persisted,
        "reported_by_kind": found,
        "missed": missed,
        "clean_steps": n_steps,
        "false_reports": false,
        "step_seconds": spread(seconds),
        "comparison_seconds": spread(costs),
        f"cost_every_{INTERVAL}_steps": spread([cost / INTERVAL / step for cost, step in pairs]),
    }


def tensors(run: Run, kind: str | None = None) -> list[Tensor]:
    """Return this rank's weights and moments, or those of a kind."""
    optimizer, weights = run.optimizer.optimizer, list(run.model.parameters())
    found = []
    for name in KINDS if kind is None else (kind,):
        if name == "weights":
            found += weights
        elif name == "gradients":
            found += [weight.grad for weight in weights if weight.grad is not None]
        else:
            found += [optimizer.state[weight][name] for weight in weights]
    return [(each.to_local() if isinstance(each, DTensor) else each).detach() for each in found]


def flip_in_step(run: Run, batch: Any, kind: str, seed: int) -> None:
    """Run a step in which rank 1 flips a bit."""

    def flip(*_: Any) -> None:
        generator = random.Random(seed)
        tensor = generator.choice(tensors(run, kind))
        content = tensor.view(-1).view(torch.uint8)
        content[generator.randrange(content.numel())] ^= 1 << generator.randrange(8)

    is_faulty = dist.get_rank() == 1
    if is_faulty and kind != "gradients":
        flip()
    hooks = []
    if is_faulty and kind == "gradients":
        hooks.append(run.optimizer.optimizer.register_step_pre_hook(flip))
    train_step(run, batch, lr=1e-3)
    for hook in hooks:
        hook.remove()


def digest(run: Run) -> str:
    """Return a hash of all weights and moments of this rank."""
    content = hashlib.sha256()
    for tensor in tensors(run):
        content.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return content.hexdigest()


def gather(value: str) -> list[Any]:
    """Return the value of every rank."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


if __name__ == "__main__":
    main()
