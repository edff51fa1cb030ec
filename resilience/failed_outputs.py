"""Warnings of outputs that cannot be written, once for each cause.

Logs, metrics, pictures and trackers are not needed to train: a failure is reported and training
continues. A file system that is full or read-only fails all of them, which is one cause.
"""

import errno
import os
from collections.abc import Callable
from pathlib import Path

from data.files import write_errno, write_problem

# Errors that concern a file system, not one of its files.
_OF_FILE_SYSTEM = {errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ESTALE}
_OF_FILE_SYSTEM |= {errno.ENOTCONN, errno.ENODEV, errno.ENXIO}


class FailedOutputs:
    """Report outputs of a run that cannot be written.

    Args:
        folder: Folder of the run, for messages.
        warn: Prints a message; its errors are the caller's.
    """

    def __init__(self, folder: Path, warn: Callable[[str], None]) -> None:
        self.folder, self.warn = folder, warn
        self._reported: set[object] = set()

    def report(self, output: str, error: BaseException | str) -> None:
        """Print why an output cannot be written, unless the output or the cause was reported.

        Args:
            output: Name of the output, such as `metrics.jsonl`.
            error: The error, or its description.
        """
        number = None if isinstance(error, str) else write_errno(error, self.folder)
        is_gone = number == errno.ENOENT and not os.path.exists(self.folder)  # moved or removed
        cause = number if number in _OF_FILE_SYSTEM or is_gone else None
        known = output in self._reported or cause in self._reported
        self._reported.add(output)
        if known:
            return
        more = ""
        if cause is not None:
            self._reported.add(cause)
            more = (
                " Other outputs with this error are not reported; metrics and events are kept in "
                "memory until they can be written."
            )
        problem = error if isinstance(error, str) else write_problem(error, self.folder)
        if not isinstance(error, str) and number is None:
            problem = f"{type(error).__name__}: {problem}"
        self.warn(
            f"Could not write {output} in {self.folder} ({' '.join(problem.split())}). Training "
            f"continues.{more}"
        )
