"""Errors that a program reports to the user."""

OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "cublas_status_alloc_failed")
"""Parts of the messages of the allocators for GPU and CPU, of CUDA, NCCL and cuBLAS."""


class LaunchError(RuntimeError):
    """The process group cannot be initialized."""


class OutOfMemory(RuntimeError):
    """A rank is out of memory; the message has the measured peak and a remedy."""


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error means that device or host have no memory left."""
    text = str(error).lower()
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(part in text for part in OUT_OF_MEMORY)
    )
