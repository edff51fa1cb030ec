"""What the planner says a step holds, against what real processes hold, counted by the allocator.

    python -m bench.planned_memory [case …]

Each case is a run of `train.py`'s own steps on one, two or four processes: eager and compiled, both
precisions, every axis. The truth is neither our tracker's nor made of our formulas: the C library
and PyTorch's CPU allocator tell what they have given out. The claim: both tiers are within 5% of
the fullest moment of the third step, on the fullest rank. Compiled steps cannot be traced, only
what stands in their place: where the compiler recomputes a part, the claim is the closed forms'.
"""

import ctypes
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from hydra import compose, initialize_config_dir
from torch.distributed.tensor import DTensor
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils._python_dispatch import TorchDispatchMode

from bench.measurement import write
from parallel.mesh import plan_processes, resolve_mesh
from planning.job import Job
from planning.memory import step_memory
from planning.traced import traced_memory
from program.command_line import CONF
from program.config import load_train_config
from program.planning import Asked, given_choice
from program.preflight import MORE_RULES, check_config, prepare_data
from program.run import Run
from train import set_up, train_step
from training.resume_contract import Changes

TOLERANCE = 0.05
IN_PART = ("compiled_selective", "compiled_half")  # recomputed
LAST_STEP = "the last step"
SMALL = (
    *("tokenizer=byte", "model.dim=256", "model.n_layers=4", "model.n_heads=8"),
    *("model.n_kv_heads=4", "model.ffn_dim=704", "model.vocab_size=2048"),
    *("train.seq_len=256", "train.global_batch_size=16", "validation.samples=0"),
    *("parallel.accelerator=cpu", "log.tensorboard=false", "run.plan_check=off"),
)
# name: processes, and what it changes
CASES: dict[str, tuple[int, tuple[str, ...]]] = {
    "one": (1, ()),
    "deep": (1, ("model.n_layers=9", "train.micro_batch_size=2")),
    "full": (1, ("parallel.activation_checkpoint=full",)),
    "selective": (1, ("parallel.activation_checkpoint=selective",)),
    "micro_batches": (1, ("train.micro_batch_size=4",)),
    "int8": (1, ("precision.optimizer_state=int8", "train.micro_batch_size=1")),
    "bf16": (1, ("precision.param=bf16",)),
    "compiled": (1, ("parallel.compile=true",)),
    "compiled_bf16": (1, ("parallel.compile=true", "precision.param=bf16")),
    "compiled_full": (1, ("parallel.compile=true", "parallel.activation_checkpoint=full")),
    "compiled_selective": (
        1,
        ("parallel.compile=true", "parallel.activation_checkpoint=selective"),
    ),
    "compiled_selective_tp": (
        2,
        ("parallel.tp=2", "parallel.compile=true", "parallel.activation_checkpoint=selective"),
    ),
    "compiled_half": (1, ("parallel.compile=true", "parallel.activation_checkpoint=0.5")),
    "compiled_bf16_full": (
        1,
        ("parallel.compile=true", "parallel.activation_checkpoint=full", "precision.param=bf16"),
    ),
    "dp_shard": (2, ("parallel.dp_shard=2",)),
    "dp_shard_micro": (2, ("parallel.dp_shard=2", "train.micro_batch_size=2")),
    "dp_shard_each": (
        2,
        (
            "parallel.dp_shard=2",
            "train.micro_batch_size=2",
            "parallel.reduce_gradients=micro_batch",
        ),
    ),
    "dp_replicate": (2, ("parallel.dp_replicate=2",)),
    "cp": (2, ("parallel.cp=2",)),
    "tp": (2, ("parallel.tp=2",)),
    "tp_bf16_full": (
        2,
        ("parallel.tp=2", "precision.param=bf16", "parallel.activation_checkpoint=full"),
    ),
    "dp_shard_tp": (4, ("parallel.dp_shard=2", "parallel.tp=2")),
    "cp_tp": (4, ("parallel.cp=2", "parallel.tp=2", "parallel.activation_checkpoint=full")),
}


def main() -> None:
    """Measures and writes `bench/results/planned_memory.json`; with `--rank`, is one process."""
    if sys.argv[1:2] == ["--rank"]:
        measure(sys.argv[2], Path(sys.argv[3]))
        return
    names = sys.argv[1:] or list(CASES)
    figures = {name: compare(name) for name in names}
    errors = [abs(each["analytic"]) for each in figures.values()]
    errors += [abs(each["traced"]) for name, each in figures.items() if name not in IN_PART]
    for name, each in figures.items():
        print(
            f"{name:<20}{each['allocated_mb']:>9.2f} MB  analytic {each['analytic']:+6.1%}  "
            f"traced {each['traced']:+6.1%}  {each['moment']}"
        )
    if names == list(CASES):
        write(Path(__file__).stem, {"worst": max(errors), "cases": figures})
    assert max(errors) <= TOLERANCE, max(errors)


def compare(name: str) -> dict[str, Any]:
    """The peak of a case's fullest rank, and by how much each tier is beside it."""
    allocated = max(run(name))
    job = planned_job(name)
    analytic, traced = step_memory(job), traced_memory(job)
    return {
        "processes": job.mesh.world_size,
        "allocated_mb": allocated / 1e6,
        "analytic": analytic.peak / allocated - 1,
        "traced": traced.peak / allocated - 1,
        "moment": traced.moment,
    }


def planned_job(name: str) -> Job:
    """The case as the planner takes it."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = load_train_config(compose("train", [*SMALL, *CASES[name][1]]), *MORE_RULES)
    processes, _ = plan_processes(config.parallel, {})
    mesh, _ = resolve_mesh(config.parallel, processes.world_size)
    asked = Asked(config, "cpu", config.stages().first_token(config.train.max_steps))
    return asked.jobs(given_choice(config, mesh))[0][0]


def run(name: str) -> list[int]:
    """Starts the processes of a case; returns each one's peak in bytes."""
    processes = CASES[name][0]
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += [f"--nproc-per-node={processes}", "-m", "bench.planned_memory"]
        subprocess.run(
            [*command, "--rank", name, folder], cwd=Path(__file__).parent.parent, check=True
        )
        return [json.loads(file.read_text()) for file in sorted(Path(folder).glob("*.json"))]


def measure(name: str, folder: Path) -> None:
    """One process of a case: trains, and writes its peak into `RANK.json`."""
    torch.set_num_threads(1)
    overrides = [*SMALL, *CASES[name][1], f"run.dir={folder}/run"]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config, processes, mesh = check_config(compose("train", overrides))
    dataset = prepare_data(config)

    def steps() -> Iterator[Run]:
        trained = set_up(config, processes, mesh, dataset, Changes())
        for batch in trained.batches():
            train_step(trained, batch, config.optim.lr)
            yield trained

    count = by_allocator if config.parallel.compile else by_c_library
    trained, most = count(steps())
    (folder / f"{trained.fabric.global_rank}.json").write_text(json.dumps(most))
    trained.fabric.barrier()


# ---------------------------------------------------------------- two ways to count


def by_allocator(steps: Iterator[Run]) -> tuple[Run, int]:
    """Most bytes in the third step by the notes of PyTorch's CPU allocator, from the start on.

    It misses blocks that a thread of a process group gives back: for one process alone.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        next(steps), next(steps)
        with record_function(LAST_STEP):
            trained = next(steps)
    events = cast(Any, profiler).profiler.kineto_results.events()
    (last,) = [event for event in events if event.name() == LAST_STEP]
    notes = [(event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"]
    held, most = 0, 0
    for moment, change in sorted(notes):
        held += change
        if last.start_ns() <= moment <= last.end_ns():
            most = max(most, held)
    return trained, most


def by_c_library(steps: Iterator[Run]) -> tuple[Run, int]:
    """Most bytes that malloc has given out after any operation of the third step.

    Of every thread, gloo's too; without what is no tensor, which is what is in use between two
    steps above weights and moments. No mode may watch compiled code: for eager steps alone.
    """
    next(steps), next(steps)
    with _Watch() as watch:
        trained = next(steps)
    moments = [m for state in trained.optimizer.optimizer.state.values() for m in state.values()]
    parts = [vars(m).values() if not isinstance(m, torch.Tensor) else [m] for m in moments]
    tensors = [*trained.model.parameters(), *chain.from_iterable(parts)]
    at_rest = sum(local_bytes(each) for each in tensors if isinstance(each, torch.Tensor))
    return trained, watch.most - (in_use() - at_rest)


class _Watch(TorchDispatchMode):
    """Asks malloc after each operation."""

    most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # DTensor turns it into local operations, which come here
        out = func(*args, **(kwargs or {}))
        self.most = max(self.most, in_use())
        return out


def local_bytes(tensor: torch.Tensor) -> int:
    """Of a tensor, or of its shard here."""
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).nbytes


class _MallocInfo(ctypes.Structure):
    """glibc's `struct mallinfo2`."""

    _fields_: ClassVar[Any] = [
        (name, ctypes.c_size_t)
        for name in (
            *("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks"),
            *("uordblks", "fordblks", "keepcost"),
        )
    ]


_mallinfo2 = ctypes.CDLL(None).mallinfo2
_mallinfo2.restype = _MallocInfo


def in_use() -> int:
    """Bytes that malloc has given out and not taken back."""
    info = _mallinfo2()
    return int(info.uordblks + info.hblkhd)


if __name__ == "__main__":
    main()
