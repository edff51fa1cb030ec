"""Memory-mapped files of a dataset, of which only a limited number is mapped at a time.

Each mapping holds a file descriptor (`ulimit -n`) and an area of memory (`vm.max_map_count`), and a
dataset of 10 billion tokens can have more shards than either allows.
"""

import errno
import resource
from collections import OrderedDict
from collections.abc import Callable, Hashable
from contextlib import suppress
from threading import Lock
from typing import Any, TypeVar

from data.errors import DataError

MAX_MAPPED = 4096  # shards; far below the 65,530 areas of memory that Linux allows a process
MAX_FILES = 2**16  # the soft limit is raised up to this: some programs visit every descriptor
_EXHAUSTED = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)

Mapped = TypeVar("Mapped")


def raise_file_limit() -> int:
    """Raise the soft limit of open files to the hard one and return it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MAX_FILES if hard == resource.RLIM_INFINITY else min(hard, MAX_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with suppress(OSError, ValueError):  # macOS has a lower limit than it reports
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return MAX_FILES if soft == resource.RLIM_INFINITY else soft


class Mappings:
    """Mapped shards by key; beyond the limit, the least recently used are unmapped.

    Arrays that a caller still holds keep their mapping, so callers copy what they return.

    Args:
        limit: Number of shards, each with two mappings. None: half of the descriptors that the
            process may open, at most `MAX_MAPPED`.
    """

    def __init__(self, limit: int | None = None) -> None:
        self._limit = limit
        self._mapped: OrderedDict[Hashable, Any] = OrderedDict()
        self._lock = Lock()

    def get(self, key: Hashable, open_: Callable[[], Mapped]) -> Mapped:
        """Return the shard with this key, opened with `open_` if it is not mapped.

        Raises:
            DataError: The system allows no further file or mapping.
        """
        with self._lock:
            if key in self._mapped:
                self._mapped.move_to_end(key)
                return self._mapped[key]
        try:
            opened = self._open(open_)
        except OSError as error:
            if error.errno not in _EXHAUSTED:
                raise
            soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
            raise DataError(
                f"Cannot map a shard ({error.strerror}), although no other is mapped; raise "
                f"`ulimit -n` (now {soft}) or `sysctl vm.max_map_count`. The data is not damaged."
            ) from error
        with self._lock:
            if self._limit is None:
                self._limit = max(min(MAX_MAPPED, raise_file_limit() // 4), 1)
            self._mapped[key] = opened
            while len(self._mapped) > self._limit:
                self._mapped.popitem(last=False)
        return opened

    def _open(self, open_: Callable[[], Mapped]) -> Mapped:
        try:
            return open_()
        except OSError as error:
            if error.errno not in _EXHAUSTED:
                raise
        raise_file_limit()
        with self._lock:  # other parts of the process hold more than expected
            self._limit = max(len(self._mapped) // 2, 1)
            self._mapped.clear()
        return open_()
