"""Duration of a pipeline's schedule: the computations of all ranks in the order of the runtime.

Each waits for the one before it on its rank, and for its hidden states or their gradient. A closed
form exists for equal stages only (`parallel.pipeline_schedule.bubble`): where some parts of a rank
have a layer more, as in most interleaved schedules, it is up to 15% too short or too long.
"""

from collections.abc import Sequence
from functools import lru_cache

from parallel.pipeline_schedule import schedule

GROUPS = 3
"""Groups of `pp` micro-batches that are replayed; each later one takes as long as the last."""


def pipeline_seconds(
    forward: Sequence[float],
    backward: Sequence[float],
    hop: float,
    ranks: int,
    micro_batches: int,
) -> float:
    """Return the seconds from the first forward to the last backward of all ranks.

    Args:
        forward, backward: Seconds of a micro-batch in each stage, in the order of the model.
        hop: Seconds between the end of a computation and the start of the next stage's.
    """
    groups, rest = divmod(micro_batches, ranks)
    replayed = min(groups, GROUPS) * ranks + rest
    times = tuple(forward), tuple(backward), hop, ranks
    seconds = _replay(*times, replayed)
    if groups > GROUPS:
        stages = [sum(each) for each in zip(forward, backward, strict=True)]
        slowest = max(sum(stages[rank::ranks]) for rank in range(ranks))
        last = seconds - _replay(*times, replayed - ranks)
        seconds += (groups - GROUPS) * max(last, ranks * slowest)
    return seconds


@lru_cache(maxsize=10_000)
def _replay(
    forward: tuple[float, ...],
    backward: tuple[float, ...],
    hop: float,
    ranks: int,
    micro_batches: int,
) -> float:
    stages = len(forward)
    orders = [schedule(rank, ranks, stages // ranks, micro_batches) for rank in range(ranks)]
    # When the inputs arrive, by stage and micro-batch; those of the first forwards are there.
    hidden: list[list[float | None]] = [[None] * micro_batches for _ in range(stages)]
    gradients: list[list[float | None]] = [[None] * micro_batches for _ in range(stages)]
    hidden[0] = [0.0] * micro_batches
    clocks, positions = [0.0] * ranks, [0] * ranks
    waiting = set(range(ranks))
    while waiting:
        for rank in tuple(waiting):
            order, position, clock = orders[rank], positions[rank], clocks[rank]
            while position < len(order):
                is_forward, part, index = order[position]
                stage = part * ranks + rank
                arrived = (hidden if is_forward else gradients)[stage][index]
                if arrived is None:
                    break
                clock = max(clock, arrived)
                if not is_forward:
                    clock += backward[stage]
                    if stage > 0:
                        gradients[stage - 1][index] = clock + hop
                else:
                    clock += forward[stage]
                    if stage < stages - 1:
                        hidden[stage + 1][index] = clock + hop
                    else:
                        gradients[stage][index] = clock
                position += 1
            clocks[rank], positions[rank] = clock, position
            if position == len(order):
                waiting.discard(rank)
    return max(clocks)
