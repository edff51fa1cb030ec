"""Runs a function on every rank of a small gloo process group, in real processes.

The processes are forked from a server that has imported torch once: starting one costs a tenth of
a second instead of several. The server has never run an operation, so it has no threads to lose.
"""

import multiprocessing
import os
import pickle
import socket
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.distributed as dist

PRELOADED = [
    "lightning.fabric.strategies",
    "torch.distributed.checkpoint",
    "torch.distributed.fsdp",
    "hydra",
    "pytest",
]
TIMEOUT_SECONDS = 600  # ten times what the slowest launch takes on two slow cores


def on_ranks(world_size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Calls `function(*arguments)` on each of `world_size` ranks; returns their results by rank.

    The environment is that of `torchrun`, so Fabric takes the processes as they are.

    Raises:
        RuntimeError: with the first failing rank's traceback; the other ranks are ended.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    processes, results = [], {}
    for rank in range(world_size):
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(
            target=_rank, args=(rank, world_size, port, sender, function, arguments), daemon=True
        )
        process.start()
        sender.close()  # so that the death of the process ends the pipe
        processes.append(process)
        results[receiver] = rank
    try:
        return _collect(results)
    finally:
        for process in processes:
            process.kill()
            process.join()


def _collect(waiting: dict[Connection, int]) -> list[Any]:
    """Every rank's result, by rank; raises as soon as one of them fails."""
    waiting, found = dict(waiting), {}
    while waiting:
        ready = wait(list(waiting), timeout=TIMEOUT_SECONDS)
        if not ready:
            raise RuntimeError(f"ranks {sorted(waiting.values())} gave no result in time")
        for receiver in ready:
            assert isinstance(receiver, Connection)
            rank = waiting.pop(receiver)
            try:
                ok, value = pickle.loads(receiver.recv_bytes())
            except EOFError:
                ok, value = False, "it died without a word"
            if not ok:
                raise RuntimeError(f"rank {rank} failed:\n{value}")
            found[rank] = value
    return [found[rank] for rank in sorted(found)]


def _rank(
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
        # Bytes: sent as it is, a tensor would be a file descriptor of a process that soon ends.
        result = pickle.dumps((True, function(*arguments)))
        dist.barrier()
        sender.send_bytes(result)
        dist.destroy_process_group()
    except BaseException:  # DCP's errors are no Exceptions
        sender.send_bytes(pickle.dumps((False, traceback.format_exc())))
