"""The workers of a preparation: processes that take one part after the other.

They hold the folder's lock together with the main process and end when it ends, however that
happens, so no second preparation begins while one of them may still write.
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
from data.preparation.part import PartSettings, load, prepare_part
from data.sources.corpora import Part
from data.tokenizer import Tokenizer

N_COUNTERS = 3  # of each part: bytes of input, documents, tokens that are done


def shared_counters(n_parts: int) -> Array[c_int64]:
    """Zeros that the workers write and the main process reads, `N_COUNTERS` of each part."""
    return RawArray(c_int64, N_COUNTERS * n_parts)


def prepare_parts(
    job: PartSettings,
    tokenizer: Tokenizer,
    parts: Sequence[tuple[int, Part]],
    n_workers: int,
    counters: Array[c_int64],
    lock: int,
) -> None:
    """Prepares parts, each with its place among the counters; without processes where one does.

    Args:
        tokenizer: what processes load from the folder
        lock: descriptor of the file that is locked

    Raises:
        DataError: the input is refused, or a worker died.
        OSError: the shards cannot be written.
    """
    n_workers = min(n_workers, len(parts))
    if n_workers <= 1:
        for place, part in parts:
            _prepare(job, tokenizer, place, part, counters)
        return
    context = multiprocessing.get_context("spawn")
    # Nothing is ever sent: the workers end when this end is closed, by us or by our death.
    workers_end, our_end = context.Pipe(duplex=False)
    pool = ProcessPoolExecutor(
        n_workers, context, _begin, (job, counters, workers_end, _Inherited(lock))
    )
    try:
        # Ctrl-C reaches all processes. The workers, which the first of these calls starts, inherit
        # that it is held back, so none ends with a traceback while it begins; here it comes after.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            futures = [pool.submit(_work, place, part) for place, part in parts]
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        done, _ = wait(futures, return_when=FIRST_EXCEPTION)
        for future in done:
            future.result()
        pool.shutdown()
    except BrokenProcessPool:
        raise DataError(
            "a worker process of the preparation died (the system kills one when memory runs "
            "out): start again, it goes on from what is done; fewer data.workers need less memory"
        ) from None
    finally:
        our_end.close()
        pool.shutdown(cancel_futures=True)
        workers_end.close()


def _prepare(
    job: PartSettings, tokenizer: Tokenizer, place: int, part: Part, counters: Array[c_int64]
) -> None:
    """One part, with its own counters."""
    own = slice(place * N_COUNTERS, (place + 1) * N_COUNTERS)

    def tell(*done: int) -> None:
        counters[own] = list(done)

    prepare_part(job, tokenizer, part, tell)


class _Inherited:
    """A file descriptor that a started process shares, and with it the lock of its file."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor

    def __reduce__(self) -> Any:
        return _detached, (reduction.DupFd(self.descriptor),)


def _detached(descriptor: Any) -> _Inherited:
    return _Inherited(descriptor.detach())


# Of a worker process, set once when it begins.
_state: dict[str, Any] = {}


def _begin(
    job: PartSettings, counters: Array[c_int64], workers_end: Connection, lock: _Inherited
) -> None:
    """Sets up a worker process."""
    threading.Thread(target=_end_with_main_process, args=(workers_end,), daemon=True).start()
    _state.update(job=job, counters=counters, lock=lock, tokenizer=load(job))


def _end_with_main_process(workers_end: Connection) -> None:
    """Ends this process at once when the main process is gone or wants no more."""
    workers_end.poll(None)
    os._exit(1)


def _work(place: int, part: Part) -> None:
    """One part, in a worker process."""
    _prepare(_state["job"], _state["tokenizer"], place, part, _state["counters"])
