"""Which samples a step takes, and how: a closed form of the step, whatever changed on the way.

A run is one stage, or several that follow each other: from a sample on other weights, another
length of the sequences, another batch size. Each begins with a step. Steps count the batches of
the order here: where a rewind left batches out, an optimizer step has a later batch than its own.
"""

from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count

from data.config import DataConfig


@dataclass(frozen=True)
class Stage:
    """How the samples from `first_sample` on are taken; `weights` by source, as given."""

    first_step: int
    first_sample: int
    first_token: int
    seq_len: int
    global_batch_size: int
    micro_batch_size: int | None
    weights: Mapping[str, float]


class Stages:
    """The stages of a run, in order; the first begins with sample 0."""

    def __init__(self, stages: Sequence[Stage]) -> None:
        self.all = list(stages)
        self._first_steps = [stage.first_step for stage in stages]
        self._first_samples = [stage.first_sample for stage in stages]

    def at(self, step: int) -> Stage:
        """The stage of a step, counted from 0."""
        return self.all[bisect_right(self._first_steps, step) - 1]

    def first_sample(self, step: int) -> int:
        """How many samples all steps before this one take."""
        stage = self.at(step)
        return stage.first_sample + (step - stage.first_step) * stage.global_batch_size

    def step_of(self, sample: int) -> int:
        """The step that takes a sample, both counted from 0."""
        stage = self.all[bisect_right(self._first_samples, sample) - 1]
        return stage.first_step + (sample - stage.first_sample) // stage.global_batch_size

    def first_token(self, step: int) -> int:
        """How many input tokens all steps before this one take."""
        stage = self.at(step)
        per_step = stage.global_batch_size * stage.seq_len
        return stage.first_token + (step - stage.first_step) * per_step


def batches_from(first: int, skips: Sequence[tuple[int, int]]) -> Iterator[int]:
    """The numbers of the batches from `first` on, without end, but for those in a range of `skips`.

    Args:
        skips: Each from its first batch to before its second one.
    """
    return (
        number
        for number in count(first)
        if not any(begin <= number < stop for begin, stop in skips)
    )


def plan_stages(
    data: DataConfig, *, seq_len: int, global_batch_size: int, micro_batch_size: int | None
) -> tuple[Stages, list[str]]:
    """The stages of a run that begins with these sizes, and what is wrong with them.

    What a stage leaves out stays as it was; a new batch size without a micro-batch size of its own
    keeps the one before it.

    Returns:
        The stages, and a message for each that does not begin with a step or has no source.
    """
    weights = {name: source.weight for name, source in data.sources.items()}
    stage = Stage(0, 0, 0, seq_len, global_batch_size, micro_batch_size, weights)
    stages, problems = [stage], []
    for place, change in enumerate(data.stages or []):
        steps, rest = divmod(change.from_sample - stage.first_sample, stage.global_batch_size)
        if rest:
            before = change.from_sample - rest
            earlier = f"{before} or " if steps else ""
            problems.append(
                f"data.stages[{place}].from_sample ({change.from_sample}) lies inside a step of "
                f"{stage.global_batch_size} samples: use {earlier}"
                f"{before + stage.global_batch_size}"
            )
        stage = Stage(
            first_step=stage.first_step + steps,
            first_sample=change.from_sample,
            first_token=stage.first_token + steps * stage.global_batch_size * stage.seq_len,
            seq_len=change.seq_len or stage.seq_len,
            global_batch_size=change.global_batch_size or stage.global_batch_size,
            micro_batch_size=change.micro_batch_size or stage.micro_batch_size,
            weights={**stage.weights, **(change.weights or {})},
        )
        if not any(stage.weights.values()):
            problems.append(
                f"data.stages[{place}].weights: every source's weight is 0: give one a weight"
            )
        stages.append(stage)
    return Stages(stages), problems
