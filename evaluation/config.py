"""Configuration of an evaluation. Imports nothing heavy."""

from dataclasses import dataclass


@dataclass(frozen=True)
class EvaluationConfig:
    """Which weights, on which held-out text, how many windows at a time.

    `data` is a prepared folder, `seq_len` the length of its windows, `samples` their number; null
    for what the checkpoint's run had, and for all of them. `output` is the file to write.
    """

    checkpoint: str
    data: str | None = None
    seq_len: int | None = None
    samples: int | None = None
    micro_batch_size: int = 8
    output: str | None = None

    def problems(self) -> list[str]:
        """Every broken rule, as messages that name key, value, rule and remedy."""
        return [
            f"evaluation.{key} ({value}) is below 1: use at least 1"
            for key in ("seq_len", "samples", "micro_batch_size")
            if (value := getattr(self, key)) is not None and value < 1
        ]
