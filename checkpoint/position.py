"""Position of a run in training: the part of a checkpoint that is not tensors."""

import dataclasses
from dataclasses import dataclass
from typing import Any

OLD_NAMES = {"lanes": "stream_shards", "vitals": "monitor_state"}  # in checkpoints of 0.1


@dataclass(frozen=True)
class Position:
    """Position of a run; with the configuration it determines learning rate and next samples.

    Attributes:
        step: Optimizer steps done, skipped updates included.
        samples: Samples consumed from the sample order: trained on, or excluded by a rewind.
        tokens: Input tokens trained on.
        data_hash: Hash of the dataset.
        stream_shards: For streamed data, the read position of each stream shard (before saving,
            only of this rank's shards).
        batches: Batches consumed from the sample order: `step` and the excluded ones.
        skips: Half-open ranges [first, stop) of batches excluded by rewinds, ascending.
        rewinds: Those that each rewind of this run excluded, in order: a copy of `rewinds.json`.
        monitor_state: State of `resilience.loss_monitor.LossMonitor`.
    """

    step: int
    samples: int
    tokens: int
    data_hash: str
    stream_shards: dict[str, list[int]] | None = None
    batches: int = 0
    skips: tuple[tuple[int, int], ...] = ()
    rewinds: tuple[tuple[int, int], ...] = ()
    monitor_state: dict[str, Any] | None = None

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Position":
        """Create a position from a manifest of this or an earlier version.

        Raises:
            TypeError, KeyError: A field is missing, unknown or of another type.
        """
        values = {OLD_NAMES.get(key, key): value for key, value in values.items()}
        for key in ("step", "samples", "tokens", "batches"):
            if type(values.get(key, 0)) is not int:
                raise TypeError(f"{key} is not an integer")
        skips, rewinds = (
            tuple((int(first), int(stop)) for first, stop in values.get(key, ()))
            for key in ("skips", "rewinds")
        )
        # Before rewinds existed, a step consumed one batch and `batches` was not saved.
        return cls(**{"batches": values["step"], **values, "skips": skips, "rewinds": rewinds})

    def with_data(self, data_hash: str) -> "Position":
        """Return the position in a run on this dataset; on another one, streams start over."""
        if data_hash == self.data_hash:
            return self
        return dataclasses.replace(self, data_hash=data_hash, stream_shards=None)
