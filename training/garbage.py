"""Python garbage collection between training steps instead of within them.

By default the collector runs whenever enough objects have been allocated: within a step, on each
rank at a different time, while all other ranks wait. A full collection visits the half a million
objects of the imported libraries, which takes a quarter of a second (`python -m bench.garbage`).
Here all ranks collect after the same steps, and objects from before training are never visited.
"""

import gc

INTERVAL = 100  # steps; reference counting frees nearly everything that a step allocates


class GarbageCollector:
    """Garbage collection of this process during training."""

    _frozen = False

    def disable(self) -> None:
        """Disable automatic collection."""
        gc.disable()

    def run(self, step: int) -> None:
        """Collect objects allocated since the first step, every `INTERVAL` steps."""
        if not self._frozen:
            # Objects from set-up and compilation, including garbage, are never visited again.
            gc.freeze()
            self._frozen = True
        elif step % INTERVAL == 0:
            gc.collect()

    def enable(self) -> None:
        """Enable automatic collection again; frozen objects stay frozen."""
        gc.enable()
