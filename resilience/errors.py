"""Errors that a program reports to the user, and their kinds."""

import errno
import os
import re

from resilience.exit_codes import ExitCode

HOST_OUT_OF_MEMORY = "can't allocate memory"
"""Part of the message of the allocator for CPU (c10/core/impl/alloc_cpu.cpp)."""
OUT_OF_MEMORY = ("out of memory", HOST_OUT_OF_MEMORY, "cublas_status_alloc_failed")
"""Parts of the messages of the allocators for GPU and CPU, of CUDA, NCCL and cuBLAS."""
_HARDWARE = re.compile(
    r"uncorrectable (ecc|nvlink)|double.bit ecc|hardware stack error|fallen off the bus|gpu is lost"
    r"|silent data corruption on (?:(?! or )[^:])*:"  # of two copies, either may be wrong
)
_XID = re.compile(r"\bxid\b(?: \([^)]*\))?\W{0,3}(\d+)")  # `NVRM: Xid (PCI:0000:3b:00): 79, …`
_HARDWARE_XIDS = {48, 62, 63, 64, 74, 79, 92, 94, 95, 119, 120, 140, *range(144, 151), 171, 172}
"""Memory, NVLink, bus, GSP (docs.nvidia.com/deploy/xid-errors); others are errors of programs."""


class LaunchError(RuntimeError):
    """The process group cannot be initialized.

    Attributes:
        code: Exit code of the process.
    """

    def __init__(self, message: str, code: ExitCode = ExitCode.USER_ERROR) -> None:
        super().__init__(message)
        self.code = code


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


def exceeded_limit(error: BaseException) -> str | None:
    """Return a message with the remedy if this process may not open or start more."""
    text, number = str(error), getattr(error, "errno", None)
    if number in (errno.EMFILE, errno.ENFILE) or "too many open files" in text.lower():
        return f"too many open files ({_limit('n', 'NOFILE')}); raise the limit"
    no_thread = ("can't start new thread", os.strerror(errno.EAGAIN))  # of Python, of std::thread
    if isinstance(error, BlockingIOError) or (
        isinstance(error, RuntimeError) and text in no_thread
    ):
        return (
            f"no other thread or process can be started ({_limit('u', 'NPROC')}, "
            f"{_limit('v', 'AS')}); raise the limit, or the container's"
        )
    return None


def _limit(option: str, name: str) -> str:
    """Return the limit of this process, as the shell shows and sets it."""
    import resource

    number = getattr(resource, f"RLIMIT_{name}")
    unit = 1024 if name == "AS" else 1
    soft, hard = (
        "unlimited" if value == resource.RLIM_INFINITY else str(value // unit)
        for value in resource.getrlimit(number)
    )
    raised = f", run: ulimit -{option} {hard}" if soft != hard else ""
    return f"ulimit -{option} is {soft}{raised}"


def is_hardware_fault(text: str) -> bool:
    """Return whether a message of CUDA, NCCL, NVIDIA's driver or a run means a broken machine."""
    text = text.lower()
    xids = {int(number) for number in _XID.findall(text)}
    return _HARDWARE.search(text) is not None or not _HARDWARE_XIDS.isdisjoint(xids)


def is_connection_fault(error: BaseException) -> bool:
    """Return whether ranks have lost their connection: an error of NCCL, gloo or a store.

    Wrong arguments of a collective are an error of the program.
    """
    from torch.distributed import DistError

    text = str(error)
    known = isinstance(error, DistError) or "gloo/transport" in text
    return known and "ncclInvalidUsage" not in text and "ncclInvalidArgument" not in text
