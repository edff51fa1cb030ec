"""What becomes of freed host memory: a training keeps it, a conversion gives it back.

glibc hands large freed blocks back to the kernel, until it has seen one of their size freed. A
training step frees and allocates the same activations every time: 70,000 page faults, 8% of the
default model's step (`python -m bench.page_faults`). A conversion allocates blocks of many sizes
once, and kept they fragment: it ended with as much memory as it had converted.
"""

import ctypes

# From glibc's malloc.h: blocks up to the first come from the heap, trimmed beyond the second.
_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD, _LARGEST = -3, -1, 2**31 - 1
_SMALL = 2**19  # bytes; below a slab of any tensor that matters


def keep_freed_memory() -> bool:
    """Asks the C library to keep what is freed; False where it has no such setting."""
    return _set(_M_MMAP_THRESHOLD, _LARGEST) and _set(_M_TRIM_THRESHOLD, _LARGEST)


def give_freed_memory_back() -> bool:
    """Asks the C library to give large freed blocks back, always; False where it has no such."""
    return _set(_M_MMAP_THRESHOLD, _SMALL)


def _set(setting: int, value: int) -> bool:
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and mallopt(setting, value) == 1
