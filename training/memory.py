"""Keeps freed host memory in the process, so that a step on CPU does not fault it in again.

glibc hands large freed blocks back to the kernel at once. A training step frees and allocates the
same activations every time: 70,000 page faults, 8% of the default model's step
(`python -m bench.page_faults`).
"""

import ctypes

# From glibc's malloc.h: blocks up to the first come from the heap, which is never trimmed.
_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD, _LARGEST = -3, -1, 2**31 - 1


def keep_freed_memory() -> bool:
    """Asks the C library to keep what is freed; False where it has no such setting."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    settings = (_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD)
    return all(mallopt(setting, _LARGEST) == 1 for setting in settings)
