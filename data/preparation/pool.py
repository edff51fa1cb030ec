"""Worker processes that prepare parts.

Workers hold the folder lock together with the main process and exit when it exits for any reason,
so no second preparation can start while a worker may still write.
"""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import Connection
from typing import Any

from data.errors import DataError
from data.sources.corpora import Part

PreparePart = Callable[[Part, Any], None]


def prepare_parts(
    prepare: PreparePart,
    parts: Sequence[tuple[int, Part]],
    n_workers: int,
    counters: Any,
    lock_descriptor: int,
) -> None:
    """Prepare parts in worker processes, or in this process if one worker is enough.

    Args:
        prepare: `prepare_part`, called with a part and its counters.
        parts: Each with its index into the counters.
        counters: Shared array of `PartCounts`.
        lock_descriptor: File descriptor that holds the folder lock.

    Raises:
        DataError: The input is invalid, or a worker died.
        OSError: The shards cannot be written.
    """
    n_workers = min(n_workers, len(parts))
    if n_workers <= 1:
        for index, part in parts:
            prepare(part, counters[index])
        return
    context = multiprocessing.get_context("spawn")
    # The pipe carries no data: closing the main end, also by the death of this process, stops the
    # workers.
    worker_end, main_end = context.Pipe(duplex=False)
    # A `Connection` only because it can be sent to a spawned process, together with the lock.
    lock = Connection(os.dup(lock_descriptor))
    pool = ProcessPoolExecutor(
        n_workers, context, _init_worker, (prepare, counters, worker_end, lock)
    )
    try:
        # Ctrl-C reaches all processes. The first submit starts the workers, which inherit the
        # blocked signal and so do not print a traceback while they start.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            futures = [pool.submit(_work, index, part) for index, part in parts]
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        done, _ = wait(futures, return_when=FIRST_EXCEPTION)
        for future in done:
            future.result()
        pool.shutdown()
    except BrokenProcessPool:
        raise DataError(
            "A worker process of the preparation died (the system may have killed it for lack of "
            "memory); run again to resume, with fewer data.workers if memory is short"
        ) from None
    finally:
        main_end.close()
        pool.shutdown(cancel_futures=True)
        worker_end.close()
        lock.close()


_worker_state: dict[str, Any] = {}  # in a worker process only, set by `_init_worker`


def _init_worker(
    prepare: PreparePart, counters: Any, worker_end: Connection, lock: Connection
) -> None:
    threading.Thread(target=_exit_with_main_process, args=(worker_end,), daemon=True).start()
    _worker_state.update(prepare=prepare, counters=counters, lock=lock)


def _exit_with_main_process(worker_end: Connection) -> None:
    """Exit this process as soon as the main process exits or closes its end of the pipe."""
    worker_end.poll(None)
    os._exit(1)


def _work(index: int, part: Part) -> None:
    _worker_state["prepare"](part, _worker_state["counters"][index])
