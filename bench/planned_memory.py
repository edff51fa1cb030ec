"""What the planner says a step holds, against what real processes hold, counted by malloc.

    python -m bench.planned_memory [case …]

Each case is a run of `train.py`'s own steps on one, two or four processes: eager and compiled, both
precisions, every axis. The truth is neither our tracker's nor made of our formulas: it is what
malloc has given out, counted in its place. The claim: both tiers are within 5% of the fullest
moment of the third step, on the fullest rank. Compiled steps are traced by what stands in for them.
"""

import ctypes
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from torch.distributed.tensor import DTensor

from bench.measurement import write
from cli.arguments import CONF
from cli.config import check_config, load_train_config
from parallel.mesh import plan_processes, resolve_mesh
from planning.memory import step_memory
from planning.request import PlanRequest, configured_choice
from planning.step_spec import StepSpec
from planning.tracing import trace_memory
from train import set_up, train_step
from training.config_rules import INSTALLATION_RULES
from training.preflight import prepare_data
from training.resume_policy import Changes
from training.run import Run

TOLERANCE = 0.05
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
    "compiled_half": (1, ("parallel.compile=true", "parallel.activation_checkpoint=0.5")),
    "compiled_bf16_full": (
        1,
        ("parallel.compile=true", "parallel.activation_checkpoint=full", "precision.param=bf16"),
    ),
    "compiled_tp": (2, ("parallel.compile=true", "parallel.tp=2")),
    "compiled_tp_full": (
        2,
        ("parallel.compile=true", "parallel.activation_checkpoint=full", "parallel.tp=2"),
    ),
    "compiled_tp_selective": (
        2,
        ("parallel.compile=true", "parallel.activation_checkpoint=selective", "parallel.tp=2"),
    ),
    "compiled_tp_half": (
        2,
        ("parallel.compile=true", "parallel.activation_checkpoint=0.5", "parallel.tp=2"),
    ),
    "compiled_cp_selective": (
        2,
        ("parallel.compile=true", "parallel.activation_checkpoint=selective", "parallel.cp=2"),
    ),
    "compiled_cp_half": (
        2,
        ("parallel.compile=true", "parallel.activation_checkpoint=0.5", "parallel.cp=2"),
    ),
    "compiled_dp_shard": (2, ("parallel.compile=true", "parallel.dp_shard=2")),
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
    errors = [abs(each[tier]) for each in figures.values() for tier in ("analytic", "traced")]
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
    spec = planned_spec(name)
    analytic, traced = step_memory(spec), trace_memory(spec)
    return {
        "processes": spec.mesh.world_size,
        "allocated_mb": allocated / 1e6,
        "analytic": analytic.peak / allocated - 1,
        "traced": traced.peak / allocated - 1,
        "moment": traced.phase,
    }


def planned_spec(name: str) -> StepSpec:
    """The case as the planner takes it."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = load_train_config(compose("train", [*SMALL, *CASES[name][1]]), *INSTALLATION_RULES)
    processes, _ = plan_processes(config.parallel, {})
    mesh, _ = resolve_mesh(config.parallel, processes.world_size)
    asked = PlanRequest(config, "cpu", config.stages().first_token(config.train.max_steps))
    return asked.stages(configured_choice(config, mesh))[0][0]


def run(name: str) -> list[int]:
    """Starts the processes of a case; returns each one's peak in bytes."""
    processes = CASES[name][0]
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += [f"--nproc-per-node={processes}", "-m", "bench.planned_memory"]
        subprocess.run(
            [*command, "--rank", name, folder],
            cwd=Path(__file__).parent.parent,
            env=os.environ | {"LD_PRELOAD": str(counting_malloc(Path(folder)))},
            check=True,
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

    trained, most = most_held(steps())
    (folder / f"{trained.fabric.global_rank}.json").write_text(json.dumps(most))
    trained.fabric.barrier()


def most_held(steps: Iterator[Run]) -> tuple[Run, int]:
    """Most bytes that malloc has given out at once in the third step.

    Without what is no tensor, which is what is in use between two steps above weights and moments.
    """
    counted = ctypes.CDLL(None)
    for function in (counted.counted_now, counted.counted_most):
        function.restype = ctypes.c_size_t
    next(steps), next(steps)
    counted.counted_forget()
    trained = next(steps)
    most, now = counted.counted_most(), counted.counted_now()
    moments = [m for state in trained.optimizer.optimizer.state.values() for m in state.values()]
    parts = [vars(m).values() if not isinstance(m, torch.Tensor) else [m] for m in moments]
    tensors = [*trained.model.parameters(), *chain.from_iterable(parts)]
    at_rest = sum(local_bytes(each) for each in tensors if isinstance(each, torch.Tensor))
    return trained, most - (now - at_rest)


def local_bytes(tensor: torch.Tensor) -> int:
    """Of a tensor, or of its shard here."""
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).nbytes


def counting_malloc(folder: Path) -> Path:
    """Compiles a library that counts what malloc gives out, to be loaded before all others.

    In each thread, compiled code's and gloo's too, and inside of operations.
    """
    library = folder / "counting.so"
    command = ["cc", "-shared", "-fPIC", "-O2", "-x", "c", "-", "-o", str(library)]
    subprocess.run(command, input=_COUNTING, text=True, check=True)
    return library


_COUNTING = """
#include <errno.h>
#include <malloc.h>
#include <stdatomic.h>
#include <stddef.h>

void *__libc_malloc(size_t), *__libc_calloc(size_t, size_t), *__libc_realloc(void *, size_t);
void *__libc_memalign(size_t, size_t), __libc_free(void *);

static atomic_size_t now, most;
size_t counted_now(void) { return now; }
size_t counted_most(void) { return most; }
void counted_forget(void) { most = now; }

static void *given(void *block) {
    size_t size = malloc_usable_size(block), held = atomic_fetch_add(&now, size) + size;
    size_t before = most;
    while (held > before && !atomic_compare_exchange_weak(&most, &before, held));
    return block;
}

void free(void *block) {
    atomic_fetch_sub(&now, malloc_usable_size(block));
    __libc_free(block);
}

void *malloc(size_t size) { return given(__libc_malloc(size)); }
void *calloc(size_t count, size_t size) { return given(__libc_calloc(count, size)); }
void *memalign(size_t alignment, size_t size) { return given(__libc_memalign(alignment, size)); }
void *aligned_alloc(size_t alignment, size_t size) { return memalign(alignment, size); }

int posix_memalign(void **block, size_t alignment, size_t size) {
    *block = memalign(alignment, size);
    return *block ? 0 : ENOMEM;
}

void *realloc(void *block, size_t size) {
    size_t before = malloc_usable_size(block);
    void *moved = __libc_realloc(block, size);
    if (moved || !size) atomic_fetch_sub(&now, before);
    return moved ? given(moved) : moved;
}
"""


if __name__ == "__main__":
    main()
