"""Objects in separate processes that compute only while a method is called.

Process-wide settings, such as the C library's handling of freed memory, as well as heap, threads
and compiled code are then independent. Results are pickled directly: torch's multiprocessing would
move tensors to shared memory and keep a thread for it.
"""

import pickle
import traceback
from collections.abc import Callable
from contextlib import suppress
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any

EXIT_SECONDS = 10.0  # grace period after closing the pipe


class Remote:
    """An object created by `make(*arguments)` in a separate process.

    Args:
        name: Name in error messages.
        make: Importable callable; runs immediately, and the first call waits for it.
    """

    def __init__(self, name: str, make: Callable[..., Any], *arguments: Any) -> None:
        context = get_context("spawn")
        self.name = name
        self.pipe, child_end = context.Pipe()
        self.process = context.Process(target=_serve, args=(child_end, make, arguments))
        self.process.start()
        child_end.close()  # so that the pipe closes when the process dies

    def call(self, method: str, *arguments: Any) -> Any:
        """Call a method of the object and return its result.

        Raises:
            ChildProcessError: The method failed or the process is dead.
        """
        with suppress(OSError):  # a process that has exited may have sent its error
            self.pipe.send_bytes(pickle.dumps((method, arguments)))
        try:
            error, answer = pickle.loads(self.pipe.recv_bytes())
        except (EOFError, OSError):
            self.process.join()
            error = f"its process exited with exit code {self.process.exitcode}"
        if error:
            raise ChildProcessError(f"{self.name}: {error}")
        return answer

    def close(self) -> None:
        """Stop the process, even if it is busy."""
        self.pipe.close()
        self.process.join(EXIT_SECONDS)
        self.process.kill()
        self.process.join()


def _serve(pipe: Connection, make: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    """Create the object and serve calls until one fails or the pipe is closed."""
    try:
        made = make(*arguments)
        while (request := _receive(pipe)) is not None:
            method, arguments_of_call = request
            pipe.send_bytes(pickle.dumps((None, getattr(made, method)(*arguments_of_call))))
    except Exception:
        pipe.send_bytes(pickle.dumps((traceback.format_exc(), None)))


def _receive(pipe: Connection) -> tuple[str, tuple[Any, ...]] | None:
    """Return the next method and arguments, or None if the pipe is closed."""
    try:
        request: tuple[str, tuple[Any, ...]] = pickle.loads(pipe.recv_bytes())
    except EOFError:
        return None
    return request
