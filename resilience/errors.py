"""Errors that a program reports to the user."""

HOST_OUT_OF_MEMORY = "can't allocate memory"
"""Part of the message of the allocator for CPU (c10/core/impl/alloc_cpu.cpp)."""
OUT_OF_MEMORY = ("out of memory", HOST_OUT_OF_MEMORY, "cublas_status_alloc_failed")
"""Parts of the messages of the allocators for GPU and CPU, of CUDA, NCCL and cuBLAS."""


class LaunchError(RuntimeError):
    """The process group cannot be initialized."""


class OutOfMemory(RuntimeError):
    """A rank is out of memory; the message has the measured peak and a remedy.

    Attributes:
        overrides: Command-line overrides with which the run fits; empty if there are none.
        is_first: Whether this rank reports; another one has failed before it otherwise.
    """

    def __init__(self, message: str, overrides: str = "") -> None:
        super().__init__(message)
        self.overrides, self.is_first = overrides, True


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error means that device or host have no memory left."""
    text = str(error).lower()
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(part in text for part in OUT_OF_MEMORY)
    )


def is_host_out_of_memory(error: BaseException) -> bool:
    """Return whether an error that `is_out_of_memory` means the host, not the device."""
    return isinstance(error, MemoryError) or HOST_OUT_OF_MEMORY in str(error).lower()
