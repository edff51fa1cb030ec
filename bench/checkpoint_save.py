"""Throughput of checkpoint saves, and the time that training is blocked by one.

    python -m bench.checkpoint_save

Two processes hold 1.2 GB of tensors on CPU. Each round alternates a raw write of as many bytes by
each process with fsync, a synchronous save including hashes and commit, and an asynchronous save,
whose stall and total duration are measured. Targets: a save reaches at least 80% of the GB/s of a
raw write; an asynchronous save stalls only for the copy to host memory.
"""

import multiprocessing
import os
import shutil
import socket
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from bench.measurement import spread, write
from checkpoint.config import CheckpointConfig
from checkpoint.position import Position
from checkpoint.saver import Saver
from resilience.run_folder import RunFolder
from training.config import OptimConfig
from training.optimizer import build_optimizer

PROCESSES, ROUNDS = 2, 9
DIM, LAYERS = 2048, 24  # 24 matrices of 2048 × 2048, with two moments each: 1.2 GB


def main() -> None:
    """Run the benchmark and write `bench/results/checkpoint_save.json`."""
    with socket.socket() as free, tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        context = multiprocessing.get_context("spawn")
        others = [
            context.Process(target=measure, args=(rank, port, folder), daemon=True)
            for rank in range(1, PROCESSES)
        ]
        for process in others:
            process.start()
        seconds, n_bytes = measure(0, port, folder)
    speed = {name: [n_bytes / 1e9 / each for each in values] for name, values in seconds.items()}
    write(
        Path(__file__).stem,
        {
            "gigabytes": round(n_bytes / 1e9, 3),
            "processes": PROCESSES,
            "raw_gb_per_second": spread(speed["raw"]),
            "save_gb_per_second": spread(speed["sync"]),
            "save_to_raw": spread(
                [raw / sync for raw, sync in zip(seconds["raw"], seconds["sync"], strict=True)]
            ),
            "sync_stall_seconds": spread(seconds["sync"]),
            "async_stall_seconds": spread(seconds["stall"]),
            "async_save_seconds": spread(seconds["async"]),
            "stall_to_sync": spread(
                [
                    stall / sync
                    for stall, sync in zip(seconds["stall"], seconds["sync"], strict=True)
                ]
            ),
        },
    )


def measure(rank: int, port: int, folder: str) -> tuple[dict[str, list[float]], int]:
    """Run all rounds on one rank and return seconds by kind and the bytes of a checkpoint."""
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, PROCESSES, is_master=rank == 0)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=PROCESSES)
    mesh = init_device_mesh("cpu", (PROCESSES,))
    model = nn.Sequential(*(nn.Linear(DIM, DIM, bias=False) for _ in range(LAYERS)))
    fully_shard(model, mesh=mesh)
    optimizer = build_optimizer(model, OptimConfig(lr=0.1))
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    config = CheckpointConfig(keep_last=None)
    saver = Saver(RunFolder(Path(folder)), "0" * 32, config, {}, print)
    seconds: dict[str, list[float]] = {kind: [] for kind in ("raw", "sync", "stall", "async")}
    n_bytes = 0
    for number in range(ROUNDS + 1):  # the first round warms up and determines n_bytes
        for kind in ("sync", "raw", "async") if number % 2 == 0 else ("async", "raw", "sync"):
            dist.barrier()
            if kind == "raw":
                start = time.perf_counter()
                write_raw(Path(folder) / f"raw-{rank}", n_bytes // PROCESSES)
                dist.barrier()
                elapsed = time.perf_counter() - start
                (Path(folder) / f"raw-{rank}").unlink()
            else:
                saver.save(model, optimizer, Position(1, 1, 1, ""), wait=kind == "sync")
                saver.finish()
                [outcome] = saver.poll()
                assert outcome.error is None, outcome.error
                elapsed, n_bytes = outcome.write_seconds, outcome.bytes
                if kind == "async" and number:
                    seconds["stall"].append(outcome.stall_seconds)
                    elapsed += outcome.stall_seconds
                dist.barrier()
                if rank == 0:
                    shutil.rmtree(Path(folder) / "checkpoints")
            if number:
                seconds[kind].append(elapsed)
    saver.finish()
    dist.barrier()
    dist.destroy_process_group()
    return seconds, n_bytes


def write_raw(path: Path, n_bytes: int) -> None:
    """Write `n_bytes` in chunks of 64 MiB and call fsync."""
    chunk = memoryview(os.urandom(2**26))  # random data cannot be compressed by the file system
    with path.open("xb", buffering=0) as file:
        while n_bytes > 0:
            n_bytes -= file.write(chunk[:n_bytes])
        os.fsync(file.fileno())


if __name__ == "__main__":
    main()
