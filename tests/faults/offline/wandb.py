"""W&B where nobody reaches its server; the zygote's ranks find it in place of the real one."""

import time
from typing import Any

TIMEOUT_SECONDS = 0.5  # the real one gives up after `init_timeout`


def Settings(**settings: Any) -> dict[str, Any]:
    """Takes what is set."""
    return settings


def init(**options: Any) -> Any:
    """Waits for an answer, and gives up."""
    time.sleep(TIMEOUT_SECONDS)
    raise ConnectionError("Run initialization has timed out")
