"""Predicted memory of a step compared with the malloc'ed memory of real processes.

    python -m bench.planned_memory [case …]

Each case runs steps of `train.py` on one, two or four processes: eager and compiled, both data
types, every axis. The reference is independent of our tracker and formulas: a preloaded malloc
counts allocated bytes. Claim: both tiers are within 5% of the peak of the third step, on the rank
with the highest peak. Compiled steps are traced with replacement operations.
"""

import ctypes
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from torch.distributed.tensor import DTensor

from bench.measurement import write
from cli.arguments import CONF
from cli.config import check_config, load_train_config
from parallel.mesh import resolve_mesh
from planning.memory import step_memory
from planning.request import PlanRequest, configured_choice
from planning.step_spec import StepSpec
from planning.tracing import trace_memory
from resilience.accelerator import resolve_processes
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
# name: (number of processes, overrides)
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
    """Run the benchmark and write `bench/results/planned_memory.json`.

    With `--rank`, run one process.
    """
    if sys.argv[1:2] == ["--rank"]:
        measure(sys.argv[2], Path(sys.argv[3]))
        return
    names = sys.argv[1:] or list(CASES)
    results = {name: compare(name) for name in names}
    errors = [abs(each[tier]) for each in results.values() for tier in ("analytic", "traced")]
    for name, each in results.items():
        print(
            f"{name:<20}{each['allocated_mb']:>9.2f} MB  analytic {each['analytic']:+6.1%}  "
            f"traced {each['traced']:+6.1%}  {each['moment']}"
        )
    if names == list(CASES):
        write(Path(__file__).stem, {"worst": max(errors), "cases": results})
    assert max(errors) <= TOLERANCE, max(errors)


def compare(name: str) -> dict[str, Any]:
    """Return the peak of the fullest rank of a case, and the relative error of each tier."""
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
    """Return the step of a case in the planner's terms."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = load_train_config(compose("train", [*SMALL, *CASES[name][1]]), *INSTALLATION_RULES)
    processes, _ = resolve_processes(config.parallel, {})
    mesh, _ = resolve_mesh(config.parallel, processes.world_size)
    request = PlanRequest(config, "cpu", config.stages().first_token(config.train.max_steps))
    spec = request.stages(configured_choice(config, mesh))[0][0]
    return replace(spec, async_save=False, prefetch=None)  # only the step is measured


def run(name: str) -> list[int]:
    """Run the processes of a case and return the peak of each in bytes."""
    processes = CASES[name][0]
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += [f"--nproc-per-node={processes}", "-m", "bench.planned_memory"]
        subprocess.run(
            [*command, "--rank", name, folder],
            cwd=Path(__file__).parent.parent,
            env=os.environ | {"LD_PRELOAD": str(compile_counting_malloc(Path(folder)))},
            check=True,
        )
        return [json.loads(file.read_text()) for file in sorted(Path(folder).glob("*.json"))]


def measure(name: str, folder: Path) -> None:
    """Train in one process of a case and write its peak to `RANK.json`."""
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

    trained, peak = peak_bytes(steps())
    (folder / f"{trained.fabric.global_rank}.json").write_text(json.dumps(peak))
    trained.fabric.barrier()


def peak_bytes(steps: Iterator[Run]) -> tuple[Run, int]:
    """Return the peak of malloc'ed bytes in the third step.

    Excludes memory other than tensors: allocations between two steps beyond weights and optimizer
    state.
    """
    library = ctypes.CDLL(None)
    for function in (library.counted_now, library.counted_most):
        function.restype = ctypes.c_size_t
    next(steps), next(steps)
    library.counted_forget()
    trained = next(steps)
    peak, now = library.counted_most(), library.counted_now()
    moments = [m for state in trained.optimizer.optimizer.state.values() for m in state.values()]
    parts = [vars(m).values() if not isinstance(m, torch.Tensor) else [m] for m in moments]
    tensors = [*trained.model.parameters(), *chain.from_iterable(parts)]
    tensor_bytes = sum(local_bytes(each) for each in tensors if isinstance(each, torch.Tensor))
    return trained, peak - (now - tensor_bytes)


def local_bytes(tensor: torch.Tensor) -> int:
    """Return the bytes of a tensor or of its local shard."""
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).nbytes


def compile_counting_malloc(folder: Path) -> Path:
    """Compile a library, to be preloaded, that counts malloc'ed bytes.

    It covers all threads, including those of compiled code and gloo, and workspaces of operators.
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
