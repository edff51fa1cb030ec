"""The stages of a run: which samples each step takes, as a closed form of the step.

A stage changes source weights, sequence length or batch sizes from a sample on, always at the start
of a step. Steps here count the batches of the sample order: after a rewind has excluded batches,
optimizer step n takes a later batch than batch n.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count

from data.config import DataConfig


@dataclass(frozen=True)
class Stage:
    """Settings from `first_sample` on; `weights` are unnormalized, by source name."""

    first_step: int
    first_sample: int
    first_token: int
    seq_len: int
    global_batch_size: int
    micro_batch_size: int | None
    weights: Mapping[str, float]


class Stages:
    """The stages of a run in order; the first starts at sample 0."""

    def __init__(self, stages: Sequence[Stage]) -> None:
        self.all = list(stages)

    def at(self, step: int) -> Stage:
        """Return the stage of a step, counted from 0."""
        return self.all[bisect_right(self.all, step, key=lambda stage: stage.first_step) - 1]

    def first_sample(self, step: int) -> int:
        """Return the number of samples in all earlier steps."""
        stage = self.at(step)
        return stage.first_sample + (step - stage.first_step) * stage.global_batch_size

    def step_of(self, sample: int) -> int:
        """Return the step that takes a sample, both counted from 0."""
        stage = self.all[bisect_right(self.all, sample, key=lambda stage: stage.first_sample) - 1]
        return stage.first_step + (sample - stage.first_sample) // stage.global_batch_size

    def first_token(self, step: int) -> int:
        """Return the number of input tokens in all earlier steps."""
        stage = self.at(step)
        tokens_per_step = stage.global_batch_size * stage.seq_len
        return stage.first_token + (step - stage.first_step) * tokens_per_step

    def steps_for(self, tokens: int) -> int:
        """Return the smallest number of steps, at least 1, that take `tokens` input tokens."""
        stage = self.all[bisect_left(self.all, tokens, key=lambda stage: stage.first_token) - 1]
        tokens_per_step = stage.global_batch_size * stage.seq_len
        return stage.first_step + -(-(tokens - stage.first_token) // tokens_per_step)


def batch_indices(first: int, skips: Sequence[tuple[int, int]]) -> Iterator[int]:
    """Yield batch indices from `first` without end, except those in `skips` (half-open ranges)."""
    return (
        index for index in count(first) if not any(start <= index < stop for start, stop in skips)
    )


def plan_stages(
    data: DataConfig, *, seq_len: int, global_batch_size: int, micro_batch_size: int | None
) -> tuple[Stages, list[str]]:
    """Return the stages of a run that starts with these sizes, and all errors.

    A value that a stage does not set keeps its previous value, including `micro_batch_size` when
    only `global_batch_size` changes.

    Returns:
        The stages, and a message for each stage that does not start a step or has no source.
    """
    weights = {name: source.weight for name, source in data.sources.items()}
    stage = Stage(0, 0, 0, seq_len, global_batch_size, micro_batch_size, weights)
    stages, errors = [stage], []
    for index, change in enumerate(data.stages or []):
        key, size = f"data.stages[{index}]", stage.global_batch_size
        n_steps, remainder = divmod(change.from_sample - stage.first_sample, size)
        if remainder:
            previous = change.from_sample - remainder
            choices = f"{previous} or {previous + size}" if n_steps else f"{previous + size}"
            errors.append(
                f"{key}.from_sample={change.from_sample} is inside a step of {size} samples; use "
                f"{choices}"
            )
        stage = Stage(
            first_step=stage.first_step + n_steps,
            first_sample=change.from_sample,
            first_token=stage.first_token + n_steps * size * stage.seq_len,
            seq_len=change.seq_len or stage.seq_len,
            global_batch_size=change.global_batch_size or size,
            micro_batch_size=change.micro_batch_size or stage.micro_batch_size,
            weights={**stage.weights, **(change.weights or {})},
        )
        if not any(stage.weights.values()):
            errors.append(f"{key}.weights: every source has weight 0; give one a positive weight")
        stages.append(stage)
    return Stages(stages), errors
