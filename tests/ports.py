"""TCP ports for process groups that tests start."""

import itertools
import os
import socket

FIRST_PORT = 12_000
PORTS_PER_WORKER = 500
N_WORKERS = 40  # with ranges of their own: 12,000 to 31,999, below Linux's default of 32,768
_counter = itertools.count()


def free_port() -> int:
    """Return a port of 127.0.0.1 that nothing uses, different in each call and pytest worker.

    The kernel's own choice, a bind to port 0, can go to another process between the choice and the
    bind of rank 0: the ports of outgoing connections, of which gloo opens many, are drawn from the
    same range. The ports returned here are below it.
    """
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    first = FIRST_PORT + worker % N_WORKERS * PORTS_PER_WORKER
    start = os.getpid() % PORTS_PER_WORKER  # another run of the tests has other ports in use
    for _ in range(PORTS_PER_WORKER):
        port = first + (start + next(_counter)) % PORTS_PER_WORKER
        with socket.socket() as probe:
            # Connections of an earlier launch may be in TIME_WAIT, which rank 0 does not mind.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise RuntimeError(f"no free port from {first} to {first + PORTS_PER_WORKER - 1}")
