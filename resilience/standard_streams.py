"""Standard streams that cannot break a program: closed, full, or without a reader or terminal.

The files below `sys.stdout` and `sys.stderr` are replaced, so that prints, logging, warnings and
rich need no handling of errors. A run that cannot write a stream continues it in `console.log` of
its folder. The descriptor is redirected there too, for libraries, faulthandler and processes that
are started later. Imports only the standard library.
"""

import atexit
import io
import os
import select
import socket
import sys
import threading
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

STDOUT = "standard output"
STREAMS = {1: "stdout", 2: "stderr"}  # by descriptor
NAMES = {1: STDOUT, 2: "standard error"}
MAX_PENDING_BYTES = 2**20  # of output before a run holds its folder; the rest is dropped
READER_SECONDS = 10.0  # a run waits this long for a reader that has stopped reading


class StreamFile(io.RawIOBase):
    """Unbuffered file of a standard stream, whose output is dropped if it cannot be written."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self.name = descriptor  # as of a file that is opened by descriptor

    def write(self, data: Any) -> int:
        """Write bytes, and return how many need not be written again."""
        try:
            return self.write_or_raise(data)
        except OSError:
            return len(data)

    def write_or_raise(self, data: Any) -> int:
        """Write bytes, and return how many were written.

        Raises:
            OSError: They cannot be written.
        """
        while True:
            try:
                return os.write(self._descriptor, data)
            except BlockingIOError:  # another program has made a shared terminal non-blocking
                select.select([], [self._descriptor], [])

    def fileno(self) -> int:
        """Return the descriptor."""
        return self._descriptor

    def isatty(self) -> bool:
        """Return whether the stream is a terminal, which may disappear."""
        return os.isatty(self._descriptor)

    def writable(self) -> bool:
        """Return True."""
        return True


class ResultFile(StreamFile):
    """Standard output of a program that prints its result: the first error is raised each time.

    The error has the file name `STDOUT`. A caller that drops errors cannot hide it from
    `flush_result`.
    """

    def __init__(self, descriptor: int) -> None:
        super().__init__(descriptor)
        self.error: OSError | None = None
        self._at_exit = False
        atexit.register(self._drop_errors)  # Python reports them again when it flushes at exit

    def write(self, data: Any) -> int:
        """Write bytes, and return how many were written."""
        if self._at_exit:
            return super().write(data)
        if self.error is not None:
            raise self.error
        try:
            return self.write_or_raise(data)
        except OSError as error:
            error.filename, self.error = STDOUT, error
            raise

    def _drop_errors(self) -> None:
        self._at_exit = True


class ConsoleFile(StreamFile):
    """Standard stream of a run, which is continued in a console log if it cannot be written."""

    def __init__(self, descriptor: int, log: "ConsoleLog") -> None:
        super().__init__(descriptor)
        self.log = log

    def write(self, data: Any) -> int:
        """Write bytes, and return how many need not be written again."""
        if self._descriptor not in self.log.reasons:
            try:
                if not select.select([], [self._descriptor], [], READER_SECONDS)[1]:
                    raise TimeoutError(f"not read for {READER_SECONDS:.0f} s")
                return self.write_or_raise(data[: select.PIPE_BUF])  # more could block again
            except OSError as error:
                self.log.replace(self._descriptor, error.strerror or str(error))
        self.log.write(data)
        return len(data)


class ConsoleLog:
    """The file in which the standard streams of a process are continued.

    Attributes:
        reasons: Why each descriptor that is continued here cannot be written.
    """

    def __init__(self) -> None:
        self.reasons: dict[int, str] = {}
        self._path: Path | None = None
        self._is_first = False
        self._file: int | None = None
        self._pending = bytearray()
        self._lock = threading.Lock()

    def replace(self, descriptor: int, reason: str) -> None:
        """Continue a stream here, and the other one if it is the same pipe, file or terminal."""
        with self._lock:
            same = [fd for fd in STREAMS if os.path.sameopenfile(fd, descriptor)]
            self.reasons |= dict.fromkeys(same, reason)
            target = os.open(os.devnull, os.O_WRONLY) if self._file is None else self._file
            self._redirect(target)
            if self._file is None:
                os.close(target)

    def write(self, data: bytes) -> None:
        """Append bytes; they are dropped if they cannot be written."""
        with self._lock:
            if self._file is None:
                self._pending += data[: MAX_PENDING_BYTES - len(self._pending)]
                self._open()
            else:
                with suppress(OSError):
                    os.write(self._file, data)

    def open(self, path: Path, is_first_process: bool) -> None:
        """Set the path and write what is pending; the file is created only if it is needed."""
        with self._lock:
            self._path, self._is_first = path, is_first_process
            if self.reasons and self._file is None:
                self._open()

    def _open(self) -> None:
        """Try to open the file and to write the reasons and what is pending."""
        if self._path is None:
            return
        # A named pipe without a reader is an error; without O_NONBLOCK it would block the run.
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NONBLOCK
        with suppress(OSError):
            is_new = not self._path.exists()
            self._file = os.open(self._path, flags, 0o666)
            os.set_blocking(self._file, True)
            self._redirect(self._file)
            if is_new or self._is_first:  # one of many processes says it
                os.write(self._file, self._heading().encode())
            if self._is_first and 2 not in self.reasons:
                os.write(2, f"The output continues in {self._path}\n".encode())
            os.write(self._file, self._pending)
            self._pending.clear()

    def _redirect(self, target: int) -> None:
        for descriptor in self.reasons:
            os.dup2(target, descriptor)

    def _heading(self) -> str:
        reasons = " and ".join(f"{NAMES[fd]} ({why})" for fd, why in self.reasons.items())
        time = datetime.now(UTC).isoformat(timespec="seconds")
        return (
            f"{time} {socket.gethostname()} (pid {os.getpid()}): the run continues without "
            f"{reasons}; its output follows here.\n"
        )


def _open_closed_streams() -> list[int]:
    """Connect closed standard streams to /dev/null, before a file gets their descriptor.

    Returns:
        Descriptors of the streams that were closed.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # returns the lowest free descriptor
    streams = {0: "stdin", **STREAMS}
    closed = [descriptor for descriptor, name in streams.items() if getattr(sys, name) is None]
    for descriptor in closed:
        mode = "w" if descriptor in STREAMS else "r"
        file = os.fdopen(descriptor, mode, encoding="utf-8", closefd=False)
        setattr(sys, streams[descriptor], file)
    return closed


def protect_streams(is_run: bool) -> None:
    """Replace the files below `sys.stdout` and `sys.stderr`.

    Args:
        is_run: Continue the streams in the log of `continue_in`. Otherwise standard output holds a
            result, whose errors are raised, and those of standard error are ignored.
    """
    closed = _open_closed_streams()
    log = ConsoleLog()
    for descriptor in STREAMS:
        if is_run:
            _set_file(ConsoleFile(descriptor, log))
            if descriptor in closed:
                log.replace(descriptor, "closed at start")
        else:
            _set_file(ResultFile(descriptor) if descriptor == 1 else StreamFile(descriptor))


def _set_file(file: StreamFile) -> None:
    """Replace the file of its stream, unless a notebook has replaced the stream."""
    name = STREAMS[file.fileno()]
    stream = getattr(sys, name)
    try:
        if stream.fileno() != file.fileno():
            return
    except (OSError, ValueError, AttributeError):
        return
    is_console = not isinstance(file, ResultFile)
    new = io.TextIOWrapper(
        io.BufferedWriter(file),
        encoding=stream.encoding,
        errors="backslashreplace",
        line_buffering=is_console or stream.line_buffering or stream.write_through,
    )
    setattr(sys, name, new)


def _file_of(stream: Any) -> Any:
    return getattr(getattr(stream, "buffer", None), "raw", None)


def continue_in(folder: Path, is_first_process: bool) -> None:
    """Set the folder of the run in whose `console.log` failing streams are continued."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(file := _file_of(stream), ConsoleFile):
            file.log.open(folder / "console.log", is_first_process)


def print_result(text: str) -> None:
    """Print the result of a program, in a run as well.

    Raises:
        OSError: Standard output cannot be written.
    """
    if isinstance(_file_of(sys.stdout), ConsoleFile):
        _set_file(ResultFile(1))
    print(text)
    flush_result()


def flush_result() -> None:
    """Flush standard output.

    Raises:
        OSError: It could not be written, now or before.
    """
    sys.stdout.flush()
    file = _file_of(sys.stdout)
    if isinstance(file, ResultFile) and file.error is not None:
        raise file.error
