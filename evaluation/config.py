"""Configuration of an evaluation. Imports nothing heavy."""

from dataclasses import dataclass


@dataclass(frozen=True)
class EvaluationConfig:
    """Which checkpoint, on how many held-out windows (null: all), how many at a time."""

    checkpoint: str
    samples: int | None = None
    micro_batch_size: int = 8

    def problems(self) -> list[str]:
        """Every broken rule, as messages that name key, value, rule and remedy."""
        return [
            f"evaluation.{key} ({value}) is below 1: use at least 1"
            for key in ("samples", "micro_batch_size")
            if (value := getattr(self, key)) is not None and value < 1
        ]
