"""`torch.cuda` and the allocation of CUDA tensors on a CPU build of PyTorch, in a forked process.

`install` patches torch in the server of `fake_device`, `configure` sets the GPUs of one process.
Tensors on CUDA are FakeTensors of one mode, `FAKE`; tensors on the CPU stay real. What is read from
the device is zero, or `host_value`. `calls` records streams, events, threads, copies between host
and device, and everything that makes the host wait.
"""

import contextlib
import ctypes
import threading
import types
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import contracts
import torch
import torch.cuda
from fake_device import Gpus
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_map_only

aten = torch.ops.aten


# Bytes of shared memory per block with opt-in: CUDA C++ Programming Guide, technical specifications
# per compute capability; 99 KiB for the others from 8.0 on.
SHARED_MEMORY = {75: 64 * 1024, 80: 163 * 1024, 87: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}


class Call(NamedTuple):
    """One call of the CUDA API, or an operation that is one."""

    name: str
    thread: str  # name of the thread
    device: int  # current device of the thread
    stream: int  # id of the current stream
    detail: str = ""


SYNCS = ("synchronize", "stream.synchronize", "event.synchronize", "wait for a value", "copy")
"""Names of calls after which the host has waited for the device."""

calls: list[Call] = []
operations: Counter[str] = Counter()  # number of calls of each operation on CUDA tensors
gathered: list[int] = []  # bytes that each all-gather of FSDP2 returned
gpus = Gpus()
guard: Any = None  # library of guard.cpp
host_value = 0  # of each element that is copied from the device
_thread = threading.local()


def configure(new: Gpus) -> None:
    """Set the GPUs that this process sees."""
    global gpus
    gpus = new
    major, minor = new.capability
    ctypes.c_int.in_dll(guard, "fake_cuda_capability").value = 10 * major + minor
    ctypes.c_int.in_dll(guard, "fake_cuda_devices").value = new.count
    ctypes.c_int.in_dll(guard, "fake_cuda_has_cudnn").value = new.cudnn


def record(name: str, detail: str = "") -> None:
    """Record a call; raise if it uses the device of a thread that has none.

    Such a thread uses GPU 0, whatever the rank, and creates a context there.
    """
    _check_thread(name, detail)
    stream = current_stream().stream_id
    calls.append(Call(name, threading.current_thread().name, current_device(), stream, detail))


def _check_thread(name: str, detail: str) -> None:
    thread = threading.current_thread()
    if guard.fake_cuda_get_device() < 0 and thread is not threading.main_thread():
        raise RuntimeError(
            f"{name} {detail} in thread {thread.name}, which has not called torch.cuda.set_device"
        )


def waits() -> list[Call]:
    """Return the recorded calls in which the host waited for the device."""
    return [call for call in calls if call.name in SYNCS]


# ---------------------------------------------------------------- torch.cuda


def current_device() -> int:
    """Return the device of this thread; GPU 0 before `set_device`."""
    return max(guard.fake_cuda_get_device(), 0)


def set_device(device: Any) -> None:
    index = torch.device(device).index if not isinstance(device, int) else device
    if not 0 <= index < gpus.count:
        raise RuntimeError(f"invalid device ordinal {index} of {gpus.count}")
    guard.fake_cuda_set_device(index)
    record("set_device", str(index))


class Stream(torch.Stream):
    """A stream on which nothing runs; `wait_stream` and others are recorded."""

    def __new__(cls, device: Any = None, priority: int = 0, **kwargs: Any) -> "Stream":
        device = torch.device("cuda", current_device())
        return torch.Stream.__new__(cls, device=device, priority=priority)

    def wait_stream(self, stream: Any) -> None:
        record("wait_stream", f"{self.stream_id} on {stream.stream_id}")

    def wait_event(self, event: Any) -> None:
        record("wait_event", f"{self.stream_id} on {event.recorded}")

    def record_event(self, event: Any = None) -> Any:
        event = event or Event()
        event.record(self)
        return event

    def synchronize(self) -> None:
        record("stream.synchronize", str(self.stream_id))

    def query(self) -> bool:
        return True


class Event:
    """An event that has always passed."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.recorded: int | None = None  # id of the stream

    def record(self, stream: Any = None) -> None:
        self.recorded = (stream or current_stream()).stream_id
        record("event.record", str(self.recorded))

    def wait(self, stream: Any = None) -> None:
        (stream or current_stream()).wait_event(self)

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        record("event.synchronize", str(self.recorded))

    def elapsed_time(self, end: Any) -> float:
        return 1.0


def current_stream(device: Any = None) -> Any:
    if not hasattr(_thread, "streams"):
        _thread.streams = [default_stream()]
    return _thread.streams[-1]


def default_stream(device: Any = None) -> Any:
    # Of the current device; its id is 0.
    return torch.Stream.__new__(
        Stream, stream_id=0, device_index=current_device(), device_type=_CUDA_TYPE
    )


_CUDA_TYPE = 1  # c10::DeviceType


@contextlib.contextmanager
def stream(new: Any) -> Iterator[None]:
    streams = current_stream() and _thread.streams
    streams.append(new or streams[-1])
    try:
        yield
    finally:
        streams.pop()


def set_stream(new: Any) -> None:
    current_stream()
    _thread.streams[-1] = new


@contextlib.contextmanager
def device(new: Any) -> Iterator[None]:
    index = torch.device(new).index if not isinstance(new, int) else new
    previous = guard.fake_cuda_get_device()
    guard.fake_cuda_set_device(previous if index is None else index)
    try:
        yield
    finally:
        guard.fake_cuda_set_device(previous)


def get_device_properties(device: Any = None) -> Any:
    major, minor = gpus.capability
    return types.SimpleNamespace(
        name=gpus.name,
        major=major,
        minor=minor,
        total_memory=int(gpus.memory_gib * 2**30),
        multi_processor_count=132,
        warp_size=32,
        max_threads_per_multi_processor=2048,
        max_threads_per_block=1024,
        regs_per_multiprocessor=65536,
        shared_memory_per_block=49152,
        shared_memory_per_block_optin=SHARED_MEMORY.get(10 * major + minor, 99 * 1024),
        shared_memory_per_multiprocessor=SHARED_MEMORY.get(10 * major + minor, 99 * 1024) + 1024,
        L2_cache_size=50 * 2**20,
        gcnArchName="",
        uuid="GPU-0",
    )


def mem_get_info(device: Any = None) -> tuple[int, int]:
    total = int(gpus.memory_gib * 2**30)
    return total - 2**30, total


def install(library: Any) -> None:
    """Patch torch in this process, before the product is imported."""
    global guard
    guard = library
    library.fake_cuda_set_device.argtypes = [ctypes.c_int]
    stubs: dict[str, Any] = {
        "_lazy_init": lambda: None,
        "is_available": lambda: gpus.count > 0,
        "is_initialized": lambda: True,
        "device_count": lambda: gpus.count,
        "is_bf16_supported": lambda *_, **__: gpus.capability >= (8, 0),
        "get_device_capability": lambda device=None: gpus.capability,
        "get_device_name": lambda device=None: gpus.name,
        "synchronize": lambda device=None: record("synchronize"),
        "empty_cache": lambda: None,
        "reset_peak_memory_stats": lambda device=None: None,
        "default_generators": (torch.Generator(),) * 64,
    }
    for name in ("memory_allocated", "max_memory_allocated"):
        stubs[name] = lambda device=None: 0
    for name in ("memory_reserved", "max_memory_reserved"):
        stubs[name] = lambda device=None: 0
    replaced: list[Any] = [current_device, set_device, current_stream, default_stream, stream]
    replaced += [set_stream, device, get_device_properties, mem_get_info, Stream, Event]
    stubs |= {each.__name__: each for each in replaced}
    for name, stub in stubs.items():
        setattr(torch.cuda, name, stub)
    torch.cuda.get_rng_state = lambda device=None: torch.get_rng_state()
    torch.cuda.set_rng_state = lambda *_, **__: None
    _install_allocation()
    setattr(FakeTensorMode, "dispatch", _dispatch)  # noqa: B010


# ---------------------------------------------------------------- tensors

FAKE = FakeTensorMode(allow_non_fake_inputs=True)
_library = torch.library.Library("aten", "IMPL")


def _install_allocation() -> None:
    """Allocate CUDA tensors as FakeTensors of `FAKE`."""
    for op in (aten.empty.memory_format, aten.empty_strided.default):
        _library.impl(
            op._schema.name + "." * bool(op._schema.overload_name) + op._schema.overload_name,
            _allocator(op),
            "CUDA",
        )
    # Kernels of the CUDA build whose presence decides how autograd sees the operation.
    for name in ("_fused_rms_norm", "_fused_rms_norm_backward"):
        _library.impl(name, _not_computed, "CUDA")
    real_tensor = torch.tensor

    def tensor(data: Any, *args: Any, device: Any = None, **kwargs: Any) -> Tensor:
        # Its C++ code copies to the device where no dispatch mode sees it.
        host = real_tensor(data, *args, **kwargs)
        return host if device is None else host.to(device)

    torch.tensor = tensor
    torch._C._cuda_getDevice = current_device
    torch._C._cuda_getCurrentRawStream = lambda device: 0


def _not_computed(*args: Any, **kwargs: Any) -> Any:
    raise RuntimeError("a kernel of the fake device was called")


def _allocator(op: Any) -> Callable[..., Tensor]:
    nested = threading.local()

    def allocate(*args: Any, **kwargs: Any) -> Any:
        if getattr(nested, "inside", False):  # the fake tensor's own storage
            return op(*args, **{**kwargs, "device": torch.device("meta")})
        nested.inside = True
        try:
            with FAKE:
                return op(*args, **kwargs)
        finally:
            nested.inside = False

    return allocate


_VALUES = {aten._local_scalar_dense.default, aten.equal.default, aten.nonzero.default}
_VALUES |= {aten.masked_select.default, aten._unique2.default, aten.is_nonzero.default}
_fake_dispatch = FakeTensorMode.dispatch


def _dispatch(
    mode: FakeTensorMode, func: Any, types: Any, args: Any = (), kwargs: Any = None
) -> Any:
    """Dispatch an operation on fake tensors: of `FAKE` in eager mode, else of the compiler."""
    kwargs = kwargs or {}
    if getattr(_thread, "inside", False):  # the operation's own decomposition
        return _fake_dispatch(mode, func, types, args, kwargs)
    contracts.check(func, args, kwargs, gpus.capability)
    if mode is not FAKE:
        return _fake_dispatch(mode, func, types, args, kwargs)
    _record_operation(func, args, kwargs)
    if func in _VALUES:
        return _read_value(func, args)
    if func is aten.copy_.default and not args[0].is_cuda:
        return args[0]
    _thread.inside = True
    try:
        result = _fake_dispatch(mode, func, types, args, kwargs)
    finally:
        _thread.inside = False
    pinned = bool(kwargs.get("pin_memory"))
    return tree_map_only(FakeTensor, lambda value: _on_host(value, pinned), result)


def _record_operation(func: Any, args: Any, kwargs: Any) -> None:
    name = str(func) if isinstance(func, torch._ops.HigherOrderOperator) else func._schema.name
    operations[name.rpartition("::")[2]] += 1
    if name == "c10d::_allgather_base_":
        gathered.append(args[0].numel() * args[0].element_size())
    if func in _VALUES:
        record("wait for a value", name)
    elif func in (aten._to_copy.default, aten.copy_.default):
        source, target = args[0], torch.device(kwargs.get("device") or args[0].device)
        if func is aten.copy_.default:
            source, target = args[1], args[0].device
        non_blocking = kwargs.get("non_blocking", False) or (len(args) > 2 and args[2])
        if source.device.type != target.type and source.dim() + source.numel() > 0:
            record("asynchronous copy" if non_blocking else "copy", f"{source.device} to {target}")
    else:
        _check_thread("operation", name)


def _read_value(func: Any, args: Any) -> Any:
    """Return what is read from the device: `host_value`, one element, False."""
    if func is aten._local_scalar_dense.default:
        return torch.full((), host_value, dtype=args[0].dtype).item()
    if func in (aten.equal.default, aten.is_nonzero.default):
        return False
    if func is aten.nonzero.default:
        return torch.zeros(1, args[0].dim(), dtype=torch.int64, device=args[0].device)
    return args[0].new_zeros(1)


def _on_host(value: Any, pinned: bool) -> Tensor:
    """Return a fake tensor on CUDA itself, and real values for one that was copied to the host."""
    if value.device.type != "cpu":
        return value
    size = value.untyped_storage().nbytes() // value.element_size()
    host = torch.full((size,), host_value, dtype=value.dtype, pin_memory=pinned)
    return host.as_strided(value.size(), value.stride(), value.storage_offset())


def reset() -> None:
    """Forget what was recorded."""
    calls.clear()
    operations.clear()
    ctypes.memset((ctypes.c_int64 * 8).in_dll(guard, "fake_cuda_sdpa_calls"), 0, 64)


def sdpa_backends() -> dict[str, int]:
    """Return how often each backend of scaled_dot_product_attention was chosen."""
    names = ("math", "flash", "efficient", "cudnn", "overrideable")
    counts = (ctypes.c_int64 * 8).in_dll(guard, "fake_cuda_sdpa_calls")
    return {name: counts[index] for index, name in enumerate(names) if counts[index]}
