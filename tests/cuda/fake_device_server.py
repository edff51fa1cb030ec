"""Preloaded by the server of `fake_device`: guard library, torch with stubs, and the product.

Starts no threads, because a fork copies the calling thread only.
"""

import ctypes
import importlib
import sys
import threading

from fake_device import guard_library, torch_folder

assert "torch" not in sys.modules, "torch looks for its CUDA hooks once"
for name in ("libc10.so", "libtorch_cpu.so"):
    ctypes.CDLL(str(torch_folder() / "lib" / name), mode=ctypes.RTLD_GLOBAL)
GUARD = ctypes.CDLL(str(guard_library()), mode=ctypes.RTLD_GLOBAL)

import cuda_stubs  # noqa: E402

cuda_stubs.install(GUARD)

# Imported here, and not in each fork.
for name in (
    "checkpoint.restore",
    "checkpoint.saver",
    "fake_inductor",
    "pytest",
    "torch._dynamo",
    "torch._inductor.compile_fx",
    "torch.distributed.fsdp",
    "torch.nn.attention.varlen",
    "torchao.float8",
    "parallel.activation_checkpoint",
    "parallel.compilation",
    "parallel.context_parallel",
    "parallel.float8",
    "parallel.tensor_parallel",
    "resilience.launch",
    "step",
    "train",
    "training.moments",
    "training.optimizer",
):
    importlib.import_module(name)

assert threading.active_count() == 1, threading.enumerate()
