"""Run a function on every rank of a small gloo process group, in real processes.

The processes are forked from a server that has imported everything once, which takes a tenth of a
second instead of several. The server has run no operation, so it has no threads that a fork loses.
"""

import multiprocessing
import os
import pickle
import sys
import traceback
from collections.abc import Callable
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from ports import free_port

PRELOADED = [
    *("train", "checkpoint.restore", "small_run"),
    *("torch.distributed.checkpoint", "torch.distributed.fsdp", "torch._dynamo.utils"),
    *("lightning_fabric.strategies", "torch.profiler", "pytest", "hypothesis"),
]
TIMEOUT_SECONDS = 600  # ten times the slowest launch on two slow cores


def on_ranks(world_size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Call `function(*arguments)` on each of `world_size` ranks and return the results by rank.

    The ranks have torchrun's environment variables, so Fabric launches no processes itself.

    Raises:
        RuntimeError: with the traceback of the first failing rank. The other ranks are killed.
    """
    port = free_port()
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    # The server ignores this process's sys.path until it forks, so pass it for the preloading.
    with mock.patch.dict(os.environ, PYTHONPATH=os.pathsep.join(filter(None, sys.path))):
        forkserver.ensure_running()
    processes, ranks = [], {}
    for rank in range(world_size):
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(
            target=_run_rank,
            args=(rank, world_size, port, sender, function, arguments),
            daemon=True,
        )
        process.start()
        sender.close()  # leaves the rank the only writer, so that its death closes the pipe
        processes.append(process)
        ranks[receiver] = rank
    try:
        return collect(ranks)
    finally:
        for process in processes:
            process.kill()
            process.join()


def collect(ranks: dict[Connection, int]) -> list[Any]:
    """Return the result of every rank, by rank; raise as soon as one fails."""
    pending, results = dict(ranks), {}
    while pending:
        ready = wait(list(pending), timeout=TIMEOUT_SECONDS)
        if not ready:
            raise RuntimeError(f"no result from ranks {sorted(pending.values())} in time")
        for receiver in ready:
            assert isinstance(receiver, Connection)
            rank = pending.pop(receiver)
            try:
                succeeded, value = pickle.loads(receiver.recv_bytes())
            except EOFError:
                succeeded, value = False, "the process died without a traceback"
            if not succeeded:
                raise RuntimeError(f"rank {rank} failed:\n{value}")
            results[rank] = value
    return [results[rank] for rank in sorted(results)]


def _run_rank(
    rank: int,
    world_size: int,
    port: int,
    sender: Connection,
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> None:
    os.environ.update(
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        GROUP_RANK="0",
        WORLD_SIZE=str(world_size),
        LOCAL_WORLD_SIZE=str(world_size),
        TORCHELASTIC_RUN_ID="tests",
    )
    torch.set_num_threads(1)
    try:
        dist.init_process_group("gloo", rank=rank, world_size=world_size)
        # Pickle here: multiprocessing would send a tensor as a handle owned by this process.
        result = pickle.dumps((True, function(*arguments)))
        dist.barrier()
        sender.send_bytes(result)
        dist.destroy_process_group()
    except BaseException:  # DCP raises errors that are not Exceptions
        sender.send_bytes(pickle.dumps((False, traceback.format_exc())))
