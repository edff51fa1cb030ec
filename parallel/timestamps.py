"""Points in time on the device that computes: CUDA events, or the host's clock on CPU.

Taking one does not wait for the device. Imports torch only inside functions.
"""

import time
from typing import Any


def timestamp(device_type: str) -> Any:
    """Return the time now; on `cuda` an event at the end of the work queued so far."""
    if device_type != "cuda":
        return time.perf_counter()
    import torch

    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def seconds_between(start: Any, end: Any) -> float:
    """Return the seconds between two timestamps, which the device must have reached."""
    return end - start if isinstance(start, float) else start.elapsed_time(end) / 1e3
