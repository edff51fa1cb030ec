"""Configuration of an evaluation and of generation. Imports nothing heavy."""

import math
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


@dataclass(frozen=True)
class GenerationConfig:
    """Which weights complete which prompts, and how tokens are drawn; conf/generate.yaml."""

    checkpoint: str
    prompt: str | None
    prompts: str | None
    max_new_tokens: int
    temperature: float
    top_p: float | None
    top_k: int | None
    seed: int
    batch_size: int
    tokenizer_path: str

    def problems(self) -> list[str]:
        """Every broken rule, as messages that name key, value, rule and remedy."""
        found = [
            f"{key} ({value}) is below 1: use at least 1{off}"
            for key, off in (("max_new_tokens", ""), ("batch_size", ""), ("top_k", ", or null"))
            if (value := getattr(self, key)) is not None and value < 1
        ]
        if self.prompt == "":
            found.append("prompt ('') is empty: give the beginning of a text, or null to be asked")
        if self.prompt is not None and self.prompts is not None:
            found.append(
                f"prompts ({self.prompts}) and prompt ({self.prompt!r}) are both given: use one "
                "of them"
            )
        if not 0 <= self.temperature < math.inf:
            found.append(
                f"temperature ({self.temperature}) is not a number from 0 on: use 0 for the "
                "likeliest token, or 0.8"
            )
        if self.top_p is not None and not 0 < self.top_p <= 1:
            found.append(f"top_p ({self.top_p}) is not in (0, 1]: use 0.9, or null for all tokens")
        return found
