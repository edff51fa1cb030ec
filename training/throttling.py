"""Warning about a GPU whose clocks are reduced by heat, by its power supply or by a fault.

One slow GPU slows down all ranks. The state comes from NVML, the library of NVIDIA's driver; if it
is absent or fails, there is no warning. Imported on GPUs only.
"""

import ctypes
from contextlib import suppress
from typing import Any

import torch

# nvml.h, nvmlClocksEventReasons. The software power cap is left out: large matrix products reach it
# on every GPU in good order.
REASONS = {
    0x08: "hardware slowdown",
    0x20: "thermal slowdown by the driver",
    0x40: "thermal slowdown by the hardware",
    0x80: "power brake by the power supply",
}


class Throttling:
    """The reasons for reduced clocks of one GPU; each combination is reported once."""

    def __init__(self, device: torch.device) -> None:
        self._library: Any = None
        self._handle = ctypes.c_void_p()
        self._reported = {0}
        with suppress(Exception):  # no driver, an older one, or a MIG slice
            uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}".encode()
            library = ctypes.CDLL("libnvidia-ml.so.1")
            handle = ctypes.byref(self._handle)
            if not library.nvmlInit_v2() and not library.nvmlDeviceGetHandleByUUID(uuid, handle):
                self._library = library

    def warning(self, rank: int, host: str) -> str | None:
        """Return a message if the clocks are reduced for reasons that were not reported yet."""
        reasons = self._reasons() & sum(REASONS)
        if reasons in self._reported:
            return None
        self._reported.add(reasons)
        named = ", ".join(name for bit, name in REASONS.items() if reasons & bit)
        return (
            f"Warning: the GPU of rank {rank} on {host} runs at reduced clocks ({named}), and all "
            "ranks wait for it; check its cooling and power: nvidia-smi -q -d PERFORMANCE"
        )

    def _reasons(self) -> int:
        """Return NVML's bit mask, 0 if it is not available."""
        found = ctypes.c_ulonglong()
        with suppress(Exception):
            read = self._library.nvmlDeviceGetCurrentClocksThrottleReasons
            if not read(self._handle, ctypes.byref(found)):
                return found.value
        return 0
