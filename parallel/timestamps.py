"""Points in time on the device that computes, taken without waiting for it."""

import time
from typing import Any


def timestamp(device_type: str) -> Any:
    """Return the host's time; on `cuda` an event at the end of the work queued so far."""
    if device_type != "cuda":
        return time.perf_counter()
    import torch

    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def seconds_between(start: Any, end: Any) -> float:
    """Return the seconds between two timestamps that the device has reached."""
    return end - start if isinstance(start, float) else start.elapsed_time(end) / 1e3
