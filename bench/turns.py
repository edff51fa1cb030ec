"""Objects in processes of their own, which compute when they are asked and at no other time.

What is set for a whole process, such as what its C library does with freed memory, is then one's
own, and so are heap, threads and compiled code. Answers are pickled plainly: torch's way between
processes puts tensors into shared memory and keeps a thread for it.
"""

import pickle
import traceback
from collections.abc import Callable
from contextlib import suppress
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any

ENDING = 10.0  # seconds for a process that nobody asks any more to end by itself


class Remote:
    """An object made by `make(*arguments)` in a process of its own; `close` ends it.

    Args:
        name: What errors call it.
        make: Importable there; it begins at once, and the first answer waits for it.
    """

    def __init__(self, name: str, make: Callable[..., Any], *arguments: Any) -> None:
        context = get_context("spawn")
        self.name = name
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, make, arguments))
        self.process.start()
        theirs.close()  # so that its death ends the pipe

    def ask(self, method: str, *arguments: Any) -> Any:
        """What a method of the object returns.

        Raises:
            ChildProcessError: it failed there, or the process is dead.
        """
        with suppress(OSError):  # where it has ended, it may have told why
            self.pipe.send_bytes(pickle.dumps((method, arguments)))
        try:
            error, answer = pickle.loads(self.pipe.recv_bytes())
        except (EOFError, OSError):
            self.process.join()
            error = f"its process ended with exit code {self.process.exitcode}"
        if error:
            raise ChildProcessError(f"{self.name}: {error}")
        return answer

    def close(self) -> None:
        """Ends the process, whatever it does."""
        self.pipe.close()
        self.process.join(ENDING)
        self.process.kill()
        self.process.join()


def _serve(pipe: Connection, make: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    """Makes the object and answers, until it fails or nobody asks any more."""
    try:
        made = make(*arguments)
        while (asked := _next(pipe)) is not None:
            method, given = asked
            pipe.send_bytes(pickle.dumps((None, getattr(made, method)(*given))))
    except Exception:
        pipe.send_bytes(pickle.dumps((traceback.format_exc(), None)))


def _next(pipe: Connection) -> tuple[str, tuple[Any, ...]] | None:
    """What is asked next; None where the other end is closed."""
    try:
        asked: tuple[str, tuple[Any, ...]] = pickle.loads(pipe.recv_bytes())
    except EOFError:
        return None
    return asked
