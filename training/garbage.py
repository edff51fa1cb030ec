"""Keeps Python's garbage collector out of the steps.

Left to itself it runs whenever enough objects have been made, in the middle of a step, on each rank
at another time, and all the others wait: a full collection visits the half a million objects that
the libraries are made of, a quarter of a second (`python -m bench.garbage`). Here it runs between
steps, on all ranks after the same one, and never visits what was there after the first.
"""

import gc

EVERY = 100  # steps; a step itself leaves hardly anything that reference counts do not free


class GarbageCollector:
    """The collector of this process while a run trains: `begin`, `after` each step, `end`."""

    def __init__(self) -> None:
        self._frozen = False

    def begin(self) -> None:
        """From now on nothing is collected but by `after`."""
        gc.disable()

    def after(self, step: int) -> None:
        """Collects after every `EVERY`-th step of the run what was made since the first one."""
        if not self._frozen:
            # What set-up and compiling made stays, garbage too: it need not be looked at again.
            gc.freeze()
            self._frozen = True
        elif step % EVERY == 0:
            gc.collect()

    def end(self) -> None:
        """The collector is Python's own again, but for what is frozen."""
        gc.enable()
