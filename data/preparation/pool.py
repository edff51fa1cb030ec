"""Worker processes that prepare parts.

Workers hold the folder lock together with the main process and exit when it exits for any reason,
so no second preparation can start while a worker may still write.
"""

import multiprocessing
import os
import signal
import threading
from collections.abc import Sequence
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from ctypes import Array, c_int64
from multiprocessing import reduction
from multiprocessing.connection import Connection
from multiprocessing.sharedctypes import RawArray
from typing import Any

from data.errors import DataError
from data.preparation.part import PartSettings, load_tokenizer_of, prepare_part
from data.sources.corpora import Part
from data.tokenizer import Tokenizer

N_COUNTERS = 3  # per part: processed input bytes, documents and tokens


def shared_counters(n_parts: int) -> Array[c_int64]:
    """Return zeroed counters that workers write and the main process reads."""
    return RawArray(c_int64, N_COUNTERS * n_parts)


def prepare_parts(
    settings: PartSettings,
    tokenizer: Tokenizer,
    parts: Sequence[tuple[int, Part]],
    n_workers: int,
    counters: Array[c_int64],
    lock_descriptor: int,
) -> None:
    """Prepare parts in worker processes, or in this process if one worker is enough.

    Args:
        tokenizer: The tokenizer that workers load from the folder.
        parts: Each with its index into the counters.
        lock_descriptor: File descriptor that holds the folder lock.

    Raises:
        DataError: The input is invalid, or a worker died.
        OSError: The shards cannot be written.
    """
    n_workers = min(n_workers, len(parts))
    if n_workers <= 1:
        for index, part in parts:
            _prepare(settings, tokenizer, index, part, counters)
        return
    context = multiprocessing.get_context("spawn")
    # The pipe carries no data: closing the main end, also by the death of this process, stops the
    # workers.
    worker_end, main_end = context.Pipe(duplex=False)
    pool = ProcessPoolExecutor(
        n_workers,
        context,
        _init_worker,
        (settings, counters, worker_end, _InheritedDescriptor(lock_descriptor)),
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


def _prepare(
    settings: PartSettings, tokenizer: Tokenizer, index: int, part: Part, counters: Array[c_int64]
) -> None:
    part_counters = slice(index * N_COUNTERS, (index + 1) * N_COUNTERS)

    def update(*counts: int) -> None:
        counters[part_counters] = list(counts)

    prepare_part(settings, tokenizer, part, update)


class _InheritedDescriptor:
    """A file descriptor, and the lock of its file, shared with a spawned process."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor

    def __reduce__(self) -> Any:
        return _detach, (reduction.DupFd(self.descriptor),)


def _detach(descriptor: Any) -> _InheritedDescriptor:
    return _InheritedDescriptor(descriptor.detach())


_worker_state: dict[str, Any] = {}  # in a worker process only, set by `_init_worker`


def _init_worker(
    settings: PartSettings,
    counters: Array[c_int64],
    worker_end: Connection,
    lock: _InheritedDescriptor,
) -> None:
    threading.Thread(target=_exit_with_main_process, args=(worker_end,), daemon=True).start()
    _worker_state.update(
        settings=settings, counters=counters, lock=lock, tokenizer=load_tokenizer_of(settings)
    )


def _exit_with_main_process(worker_end: Connection) -> None:
    """Exit this process as soon as the main process exits or closes its end of the pipe."""
    worker_end.poll(None)
    os._exit(1)


def _work(index: int, part: Part) -> None:
    state = _worker_state
    _prepare(state["settings"], state["tokenizer"], index, part, state["counters"])
