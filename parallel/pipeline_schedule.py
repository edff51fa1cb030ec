"""Which layers each pipeline rank has, and the order of its computations and transfers.

The model is cut into `pp` × `pp_parts` stages; stage s is on rank s mod `pp` of the axis. One part
per rank gives 1F1B (PipeDream-Flush, arXiv:2006.09503), several give the interleaved schedule of
Megatron-LM (arXiv:2104.04473, section 2.2), whose bubble is shorter by the number of parts. The
runtime in `parallel.pipeline_parallel` and the planner both use these functions, which import
nothing heavy.
"""

from collections.abc import Iterator, Sequence
from itertools import groupby, pairwise
from typing import NamedTuple

from model.config import ModelConfig, ModelPart
from parallel.config import ParallelConfig


class Action(NamedTuple):
    """Forward or backward of one micro-batch through one part of a rank."""

    forward: bool
    part: int
    micro_batch: int


class Transfer(NamedTuple):
    """Hidden states of a micro-batch on their way to the next stage, or their gradient back."""

    source: int  # stage
    target: int
    micro_batch: int

    @property
    def forward(self) -> bool:
        return self.target > self.source


class Operation(NamedTuple):
    """One operation of a rank in a step.

    Attributes:
        kind: `receive` starts a receive, `wait` waits for its data, `send` waits for the previous
            send in this direction and starts the next one; `compute` runs `action`.
        transfer: Of all kinds but `compute`.
        action: Of `compute`.
    """

    kind: str
    transfer: Transfer | None = None
    action: Action | None = None


# ---------------------------------------------------------------- the cut


def split_layers(model: ModelConfig, stages: int) -> list[int]:
    """Return the number of layers of each stage, so that the slowest one is as fast as possible.

    The head counts as many layers as it has multiplications in those of a layer; the embedding has
    none. The last stage takes the most layers that do not make it slower; the others share the rest
    evenly. Among these the first ones, which hold the most micro-batches, have a layer less. This
    yields 7, 14 × 8, 7 for Llama 3.1 405B on 16 stages, as published (arXiv:2407.21783, section
    3.3.2).

    Args:
        stages: At most `n_layers` + 1; the last stage may consist of the head alone.
    """
    total, others = model.n_layers, stages - 1
    if not others:
        return [total]
    kv_dim = model.n_kv_heads * model.head_dim
    layer = model.dim * (2 * model.dim + 2 * kv_dim + 3 * model.ffn_dim)
    head = model.vocab_size * model.dim

    def slowest(last: int) -> int:
        return max(-(-(total - last) // others) * layer, last * layer + head)

    last = min(range(total - others, -1, -1), key=slowest)  # the largest of equal ones
    fewest, longer = divmod(total - last, others)
    return [fewest] * (others - longer) + [fewest + 1] * longer + [last]


def model_parts(layers: list[int], rank: int, ranks: int) -> list[ModelPart]:
    """Return the parts of a rank, in the order of the model.

    Args:
        layers: Number of layers of each stage.
    """
    last = len(layers) - 1
    return [
        ModelPart(range(sum(layers[:stage]), sum(layers[: stage + 1])), stage == 0, stage == last)
        for stage in range(rank, len(layers), ranks)
    ]


def stage_layers(model: ModelConfig, parallel: ParallelConfig, ranks: int) -> list[int]:
    """Return the number of layers of each stage, given or balanced, of `ranks` pipeline ranks."""
    return list(parallel.pp_layers or split_layers(model, ranks * parallel.pp_parts))


def parts_of_rank(
    model: ModelConfig, parallel: ParallelConfig, ranks: int, rank: int
) -> list[ModelPart]:
    """Return the parts of a rank of the `pp` axis, which has `ranks` ranks."""
    return model_parts(stage_layers(model, parallel, ranks), rank, ranks)


def describe_pipeline(layers: Sequence[int], ranks: int, micro_batches: int) -> str:
    """Return schedule and cut for reports, and a note if ranks idle for most of a step.

    Args:
        layers: Number of layers of each stage.
    """
    parts = len(layers) // ranks
    schedule = "1F1B" if parts == 1 else f"interleaved 1F1B, {parts} parts per rank"
    cut = _shorten(layers)
    if parts > 1:
        cut += f", of the ranks: {_shorten([sum(layers[rank::ranks]) for rank in range(ranks)])}"
    note = "; fewer micro-batches than stages, so ranks idle most of a step"
    note = note if micro_batches < ranks else ""
    return f"{schedule}; layers of the stages: {cut}{note}"


def _shorten(numbers: Sequence[int]) -> str:
    """Return numbers for a report: "7, 14 × 8, 7"."""
    runs = [(number, len([*same])) for number, same in groupby(numbers)]
    return ", ".join(f"{count} × {number}" if count > 1 else f"{number}" for number, count in runs)


# ---------------------------------------------------------------- the order


def schedule(rank: int, ranks: int, parts: int, micro_batches: int) -> list[Action]:
    """Return the computations of a rank in a step, in order.

    Args:
        micro_batches: With several parts a multiple of `ranks`.

    Raises:
        ValueError: The ranks would wait for each other forever with this number of micro-batches.
    """
    if parts > 1 and micro_batches % ranks:
        raise ValueError(f"{micro_batches} micro-batches are not a multiple of {ranks} ranks")
    forwards = [
        (part, micro_batch)
        for first in range(0, micro_batches, ranks)
        for part in range(parts)
        for micro_batch in range(first, min(first + ranks, micro_batches))
    ]
    backwards = [(parts - 1 - part, micro_batch) for part, micro_batch in forwards]
    ahead = max_in_flight(rank, ranks, parts, micro_batches) - 1
    order = [Action(True, *each) for each in forwards[:ahead]]
    for forward, backward in zip(forwards[ahead:], backwards, strict=False):
        order += [Action(True, *forward), Action(False, *backward)]
    return order + [Action(False, *each) for each in backwards[len(forwards) - ahead :]]


def operations(rank: int, ranks: int, parts: int, micro_batches: int) -> Iterator[Operation]:
    """Yield the computations and transfers of a rank in a step, in order.

    Each rank receives hidden states from one rank and gradients from one other. Of both kinds, the
    next receive starts before the data of the current one is used.
    """
    order = schedule(rank, ranks, parts, micro_batches)
    stages = ranks * parts
    inputs: dict[bool, list[Transfer]] = {True: [], False: []}
    for action in order:
        if transfer := _transfers(action, rank, ranks, stages)[0]:
            inputs[action.forward].append(transfer)
    for waiting in inputs.values():
        yield from (Operation("receive", each) for each in waiting[:1])
    for action in order:
        waiting = inputs[action.forward]
        received, sent = _transfers(action, rank, ranks, stages)
        if received:
            current = waiting.pop(0)
            yield from (Operation("receive", each) for each in waiting[:1])
            yield Operation("wait", current)
        yield Operation("compute", action=action)
        if sent:
            yield Operation("send", sent)


def _transfers(action: Action, rank: int, ranks: int, stages: int) -> list[Transfer | None]:
    """Return what a computation receives from another rank, and what it sends to one."""
    stage, step = action.part * ranks + rank, 1 if action.forward else -1
    path = [each if 0 <= each < stages else None for each in (stage - step, stage, stage + step)]
    return [
        None if source is None or target is None else Transfer(source, target, action.micro_batch)
        for source, target in pairwise(path)
    ]


def max_in_flight(rank: int, ranks: int, parts: int, micro_batches: int) -> int:
    """Return the most forwards through a part whose backwards have not run yet."""
    if parts == 1:
        return min(ranks - rank, micro_batches)
    return min(2 * (ranks - 1 - rank) + (parts - 1) * ranks + 1, parts * micro_batches)


def bubble(ranks: int, parts: int, micro_batches: int) -> float:
    """Return the fraction of a step in which a rank idles if all stages take equally long."""
    return (ranks - 1) / (parts * micro_batches + ranks - 1)
