"""Stub of W&B whose server is unreachable; imported instead of the real one in forked ranks."""

import time
from typing import Any

TIMEOUT_SECONDS = 0.5  # the real one waits for `init_timeout`


def Settings(**settings: Any) -> dict[str, Any]:
    return settings


def init(**options: Any) -> Any:
    """Wait, then fail as the real one does without a connection."""
    time.sleep(TIMEOUT_SECONDS)
    raise ConnectionError("Run initialization has timed out")
