"""`train.deterministic`: two equal runs on equal GPUs have equal results, bit for bit.

PyTorch's kernels, FlashAttention and the compiler select deterministic algorithms by one switch;
cuBLAS and NCCL read environment variables. An operator without a deterministic algorithm raises.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.utils.deterministic


def make_deterministic() -> None:
    """Select deterministic algorithms; call it before CUDA and NCCL are initialized."""
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # PyTorch raises without it
    # Reductions inside of NVSwitch have no fixed order. `^` excludes all names of the list (NCCL,
    # src/graph/tuning.cc: parseList; names in src/init.cc: ncclAlgoStr); NCCL rejects unknown ones.
    os.environ.setdefault("NCCL_ALGO", "^NVLS,NVLSTree")
    torch.use_deterministic_algorithms(True)
    # Filling uninitialized memory finds errors, and takes time.
    setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)  # noqa: B010
    torch.backends.cudnn.benchmark = False


@contextmanager
def nondeterministic() -> Iterator[None]:
    """Allow other operators in code that does not affect the run's state."""
    torch.use_deterministic_algorithms(False)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(True)
