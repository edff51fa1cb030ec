"""Pauses training where it writes a text sample to a named pipe, until the pipe has a reader.

Training itself does not wait for the reader of a pipe. With this folder in PYTHONPATH, Python runs
the file at its start.
"""

import os
import stat
import sys
import threading
from pathlib import Path
from typing import Any

SECONDS_OPEN = 0.5  # training opens and writes the pipe meanwhile; the reader then sees its end
waiting = threading.local()


def wait_for_reader(event: str, arguments: tuple[Any, ...]) -> None:
    """Wait in the call that opens the pipe for writing."""
    if event != "open" or getattr(waiting, "path", None) or not isinstance(arguments[0], str):
        return
    path, flags = arguments[0], arguments[2]
    if not path.endswith("samples.txt") or not isinstance(flags, int) or not flags & os.O_WRONLY:
        return
    if not Path(path).exists() or not stat.S_ISFIFO(os.stat(path).st_mode):
        return
    waiting.path = path
    try:
        descriptor = os.open(path, os.O_WRONLY)
    finally:
        waiting.path = None
    threading.Timer(SECONDS_OPEN, os.close, [descriptor]).start()


sys.addaudithook(wait_for_reader)
