"""Settings of glibc's allocator: training keeps freed memory, conversion returns it.

glibc returns large freed blocks to the kernel until it has seen one of their size freed. A training
step frees and allocates the same activations every time, which causes 14,000 page faults per step
of the default model; without them, and in huge pages, a step takes 0.87 of the time
(`bench.page_faults`). A conversion allocates blocks of many sizes once; if they were kept, they
would fragment: it ended with as much memory as it had converted.
"""

import ctypes
import os
import resource
from pathlib import Path

# From glibc's malloc.h. Blocks below the mmap threshold come from the heap; free memory at its top
# beyond the trim threshold is returned.
_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD, _LARGEST, _NEVER = -3, -1, 2**31 - 1, -1
_SMALL = 2**19  # bytes; smaller than any large tensor's slab
_MADV_HUGEPAGE, _HUGE, _CHUNK = 14, 2**21, 2**30  # linux/mman.h; bytes per huge page, per chunk
_STRICT_OVERCOMMIT = "2"  # the kernel counts memory when it is allocated, not when it is touched


def keep_freed_memory() -> bool:
    """Make the C library keep freed memory; return False if it has no such setting."""
    kept = _mallopt(_M_MMAP_THRESHOLD, _LARGEST) and _mallopt(_M_TRIM_THRESHOLD, _NEVER)
    if kept and not _untouched_memory_counts():
        _use_huge_pages()
    return kept


def return_freed_memory() -> bool:
    """Make the C library return large freed blocks; return False if it has no such setting."""
    return _mallopt(_M_MMAP_THRESHOLD, _SMALL)


def _mallopt(setting: int, value: int) -> bool:
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and mallopt(setting, value) == 1


def _untouched_memory_counts() -> bool:
    """Return whether allocated but untouched memory counts against a limit."""
    limits = (resource.getrlimit(kind)[0] for kind in (resource.RLIMIT_AS, resource.RLIMIT_DATA))
    limited = any(limit != resource.RLIM_INFINITY for limit in limits)
    overcommit = Path("/proc/sys/vm/overcommit_memory").read_text().strip()
    return limited or overcommit == _STRICT_OVERCOMMIT


def _use_huge_pages() -> None:
    """Make the kernel back the heap with huge pages, if it does so on request.

    The request needs existing addresses: the heap is grown by half of the machine's memory, without
    touching it. After the blocks are freed, the heap keeps the addresses.
    """
    c = ctypes.CDLL(None)
    c.malloc.restype, c.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    c.free.argtypes = [ctypes.c_void_p]
    c.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    half = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    chunks = [chunk for _ in range(half // _CHUNK) if (chunk := c.malloc(_CHUNK)) is not None]
    for chunk in reversed(chunks):
        start, end = -(-chunk // _HUGE) * _HUGE, (chunk + _CHUNK) // _HUGE * _HUGE
        c.madvise(start, end - start, _MADV_HUGEPAGE)
        c.free(chunk)
