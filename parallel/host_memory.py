"""What becomes of freed host memory: a training keeps it, a conversion gives it back.

glibc hands large freed blocks back to the kernel, until it has seen one of their size freed. A
training step frees and allocates the same activations every time: 14,000 page faults a step of the
default model; without them, and in huge pages, it takes 0.87 of the time (`bench.page_faults`).
A conversion allocates blocks of many sizes once, and kept they fragment: it ended with as much
memory as it had converted.
"""

import ctypes
import os
import resource
from pathlib import Path

# From glibc's malloc.h: blocks up to the first come from the heap, trimmed beyond the second.
_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD, _LARGEST, _NEVER = -3, -1, 2**31 - 1, -1
_SMALL = 2**19  # bytes; below a slab of any tensor that matters
_MADV_HUGEPAGE, _HUGE, _PIECE = 14, 2**21, 2**30  # linux/mman.h; bytes of a huge page; of a piece
_COUNTED = "2"  # the kernel counts memory when it is asked for, not when it is touched


def keep_freed_memory() -> bool:
    """Asks the C library to keep what is freed; False where it has no such setting."""
    kept = _set(_M_MMAP_THRESHOLD, _LARGEST) and _set(_M_TRIM_THRESHOLD, _NEVER)
    if kept and not _untouched_memory_counts():
        _use_huge_pages()
    return kept


def give_freed_memory_back() -> bool:
    """Asks the C library to give large freed blocks back, always; False where it has no such."""
    return _set(_M_MMAP_THRESHOLD, _SMALL)


def _set(setting: int, value: int) -> bool:
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and mallopt(setting, value) == 1


def _untouched_memory_counts() -> bool:
    """Whether memory that was asked for and never touched is missing elsewhere."""
    limits = (resource.getrlimit(kind)[0] for kind in (resource.RLIMIT_AS, resource.RLIMIT_DATA))
    limited = any(limit != resource.RLIM_INFINITY for limit in limits)
    return limited or Path("/proc/sys/vm/overcommit_memory").read_text().strip() == _COUNTED


def _use_huge_pages() -> None:
    """Has the kernel map the heap in huge pages, where it does so for who asks.

    It can be asked for addresses that are there alone: the heap grows by half the machine's memory,
    of which nothing is touched, and what is freed again stays the heap's.
    """
    c = ctypes.CDLL(None)
    c.malloc.restype, c.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    c.free.argtypes = [ctypes.c_void_p]
    c.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    half = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    pieces = [piece for _ in range(half // _PIECE) if (piece := c.malloc(_PIECE)) is not None]
    for piece in reversed(pieces):
        begin, end = -(-piece // _HUGE) * _HUGE, (piece + _PIECE) // _HUGE * _HUGE
        c.madvise(begin, end - begin, _MADV_HUGEPAGE)
        c.free(piece)
