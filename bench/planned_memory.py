"""Predicted memory of a step compared with the malloc'ed memory of real processes.

    python -m bench.planned_memory [case …]
    python -m bench.planned_memory pipeline
    python -m bench.planned_memory random [COUNT] [SEED]

Each case runs steps of `train.py` on one, two or four processes: eager and compiled, both data
types, every axis. The reference is independent of our tracker and formulas: a preloaded malloc
counts allocated bytes. Claim: both tiers are within 5% of the peak of a step, on the rank with
the highest peak. Compiled steps are traced with replacement operations. Random jobs are drawn
by `tests.planning.random_jobs`, with sizes at which tensors are most of the memory; claim: 38 of 40
are within 5%, and none above 8%. In a pipeline each stage is compared, with the rank of the stage
that has the highest peak; claim: within 3.3%.
"""

import ctypes
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from itertools import chain, islice
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from torch.distributed.tensor import DTensor

from bench.measurement import write
from bench.planned_memory_random import overrides, random_jobs
from cli.arguments import CONF
from cli.config import check_config, load_train_config
from parallel.mesh import resolve_mesh
from planning.memory import step_memory, step_peaks
from planning.phases import fullest_phase
from planning.request import PlanRequest, configured_choice
from planning.step_spec import StepSpec
from planning.tracing import traced_peaks
from resilience.accelerator import resolve_processes
from train import set_up, train_step
from training.config_rules import INSTALLATION_RULES
from training.preflight import prepare_data
from training.resume_policy import Changes
from training.run import Run

Case = tuple[int, tuple[str, ...]]
"""Number of processes, and overrides."""
TOLERANCE, WORST, OF_STAGE = 0.05, 0.08, 0.033
LEAST = 32e6  # bytes: below, gloo's buffers of up to 2 MB and Python's objects count
PEAKS = "peaks: "
SMALL = (
    *("tokenizer=byte", "model.dim=256", "model.n_layers=4", "model.n_heads=8"),
    *("model.n_kv_heads=4", "model.ffn_dim=704", "model.vocab_size=2048"),
    *("train.seq_len=256", "train.global_batch_size=16", "validation.samples=0"),
    *("parallel.accelerator=cpu", "log.tensorboard=false", "run.plan_check=off"),
)
CASES: dict[str, Case] = {
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
MICRO_BATCHES = "train.micro_batch_size=2"  # 8 with one data rank
PIPELINE_CASES: dict[str, Case] = {
    "pp": (2, ("parallel.pp=2", MICRO_BATCHES)),
    "pp3": (3, ("parallel.pp=3", "model.n_layers=6", MICRO_BATCHES)),
    "pp3_given": (3, ("parallel.pp=3", "parallel.pp_layers=[1,2,1]", MICRO_BATCHES)),
    "pp_tied_full": (
        2,
        (
            *("parallel.pp=2", MICRO_BATCHES, "model.tie_embeddings=true"),
            "parallel.activation_checkpoint=full",
        ),
    ),
    "pp_interleaved": (2, ("parallel.pp=2", "parallel.pp_parts=2", MICRO_BATCHES)),
    "pp3_interleaved": (
        3,
        (
            *("parallel.pp=3", "parallel.pp_parts=2", "model.n_layers=6", MICRO_BATCHES),
            "train.global_batch_size=12",
        ),
    ),
    "pp_dp_shard": (4, ("parallel.pp=2", "parallel.dp_shard=2", MICRO_BATCHES)),
    "pp_tp_bf16": (
        4,
        (
            *("parallel.pp=2", "parallel.tp=2", "precision.param=bf16"),
            "train.micro_batch_size=4",
        ),
    ),
}


def main() -> None:
    """Run the benchmark and write `bench/results/planned_memory*.json`.

    With `--ranks`, run the processes of all jobs of a file.
    """
    if sys.argv[1:2] == ["--ranks"]:
        run_ranks(Path(sys.argv[2]))
        return
    names = sys.argv[1:]
    if names[:1] == ["random"]:
        count, seed = [int(each) for each in [*names[1:], "40", "0"][:2]]
        jobs = {f"{n}": job for n, job in enumerate(random_cases(count, seed))}
    elif names[:1] == ["pipeline"]:
        jobs = PIPELINE_CASES
    else:
        jobs = {name: (CASES | PIPELINE_CASES)[name] for name in names or CASES}
    results = compare(jobs)
    errors = sorted(abs(each[tier]) for each in results.values() for tier in ("analytic", "traced"))
    if names[:1] == ["random"]:
        record = {"seed": seed, "worst": errors[-1], "cases": results}
        write("planned_memory_real_random", record)
        assert sum(error > TOLERANCE for error in errors) <= 2 * count / 20, errors
        assert errors[-1] <= WORST, errors[-1]
        return
    if names[:1] == ["pipeline"]:
        write("planned_memory_pipeline", {"worst": errors[-1], "cases": results})
        assert errors[-1] <= OF_STAGE, errors[-1]
    elif not names:
        write(Path(__file__).stem, {"worst": errors[-1], "cases": results})
    assert errors[-1] <= TOLERANCE, errors[-1]


def random_cases(count: int, seed: int) -> Iterator[Case]:
    """Yield random jobs for two or four processes, with at most some GB each."""
    jobs = random_jobs(
        *(2 * count, seed),
        accelerators=("cpu",),
        axis_sizes=(1, 1, 2),
        head_dims=(16, 32, 48, 64),
        widths=(128, 384),
        vocabularies=(2048, 8192, 32_000, 65_536, 131_072),
        depths=(1, 2, 3, 4, 9),
        sequences=(128, 256, 512),
        max_tokens=2048,
        max_processes=2,
        compiled=0.1,
        optimizer_states=("fp32", "bf16"),  # the update of int8 is compiled, which takes long
    )
    large = (job for job in jobs if step_memory(job[1]).peak > LEAST)
    for settings, spec in islice(large, count):
        yield spec.mesh.world_size, tuple(overrides(settings))


def compare(jobs: dict[str, Case]) -> dict[str, dict[str, Any]]:
    """Print and return the peak of each stage's fullest rank, and the error of each tier."""
    results = {}
    for job, spec, peaks in stages(jobs):
        name = f"{job} {spec.stage}" if spec.mesh.pp > 1 else job
        allocated = max(peaks)
        _, analytic = fullest_phase(spec, step_peaks)  # of a step; a save may need more
        phase, traced = fullest_phase(spec, traced_peaks)
        results[name] = {
            "processes": spec.mesh.world_size,
            "overrides": " ".join(jobs[job][1]),
            "allocated_mb": allocated / 1e6,
            "analytic": sum(analytic.values()) / allocated - 1,
            "traced": sum(traced.values()) / allocated - 1,
            "moment": phase,
        }
        print(
            f"{name:<20}{allocated / 1e6:>9.2f} MB  analytic {results[name]['analytic']:+6.1%}  "
            f"traced {results[name]['traced']:+6.1%}  {phase}",
            flush=True,
        )
    return results


def stages(jobs: dict[str, Case]) -> Iterator[tuple[str, StepSpec, list[int]]]:
    """Run the jobs and yield, for each stage, the job's name, the step and the peaks of its ranks.

    Without a pipeline, all ranks are one stage.
    """
    for name, peaks in run(jobs):
        spec = planned_spec(jobs[name])
        mesh = spec.mesh
        ranks = mesh.dp_shard * mesh.cp * mesh.tp
        for stage in spec.stages:
            own = [rank for rank in range(len(peaks)) if rank // ranks % mesh.pp == stage.stage]
            yield name, stage, [peaks[rank] for rank in own]


def planned_spec(case: Case) -> StepSpec:
    """Return the step of a case in the planner's terms."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = load_train_config(compose("train", [*SMALL, *case[1]]), *INSTALLATION_RULES)
    processes, _ = resolve_processes(config.parallel, {})
    mesh, _ = resolve_mesh(config.parallel, processes.world_size)
    request = PlanRequest(config, "cpu", config.stages().first_token(config.train.max_steps))
    spec = request.stages(configured_choice(config, mesh))[0][0]
    return replace(spec, async_save=False, prefetch=None)  # only the step is measured


def run(jobs: dict[str, Case]) -> Iterator[tuple[str, list[int]]]:
    """Run the processes of each job and yield its name and the peak of each process in bytes."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "jobs.json"
        file.write_text(json.dumps(jobs))
        command = [sys.executable, "-m", "bench.planned_memory", "--ranks", str(file)]
        environment = os.environ | {"LD_PRELOAD": str(compile_counting_malloc(Path(folder)))}
        ranks = subprocess.Popen(
            command,
            cwd=Path(__file__).parent.parent,
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert ranks.stdout is not None
        for line in ranks.stdout:
            if line.startswith(PEAKS):
                name, peaks = json.loads(line.removeprefix(PEAKS))
                yield name, peaks
        assert ranks.wait() == 0


def run_ranks(file: Path) -> None:
    """Run the jobs of a file one after the other and print the peaks of each.

    Ranks are forked, so that the imports are only done once.
    """
    torch.set_num_threads(1)
    for name, (size, settings) in json.loads(file.read_text()).items():
        folder = file.parent / name
        folder.mkdir()
        with socket.create_server(("localhost", 0)) as server:
            port = server.getsockname()[1]
        ranks = []
        for rank in range(size):
            variables = {
                "RANK": rank,
                "LOCAL_RANK": rank,
                "WORLD_SIZE": size,
                "LOCAL_WORLD_SIZE": size,
            }
            variables |= {"MASTER_ADDR": "localhost", "MASTER_PORT": port}
            fork = get_context("fork")
            ranks.append(fork.Process(target=measure, args=(settings, folder, variables)))
            ranks[-1].start()
        for process in ranks:
            process.join()
            assert process.exitcode == 0, (name, settings)
        peaks = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(size)]
        print(f"{PEAKS}{json.dumps([name, peaks])}", flush=True)
        shutil.rmtree(folder)


def measure(settings: list[str], folder: Path, variables: dict[str, Any]) -> None:
    """Train in one process of a case and write its peak to `RANK.json`."""
    os.environ |= {name: str(value) for name, value in variables.items()}
    arguments = [*SMALL, *settings, f"run.dir={folder}/run"]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config, processes, mesh = check_config(compose("train", arguments))
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
    """Return the peak of malloc'ed bytes in a step, the lowest of steps 3 to 5.

    Each step allocates the same tensors, but other threads and Python's objects vary. Excludes
    memory other than tensors: allocations between two steps beyond weights and optimizer state.
    """
    library = ctypes.CDLL(None)
    for function in (library.counted_now, library.counted_most):
        function.restype = ctypes.c_size_t
    next(steps), next(steps)
    measured = []
    for _ in range(3):
        library.counted_forget()
        trained = next(steps)
        measured.append((library.counted_most(), library.counted_now()))
    peak, now = min(measured, key=lambda each: each[0] - each[1])
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
