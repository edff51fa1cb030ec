"""A CUDA device whose kernels take time on a virtual clock, for the host side of the training loop.

The host's clock advances only by `advance` and by waits for the device, so results do not depend on
the machine. Streams execute in order, events have the time at which the stream reaches them, and a
copy to the host arrives when the stream has executed it: a buffer that is read too early holds NaN.
Tensors are CPU tensors that claim to be on the device.
"""

import heapq
import itertools
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch


class VirtualDevice:
    """One device and the clock of its host, in seconds.

    Attributes:
        now: Time of the host.
        waits: Names of the calls with which the host waited for the device.
    """

    def __init__(self) -> None:
        self.now = 1000.0
        self.current = self.default = Stream(self)
        self.waits: list[str] = []
        self._effects: list[tuple[float, int, Callable[[], Any]]] = []
        self._order = itertools.count()

    def advance(self, seconds: float) -> None:
        """Let the host work."""
        self.now += seconds
        while self._effects and self._effects[0][0] <= self.now:
            heapq.heappop(self._effects)[2]()

    def launch(self, seconds: float, effect: Callable[[], Any] = lambda: None) -> None:
        """Queue a kernel on the current stream; `effect` becomes visible when it has ended."""
        stream = self.current
        stream.end = max(self.now, stream.end) + seconds
        heapq.heappush(self._effects, (stream.end, next(self._order), effect))

    def wait_until(self, end: float, call: str) -> None:
        """Let the host wait for the device."""
        self.waits.append(call)
        self.advance(max(0.0, end - self.now))

    def tensor(self, values: list[float]) -> torch.Tensor:
        """Return a tensor that the kernels queued so far compute."""
        found = torch.tensor(values).as_subclass(DeviceTensor)
        found.virtual = self  # type: ignore[attr-defined]
        return found

    def install(self, patch: pytest.MonkeyPatch) -> None:
        """Replace the clock of the process and the parts of `torch.cuda` that the loop uses."""
        patch.setattr(time, "perf_counter", lambda: self.now)
        patch.setattr(torch.cuda, "Event", lambda **options: Event(self, **options))
        patch.setattr(torch.cuda, "current_stream", lambda device=None: self.current)
        patch.setattr(torch.cuda, "get_device_name", lambda device=None: "NVIDIA H100 80GB HBM3")
        patch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
        patch.setattr(torch.cuda, "max_memory_allocated", lambda device=None: 0)
        empty_like = torch.empty_like

        def unpinned(tensor: torch.Tensor, *, pin_memory: bool = False, **options: Any) -> Any:
            like = tensor.as_subclass(torch.Tensor)
            return empty_like(like, **options).fill_(math.nan if pin_memory else 0)

        patch.setattr(torch, "empty_like", unpinned)


class Stream:
    """Work in order; `end` is the time at which all of it will have been executed."""

    def __init__(self, device: VirtualDevice) -> None:
        self.device, self.end = device, -math.inf

    def synchronize(self) -> None:
        self.device.wait_until(self.end, "Stream.synchronize")

    def wait_event(self, event: "Event") -> None:
        self.end = max(self.end, event.time)

    def wait_stream(self, other: "Stream") -> None:
        self.end = max(self.end, other.end)


class Event:
    """A point in a stream."""

    def __init__(
        self, device: VirtualDevice, enable_timing: bool = False, blocking: bool = False
    ) -> None:
        self.device, self.has_time = device, enable_timing

    def record(self, stream: Stream | None = None) -> None:
        self.time = max(self.device.now, (stream or self.device.current).end)

    def query(self) -> bool:
        return self.time <= self.device.now

    def synchronize(self) -> None:
        self.device.wait_until(self.time, "Event.synchronize")

    def elapsed_time(self, end: "Event") -> float:
        """Return milliseconds; as in CUDA, an error before both events have completed."""
        assert self.has_time and end.has_time, "created without enable_timing"
        assert self.query() and end.query(), "device not ready"
        return 1e3 * (end.time - self.time)


class DeviceTensor(torch.Tensor):
    """A CPU tensor that is read like one on the device."""

    is_cuda = True

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if function is torch.Tensor.copy_ and not isinstance(args[0], DeviceTensor):
            host, values = args[0], args[1].as_subclass(torch.Tensor)
            assert kwargs.get("non_blocking"), "a blocking copy waits for the device"
            args[1].virtual.launch(0.0, lambda: host.copy_(values))
            return host
        name = getattr(function, "__name__", "")
        if name in ("tolist", "item", "cpu", "numpy", "__bool__", "__float__"):
            device = args[0].virtual
            device.wait_until(device.current.end, f"Tensor.{name}")
            return function(args[0].as_subclass(torch.Tensor), *args[1:], **kwargs)
        found = super().__torch_function__(function, types, args, kwargs)
        sources = [each for each in args if isinstance(each, DeviceTensor)]
        if isinstance(found, DeviceTensor) and sources:
            found.virtual = sources[0].virtual  # type: ignore[attr-defined]
        return found


class VirtualPool:
    """Replaces ThreadPoolExecutor: each task takes `seconds` of one of its workers' time."""

    def __init__(self, device: VirtualDevice, seconds: float, workers: int) -> None:
        self.device, self.seconds = device, seconds
        self.free = [-math.inf] * workers

    def submit(self, function: Callable[..., Any], *args: Any) -> Any:
        ready = max(self.device.now, heapq.heappop(self.free)) + self.seconds
        heapq.heappush(self.free, ready)
        value = function(*args)

        def result() -> Any:
            self.device.advance(max(0.0, ready - self.device.now))
            return value

        return SimpleNamespace(result=result)

    def shutdown(self, cancel_futures: bool) -> None:
        """Do nothing: there are no threads."""


@contextmanager
def virtual_device() -> Iterator[VirtualDevice]:
    """Install a virtual device."""
    with pytest.MonkeyPatch.context() as patch:
        device = VirtualDevice()
        device.install(patch)
        yield device
