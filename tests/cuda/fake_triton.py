"""Compile Inductor's Triton kernels to machine code without a GPU or a driver; never run them.

Triton and ptxas compile for any capability; only loading a kernel needs the driver. `install` gives
Triton a driver that loads nothing, and `kernels` returns what Inductor's code would launch.
"""

import contextlib
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cuda_stubs
import torch
import torch._functorch.config
import torch._inductor.config
import triton
from torch._dynamo.device_interface import CudaInterface
from torch._inductor.runtime import triton_helpers, triton_heuristics
from triton.backends.compiler import GPUTarget
from triton.runtime.errors import OutOfResources


@dataclass(frozen=True)
class Kernel:
    """A compiled kernel: resources per block, and stack bytes per thread (spilled registers)."""

    name: str
    configuration: str
    shared_memory: int
    registers: int
    stack: int


_library = torch.library.Library("aten", "IMPL")
# Called with an output by generated code; has no kernel for fake tensors.
_library.impl("_scaled_mm.out", lambda *args, out, **kwargs: out, "Meta")
_launched: dict[int, Any] = {}  # id of an autotuner: the autotuner of a kernel


def install() -> None:
    """Patch Triton and Inductor in this process, whose GPUs are configured.

    Call it after each launch, which sets the number of compile workers.
    """
    major, minor = cuda_stubs.gpus.capability
    triton.runtime.driver.set_active(_Driver(10 * major + minor))
    triton_helpers.set_driver_to_gpu = lambda: None
    autotuner: Any = triton_heuristics.CachingAutotuner
    autotuner.run = _run
    result_type: Any = triton_heuristics.TritonCompileResult
    result_type.make_launcher = _load
    config: Any = torch._inductor.config
    config.compile_threads = 1
    config.fx_graph_cache = False
    config.joint_graph_constant_folding = False  # it computes on the device
    config.use_static_triton_launcher = False
    torch._functorch.config.enable_autograd_cache = False
    _let_wrappers_run()


def reset() -> None:
    """Forget which kernels were launched."""
    _launched.clear()


def kernels() -> list[Kernel]:
    """Return the launched kernels in each configuration that fits on the GPU, with resources.

    They are read from the machine code. Inductor chooses among the configurations by their times.
    """
    found = []
    for each in _launched.values():
        name = each.inductor_meta.get("kernel_name") or each.fn.__name__
        for launcher in each.launchers:
            cubin = launcher.kernel.asm["cubin"]
            registers, stack = resource_usage(cubin)
            found.append(Kernel(name, str(launcher.config), launcher.shared, registers, stack))
    return found


@cache
def resource_usage(cubin: bytes) -> tuple[int, int]:
    """Return registers and stack bytes of each thread, as in the machine code."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        output = subprocess.run(
            [tool, "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    usage = re.search(r"REG:(\d+) STACK:(\d+)", output)
    assert usage is not None, output
    return int(usage[1]), int(usage[2])


def _load(self: Any) -> Any:
    """Return a launcher, if the kernel's shared memory does not exceed the GPU's.

    As `CompiledKernel._init_handles` in triton/compiler/compiler.py.

    Raises:
        OutOfResources: Inductor tries another configuration, and fails without one.
    """
    limit = cuda_stubs.get_device_properties().shared_memory_per_block_optin
    shared = self.kernel.metadata.shared
    if shared > limit:
        raise OutOfResources(shared, limit, "shared memory")
    return SimpleNamespace(
        config=self.config, kernel=self.kernel, n_spills=0, n_regs=0, shared=shared
    )


def _run(self: Any, *args: Any, **kwargs: Any) -> None:
    """Compile a kernel where it would be launched, if that has not been done, and record it."""
    _launched[id(self)] = self
    if not self.launchers:
        self.precompile()


class _Utils:
    def get_device_properties(self, device: int) -> dict[str, int]:
        return {
            "max_shared_mem": cuda_stubs.get_device_properties().shared_memory_per_block_optin,
            "multiprocessor_count": 132,
            "max_num_regs": 65536,
            "warpSize": 32,
        }


class _Driver:
    """What `triton.compile` and Inductor read of `triton.backends.nvidia.driver.CudaDriver`."""

    utils = _Utils()

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int = 0) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cuda", 0)

    def get_device_interface(self) -> Any:
        return torch.cuda

    def is_active(self) -> bool:
        return True


def _let_wrappers_run() -> None:
    """Replace the functions of the CUDA build that Inductor's generated code calls."""
    guards: Any = torch._C._dynamo.guards
    guards._empty_strided_cuda = lambda size, stride, dtype: torch.empty_strided(
        size, stride, dtype=dtype, device="cuda"
    )
    guards._reinterpret_tensor = lambda tensor, size, stride, offset=0: torch.as_strided(
        tensor, size, stride, tensor.storage_offset() + offset
    )
    interface: Any = CudaInterface  # refers to the functions that `cuda_stubs` has replaced
    properties = staticmethod(cuda_stubs.get_device_properties)
    interface.exchange_device = interface.maybe_exchange_device = staticmethod(lambda device: 0)
    interface.get_device_properties = interface.Worker.get_device_properties = properties
    module: Any = torch.cuda
    module._DeviceGuard = _device_guard
    module._exchange_device = lambda device: 0
    module._maybe_exchange_device = lambda device: 0


@contextlib.contextmanager
def _device_guard(index: int) -> Iterator[None]:
    yield
