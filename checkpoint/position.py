"""Where a run stands: what a checkpoint holds besides tensors."""

import dataclasses
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Position:
    """Where a run stands: learning rate, samples and weights follow from it and the configuration.

    Args:
        step: Optimizer steps done, those whose update was skipped included.
        samples: How far the run is in the order of samples: trained on, or skipped by a rewind.
        tokens: Input tokens trained on.
        data_hash: Which tokens.
        lanes: Where samples come straight from a dataset, the place of each lane (of this rank's
            own, until they are saved together).
        batches: How many batches of the order lie behind; `step`, and those that rewinds skipped.
        skips: The batches that rewinds skip, as ranges [first, stop), in ascending order.
        vitals: What the watch over losses and gradients remembers; see `resilience.loss_monitor`.
    """

    step: int
    samples: int
    tokens: int
    data_hash: str
    lanes: dict[str, list[int]] | None = None
    batches: int = 0
    skips: tuple[tuple[int, int], ...] = ()
    vitals: dict[str, Any] | None = None

    @classmethod
    def read(cls, values: dict[str, Any]) -> "Position":
        """The position that a manifest holds; before there were rewinds, a step was a batch.

        Raises:
            TypeError, KeyError: it is not a position.
        """
        skips = tuple((int(first), int(stop)) for first, stop in values.get("skips", ()))
        return cls(**{"batches": values["step"], **values, "skips": skips})

    def after(
        self,
        *,
        batches: int,
        samples: int,
        tokens: int,
        lanes: dict[str, list[int]] | None = None,
        vitals: dict[str, Any] | None = None,
    ) -> "Position":
        """The position one step on: the places reached, the tokens that the step took."""
        return dataclasses.replace(
            self,
            step=self.step + 1,
            batches=batches,
            samples=samples,
            tokens=self.tokens + tokens,
            lanes=lanes,
            vitals=vitals,
        )

    def on(self, data_hash: str) -> "Position":
        """The same position in a run on this data; lanes of other data have no place in it."""
        if data_hash == self.data_hash:
            return self
        return dataclasses.replace(self, data_hash=data_hash, lanes=None)
